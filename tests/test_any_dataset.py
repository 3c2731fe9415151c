"""No number that belongs to a dataset is in the code of a stage: every command that trains, draws, compares or measures
works on images of any shape, with any classes or none, or refuses them in one sentence."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prior.evaluation.classifier_training import SavedClassifierTask
from prior.train import PriorTask
from tests.helpers import make_info, make_split, run, save_model
from tests.prior.evaluation.test_classifier import make_classifier
from vqvae.data.dataset import Dataset
from vqvae.storage import checkpoint, runs
from vqvae.train import VQVAETask

RECIPE = """
[vqvae]
code_dim = 4
num_codes = 16
width = 8
num_encoder_blocks = 1
num_decoder_blocks = 1
codebook_learning = "ema"
prediction_weight = 0.1
num_epochs = 1
downsampling = {downsampling}

[prior]
width = 8
num_epochs = 1
"""
SETS = [  # image shape, number of classes, downsampling
    ((1, 28, 28), 10, 4),
    ((3, 32, 32), 3, 4),
    ((1, 20, 36), 2, 4),
    ((3, 64, 64), 0, 8),
    ((1, 16, 16), 26, 8),
]
PAIR = ["--vqvae", "run/vqvae.safetensors", "--prior", "run/prior.safetensors"]


def make_data(image_shape: tuple[int, int, int], num_classes: int) -> Dataset:
    train, validation, test = (make_split(num, image_shape, num_classes, num) for num in (130, 20, 104))
    return Dataset(make_info(image_shape, num_classes), train, validation, lambda: test)


@pytest.fixture
def data(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """A made dataset that every command reads, in an empty folder without shipped weights."""
    made = make_data(*request.param)
    for module in ("vqvae.data.load", "vqvae.train", "prior.evaluation.classifier_training"):
        monkeypatch.setattr(f"{module}.load_dataset", lambda *_, **__: made)
    for task in (VQVAETask, PriorTask, SavedClassifierTask):  # pictures take most of the time
        monkeypatch.setattr(task, "show", lambda *_: None)
    monkeypatch.setattr(runs, "SHIPPED", tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)
    return made


def succeed(command: str, *options: object) -> tuple[str, str]:
    status, out, err = run(*command.split(), *options, "--device", "cpu")
    assert status == 0, err
    return out, err


def train(downsampling: int) -> None:
    Path("small.toml").write_text(RECIPE.format(downsampling=downsampling))
    succeed("train-vqvae --config small.toml --output-folder run")
    succeed("train-prior --config small.toml --vqvae run/vqvae.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(("data", "downsampling"), [((s, n), d) for s, n, d in SETS], indirect=["data"], ids=str)
def test_both_stages_train_sample_compare_and_are_measured(data: Dataset, downsampling: int) -> None:
    image_shape, names = data.info.image_shape, data.info.class_names
    map_shape = tuple(side // downsampling for side in image_shape[1:])
    train(downsampling)
    for stage in ("vqvae", "prior"):
        assert checkpoint.read_header(Path("run") / f"{stage}.safetensors", stage).data["class_names"] == list(names)
    succeed("sample --mode pixelcnn --num-samples 5 --output s.npz", *PAIR)
    with np.load("s.npz") as arrays:
        assert (arrays["images"].shape, arrays["indices"].shape) == ((5, *image_shape), (5, *map_shape))
    succeed("compare", *PAIR)
    if names:
        succeed("train-classifier --num-epochs 1 --output-folder run")
    given = ["--classifier", "run/classifier.safetensors"] if names else []
    out, _ = succeed("evaluate --num-samples 100 --output-folder report", *given, *PAIR)
    figures, page = json.loads(Path("report/metrics.json").read_text()), Path("report/report.html").read_text()
    assert [len(row["agreement_by_class"]) for row in figures["rows"][:1]] == [len(names)] * bool(names)
    assert {"stage_one", "likelihood", "memorisation"} <= figures.keys()
    assert all(f'<th scope="col">{name}</th>' in page for name in names)
    assert ("are left out, because the images have no classes" in out) == (not names)


@pytest.mark.parametrize("data", [((3, 16, 16), 3)], indirect=True)
def test_without_a_classifier_the_rest_is_measured_and_the_command_that_makes_one_is_printed(data: Dataset) -> None:
    train(4)
    save_model(Path("run/classifier.safetensors"), make_classifier((3, 16, 16)), "classifier", make_info((3, 16, 16)))
    Path("checkpoints").symlink_to(".")
    out, err = succeed("evaluate --num-samples 100", *PAIR)  # of ten classes is another
    assert "are left out, because there was no classifier of these images and classes" in out
    assert json.loads(Path("evaluation/metrics.json").read_text())["rows"] == []
    again = err.partition("to measure FID too, first run: python cli.py ")[2].strip()
    assert again == "train-classifier --dataset made --image-size 16x16 --output-folder run"
    succeed(f"{again} --num-epochs 1 --overwrite")
    out, err = succeed("evaluate --num-samples 100", *PAIR)
    assert ", measured with run/classifier.safetensors (your run)" in out
    assert len(json.loads(Path("evaluation/metrics.json").read_text())["rows"]) > 5


@pytest.mark.parametrize("data", [((1, 30, 45), 3)], indirect=True)
def test_a_size_that_the_network_cannot_take_is_refused_with_the_nearest_that_it_takes(data: Dataset) -> None:
    status, _, err = run(*"train-vqvae --output-folder run".split())
    message = "expected images whose height and width divide by 4, found 30x45; try --image-size 28x44"
    assert (status, err) == (1, f"error: {message}\n")
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("data", [((1, 16, 16), 3)], indirect=True)
def test_another_dataset_than_the_checkpoint_was_trained_on_is_refused_before_anything_is_done(
    data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(4)
    files = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    other = replace(data, info=replace(data.info, name="pets", class_names=("cat", "dog", "cow")))
    monkeypatch.setattr("vqvae.data.load.load_dataset", lambda *_, **__: other)
    for command, output in (
        ("train-prior", "--output-folder"),
        ("evaluate", "--output-folder"),
        ("compare", "--output"),
    ):
        pair = PAIR if command != "train-prior" else PAIR[:2]
        status, _, err = run(command, *pair, "--dataset", "pets", output, "new.png")
        assert (status, err.count("\n")) == (1, 1 + (command == "evaluate"))
        expected = (
            "expected images and classes like those of made, which the model was trained on, found those of pets; "
        )
        assert f"error: {expected}choose the same data, by --dataset\n" in err
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == files


@pytest.mark.parametrize("data", [((1, 8, 8), 3)], indirect=True)
def test_fewer_positions_than_codes_are_refused_and_fewer_images_are_remarked_on(data: Dataset) -> None:
    assert len(data.train.images) == 130  # of four positions
    Path("small.toml").write_text(RECIPE.format(downsampling=4))
    common = "train-vqvae --config small.toml --num-epochs 1 --output-folder"
    for num_codes, remark in (
        (130, ""),
        (131, "there are fewer training images, 130, than codes, 131; try fewer codes, "),
    ):
        _, err = succeed(f"{common} {num_codes} --k {num_codes}")
        assert err.count("such as 128\n") == bool(remark)
        assert remark in err
    status, _, err = run(*f"{common} new --k 521".split())
    found = "one position in the code maps for each of 521 codes, found 520 in 130 training images; "
    assert (status, found in err, err.endswith("or try --k 128\n")) == (1, True, True)
    assert not Path("new").exists()
