"""The command line on a tiny fixture: what each command writes and prints, and how mistakes end."""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import cli
from prior.sampling import GUIDANCE
from vqvae.common import checkpoint, data, runs
from vqvae.model import load_vqvae

ROOT = Path(__file__).parents[1]
SMOKE = ROOT / "configs" / "smoke.toml"
VQVAE = Path("checkpoints/smoke/vqvae.safetensors")
PRIOR = Path("checkpoints/smoke/prior.safetensors")
MNIST_FILES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]

Result = namedtuple("Result", "status stdout stderr")


def run(*arguments: object) -> Result:
    """`python cli.py <arguments>` in this process; what is no user's mistake is raised."""
    stdout, stderr, status = io.StringIO(), io.StringIO(), 0
    with patch.object(sys, "argv", ["cli.py", *map(str, arguments)]), redirect_stdout(stdout), redirect_stderr(stderr):
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
    return Result(status, stdout.getvalue(), stderr.getvalue())


def succeed(*arguments: object) -> Result:
    result = run(*arguments)
    assert result.status == 0, result.stderr
    return result


def refuse(*arguments: object, saying: list[str]) -> None:
    """A mistake: a status that isn't 0, a message with these texts in it, no traceback, no file touched."""
    before = files_in(Path())
    result = run(*arguments)
    assert result.status not in (0, None)
    for text in saying:
        assert text in result.stderr
    assert "Traceback" not in result.stderr
    assert "wrote" not in result.stdout
    assert files_in(Path()) == before


