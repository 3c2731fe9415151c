"""The digit classifier: what it sees, how digits are deformed for it, and its training run on the fixture."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from vqvae.common import checkpoint, classifier
from vqvae.common.classifier import (
    MAX_ROTATION,
    MAX_SCALING,
    MAX_SHIFT,
    Classifier,
    ClassifierConfig,
    ClassifierTraining,
    accuracy_after_training_on,
    deform,
    evaluate,
    load_classifier,
    look,
    objective,
    train_classifier,
)
from vqvae.common.data import Split, load_test, load_train_and_validation, to_model_range
from vqvae.common.errors import UserError
from vqvae.common.logs import RunLog
from vqvae.common.runs import SHIPPED

FIXTURE = Path(__file__).parent / "fixture"
CPU = torch.device("cpu")
CONFIG = ClassifierConfig(width=4)


def make_classifier(seed: int = 0, width: int = 4) -> Classifier:
    """A network in eval mode whose batch statistics are no longer those of a fresh one."""
    torch.manual_seed(seed)
    model = Classifier(ClassifierConfig(width=width)).train()
    model(torch.randn(16, 1, 28, 28))
    return model.eval()


def make_images(num: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (num, 1, 28, 28), dtype=torch.uint8, generator=generator)


def make_split(num: int, seed: int = 0) -> Split:
    labels = torch.randint(10, (num,), generator=torch.Generator().manual_seed(seed))
    return Split(make_images(num, seed), labels)


# What it sees


@pytest.mark.parametrize("width", [1, 4, 32])
def test_images_become_ten_logits_whatever_the_width(width: int) -> None:
    model = make_classifier(width=width)
    assert model(torch.zeros(3, 1, 28, 28)).shape == (3, 10)
    assert look(model, make_images(3))[0].shape == (3, 4 * width)


@pytest.mark.parametrize("width", [0, 513])
def test_a_width_out_of_its_range_is_refused(width: int) -> None:
    with pytest.raises(UserError, match=f"width between 1 and 512, found {width}"):
        ClassifierConfig(width=width)


@pytest.mark.parametrize("batch", [1, 7, 11, 500])
def test_looking_gives_what_the_model_gives_image_by_image(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "EVALUATION_BATCH", batch)
    model, images = make_classifier(), make_images(11)
    features, probabilities = look(model, images)
    assert (features.shape, features.dtype) == ((11, 16), torch.float32)
    assert (probabilities.shape, probabilities.dtype) == ((11, 10), torch.float32)
    for n, image in enumerate(images):
        with torch.no_grad():
            logits = model(image[None].double().div(127.5).sub(1).float())[0].double()
            decided_by = model.head(features[n]).double()
        exponents = np.exp(logits.numpy() - logits.max().item())
        np.testing.assert_allclose(probabilities[n].numpy(), exponents / exponents.sum(), atol=1e-5)
        np.testing.assert_allclose(decided_by.numpy(), logits.numpy(), atol=1e-5)


def test_looking_and_evaluating_leave_every_layers_mode_and_the_statistics_as_they_were() -> None:
    model = make_classifier().train()
    model.trunk[1].eval()
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    look(model, make_images(4))
    evaluate(model, make_split(4))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# How digits are deformed


def moves(num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Where `deform` takes its pixels from, read off two images whose ink is their own x or y: for each of `num` draws
    a matrix (2, 2) and a shift (2,), as place = matrix @ pixel + shift, in -1..1 from edge to edge."""
    centres = (2 * torch.arange(28.0) + 1) / 28 - 1
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    taken = []
    for ramp in (x, y):
        torch.manual_seed(seed)  # the same draws for both
        taken.append(deform(ramp.expand(num, 1, 28, 28))[:, 0, 9:19, 9:19].flatten(1))  # the middle: no paper near
    pixels = torch.stack([x[9:19, 9:19].flatten(), y[9:19, 9:19].flatten(), torch.ones(100)], dim=1)
    places = torch.stack(taken, dim=2)  # (num, 100, 2)
    fitted = torch.linalg.lstsq(pixels.expand(num, 100, 3), places).solution  # (num, 3, 2)
    assert torch.allclose(pixels @ fitted, places, atol=1e-4)  # nothing but a turn, a size and a shift
    return fitted[:, :2].transpose(1, 2).numpy(), fitted[:, 2].numpy()


