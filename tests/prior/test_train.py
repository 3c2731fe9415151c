import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

import prior.train
from prior import likelihood
from prior.codes import Codes, extract
from prior.independent import baselines
from prior.likelihood import nats_per_code
from prior.model import GatedPixelCNN, PriorConfig, load_prior
from prior.pair import load
from prior.train import PriorTask, PriorTraining, drop_labels, evaluate_prior, summarise, train_prior
from tests.helpers import CPU, FIXTURE, make_codes, make_dataset, make_prior, make_split, make_vqvae, mnist, save_model
from vqvae.codec import encode_images
from vqvae.compute import derive_seed
from vqvae.data.dataset import Dataset
from vqvae.data.pixels import to_model_range
from vqvae.errors import InputError
from vqvae.model import load_vqvae
from vqvae.storage import checkpoint
from vqvae.training.loop import Run, fit

STEPS = 4  # of an epoch: 440 maps in batches of 128
show = PriorTask.show


def save_vqvae(folder: Path, dataset: Dataset, seed: int = 0) -> Path:
    path = folder / "vqvae.safetensors"
    save_model(path, make_vqvae(dataset.info.image_shape, seed), "vqvae", dataset.info)
    return path


def train(vqvae: Path, folder: Path, num_epochs: int, **options: Any) -> dict[str, float]:
    training = options.pop("training", PriorTraining(lr=1e-2, num_epochs=num_epochs))
    common = {"vqvae_path": vqvae, "seed": 3, "data_folder": FIXTURE, "device": CPU, "download": False}
    return train_prior(PriorConfig(width=4, dropout=0.1), training, output_folder=folder, **common, **options)


def make_task(path: Path, dataset: Dataset, training: PriorTraining, **network: float) -> PriorTask:
    vqvae, header = load_vqvae(save_vqvae(path, dataset), CPU)
    train, validation = extract(vqvae, dataset.train), extract(vqvae, dataset.validation)
    prior_file, config = path / "prior.safetensors", PriorConfig(width=4, **network)
    return PriorTask(config, training, dataset, train, validation, vqvae, header, prior_file, seed=3)


def resume_state(folder: Path) -> dict[str, Any]:
    return checkpoint.load_resume_state(folder / "prior" / "resume.pt")


def last_weights(folder: Path) -> str:
    return checkpoint.fingerprint({}, resume_state(folder)["model"])


def best_weights(folder: Path) -> str:
    return checkpoint.fingerprint({}, load_file(folder / "prior.safetensors"))


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples and the graph take most of such a short run's time."""
    monkeypatch.setattr(PriorTask, "show", lambda *_: None)


def test_evaluation_weighs_every_map_the_same_whatever_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    network = make_prior((2, 3), num_codes=5, dropout=0.3)
    codes = make_codes(23, network)
    nats = nats_per_code(network, *codes).item()
    assert nats_per_code(network, codes.indices, None).item() != pytest.approx(nats, abs=1e-4)
    network.train()
    for batch in (1, 4, 22, 1000):
        monkeypatch.setattr(likelihood, "BATCH", batch)
        expected = {"nats_per_code": nats, "bits_per_image": nats * 6 / math.log(2)}
        assert evaluate_prior(network, codes) == pytest.approx(expected, abs=1e-5)
    assert network.training


def test_labels_are_dropped_at_a_rate_between_0_and_1_and_otherwise_kept() -> None:
    labels = torch.arange(20_000) % 10
    assert torch.equal(drop_labels(labels, 0.0, 10), labels)
    assert (drop_labels(labels, 1.0, 10) == 10).all()
    torch.manual_seed(0)
    some = drop_labels(labels, 0.3, 10)
    assert torch.equal(some[some != 10], labels[some != 10])
    for label in range(10):
        share = (some[labels == label] == 10).double().mean().item()
        assert share == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / 2000))
    for share in (-0.1, 1.1):
        with pytest.raises(InputError, match=f"`label_dropout` between 0 and 1, found {share}"):
            PriorTraining(label_dropout=share)