def files_in(folder: Path) -> dict[str, bytes]:
    """Every file by its name, but for the empty ones that runs are locked by."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def next_command(result: Result) -> list[str]:
    """The arguments of the command in the last line printed, as a shell would split it."""
    _, _, command = result.stdout.splitlines()[-1].partition("next: python cli.py ")
    return shlex.split(command)


def arrays_in(path: Path | str) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


@pytest.fixture(scope="module", autouse=True)
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Result, Result]]:
    """A folder to work in, with MNIST's fixture as its data, both stages trained on it, no shipped weights,
    and two files `keep` that nothing may overwrite."""
    folder = tmp_path_factory.mktemp("work")
    shutil.copytree(ROOT / "tests" / "fixture", folder / "data")
    for name in ("keep.png", "keep.npz"):
        (folder / name).write_bytes(b"keep")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(runs, "SHIPPED", folder / "shipped")
        monkeypatch.setattr(data, "_fetch", no_network)
        first = succeed("train-vqvae", "--config", SMOKE, "--device", "cpu")
        yield first, succeed(*next_command(first), "--device", "cpu")


def no_network(*_: object) -> None:
    raise AssertionError("tried to download")


# What the commands write


def test_training_writes_exactly_these_files_and_no_others(trained: tuple[Result, Result]) -> None:
    names = {path for path in files_in(Path("checkpoints/smoke")) if "events.out.tfevents" not in path}
    events = [path for path in files_in(Path("checkpoints")) if "events.out.tfevents" in path]
    assert names == {
        "vqvae.safetensors",
        "vqvae/metrics.jsonl",
        "vqvae/resume.pt",
        "prior.safetensors",
        "prior/metrics.jsonl",
        "prior/resume.pt",
        "prior/codes-train.safetensors",
        "prior/codes-validation.safetensors",
    }
    assert sorted(Path(path).parent.as_posix() for path in events) == ["smoke/prior", "smoke/vqvae"]


def test_training_says_what_it_reached_and_what_it_wrote(trained: tuple[Result, Result]) -> None:
    vqvae, prior = trained
    assert "test: squared error 0." in vqvae.stdout
    assert "of 32 codes used" in vqvae.stdout
    assert f"wrote {VQVAE}; next: python cli.py train-prior" in vqvae.stdout.splitlines()[-1]
    assert f"VQ-VAE: {VQVAE} (your run)" in prior.stdout
    assert "uniform 3.466" in prior.stdout  # log 32
    assert f"wrote {PRIOR}; next: python cli.py sample" in prior.stdout.splitlines()[-1]


def test_the_command_printed_after_training_the_prior_runs_as_printed(trained: tuple[Result, Result]) -> None:
    command = next_command(trained[1])
    assert command[:3] == ["sample", "--mode", "pixelcnn"]
    result = succeed(*command)
    assert "wrote samples.png" in result.stdout
    assert picture_size("samples.png") == (302, 302)  # 10x10 images of 28 pixels, 2 between and around them
    Path("samples.png").unlink()


def test_printed_commands_run_as_printed_for_folders_of_any_name_and_other_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree("data", tmp_path / "my data")
    monkeypatch.chdir(tmp_path)
    options = ["--config", SMOKE, "--num-epochs", "1", "--device", "cpu", "--output-folder", "my run"]
    first = succeed("train-vqvae", *options, "--data-folder", "my data")
    assert "'my run/vqvae.safetensors'" in first.stdout
    second = succeed(*next_command(first))
    succeed(*next_command(second))
    assert picture_size("samples.png") == (302, 302)


def picture_size(path: str) -> tuple[int, int]:
    with Image.open(path) as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        return picture.size


@pytest.mark.parametrize(
    "options",
    [
        ["--mode", "gaussian"],
        ["--mode", "gaussian", "--gaussian-input", "latent"],
        ["--mode", "gaussian", "--gaussian-input", "image"],
        ["--mode", "pixelcnn"],
        ["--mode", "pixelcnn", "--labels", "0-9"],
        ["--mode", "pixelcnn", "--temperature", "0.8", "--top-k", "20", "--top-p", "0.95"],
    ],
)
def test_samples_are_arrays_of_the_promised_form_and_the_images_are_the_decoded_indices(
    options: list[str], tmp_path: Path
) -> None:
    result = succeed("sample", *options, "--num-samples", 23, "--output", tmp_path / "s.npz", "--device", "cpu")
    assert str(VQVAE) in result.stdout
    assert (str(PRIOR) in result.stdout) == ("pixelcnn" in options)
    arrays = arrays_in(tmp_path / "s.npz")
    assert set(arrays) == {"images", "indices"} | ({"labels"} if "--labels" in options else set())
    assert (arrays["images"].shape, arrays["images"].dtype) == ((23, 1, 28, 28), np.float32)
    assert 0 <= arrays["images"].min() < arrays["images"].max() <= 1
    assert (arrays["indices"].shape, arrays["indices"].dtype) == ((23, 7, 7), np.int64)
    assert 0 <= arrays["indices"].min() < arrays["indices"].max() < 32
    assert len({indices.tobytes() for indices in arrays["indices"]}) == 23
    model, _ = load_vqvae(VQVAE, torch.device("cpu"))
    with torch.no_grad():
        decoded = (model.decode_indices(torch.from_numpy(arrays["indices"])) + 1) / 2
    assert np.allclose(arrays["images"], decoded.clamp(0, 1).numpy(), atol=1e-6)


def test_the_default_gaussian_input_is_the_latent() -> None:
    drawn = {}
    for name, options in (("default", []), ("latent", ["latent"]), ("image", ["image"])):
        flags = ["--gaussian-input", *options] if options else []
        succeed("sample", "--mode", "gaussian", *flags, "--num-samples", 5, "--output", "g.npz")
        drawn[name] = arrays_in("g.npz")["indices"].tobytes()
    Path("g.npz").unlink()
    assert drawn["default"] == drawn["latent"] != drawn["image"]


@pytest.mark.parametrize("mode", ["gaussian", "pixelcnn"])
def test_a_grid_has_ten_columns_and_the_images_of_the_arrays(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for suffix in ("png", "npz"):
        succeed("sample", "--mode", mode, "--num-samples", 12, "--output", tmp_path / f"s.{suffix}")
    assert picture_size(tmp_path / "s.png") == (302, 62)
    with Image.open(tmp_path / "s.png") as picture:
        pixels = np.asarray(picture)
    images = arrays_in(tmp_path / "s.npz")["images"]
    for n in range(12):
        top, left = 2 + n // 10 * 30, 2 + n % 10 * 30
        for channel in range(3):
            found = pixels[top : top + 28, left : left + 28, channel] / 255
            assert np.abs(found - images[n, 0]).max() <= 0.51 / 255


def test_the_default_is_100_images_in_a_file_of_the_modes_name() -> None:
    assert "wrote gaussian.png" in succeed("sample", "--mode", "gaussian").stdout
    assert picture_size("gaussian.png") == (302, 302)
    Path("gaussian.png").unlink()


@pytest.mark.parametrize("options", [["gaussian"], ["gaussian", "--gaussian-input", "image"], ["pixelcnn"]])
@pytest.mark.parametrize("suffix", ["png", "npz"])
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(
    options: list[str], suffix: str, tmp_path: Path
) -> None:
    contents = []
    for name, seed in (("one", 7), ("again", 7), ("other", 8)):
        path = tmp_path / f"{name}.{suffix}"
        succeed("sample", "--mode", *options, "--num-samples", 4, "--seed", seed, "--output", path)
        contents.append(path.read_bytes())
    assert contents[0] == contents[1] != contents[2]


@pytest.mark.parametrize(
    ("options", "labels"),
    [
        (["--labels", "0-9"], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]),
        (["--labels", "1,3,5"], [1, 3, 5] * 4),
        (["--labels", "7-8,0"], [7, 8, 0] * 4),
        (["--labels", "4"], [4] * 12),
        (["--label", "7"], [7] * 12),
    ],
)
def test_labels_are_drawn_in_turn(options: list[str], labels: list[int], tmp_path: Path) -> None:
    draw = ["sample", "--mode", "pixelcnn", "--top-k", 1, "--num-samples", 12]
    succeed(*draw, *options, "--output", tmp_path / "s.npz")
    arrays = arrays_in(tmp_path / "s.npz")
    assert arrays["labels"].dtype == np.int64
    assert arrays["labels"].tolist() == labels
    for one, other in np.ndindex(12, 12):  # at a top-k of 1 the label decides everything
        if labels[one] == labels[other]:
            assert np.array_equal(arrays["indices"][one], arrays["indices"][other])


def test_reconstructions_as_arrays_stand_beside_the_first_test_images_and_their_labels(tmp_path: Path) -> None:
    result = succeed("reconstruct", "--num-images", 30, "--output", tmp_path / "r.npz", "--device", "cpu")
    assert f"weights: {VQVAE} (your run)" in result.stdout
    arrays = arrays_in(tmp_path / "r.npz")
    assert set(arrays) == {"images", "reconstructions", "indices", "labels"}
    raw = Path("data/MNIST/raw")
    pixels = np.frombuffer((raw / "t10k-images-idx3-ubyte").read_bytes()[16:], dtype=np.uint8).reshape(-1, 1, 28, 28)
    assert np.allclose(arrays["images"], pixels[:30] / 255, atol=1e-6)
    assert arrays["labels"].tolist() == list((raw / "t10k-labels-idx1-ubyte").read_bytes()[8:38])
    model, _ = load_vqvae(VQVAE, torch.device("cpu"))
    with torch.no_grad():
        through = model(torch.from_numpy(arrays["images"]) * 2 - 1).x_hat
    assert np.allclose(arrays["reconstructions"], ((through + 1) / 2).clamp(0, 1).numpy(), atol=1e-3)
    for name, dtype in (("images", np.float32), ("reconstructions", np.float32), ("indices", np.int64)):
        assert arrays[name].dtype == dtype
    assert arrays["indices"].shape == (30, 7, 7)
    assert [path.name for path in tmp_path.iterdir()] == ["r.npz"]


def test_reconstructions_as_grids_are_two_pictures(tmp_path: Path) -> None:
    succeed("reconstruct", "--output", tmp_path / "r.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r-original.png", "r.png"]
    assert picture_size(tmp_path / "r.png") == picture_size(tmp_path / "r-original.png") == (302, 302)
    assert (tmp_path / "r.png").read_bytes() != (tmp_path / "r-original.png").read_bytes()


def test_the_comparison_prints_a_row_for_each_mode_and_writes_a_picture_or_arrays(tmp_path: Path) -> None:
    result = succeed("compare", "--num-samples", 20, "--output", tmp_path / "c.png")
    rows = [line for line in result.stdout.splitlines() if line[:4] in ("real", "thei", "gaus", "pixe")]
    assert len(rows) == 5
    for row in rows:
        codes_used, nats_per_code, distance = row.split()[-3:]
        assert 1 <= int(codes_used) <= 32
        assert 0 < float(nats_per_code) < 20
        assert 0 < float(distance) < 1
    assert f"{VQVAE} (your run) and {PRIOR} (your run)" in result.stdout
    assert picture_size(tmp_path / "c.png")[0] >= 302
    succeed("compare", "--num-samples", 20, "--output", tmp_path / "c.npz")
    arrays = arrays_in(tmp_path / "c.npz")
    assert {name: (array.shape, array.dtype.kind) for name, array in arrays.items()} == {
        "images": ((100, 1, 28, 28), "f"),
        "indices": ((100, 7, 7), "i"),
        "labels": ((100,), "i"),
        "modes": ((100,), "U"),
    }
    assert sorted(set(arrays["modes"])) == ["gaussian_image", "gaussian_latent", "pixelcnn", "real", "reconstructed"]
    assert set(arrays["labels"][arrays["modes"] == "gaussian_latent"]) == {-1}
    assert arrays["labels"][arrays["modes"] == "pixelcnn"].tolist() == [*range(10)] * 2


# Which weights, which settings


def test_the_newest_run_is_the_default_and_the_message_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("old", "new"):
        shutil.copytree("checkpoints/smoke", tmp_path / "checkpoints" / name)
    monkeypatch.chdir(tmp_path)
    for newest in ("old", "new"):
        for stage in ("vqvae", "prior"):
            for name in ("old", "new"):
                moment = 2000 if name == newest else 1000
                os.utime(f"checkpoints/{name}/{stage}.safetensors", (moment, moment))
        gaussian = succeed("sample", "--mode", "gaussian", "--num-samples", 1)
        assert f"weights: checkpoints/{newest}/vqvae.safetensors (your run)\n" in gaussian.stdout
        pixelcnn = succeed("sample", "--mode", "pixelcnn", "--num-samples", 1)
        assert f"and checkpoints/{newest}/prior.safetensors (your run)\n" in pixelcnn.stdout


def test_a_newer_vqvae_without_a_prior_leaves_the_prior_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree("checkpoints/smoke", tmp_path / "checkpoints" / "pair")
    other_vqvae(tmp_path / "checkpoints" / "alone" / "vqvae.safetensors")
    monkeypatch.chdir(tmp_path)
    os.utime("checkpoints/alone/vqvae.safetensors", (4e9, 4e9))
    pixelcnn = succeed("sample", "--mode", "pixelcnn", "--num-samples", 1).stdout
    assert "checkpoints/pair/vqvae.safetensors (your run) and checkpoints/pair/prior.safetensors" in pixelcnn
    assert "checkpoints/alone/vqvae.safetensors" in succeed("sample", "--mode", "gaussian", "--num-samples", 1).stdout


def test_without_a_run_the_shipped_weights_are_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree("checkpoints/smoke", tmp_path / "package" / "pretrained")
    monkeypatch.setattr(runs, "SHIPPED", tmp_path / "package" / "pretrained")
    monkeypatch.chdir(tmp_path)
    assert succeed("sample", "--mode", "pixelcnn", "--num-samples", 1).stdout.count("(the shipped weights)") == 2
    folder = tmp_path / "package" / "pretrained"
    refuse("train-vqvae", "--config", SMOKE, "--output-folder", folder, "--overwrite", saying=["the shipped weights"])


def test_without_any_weights_the_message_names_the_command_that_makes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refuse("sample", "--mode", "gaussian", saying=["found none", "python cli.py train-vqvae"])
    refuse("sample", "--mode", "pixelcnn", saying=["found none", "python cli.py train-prior"])


def test_a_flag_overrides_the_recipe_and_the_recipe_the_default(tmp_path: Path) -> None:
    flags = ["--k", 8, "--hidden-size", 6, "--num-epochs", 1, "--lr", 0.001, "--beta", 0.5, "--seed", 4]
    folder = tmp_path / "run"
    succeed("train-vqvae", "--config", SMOKE, *flags, "--output-folder", folder, "--device", "cpu")
    header = checkpoint.read_header(folder / "vqvae.safetensors", "vqvae")
    assert (header.config["k"], header.config["hidden_size"]) == (8, 6)  # flags
    assert (header.config["width"], header.recipe["batch_size"]) == (16, 32)  # the recipe
    assert (header.config["image_size"], header.recipe["weight_decay"]) == (28, 0.0)  # defaults
    assert [header.recipe[name] for name in ("num_epochs", "lr", "beta", "seed")] == [1, 0.001, 0.5, 4]


def test_a_run_is_kept_unless_it_is_resumed_or_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree("checkpoints/smoke", tmp_path / "run")
    shutil.copytree("data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    epochs = ["--config", SMOKE, "--num-epochs", 3, "--device", "cpu"]
    vqvae = ["train-vqvae", *epochs, "--output-folder", "run"]
    prior = ["train-prior", *epochs, "--vqvae", "run/vqvae.safetensors"]
    for command, stage in ((vqvae, "vqvae"), (prior, "prior")):
        refuse(*command, saying=[f"expected no {stage} run in run, found one", "--resume", "--overwrite"])
    resumed = succeed(*prior, "--resume")
    assert "epoch 3:" in resumed.stdout
    assert "epoch 2:" not in resumed.stdout
    assert "epoch 1:" in succeed(*vqvae, "--overwrite").stdout
    refuse(*vqvae, "--resume", "--seed", 5, saying=["seed = 0", "seed = 5"])
    pair = ["--vqvae", "run/vqvae.safetensors", "--prior", "run/prior.safetensors"]  # but not any more
    refuse("sample", "--mode", "pixelcnn", *pair, saying=["the VQ-VAE that the prior at run/prior.safetensors"])


# Mistakes


def test_help_answers_without_importing_torch() -> None:
    command = [sys.executable, "-X", "importtime", ROOT / "cli.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for name in ("train-vqvae", "train-prior", "train-classifier", "sample", "reconstruct", "compare", "evaluate"):
        assert name in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "typer" in imported
    assert not {"torch", "torchvision", "numpy", "tensorboard", "scipy", "matplotlib"} & imported


def test_sampling_imports_neither_torchvision_nor_the_compiler() -> None:
    """Each takes more than a second, half of a cold start."""
    arguments = ["sample", "--mode", "pixelcnn", "--vqvae", VQVAE, "--prior", PRIOR, "--output", "cold.png"]
    command = [sys.executable, "-X", "importtime", ROOT / "cli.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "wrote cold.png" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "prior.sampling" in imported
    assert imported.isdisjoint({"torchvision", "torch._dynamo"})


def test_a_mistake_ends_a_process_with_status_1_and_one_sentence() -> None:
    command = [sys.executable, ROOT / "cli.py", "sample", "--mode", "gaussian", "--vqvae", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: expected a vqvae checkpoint at nowhere, found none")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "command", ["train-vqvae", "train-prior", "train-classifier", "sample", "reconstruct", "compare", "evaluate"]
)
def test_each_command_has_help_and_refuses_an_option_it_does_not_know(command: str) -> None:
    assert "--device" in succeed(command, "--help").stdout
    refuse(command, "--devise", "cpu", saying=["No such option", "--devise"])


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("train-vqvae --beta 3", "beta between 0.1 and 2, found 3"),
        ("train-vqvae --beta 0", "beta between 0.1 and 2, found 0"),
        ("train-vqvae --lr 0", "lr between"),
        ("train-vqvae --lr nan", "lr between"),
        ("train-vqvae --num-epochs 0", "num_epochs between 1 and"),
        ("train-vqvae --batch-size 0", "batch_size between 1 and"),
        ("train-vqvae --hidden-size 0", "hidden_size between 1 and"),
        ("train-vqvae --k 1", "k between 2 and 32767, found 1"),
        ("train-vqvae --num-epochs two", "--num-epochs"),
        ("train-vqvae --device tpu", "expected --device auto, cpu or cuda, found 'tpu'"),
        ("train-prior --lr -1", "lr between"),
        ("train-prior --num-epochs 0", "num_epochs between 1 and"),
        ("train-prior --batch-size 0", "batch_size between 1 and"),
        ("train-prior --device tpu", "expected --device auto, cpu or cuda, found 'tpu'"),
        ("train-classifier --lr 0", "lr between"),
        ("train-classifier --num-epochs 0", "num_epochs between 1 and"),
        ("train-classifier --batch-size 0", "batch_size between 1 and"),
        ("train-classifier --device tpu", "expected --device auto, cpu or cuda, found 'tpu'"),
        ("sample", "--mode"),
        ("sample --mode vae", "expected --mode to be gaussian or pixelcnn, found 'vae'"),
        ("sample --mode gaussian --gaussian-input noise", "--gaussian-input to be latent or image, found 'noise'"),
        ("sample --mode gaussian --num-samples 0", "--num-samples of at least 1, found 0"),
        ("sample --mode gaussian --device tpu", "expected --device auto, cpu or cuda, found 'tpu'"),
        ("sample --mode gaussian --seed 99999999999999999999999", "--seed"),
        ("sample --mode gaussian --label 3", "no --label with --mode gaussian"),
        ("sample --mode gaussian --labels 0-9", "no --labels with --mode gaussian"),
        ("sample --mode gaussian --temperature 1", "no --temperature with --mode gaussian"),
        ("sample --mode gaussian --top-k 5", "no --top-k with --mode gaussian"),
        ("sample --mode gaussian --top-p 0.5", "no --top-p with --mode gaussian"),
        ("sample --mode gaussian --prior nowhere", "no --prior with --mode gaussian"),
        ("sample --mode pixelcnn --gaussian-input image", "no --gaussian-input with --mode pixelcnn"),
        ("sample --mode pixelcnn --num-samples 0", "--num-samples of at least 1, found 0"),
        ("sample --mode pixelcnn --temperature 0", "--temperature over 0, found 0"),
        ("sample --mode pixelcnn --top-k 0", "--top-k of at least 1, found 0"),
        ("sample --mode pixelcnn --top-p 0", "--top-p over 0 and at most 1, found 0"),
        ("sample --mode pixelcnn --top-p 1.5", "--top-p over 0 and at most 1, found 1.5"),
        ("sample --mode pixelcnn --label 3 --labels 0-9", "expected --label or --labels, found both"),
        ("sample --mode pixelcnn --label 10", "digits such as 7, 0-9 or 1,3,5, found '10'"),
        ("sample --mode pixelcnn --label -1", "found '-1'"),
        ("sample --mode pixelcnn --labels 0-10", "digits such as 7, 0-9 or 1,3,5, found '0-10'"),
        ("sample --mode pixelcnn --labels 5-3", "found '5-3'"),
        ("sample --mode pixelcnn --labels 1,,3", "found '1,,3'"),
        ("sample --mode pixelcnn --labels seven", "found 'seven'"),
        ("sample --mode pixelcnn --labels ²", "found '²'"),
        ("reconstruct --num-images 0", "--num-images between 1 and 120, found 0"),
        ("reconstruct --num-images 121", "--num-images between 1 and 120, found 121"),
        ("compare --num-samples 0", "--num-samples to be a multiple of 10, found 0"),
        ("compare --num-samples 15", "--num-samples to be a multiple of 10, found 15"),
        ("compare --num-samples 300", "--num-samples"),  # the fixture has about 12 test images of a digit
        ("evaluate --split train", "expected --split to be test or validation, found 'train'; type --split test"),
        ("evaluate --num-samples many", "--num-samples"),
        ("evaluate --device tpu", "expected --device auto, cpu or cuda, found 'tpu'"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(command: str, text: str) -> None:
    arguments = shlex.split(command)
    place = ["--output-folder", "new"] if arguments[0].startswith(("train", "eval")) else ["--output", "keep.png"]
    refuse(*arguments, *place, saying=[text])


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
@pytest.mark.parametrize(
    "command",
    [
        "train-vqvae",
        "train-prior",
        "train-classifier",
        "sample --mode gaussian",
        "sample --mode pixelcnn",
        "reconstruct",
        "evaluate",
    ],
)
def test_cuda_without_a_cuda_device_is_refused(command: str) -> None:
    refuse(*command.split(), "--device", "cuda", saying=["expected a CUDA device for --device cuda, found none"])


def test_a_recipes_name_does_not_lead_out_of_the_folder_of_runs(tmp_path: Path) -> None:
    shutil.copy(ROOT / "configs" / "smoke.toml", tmp_path / "...toml")
    refuse("train-vqvae", "--config", tmp_path / "...toml", saying=["expected a recipe's name to name a folder, found"])


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        ("[vqvae]\nnum_epoch = 3", "unknown key 'num_epoch' in the recipe; did you mean 'num_epochs'?"),
        ("[vqvae]\nhiden_size = 3", "did you mean 'hidden_size'?"),
        ("[vqvae]\nnum_epochs = 'three'", "expected num_epochs to be of type int, found 'three'"),
        ("[vqvae]\nnum_epochs = 2.5", "expected num_epochs to be of type int, found 2.5"),
        ("[vqvae]\nnum_epochs = true", "expected num_epochs to be of type int, found True"),
        ("[vqvae]\nlr = '1e-3'", "expected lr to be of type float, found '1e-3'"),
        ("[vqvae]\nschedule = 'linear'", "expected schedule to be one of 'constant', 'one-cycle', found 'linear'"),
        ("[vqvae]\nbeta = 5", "beta between 0.1 and 2, found 5"),
        ("[vqvea]\nk = 8", "found 'vqvea'; did you mean 'vqvae'?"),
        ("k = 8", "expected the tables [vqvae] and [prior], found 'k'"),
        ("this is no recipe", "found text that is not TOML"),
        ("[vqvae]\nk = ", "found text that is not TOML"),
    ],
)
def test_a_recipe_with_a_mistake_is_refused_with_what_is_wrong(recipe: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(recipe)
    refuse("train-vqvae", "--config", path, "--output-folder", "new", saying=[text])


def test_a_recipe_that_is_missing_or_no_text_is_refused(tmp_path: Path) -> None:
    for command in ("train-vqvae", "train-prior"):
        refuse(command, "--config", "nowhere.toml", saying=["expected a TOML recipe at nowhere.toml"])
        refuse(command, "--config", "data", saying=["expected a TOML recipe at data"])
    path = tmp_path / "recipe.toml"
    path.write_bytes(b"\xff\xfe\x00")
    refuse("train-vqvae", "--config", path, saying=["expected a TOML recipe at", "of another kind"])


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        ("[prior]\nnum_layer = 3", "did you mean 'num_layers'?"),
        ("[prior]\nk = 512", "unknown key 'k'"),  # the VQ-VAE's to say
        ("[prior]\nnum_layers = 5", "at least 6 layers for a map of 7x7 codes"),
        ("[prior]\nlabel_dropout = 2", "label_dropout between 0 and 1, found 2"),
    ],
)
def test_a_recipe_for_the_prior_with_a_mistake_is_refused(recipe: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(recipe)
    before = files_in(Path("checkpoints"))
    result = run("train-prior", "--config", path, "--output-folder", tmp_path / "new")
    assert result.status == 1
    assert text in result.stderr
    assert files_in(Path("checkpoints")) == before
    assert not (tmp_path / "new" / "prior.safetensors").exists()


def bad_checkpoint(kind: str, good: Path, other_stage: Path, path: Path) -> None:
    if kind == "cut short":
        path.write_bytes(good.read_bytes()[:-1000])
    elif kind == "cut in the header":
        path.write_bytes(good.read_bytes()[:50])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "random bytes":
        path.write_bytes(np.random.default_rng(0).bytes(5000))
    elif kind == "without header":
        save_file({"weight": torch.zeros(3)}, path)
    elif kind == "changed weights":
        content = bytearray(good.read_bytes())
        content[-5] ^= 64
        path.write_bytes(content)
    elif kind == "other stage":
        shutil.copy(other_stage, path)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("missing", "found none; create one with: python cli.py train-"),
        ("cut short", "cut short, damaged or of another kind"),
        ("cut in the header", "cut short, damaged or of another kind"),
        ("empty", "cut short, damaged or of another kind"),
        ("random bytes", "cut short, damaged or of another kind"),
        ("without header", "of another kind (KeyError: "),
        ("changed weights", "the file is damaged"),
        ("other stage", "found one of stage"),
    ],
)
def test_a_file_that_is_no_whole_checkpoint_of_the_stage_is_refused(kind: str, text: str, tmp_path: Path) -> None:
    vqvae, prior = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    bad_checkpoint(kind, VQVAE, PRIOR, vqvae)
    bad_checkpoint(kind, PRIOR, VQVAE, prior)
    output = ["--output", "keep.npz"]
    refuse("sample", "--mode", "gaussian", "--vqvae", vqvae, *output, saying=[text, str(vqvae)])
    refuse("sample", "--mode", "pixelcnn", "--vqvae", VQVAE, "--prior", prior, *output, saying=[text, str(prior)])
    refuse("reconstruct", "--vqvae", vqvae, *output, saying=[text, str(vqvae)])
    refuse("compare", "--vqvae", VQVAE, "--prior", prior, *output, saying=[text, str(prior)])
    refuse("train-prior", "--config", SMOKE, "--vqvae", vqvae, "--overwrite", saying=[text, str(vqvae)])


def other_vqvae(path: Path) -> str:
    """The trained VQ-VAE with one codebook value changed; its fingerprint."""
    model, header = load_vqvae(VQVAE, torch.device("cpu"))
    with torch.no_grad():
        model.quantizer.codebook[5, 3] += 1e-4
    return checkpoint.save(
        path, model, stage="vqvae", config=asdict(model.config), recipe=header.recipe, metrics=header.metrics
    ).fingerprint


def test_a_prior_beside_another_vqvae_is_refused_and_both_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.safetensors"
    found = other_vqvae(other)[:12]
    expected = checkpoint.read_header(VQVAE, "vqvae").fingerprint[:12]
    pair = ["--vqvae", other, "--prior", PRIOR, "--output", "keep.npz"]
    refuse("sample", "--mode", "pixelcnn", *pair, saying=[str(PRIOR), expected, found])
    refuse("compare", *pair, saying=[str(PRIOR), expected, found])
    monkeypatch.setattr(runs, "SHIPPED", PRIOR.parent)
    refuse("sample", "--mode", "pixelcnn", "--vqvae", other, saying=["belong together", str(other), str(PRIOR)])


def test_an_output_that_cannot_be_written_is_refused() -> None:
    place = ["--output", "keep.png/s.png"]
    refuse("sample", "--mode", "gaussian", "--num-samples", 1, *place, saying=["expected to write keep.png/s.png"])
    for folder in ("keep.png", "keep.png/run"):
        place = ["--config", SMOKE, "--output-folder", folder]
        refuse("train-vqvae", *place, saying=[f"expected to write to {folder}"])
        refuse("train-prior", *place, saying=[f"expected to write to {folder}"])


@pytest.mark.parametrize("output", ["samples.jpg", "samples", "samples.PNG", "keep.npz.gz"])
def test_an_output_of_another_kind_is_refused(output: str) -> None:
    for command in (["sample", "--mode", "gaussian"], ["sample", "--mode", "pixelcnn"], ["reconstruct"], ["compare"]):
        refuse(*command, "--output", output, saying=[".png (a grid) or .npz (arrays)", f"found {output}"])


def test_resuming_where_there_is_no_run_is_refused() -> None:
    for command in ("train-vqvae", "train-prior"):
        options = ["--config", SMOKE, "--output-folder", "nothing", "--resume"]
        refuse(command, *options, saying=["expected a run to resume at", "without --resume"])
        assert not Path("nothing").exists()


@pytest.mark.parametrize("damaged", MNIST_FILES)
def test_damaged_data_is_refused_by_the_name_of_the_file(damaged: str, tmp_path: Path) -> None:
    shutil.copytree("data", tmp_path / "data")
    path = tmp_path / "data" / "MNIST" / "raw" / damaged
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    options = ["--data-folder", tmp_path / "data", "--no-download"]
    refuse("train-vqvae", "--config", SMOKE, "--output-folder", "new", *options, saying=[f"{path} is damaged"])
    refuse("reconstruct", "--output", "keep.png", *options, saying=[f"{path} is damaged"])


@pytest.mark.parametrize("command", ["train-vqvae", "train-prior", "reconstruct", "compare"])
def test_missing_data_without_a_download_names_the_files_and_their_place(command: str, tmp_path: Path) -> None:
    place = ["--config", SMOKE, "--output-folder", "new"] if "train" in command else ["--output", "keep.png"]
    options = ["--data-folder", tmp_path / "nothing", "--no-download"]
    where = str(tmp_path / "nothing" / "MNIST" / "raw")
    refuse(command, *place, *options, saying=[*MNIST_FILES, where, "--data-folder"])
    assert not (tmp_path / "nothing").exists()


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("vqvae.common.runs.find_vqvae", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run("sample", "--mode", "gaussian")


# The classifier, and what is measured with it

CLASSIFIER = Path("eyes/classifier.safetensors")
EVALUATE = ["evaluate", "--classifier", CLASSIFIER, "--device", "cpu"]


@pytest.fixture(scope="module")
def classifier(trained: tuple[Result, Result]) -> Result:
    """A classifier trained on the fixture, in a folder apart, so that it is no other test's default."""
    options = ["--num-epochs", 2, "--batch-size", 40, "--output-folder", CLASSIFIER.parent, "--device", "cpu"]
    return succeed("train-classifier", *options)