def test_each_image_is_turned_scaled_and_shifted_by_its_own_draw_up_to_the_stated_limits() -> None:
    matrices, shifts = moves(2000, seed=1)
    scales = np.sqrt(np.linalg.det(matrices))
    turns = matrices / scales[:, None, None]
    np.testing.assert_allclose(turns @ turns.transpose(0, 2, 1), np.tile(np.eye(2), (2000, 1, 1)), atol=1e-4)
    angles = np.arctan2(turns[:, 1, 0], turns[:, 0, 0])
    limits = ((angles, MAX_ROTATION), (scales - 1, MAX_SCALING), (shifts[:, 0], MAX_SHIFT), (shifts[:, 1], MAX_SHIFT))
    for drawn, most in limits:
        assert np.abs(drawn).max() < most + 1e-4
        assert drawn.max() > 0.98 * most
        assert drawn.min() < -0.98 * most
        assert np.mean(np.abs(drawn) < most / 2) == pytest.approx(0.5, abs=0.05)  # evenly
    drawn = np.stack([values for values, _ in limits])
    np.testing.assert_allclose(np.corrcoef(drawn), np.eye(4), atol=0.1)  # each by itself
    assert (MAX_ROTATION, MAX_SHIFT * 14) == pytest.approx((math.pi / 15, 2.1))  # 12 degrees, two pixels


def test_what_comes_in_from_outside_is_paper() -> None:
    torch.manual_seed(2)
    ink = deform(torch.ones(300, 1, 28, 28))
    assert ink.min() == -1
    assert ink.max() == pytest.approx(1, abs=1e-5)
    assert (ink[:, :, 7:21, 7:21] > 1 - 1e-5).all()
    torch.manual_seed(2)
    assert (deform(-torch.ones(300, 1, 28, 28)) == -1).all()


def test_a_digit_stays_within_the_range_and_is_another_each_time(fixture_folder: Path) -> None:
    x = to_model_range(load_test(fixture_folder, download=False).images[:20])
    torch.manual_seed(3)
    one, other = deform(x), deform(x)
    for deformed in (one, other):
        assert (deformed.shape, deformed.dtype) == (x.shape, torch.float32)
        assert deformed.min() >= -1
        assert deformed.max() <= 1 + 1e-5
        ink, before = (deformed + 1).sum(dim=(1, 2, 3)), (x + 1).sum(dim=(1, 2, 3))
        assert ((ink / before - 1).abs() < 0.35).all()  # of the area, 1.12 ** 2 or so
        assert ((deformed - x).abs().flatten(1).amax(dim=1) > 0.1).all()
    assert ((one - other).abs().flatten(1).amax(dim=1) > 0.1).all()


# Objective and evaluation


def cross_entropy_by_hand(logits: Tensor, labels: Tensor) -> float:
    rows = logits.detach().double().numpy()
    return float(np.mean([np.log(np.exp(row).sum()) - row[label] for row, label in zip(rows, labels, strict=True)]))


def test_the_objective_is_the_cross_entropy_of_the_deformed_digits_under_their_labels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, split = make_classifier(), Split(*(part[:9] for part in load_test(FIXTURE, download=False)))
    monkeypatch.setattr(classifier, "deform", lambda x: -x)  # stands in for it, and shows that it was asked
    found = objective(model, *split)
    with torch.no_grad():
        logits = model(1 - split.images.float() / 127.5)
    assert list(found) == ["cross_entropy"]
    assert found["cross_entropy"].item() == pytest.approx(cross_entropy_by_hand(logits, split.labels), abs=1e-5)


def test_the_objective_leads_to_lower_cross_entropy_of_the_digits_themselves() -> None:
    split = Split(*(part[:100] for part in load_test(FIXTURE, download=False)))
    model = make_classifier(width=8).train()
    optimizer, before = torch.optim.Adam(model.parameters(), lr=1e-2), evaluate(model, split)["cross_entropy"]
    for _ in range(15):
        loss = objective(model, *split)["cross_entropy"]
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
    assert evaluate(model, split)["cross_entropy"] < 0.8 * before