def test_a_share_of_each_batch_is_deformed_and_its_labels_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_dataset(40, num_classes=3)
    monkeypatch.setattr(prior.train, "deform", lambda x, deformation: -x)  # stands in, and shows that it was asked
    task = make_task(tmp_path, dataset, PriorTraining(label_dropout=0), deformed_share=0.3)
    indices, labels, images = (tensor[:20] for tensor in task.data)
    found, found_labels = task.prepare(indices, labels, images)
    assert torch.equal(found[:6], encode_images(task.vqvae, -to_model_range(images[:6])))
    assert torch.equal(found[6:], indices[6:].long())
    assert torch.equal(found_labels, labels + 4 * (torch.arange(20) < 6))  # of three classes and none
    task.model.eval()
    logits, of_deformed = (task.prior(found, found_labels % 4 + told) for told in (0, 4))
    assert (logits - of_deformed).abs().max() > 1e-3
    fit(task, PriorTraining(num_epochs=1), Run(None, 0, task.settings))


@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_training_drops_labels_at_label_dropout_and_remarks_on_a_useless_prior(
    rate: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {} if rate == 0.1 else {"label_dropout": rate}  # a tenth is the default
    spy = Mock(side_effect=nats_per_code)
    monkeypatch.setattr(prior.train, "nats_per_code", spy)
    monkeypatch.setattr(PriorTask, "evaluate", lambda _: {"nats_per_code": 1.0})
    monkeypatch.setattr(prior.train, "evaluate_prior", lambda *_: {"nats_per_code": 10 * rate})  # unigram: below 3
    train(save_vqvae(tmp_path, mnist()), tmp_path, 5, training=PriorTraining(num_epochs=5, **settings))
    assert ("the prior knows no more than " in capsys.readouterr().err) == (rate == 0.4)
    labels = torch.cat([call.args[2] for call in spy.call_args_list])
    assert torch.bincount(labels).min() > 0
    share = (labels == 10).double().mean().item()
    assert share == pytest.approx(rate, abs=4 * math.sqrt(rate * (1 - rate) / (5 * 440)))


@pytest.mark.parametrize(
    ("image_shape", "num_classes"),
    [((1, 28, 28), 10), ((3, 32, 32), 3), ((1, 20, 36), 2), ((3, 64, 64), 0), ((1, 12, 12), 26)],
    ids=str,
)
def test_any_dataset_trains_and_samples(image_shape: tuple[int, int, int], num_classes: int, tmp_path: Path) -> None:
    dataset, training = make_dataset(40, image_shape, num_classes), PriorTraining(num_epochs=2, batch_size=20, lr=1e-2)
    task = make_task(tmp_path, dataset, training)
    before = task.evaluate()["nats_per_code"]
    fit(task, training, Run(tmp_path / "run", 0, task.settings))
    pair = load(tmp_path / "vqvae.safetensors", tmp_path / "prior.safetensors", "cpu")
    assert pair.info == dataset.info
    assert pair.prior_header.metrics["nats_per_code"] < before
    samples = pair.draw(3)
    assert samples.images.shape == (3, *image_shape)
    assert samples.indices.shape == (3, image_shape[1] // 4, image_shape[2] // 4)
    assert all(0 <= label < max(num_classes, 1) for label in samples.labels)
    assert pair.log_likelihood(dataset.validation.images[:2] / 255).shape == (2,)


@pytest.mark.parametrize("num_classes", [3, 0])
def test_pictures_are_samples_of_each_class(num_classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(tmp_path, make_dataset(40, (1, 16, 20), num_classes), PriorTraining(num_epochs=10))
    draw, log = Mock(return_value=torch.zeros(100, 4, 5, dtype=torch.int64)), Mock()
    monkeypatch.setattr(prior.train, "draw_maps", draw)
    for epoch in range(1, 11):
        show(task, log, epoch, 7 * epoch)
    found = [(tag, picture.shape, step) for tag, picture, step in (call.args for call in log.picture.call_args_list)]
    assert found == [("samples", (3, 4 * (10 * 18 + 2), 4 * (10 * 22 + 2)), 7 * epoch) for epoch in (4, 8, 10)]
    log.graph.assert_called_once()
    task.prior(*log.graph.call_args.args[1])  # its example
    seeds = {(network, num, generator.initial_seed()) for network, num, generator in (c.args for c in draw.mock_calls)}
    assert seeds == {(task.prior, 100, derive_seed(3, "samples"))}
    assert draw.call_args.kwargs["labels"].tolist() == [column % max(num_classes, 1) for column in range(10)] * 10


@pytest.mark.parametrize("halt", ["after two epochs", "in the middle of the second epoch"])
def test_a_halted_run_goes_on_to_where_it_would_be(halt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vqvae, straight, halted = save_vqvae(tmp_path, mnist()), tmp_path / "straight", tmp_path / "halted"
    figures = train(vqvae, straight, 3)
    if halt == "after two epochs":
        train(vqvae, halted, 2)
        assert last_weights(halted) != last_weights(straight)
    else:
        calls = iter([False] * (STEPS + 1 + 2))  # an epoch's steps and its evaluation, then two more steps
        monkeypatch.setattr(prior.train, "nats_per_code", lambda *batch: next(calls) or nats_per_code(*batch))
        with pytest.raises(StopIteration):
            train(vqvae, halted, 3)
        monkeypatch.setattr(prior.train, "nats_per_code", nats_per_code)
        assert resume_state(halted)["step"] == STEPS
    torch.rand(17)  # whatever happens in between
    assert train(vqvae, halted, 3, resume=True) == figures
    assert last_weights(halted) == last_weights(straight)
    assert (halted / "prior.safetensors").read_bytes() == (straight / "prior.safetensors").read_bytes()


def test_the_best_epoch_on_validation_is_kept_and_the_test_split_read_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vqvae, folder, two_epochs = save_vqvae(tmp_path, mnist()), tmp_path / "run", tmp_path / "two epochs"
    train(vqvae, two_epochs, 2)
    scripted, asked = iter([3.0, 1.0, 2.0, 0.5, 1.5, 0.7]), []
    read_at: list[int] = []

    def figures_by_script(network: GatedPixelCNN, codes: Codes) -> dict[str, float]:
        asked.append(codes.labels)
        return {"nats_per_code": next(scripted)}

    monkeypatch.setattr(prior.train, "evaluate_prior", figures_by_script)
    dataset = replace(mnist(), load_test=lambda: read_at.append(resume_state(folder)["step"]) or mnist().load_test())
    monkeypatch.setattr(prior.train, "load_like", lambda *_, **options: dataset)
    assert train(vqvae, folder, 3)["nats_per_code"] == 0.5
    assert all(map(torch.equal, asked, [mnist().validation.labels] * 3 + [mnist().load_test().labels]))
    assert checkpoint.read_header(folder / "prior.safetensors", "prior").metrics["nats_per_code"] == 1.0
    assert best_weights(folder) == last_weights(two_epochs)
    assert train(vqvae, folder, 4, resume=True)["nats_per_code"] == 0.7  # the fourth epoch, of 1.5, is no better
    assert best_weights(folder) == last_weights(two_epochs)
    assert read_at == [3 * STEPS, 4 * STEPS]  # the test split, when all training was done and saved


def test_the_figures_written_are_those_of_the_weights_written(tmp_path: Path) -> None:
    file = save_vqvae(tmp_path, mnist())
    figures = train(file, tmp_path, 2)
    vqvae, header = load_vqvae(file, CPU)
    network, written = load_prior(tmp_path / "prior.safetensors", vqvae, header, CPU)
    for found, split in ((written.metrics, mnist().validation), (figures, mnist().load_test())):
        codes = extract(vqvae, split)
        counted = baselines(extract(vqvae, mnist().train), codes, 16)
        assert found == pytest.approx({**evaluate_prior(network, codes), **counted})
    assert summarise({**figures, "nats_per_code": 1.25, "unigram": 2.5}).startswith("1.250 nats per code (")
    assert summarise(figures).endswith("the per-position unigram's {unigram:.3f}; uniform 2.773".format(**figures))
    assert figures["nats_per_code"] < figures["uniform"]
    assert (written.recipe["seed"], written.recipe["lr"], written.recipe["width"]) == (3, 1e-2, 4)
    assert written.data["class_counts"] == list(mnist().info.class_counts)


def test_of_another_vqvae_or_other_data_no_run_is_resumed_and_no_code_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (save_vqvae(tmp_path / name, mnist(), seed) for seed, name in enumerate(("one", "other")))
    fresh, used = tmp_path / "fresh", tmp_path / "used"
    expected = train(other, fresh, 1)
    assert train(one, used, 1) != expected
    files = {path: path.read_bytes() for path in used.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="`overwrite=True`"):
        train(other, used, 1)
    with pytest.raises(InputError, match=r"vqvae = .*`overwrite=True`"):
        train(other, used, 2, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(prior.train, "load_like", lambda *_, **options: replace(mnist(), train=make_split(440)))
        with pytest.raises(InputError, match=r"found other data; .*`overwrite=True`"):
            train(one, used, 2, resume=True)
    assert {path: path.read_bytes() for path in files} == files
    assert train(other, used, 1, overwrite=True) == expected  # beside a stale cache