def test_training_the_classifier_says_what_it_reached_and_what_to_type_next(classifier: Result) -> None:
    *_, figures, written = classifier.stdout.splitlines()
    assert re.fullmatch(r"test: \d+\.\d\d% right, cross-entropy \d+\.\d{4}", figures)
    assert written == f"wrote {CLASSIFIER}; next: python cli.py evaluate --classifier {CLASSIFIER}"
    names = {"classifier.safetensors", "classifier/metrics.jsonl", "classifier/resume.pt"}
    assert names <= files_in(CLASSIFIER.parent).keys()
    header = checkpoint.read_header(CLASSIFIER, "classifier")
    assert [header.recipe[name] for name in ("num_epochs", "batch_size", "lr", "seed")] == [2, 40, 0.004, 0]


def test_the_command_printed_after_training_the_classifier_measures_both_stages(
    classifier: Result, tmp_path: Path
) -> None:
    options = ["--num-samples", 100, "--guidance", 2, "--seed", 3, "--output-folder", tmp_path / "new" / "folder"]
    result = succeed(*next_command(classifier), *options, "--device", "cpu")
    weights = {"vqvae": VQVAE, "prior": PRIOR, "classifier": CLASSIFIER}
    assert f"weights: {VQVAE} (your run), {PRIOR} (your run) and {CLASSIFIER} (your run)\n" in result.stdout
    written = files_in(tmp_path / "new" / "folder")
    assert {"report.html", "metrics.json", "table.txt", "table.md", "real.png", "closest.png"} <= written.keys()
    assert f"wrote {tmp_path / 'new' / 'folder' / 'report.html'}" in result.stdout.splitlines()[-1]
    figures = json.loads(written["metrics.json"])
    fingerprints = {stage: checkpoint.read_header(path, stage).fingerprint for stage, path in weights.items()}
    assert figures["origin"] == {"split": "test", "num_samples": 100, "seed": 3, "guidance": 2.0, **fingerprints}
    titles = [row["title"] for row in figures["rows"]]
    assert len(titles) == 9
    assert "pixelcnn, guidance 2" in titles
    table = written["table.txt"].decode()
    for title in ("Sets of images against training digits", "Likelihood", "Memorisation"):
        head = f"{title} (classifier {fingerprints['classifier'][:12]})\n"
        rows = result.stdout.partition(head)[2].partition("\n\n")[0]
        assert len(rows.splitlines()) >= 4
        assert f"{title}\n{rows}\n" in table  # what is printed is what is written