@pytest.mark.parametrize("batch", [1, 4, 22, 500])
def test_evaluation_counts_every_image_once_whatever_the_batch(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "EVALUATION_BATCH", batch)
    model, split = make_classifier(), make_split(23)
    found = evaluate(model, split)
    with torch.no_grad():
        logits = torch.cat([model(image[None].float() / 127.5 - 1) for image in split.images])
    wrong = [row.tolist().index(row.max()) != label for row, label in zip(logits, split.labels.tolist(), strict=True)]
    assert 0 < sum(wrong) < 23
    assert found == {
        "cross_entropy": pytest.approx(cross_entropy_by_hand(logits, split.labels), abs=1e-5),
        "error": pytest.approx(sum(wrong) / 23, abs=1e-6),
    }


# The run


def train(folder: Path, num_epochs: int, resume: bool = False, config: ClassifierConfig = CONFIG, **settings: object):
    (folder / "classifier").mkdir(parents=True, exist_ok=True)
    training = ClassifierTraining(**{"batch_size": 44, "num_epochs": num_epochs, **settings})
    common = {"seed": 3, "data_folder": FIXTURE, "device": CPU, "download": False}
    return train_classifier(config, training, output_folder=folder, resume=resume, **common)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """A run's folder and what it returned."""
    folder = tmp_path_factory.mktemp("classifier")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLog, "graph", lambda *_: None)  # takes longer than the run
        figures = train(folder, 6, config=ClassifierConfig(width=8), batch_size=32)
    return folder, figures


@pytest.fixture(autouse=True)
def no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunLog, "graph", lambda *_: None)


def test_a_short_run_on_the_fixture_learns_digits(finished: tuple[Path, dict[str, float]]) -> None:
    _, figures = finished
    assert figures["error"] < 0.5  # 0.9 by chance
    assert figures["cross_entropy"] < math.log(10) - 0.5


def test_the_figures_written_are_those_of_the_weights_written(finished: tuple[Path, dict[str, float]]) -> None:
    folder, figures = finished
    model, header = load_classifier(folder / "classifier.safetensors", CPU)
    _, validation = load_train_and_validation(FIXTURE, download=False)
    assert evaluate(model, load_test(FIXTURE, download=False)) == figures
    assert evaluate(model, validation) == header.metrics
    assert header.config == {"width": 8}
    assert (header.recipe["num_epochs"], header.recipe["batch_size"], header.recipe["seed"]) == (6, 32, 3)


def test_a_run_writes_its_weights_its_state_and_its_log(finished: tuple[Path, dict[str, float]]) -> None:
    folder, _ = finished
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {name for name in names if "tfevents" not in name} == {
        "classifier.safetensors",
        "classifier/resume.pt",
        "classifier/metrics.jsonl",
    }


def test_a_loaded_classifier_sees_what_the_saved_one_saw(tmp_path: Path) -> None:
    model, images = make_classifier(), make_images(5)
    path = tmp_path / "classifier.safetensors"
    saved = checkpoint.save(path, model.train(), stage="classifier", config={"width": 4}, recipe={}, metrics={})
    loaded, header = load_classifier(path, CPU)
    assert not loaded.training
    assert header.fingerprint == saved.fingerprint
    for found, expected in zip(look(loaded, images), look(model, images), strict=True):
        assert torch.equal(found, expected)


def test_a_missing_classifier_is_told_with_the_command_that_makes_one(tmp_path: Path) -> None:
    message = r"expected a classifier checkpoint at .*, found none; create .* with: python cli.py train-classifier$"
    with pytest.raises(UserError, match=message):
        load_classifier(tmp_path / "classifier.safetensors", CPU)


def test_another_stages_checkpoint_is_refused_by_its_stage(tmp_path: Path) -> None:
    path = tmp_path / "vqvae.safetensors"
    checkpoint.save(path, make_classifier(), stage="vqvae", config={"width": 4}, recipe={}, metrics={})
    with pytest.raises(UserError, match=r"expected a classifier checkpoint at .*, found one of stage 'vqvae'"):
        load_classifier(path, CPU)


