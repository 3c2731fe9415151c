from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from prior.evaluation import classifier_training as training
from prior.evaluation.classifier import Classifier, ClassifierConfig, load_classifier
from prior.evaluation.classifier_training import ClassifierTask, ClassifierTraining
from tests.helpers import CPU, FIXTURE, make_info, make_split, mnist
from tests.prior.evaluation.test_classifier import make_classifier
from vqvae.data.dataset import Split, digest
from vqvae.data.deform import ANY_KIND
from vqvae.data.mnist import HANDWRITING
from vqvae.data.pixels import to_model_range
from vqvae.errors import InputError


def test_the_loss_deforms_images_and_the_figures_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "EVALUATION_BATCH", 22)  # and then one more image, which weighs as much as any
    monkeypatch.setattr(training, "deform", lambda x, deformation: -x)  # stands in, and shows that it was asked
    model, split = make_classifier(), make_split(23)
    task, x = ClassifierTask(model, split, split, ANY_KIND), split.images.float() / 127.5 - 1
    wrong = (model(x).argmax(dim=1) != split.labels).double().mean().item()
    plain, augmented = (F.cross_entropy(model(images), split.labels).item() for images in (x, -x))
    expected = pytest.approx({"cross_entropy": plain, "error": wrong}, abs=1e-5)
    model.train()
    assert (task.evaluate(), model.training) == (expected, True)  # it is evaluated in eval mode all the same
    losses = ClassifierTask(model.eval(), split, split, ANY_KIND).loss(*task.data)
    assert (list(losses), losses["cross_entropy"].item()) == (["cross_entropy"], pytest.approx(augmented, abs=1e-5))
    losses["cross_entropy"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def train(folder: Path, num_epochs: int, **options: Any) -> dict[str, float]:
    """A run on the fixture, without a drawing of its graph, which would take longer."""
    settings = ClassifierTraining(batch_size=44, num_epochs=num_epochs, schedule="constant")
    common = {"seed": 3, "data_folder": FIXTURE, "device": CPU, "download": False, "output_folder": folder}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.SavedClassifierTask, "show", lambda *_: None)
        return training.train_classifier(ClassifierConfig(4), settings, **{**common, **options})


def test_the_best_epoch_is_kept_and_then_tested_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted, asked, seen = iter([3.0, 1.0, 2.0, 0.5]), [], []

    def figures_by_script(model: Classifier, split: Split) -> dict[str, float]:
        asked.append(split.labels.tolist())
        seen.append(model.head.weight.detach().clone())
        return {"error": -len(seen), "cross_entropy": next(scripted)}

    monkeypatch.setattr(training, "evaluate_classifier", figures_by_script)
    assert train(tmp_path, 3)["cross_entropy"] == 0.5
    assert asked == [mnist().validation.labels.tolist()] * 3 + [mnist().load_test().labels.tolist()]
    kept, header = load_classifier(tmp_path / "classifier.safetensors", CPU)
    found = [torch.equal(kept.head.weight, weight) for weight in seen]
    assert found == [False, True, False, True]  # the test split's figures are theirs
    assert (header.metrics["cross_entropy"], header.config) == (1.0, {"width": 4})
    assert header.data["class_counts"] == list(mnist().info.class_counts)
    assert header.recipe["batch_size"] == 44


def test_training_on_labelled_images_is_worth_what_their_labels_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def score(labels: Tensor) -> float:
        torch.rand(17)
        settings, split = ClassifierTraining(batch_size=32, num_epochs=5), Split(data.train.images, labels)
        return training.accuracy_after_training_on(split, data.load_test(), data.info, settings, HANDWRITING, 1, CPU)

    monkeypatch.setattr(training, "ClassifierConfig", lambda: ClassifierConfig(width=8))
    data = mnist()
    assert score(data.train.labels) == score(data.train.labels) > 0.4  # 0.1 by chance
    assert score((data.train.labels + 1) % 10) < 0.15


def test_the_loop_gets_the_seed_and_what_it_may_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, graphs, given = [], [], []
    monkeypatch.setattr(training, "fit", lambda task, _, run: (calls.append((task, run)), task.save_best({})))
    monkeypatch.setattr(training, "run_lock", lambda *arguments: (given.append(arguments), nullcontext())[1])
    load = lambda *arguments, **options: (given.append((*arguments, options)), mnist())[1]  # noqa: E731
    monkeypatch.setattr(training, "load_dataset", load)
    train(tmp_path, 2, seed=7, resume=True, overwrite=True)
    split, info = make_split(600, (3, 32, 32), 3), make_info((3, 32, 32), 3)
    training.accuracy_after_training_on(split, split.first(6), info, ClassifierTraining(), ANY_KIND, 8, CPU)
    (saved, run), (watched, other) = calls
    assert given == [("mnist", FIXTURE, {"image_size": None, "download": False}), (tmp_path, "classifier", True, True)]
    assert (run.seed, run.resume, run.folder, other.seed) == (7, True, tmp_path / "classifier", 8)
    assert run.settings.items() >= {"num_epochs": 2, "seed": 7, "width": 4, "data": digest(mnist().train)}.items()
    assert (watched.model.config, other.folder) == (ClassifierConfig(), None)  # only the accuracy is kept
    for found, expected in ((saved.data, mnist().train), (watched.data, split), (watched.validation, split.first(100))):
        assert all(map(torch.equal, found, expected))
    log: Any = SimpleNamespace(graph=lambda model, inputs: graphs.append((model.training, inputs[0].clone())))
    torch.manual_seed(7)
    assert torch.equal(saved.model.head.weight, Classifier(ClassifierConfig(4), (1, 28, 28), 10).head.weight)
    for epoch in (1, 2):
        saved.show(log, epoch, 0)
    ((mode, x),) = graphs
    assert (mode, saved.model.training) == (False, True)
    assert torch.equal(x, to_model_range(mnist().validation.images[:1]))


def test_what_cannot_be_trained_is_refused_before_data_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="at least 2 classes to train a classifier on, found 1 in"):
        training.accuracy_after_training_on(
            *[make_split(4)] * 2, make_info(num_classes=1), ClassifierTraining(), ANY_KIND, 0, CPU
        )
    monkeypatch.setattr("vqvae.distributed.world_size", lambda: 2)
    monkeypatch.setattr(training, "load_dataset", lambda *_, **__: pytest.fail("read the data"))
    for refused in (lambda: train(tmp_path, 1), lambda: training.require_trainable(make_info())):
        with pytest.raises(InputError, match="expected one process for a classifier, found 2"):
            refused()