def test_the_validation_split_is_measured_without_a_look_at_the_test_split(
    classifier: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse_to_load(*_: object) -> None:
        raise LookupError("the test split was read")

    monkeypatch.setattr("prior.evaluate.FEWEST", 20)  # the fixture has 40 validation digits
    monkeypatch.setattr(data, "load_test", refuse_to_load)
    place = ["--num-samples", 40, "--output-folder", tmp_path]
    succeed(*EVALUATE, "--split", "validation", *place)
    figures = json.loads((tmp_path / "metrics.json").read_text())
    assert (figures["origin"]["split"], figures["origin"]["guidance"]) == ("validation", GUIDANCE)
    assert list(figures["likelihood"]) == ["train", "validation"]
    with pytest.raises(LookupError):
        run(*EVALUATE, *place)  # the default is test


def test_the_classification_accuracy_score_is_measured_on_request(
    classifier: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prior.evaluate.accuracy_after_training_on", lambda *_: 0.875)
    result = succeed(*EVALUATE, "--cas", "--num-samples", 100, "--output-folder", tmp_path)
    assert "Classification accuracy score" in result.stdout
    figures = json.loads((tmp_path / "metrics.json").read_text())
    assert figures["classification_accuracy_score"] == {"samples": 0.875, "real": 0.875}


def test_the_newest_classifier_is_the_default_and_the_message_says_so(
    classifier: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree("checkpoints/smoke", tmp_path / "checkpoints" / "smoke")
    for name in ("old", "new"):
        shutil.copytree(CLASSIFIER.parent, tmp_path / "checkpoints" / name)
    options = ["--data-folder", Path("data").absolute(), "--num-samples", 1]
    monkeypatch.chdir(tmp_path)
    for newest in ("old", "new"):
        for name in ("old", "new"):
            moment = 2000 if name == newest else 1000
            os.utime(f"checkpoints/{name}/classifier.safetensors", (moment, moment))
        assert f"and checkpoints/{newest}/classifier.safetensors (your run)\n" in run("evaluate", *options).stdout


def test_a_classifiers_run_is_kept_unless_it_is_resumed_or_overwritten(classifier: Result, tmp_path: Path) -> None:
    shutil.copytree(CLASSIFIER.parent, tmp_path / "run")
    command = ["train-classifier", "--output-folder", tmp_path / "run", "--batch-size", 40, "--device", "cpu"]
    refuse(*command, saying=["expected no classifier run in", "--resume", "--overwrite"])
    resumed = succeed(*command, "--num-epochs", 3, "--resume").stdout
    assert "epoch 3:" in resumed
    assert "epoch 2:" not in resumed
    refuse("train-classifier", "--output-folder", "nothing", "--resume", saying=["expected a run to resume at"])


@pytest.mark.parametrize("num_samples", [0, 99, 121])
def test_too_few_samples_or_more_than_test_digits_are_refused(classifier: Result, num_samples: int) -> None:
    text = f"--num-samples between 100 and 120, the number of digits to compare with, found {num_samples}"
    refuse(*EVALUATE, "--num-samples", num_samples, saying=[text, "type --num-samples 120"])


def test_a_folder_that_cannot_be_made_is_told_before_anything_is_measured(
    classifier: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prior.evaluate.evaluate", lambda *_: pytest.fail("measured"))
    (tmp_path / "file").write_text("no folder")
    place = ["--output-folder", tmp_path / "file" / "report"]
    refuse(*EVALUATE, *place, saying=["expected to write to", "name another folder"])


def test_a_guidance_out_of_its_range_is_refused(classifier: Result) -> None:
    text = "--guidance between 0 and 100, found -1"
    refuse(*EVALUATE, "--num-samples", 100, "--guidance", -1, saying=[text])


def test_without_a_classifier_the_message_names_the_command_that_makes_one() -> None:
    for options in ([], ["--classifier", "nowhere"]):
        where = options[-1] if options else Path("shipped/classifier.safetensors").absolute()
        text = f"expected a classifier checkpoint at {where}, found none"
        refuse("evaluate", "--num-samples", 100, *options, saying=[text, "python cli.py train-classifier"])


def test_a_checkpoint_of_another_stage_is_refused_as_a_classifier_and_a_classifier_as_another(
    classifier: Result,
) -> None:
    text = f"expected a classifier checkpoint at {VQVAE}, found one of stage 'vqvae'"
    refuse("evaluate", "--classifier", VQVAE, saying=[text])
    text = f"expected a vqvae checkpoint at {CLASSIFIER}, found one of stage 'classifier'"
    refuse("sample", "--mode", "gaussian", "--vqvae", CLASSIFIER, "--output", "keep.png", saying=[text])


def test_a_report_or_a_run_that_cannot_be_written_is_refused(classifier: Result) -> None:
    refuse(*EVALUATE, "--num-samples", 100, "--output-folder", "keep.png/e", saying=["expected to write", "keep.png/e"])
    refuse("train-classifier", "--output-folder", "keep.png", saying=["expected to write to keep.png"])


def test_missing_data_is_named_by_the_classifiers_commands_too(classifier: Result, tmp_path: Path) -> None:
    options = ["--data-folder", tmp_path / "nothing", "--no-download", "--output-folder", tmp_path / "new"]
    for command in (["train-classifier"], EVALUATE):
        refuse(*command, *options, saying=[*MNIST_FILES, str(tmp_path / "nothing" / "MNIST" / "raw"), "--data-folder"])