def test_two_epochs_and_one_more_equal_three_straight(tmp_path: Path) -> None:
    straight = train(tmp_path / "straight", 3, schedule="constant")
    train(tmp_path / "halted", 2, schedule="constant")
    weights = [tmp_path / name / "classifier.safetensors" for name in ("halted", "straight")]
    halted_after_two = load_classifier(weights[0], CPU)[0].state_dict()
    torch.rand(17)  # whatever happens in between
    assert train(tmp_path / "halted", 3, resume=True, schedule="constant") == straight
    resumed, whole = (load_classifier(path, CPU)[0].state_dict() for path in weights)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert not all(torch.equal(resumed[name], halted_after_two[name]) for name in whole)


def test_a_run_is_not_resumed_under_other_settings_or_on_other_data(
    tmp_path: Path, finished: tuple[Path, dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "classifier").mkdir()
    state = (finished[0] / "classifier" / "resume.pt").read_bytes()
    (tmp_path / "classifier" / "resume.pt").write_bytes(state)
    with pytest.raises(UserError, match=r"batch_size = 32, found batch_size = 40; .*--overwrite"):
        train(tmp_path, 7, resume=True, config=ClassifierConfig(width=8), batch_size=40)
    monkeypatch.setattr(classifier, "digest", lambda _: "other data")
    with pytest.raises(UserError, match=r"data = '[0-9a-f]*', found data = 'other data'"):
        train(tmp_path, 7, resume=True, config=ClassifierConfig(width=8), batch_size=32)


def test_the_weights_kept_are_those_of_the_best_epoch_on_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "two epochs", 2, schedule="constant")
    two_epochs = checkpoint.load_resume_state(tmp_path / "two epochs" / "classifier" / "resume.pt")["model"]
    scripted, asked, seen = iter([3.0, 1.0, 2.0, 0.5]), [], []

    def figures_by_script(model: Classifier, split: Split) -> dict[str, float]:
        asked.append(split.labels)
        seen.append(model.head.weight.detach().clone())
        return {"cross_entropy": next(scripted)}

    monkeypatch.setattr(classifier, "evaluate", figures_by_script)
    assert train(tmp_path / "run", 3, schedule="constant") == {"cross_entropy": 0.5}
    _, validation = load_train_and_validation(FIXTURE, download=False)
    assert [torch.equal(labels, validation.labels) for labels in asked] == [True, True, True, False]
    assert torch.equal(asked[-1], load_test(FIXTURE, download=False).labels)
    kept, header = load_classifier(tmp_path / "run" / "classifier.safetensors", CPU)
    assert header.metrics == {"cross_entropy": 1.0}
    assert all(torch.equal(tensor, two_epochs[name]) for name, tensor in kept.state_dict().items())
    assert torch.equal(seen[-1], kept.head.weight)  # the test split's figures are theirs
    assert not torch.equal(seen[-2], kept.head.weight)


def test_the_shipped_classifier_knows_the_fixtures_digits() -> None:
    model, _ = load_classifier(SHIPPED / "classifier.safetensors", CPU)
    figures = evaluate(model, load_test(FIXTURE, download=False))
    assert figures["error"] < 0.02
    assert figures["cross_entropy"] < 0.05


# Trained on one split alone


def test_training_on_labelled_images_is_worth_what_their_labels_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "ClassifierConfig", lambda: ClassifierConfig(width=8))
    split, _ = load_train_and_validation(FIXTURE, download=False)
    test, training = load_test(FIXTURE, download=False), ClassifierTraining(batch_size=32, num_epochs=5)
    right = accuracy_after_training_on(split, test, training, seed=1)
    assert right > 0.4  # 0.1 by chance
    assert accuracy_after_training_on(split, test, training, seed=1) == right
    moved_on = Split(split.images, (split.labels + 1) % 10)
    assert accuracy_after_training_on(moved_on, test, training, seed=1) < 0.15
