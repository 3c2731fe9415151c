"""The command line: what each command writes and prints, where its flags arrive, and how mistakes end."""

import ast
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields, replace
from fnmatch import fnmatch
from inspect import signature
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import numpy as np
import pytest
import torch
import typer
from PIL import Image

import cli
import prior
from prior import Pair, PriorConfig, PriorTraining
from prior.evaluation.classifier import ClassifierConfig
from prior.evaluation.classifier_training import ClassifierTraining
from prior.sampling import GUIDANCE
from tests.helpers import FIXTURE, ROOT, Result, mnist, run, save_pair
from vqvae import VQVAEConfig, VQVAETraining
from vqvae.data.mnist import MNIST_MD5
from vqvae.errors import Interrupted
from vqvae.gaussian import draw_gaussian
from vqvae.storage import checkpoint, runs
from vqvae.storage.recipe import read_recipe, resolve

RUN = Path("checkpoints/my run")  # a shell needs quotes around it
VQVAE, PRIOR, CLASSIFIER = (RUN / f"{stage}.safetensors" for stage in ("vqvae", "prior", "classifier"))
SPLITS = ("train", "validation", "test")
Patch = pytest.MonkeyPatch
COMMANDS = ["train-vqvae", "train-prior", "train-classifier", "sample --mode pixelcnn"]
COMMANDS += ["reconstruct", "complete", "score", "compare", "evaluate"]


def succeed(*arguments: object) -> Result:
    result = run(*arguments)
    assert result.status == 0, result.stderr
    return result


def refuse(command: str, *arguments: object, saying: str | list[str], place: str = "new") -> str:
    """One sentence and status 1, or Typer's usage and status 2, with these texts. No file is touched.
    `place` is where the command would write: its output folder or, with an ending, its output."""
    name, *options = [*shlex.split(command), *map(str, arguments)]
    output = ("--output-folder", place) if name.startswith(("train", "eval")) else ("--output", f"{place}.npz")
    before = files_in(Path())
    result = run(name, *output, *options)
    message = result.stderr.splitlines()[-1] if "error: " in result.stderr else result.stderr
    assert message.startswith(("error: ", "Usage: "))
    assert result.status == (2 if message.startswith("Usage: ") else 1)
    for text in [saying] if isinstance(saying, str) else saying:
        assert text in message
    assert "`" not in message
    assert "wrote" not in result.stdout
    assert files_in(Path()) == before
    return message


def files_in(folder: Path) -> dict[str, bytes]:
    """Every file by its name, without the empty ones that runs are locked by."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def next_command(result: Result) -> list[str]:
    """The arguments of the command in the last line printed, as a shell would split it."""
    return shlex.split(result.stdout.splitlines()[-1].partition("; next: python cli.py ")[2])


def assert_arrays(path: Path, expected: dict[str, torch.Tensor]) -> None:
    with np.load(path) as file:
        assert file.files == [*expected]
        torch.testing.assert_close({name: torch.from_numpy(file[name]) for name in file}, expected, rtol=0, atol=0)


def picture_size(path: str | Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        return picture.size


@pytest.fixture(scope="module", autouse=True)
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Result, ...]]:
    """A folder with MNIST's fixture, no shipped weights and no network. Both stages and a classifier are trained there.
    The second command is the one that the first one printed."""
    folder = tmp_path_factory.mktemp("work")
    shutil.copytree(FIXTURE, folder / "my data")
    (folder / "data").symlink_to("my data")
    shutil.copy(ROOT / "configs" / "smoke.toml", folder)
    (folder / "wrong.toml").write_text("[vqvae]\nnum_epoch = 3")
    (folder / "damaged").write_bytes(b"damaged" * 100)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(runs, "SHIPPED", folder / "shipped")
        monkeypatch.setattr("vqvae.data.mnist.fetch", MagicMock(side_effect=ConnectionError))
        place = ["--output-folder", RUN, "--device", "cpu"]
        first = succeed("train-vqvae", "--config", folder / "smoke.toml", "--data-folder", "my data", *place)
        second = succeed(*next_command(first), "--device", "cpu")
        yield first, second, succeed("train-classifier", "--num-epochs", 1, "--batch-size", 40, "--lr", 0.001, *place)


@pytest.fixture(scope="module")
def pair() -> Pair:
    return prior.load(VQVAE, PRIOR, "cpu")


# What the commands write and print


@pytest.mark.parametrize("options", ["-I", "-OO", "-W error"])
def test_help_and_version_are_told_however_python_is_started(options: str) -> None:
    def told(*arguments: str) -> str:
        command = [sys.executable, *options.split(), str(ROOT / "cli.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert "  train-vqvae       Stage one: train the VQ-VAE.\n" in told("-h")
    assert "\n  Stage one: train the VQ-VAE.\n" in told("train-vqvae", "-h") == told("train-vqvae", "--help")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]  # of the code, not of another
    assert told("--version") == f"vqvae-pixelcnn-mnist {version}\n"


@pytest.mark.parametrize("streams", [">/dev/full 2>/dev/full", "<&- >&- 2>&-", "2>&1 | true", ">ascii 2>&1"])
@pytest.mark.parametrize(
    ("command", "status"), [("--help", 0), ("sample", 2), ("sample --mode gaussian --labels 'é∞'", 1)]
)
def test_no_stream_changes_how_a_command_ends(command: str, status: int, streams: str, tmp_path: Path) -> None:
    whole = f"'{sys.executable}' '{ROOT / 'cli.py'}' {command} {streams}; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run(["bash", "-c", whole], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


def test_training_writes_exactly_these_files_and_no_others() -> None:
    for stage, others in (("vqvae", set()), ("prior", {f"codes-{name}.safetensors" for name in SPLITS})):
        names = {path for path in files_in(RUN / stage) if "events.out.tfevents" not in path}
        assert names == {"metrics.jsonl", "resume.pt", *others}
        assert len(files_in(RUN / stage)) == len(names) + 2  # TensorBoard's, of both splits
    assert {path.name for path in RUN.iterdir() if path.is_file()} == {VQVAE.name, PRIOR.name, CLASSIFIER.name}


def test_training_says_what_it_reached_and_what_to_type_next(trained: tuple[Result, ...]) -> None:
    first, second, third = (result.stdout.splitlines() for result in trained)
    assert re.fullmatch(r"test: squared error 0\.\d+, PSNR .* dB, \d+ of 32 codes used, perplexity \d+", first[-2])
    following = f"train-prior --vqvae '{VQVAE}' --config smoke.toml --data-folder 'my data'"
    assert first[-1] == f"best weights: {VQVAE}; next: python cli.py {following}"
    assert second[0] == f"VQ-VAE: {VQVAE} (your run)"
    assert re.fullmatch(r"test: \d\.\d+ nats per code .*; uniform 3\.466", second[-2])  # log 32
    following = f"sample --mode pixelcnn --vqvae '{VQVAE}' --prior '{PRIOR}' --output samples.png"
    assert second[-1] == f"best weights: {PRIOR}; next: python cli.py {following}"
    assert re.fullmatch(r"test: \d+\.\d\d% right, cross-entropy \d+\.\d{4}", third[-2])
    error = checkpoint.read_header(CLASSIFIER, "classifier").metrics["error"]  # on validation
    assert abs(float(third[-2][6:].partition("%")[0]) / 100 - (1 - error)) < 0.25
    assert third[-1] == f"best weights: {CLASSIFIER}; next: python cli.py evaluate --classifier '{CLASSIFIER}'"


def test_printed_commands_run_as_printed_and_pictures_have_100_images(trained: tuple[Result, ...]) -> None:
    for command, name in ((next_command(trained[1]), "samples"), (["sample", "--mode", "gaussian"], "gaussian")):
        assert succeed(*command).stdout.endswith(f"\nwrote {name}.png\n")
        width, height = picture_size(f"{name}.png")
        assert width == 604  # ten images of 28 pixels, 2 between and around them, twice as large
        assert height == 604 + (10 * 15 + 9 * 4) * (name == "samples")  # a line of captions above each row
        Path(f"{name}.png").unlink()


@pytest.mark.parametrize(
    ("options", "draw"),
    [
        ("gaussian --gaussian-input latent", lambda pair, n: draw_gaussian(pair.vqvae, "latent", n, 3)),
        ("gaussian --gaussian-input image", lambda pair, n: draw_gaussian(pair.vqvae, "image", n, 3)),
        ("pixelcnn", lambda pair, n: pair.draw(n, seed=3)._asdict()),
        ("pixelcnn --label 7", lambda pair, n: pair.draw(n, seed=3, labels=[7])._asdict()),
        ("pixelcnn --labels 7-8,0", lambda pair, n: pair.draw(n, seed=3, labels=[7, 8, 0])._asdict()),
    ],
)
def test_sampled_arrays_are_those_of_the_library(options: str, draw: Any, pair: Pair, tmp_path: Path) -> None:
    path = tmp_path / "s.npz"
    command = ["sample", "--mode", *options.split(), "--num-samples", 23, "--seed", 3, "--output", path]
    weights = f"{VQVAE} (your run)" + (f" and {PRIOR} (your run)" if "pixelcnn" in options else "")
    assert succeed(*command, "--device", "cpu").stdout == f"weights: {weights}\nwrote {path}\n"
    assert_arrays(path, draw(pair, 23))


def test_the_comparison_prints_a_row_for_each_mode_and_writes_a_picture_or_arrays(tmp_path: Path) -> None:
    result = succeed("compare", "--num-samples", 20, "--output", tmp_path / "c.png")
    first, _, *rows, _, last = result.stdout.splitlines()
    assert (first, last) == (f"weights: {VQVAE} (your run) and {PRIOR} (your run)", f"wrote {tmp_path / 'c.png'}")
    assert [re.split(r"\W", row)[0] for row in rows] == ["real", "their", "gaussian", "gaussian", *["pixelcnn"] * 2]
    assert picture_size(tmp_path / "c.png")[0] >= 604
    succeed("compare", "--output", tmp_path / "c.npz")
    with np.load(tmp_path / "c.npz") as file:
        assert file["images"].shape == (6 * 30, 1, 28, 28)


def test_an_export_tells_how_much_it_differs_and_is_refused_where_one_is_or_where_the_extra_is_missing(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    weights, place = ("--vqvae", VQVAE, "--prior", PRIOR), tmp_path / "my export"
    result = succeed("export", "--format", "torch", "--output", place, *weights)
    assert re.search(
        r"^largest difference from the weights: encoder 0, decoder \S+e-\d\d, prior \S+e-\d\d$", result.stdout, re.M
    )
    assert result.stdout.splitlines()[-1] == f"wrote {place}"
    networks = {f"{name}.pt2" for name in ("encoder", "decoder", "prior")}
    assert files_in(place).keys() == {*networks, "README.md", "about.json", "sample.py"}
    refuse(
        "export", *weights, "--format", "torch", "--output", place, saying="expected a new folder as --output, found"
    )
    monkeypatch.setitem(sys.modules, "onnx", None)
    refuse("export", *weights, saying=["found no onnx; install them with: pip install ", "[export]"])


def test_the_command_printed_after_the_classifier_measures(trained: tuple[Result, ...], tmp_path: Path) -> None:
    place = tmp_path / "new" / "folder"
    options = ["--num-samples", 100, "--output-folder", place, "--device", "cpu"]
    lines = succeed(*next_command(trained[2]), *options).stdout.splitlines()
    assert lines[0] == f"weights: {VQVAE} (your run) and {PRIOR} (your run), measured with {CLASSIFIER} (your run)"
    assert lines[-1].startswith(f"wrote {place / 'report.html'}, ")
    written = files_in(place)
    assert {"report.html", "metrics.json", "table.txt", "table.md", "real.png", "closest.png"} <= written.keys()
    origin = json.loads(written["metrics.json"])["origin"]
    for stage, path in {"vqvae": VQVAE, "prior": PRIOR, "classifier": CLASSIFIER}.items():
        assert origin[stage] == checkpoint.read_header(path, stage).fingerprint
    rows = {line for line in lines if line.startswith("pixelcnn, ")}
    assert len(rows) >= 3
    assert rows <= set(written["table.txt"].decode().splitlines())  # what is printed is what is written


@pytest.mark.parametrize(
    ("command", "written"),
    [
        ("train-vqvae --config smoke.toml --output-folder place", "vqvae.safetensors"),
        (f"train-prior --config smoke.toml --output-folder place --vqvae '{VQVAE}'", "prior.safetensors"),
        ("sample --mode gaussian --output place/s.npz", "s.npz"),
        ("sample --mode pixelcnn --output place/s.png", "s.png"),
        ("reconstruct --output place/r.png", "r.png"),
        ("complete --num-images 1 --output place/c.png", "c.png"),
        ("score --num-images 1 --output place/s.csv", "s.csv"),
        ("compare --output place/c.png", "c.png"),
        ("evaluate --output-folder place --num-samples 100", "report.html"),
    ],
)
def test_what_was_computed_is_on_disk_before_it_is_printed(command: str, written: str, monkeypatch: Patch) -> None:
    def write(text: str) -> None:
        if not text.startswith(("weights: ", "VQ-VAE: ")):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli, "say", write)
    with pytest.raises(OSError, match="No space"):
        run(*shlex.split(command))
    assert (Path("place") / written).exists()
    shutil.rmtree("place")


# Which flags arrive where


def arguments_of(function: str, command: str, *options: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    with patch(function, side_effect=NotImplementedError) as called, pytest.raises(NotImplementedError):
        run(*command.split(), *options)
    return called.call_args.args, called.call_args.kwargs


MNIST, START = {"dataset": "mnist", "image_size": None}, {"start_from": None}
TRAIN_CLASSIFIER = "prior.evaluation.classifier_training.train_classifier"
TRAINERS = {  # each training command's function, its settings, its default folder, and what else it takes
    "train-vqvae": ("vqvae.train.train_vqvae", (VQVAEConfig, VQVAETraining), "checkpoints/mnist", {**MNIST, **START}),
    "train-prior": (
        "prior.train.train_prior",
        (PriorConfig, PriorTraining),
        RUN,
        {"vqvae_path": VQVAE, "dataset": None, **START},
    ),
    "train-classifier": (TRAIN_CLASSIFIER, (ClassifierConfig, ClassifierTraining), "checkpoints/classifier", MNIST),
}


@pytest.mark.parametrize("command", TRAINERS)
def test_each_flag_of_a_training_command_arrives_over_the_recipe_and_the_recipe_over_the_defaults(command: str) -> None:
    function, classes, folder, its_own = TRAINERS[command]
    default = {**its_own, "data_folder": Path("data"), "output_folder": Path(folder), "device": "auto", "seed": 0}
    default |= {"resume": False, "overwrite": False, "download": True}
    assert arguments_of(function, command)[1] == default
    others = {"data_folder": Path("d"), "output_folder": Path("o"), "device": "cpu", "seed": 4}
    others |= {name: "other" for name in its_own if name != "vqvae_path"}
    if "start_from" in others:
        others["start_from"] = Path("other")
    for name, value in others.items():
        expected = {**default, name: value}
        if (command, name) == ("train-vqvae", "dataset"):
            expected["output_folder"] = Path("checkpoints/other")
        assert arguments_of(function, command, f"--{name.replace('_', '-')}", value)[1] == expected
    for flag, switched in {"--resume": "resume", "--overwrite": "overwrite", "--no-download": "download"}.items():
        assert arguments_of(function, command, flag)[1] == {**default, switched: not default[switched]}
    recipes = {"": ROOT / "configs" / "mnist.toml", "--config smoke.toml": Path("smoke.toml")}
    given = {"batch_size": ("--batch-size", 7), "num_epochs": ("--num-epochs", 9), "lr": ("--lr", 0.001)}
    if command == "train-vqvae":
        given |= {"code_dim": ("--hidden-size", 6), "num_codes": ("--k", 8), "beta": ("--beta", 0.7)}
    for option, recipe in recipes.items() if command != "train-classifier" else [("", None)]:
        expected = resolve(classes, read_recipe(recipe, command.removeprefix("train-")) if recipe else {}, {})
        assert list(arguments_of(function, f"{command} {option}")[0]) == expected
        for name, flag in given.items():
            changed = [replace(part, **{name: flag[1]}) if hasattr(part, name) else part for part in expected]
            assert list(arguments_of(function, f"{command} {option}", *flag)[0]) == changed != expected
    if command == "train-classifier":  # whose defaults are in no recipe
        text, training = " ".join(succeed(command, "--help").stdout.split()), ClassifierTraining()
        for real in (training.batch_size, training.num_epochs, f"{training.lr * 1000:g}e-3"):
            assert f"[default: {real}]" in text


def test_the_flags_of_sample_compare_and_evaluate_reach_their_functions_with_one_default() -> None:
    given = "--guidance 3 --temperature 0.5 --top-k 9 --top-p 0.7"
    for options, expected in (("", [GUIDANCE, None, None, None]), (given, [3.0, 0.5, 9, 0.7])):
        for labels in ("", "--label 3", "--labels 0-9"):
            _, found = arguments_of("prior.maps.sample_codes", f"sample --mode pixelcnn {labels} {options}")
            assert [found[name] for name in ("guidance", "temperature", "top_k", "top_p")] == expected
    for options, given in (("", (None, 0)), ("--num-samples 20 --seed 7", (20, 7))):
        (found, _), named = arguments_of("prior.evaluation.comparison.compare_modes", f"compare {options}")
        assert (found.files, *named.values()) == ((VQVAE, PRIOR), *given)
    assert arguments_of("vqvae.gaussian.draw_gaussian", "sample --mode gaussian")[0][1:] == ("latent", 100, 0)
    assert arguments_of("prior.pair.Pair.draw", "sample --mode pixelcnn")[1]["seed"] == 0
    function = "prior.evaluation.report.evaluate_and_report"
    (pair, file, load_dataset, folder), options = arguments_of(function, "evaluate")
    assert (pair.files, file, folder) == ((VQVAE, PRIOR), CLASSIFIER, Path("evaluation"))
    assert torch.equal(load_dataset(pair.info).validation.images, mnist().validation.images)
    assert options == {"split": "test", "num_samples": None, "guidance": None, "seed": 0, "accuracy_score": False}
    command = "evaluate --split validation --num-samples 120 --guidance 2 --seed 4 --cas --output-folder o"
    (*_, folder), options = arguments_of(function, command)
    given = {"split": "validation", "num_samples": 120, "guidance": 2.0, "seed": 4, "accuracy_score": True}
    assert (folder, options) == (Path("o"), given)


def test_the_files_named_are_used_and_without_any_the_shipped_ones(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    old, new = (save_pair(Path(name), seed=seed).files for seed, name in enumerate(("checkpoints/old", "new")))
    draw = ["sample", "--mode", "pixelcnn", "--num-samples", 1]
    named = ["--vqvae", new[0], "--prior", new[1]]
    for options, files in (([], old), (["--prior", old[1]], old), (named, new)):
        assert f"weights: {files[0]} (your run) and {files[1]} (your run)\n" in succeed(*draw, *options).stdout
    refuse("compare", "--vqvae", new[0], "--prior", old[1], saying=[str(old[1]), "by --vqvae and --prior"])
    shutil.rmtree("checkpoints")
    refuse("sample --mode gaussian", saying=["found none", "create one with python cli.py train-vqvae"])
    refuse("sample --mode pixelcnn", saying=["found none", "create one with python cli.py train-prior"])
    monkeypatch.setattr(runs, "SHIPPED", tmp_path / "new")
    assert succeed(*draw).stdout.count("(the shipped weights)") == 2
    _, options = arguments_of("prior.train.train_prior", "train-prior")
    assert options["output_folder"] == Path("checkpoints/mnist")  # and not the shipped weights' folder


# Mistakes


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("train-vqvae --k 1", "expected --k between 2 and 32767, found 1; "),
        ("sample", "Missing option '--mode'"),
        ("sample --mode pixelcnn --gaussian-input image", "no --gaussian-input with --mode pixelcnn, found image; "),
        ("sample --mode pixelcnn --label 0 --labels 0", "expected --label or --labels, found both; "),
        ("sample --mode pixelcnn --temperature 0", "expected --temperature over 0, found 0; use --top-k 1"),
        ("reconstruct --num-images 121", "expected --num-images between 1 and 120, found 121; try --num-images 120"),
        ("sample --mode gaussian --vqvae damaged", "expected a vqvae checkpoint at damaged, found a file that is cut"),
        ("compare --prior damaged", "; create one with python cli.py train-prior"),
        ("train-vqvae --config wrong.toml", "did you mean 'num_epochs'? (the recipe is wrong.toml)"),
    ],
)
def test_what_cannot_be_is_refused_by_its_flag_or_its_name(command: str, text: str) -> None:
    refuse(command, saying=text)


def test_what_belongs_to_the_prior_is_refused_in_the_gaussian_mode() -> None:
    given = {"--label": 3, "--labels": "0-9", "--guidance": 1.0, "--temperature": 1.0, "--top-k": 5, "--top-p": 0.5}
    for flag, value in {**given, "--prior": "nowhere"}.items():
        text = f"expected no {flag} with --mode gaussian, found {value}; leave it out or change the mode"
        refuse("sample --mode gaussian", flag, value, saying=text)


@pytest.mark.parametrize("command", [*COMMANDS, "sample --mode gaussian"])
def test_a_missing_device_is_refused_and_missing_data_is_fetched_or_named_with_its_place(
    command: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refuse(command, "--device", "cuda", saying="expected a CUDA device for --device cuda, found none; use --device cpu")
    if "sample" in command:
        return
    options = ["--device", "cpu", "--data-folder", tmp_path / "no"]
    texts = [*MNIST_MD5, str(tmp_path / "no" / "MNIST" / "raw"), "(without --no-download)", "as --data-folder"]
    refuse(command, *options, "--no-download", saying=texts)
    assert not (tmp_path / "no").exists()
    with pytest.raises(ConnectionError):  # the default
        run(command, *options)


@pytest.mark.parametrize("command", TRAINERS)
def test_a_run_is_kept_where_the_new_one_is_refused(command: str) -> None:
    given = [command, "--device", "cpu", "--output-folder", RUN, "--batch-size", 32]
    there = [f"run in {RUN}, found one", "with it with --resume", "it with --overwrite", "name another --output-folder"]
    refuse(*given, saying=there)
    refuse(*given, "--resume", "--batch-size", 3, saying=["batch_size = 3;", "or start anew with --overwrite"])
    refuse(*given, "--overwrite", "--data-folder", "nowhere", "--no-download", saying="nowhere")
    refuse(*given, "--overwrite", "--lr", 2, saying="expected --lr between 1e-08 and 1, found 2; ")
    if command == "train-prior":
        Path("shallow.toml").write_text("[prior]\nnum_layers = 1\n")
        refuse(*given, "--overwrite", "--config", "shallow.toml", saying="layers for a map of 7x7 codes")
        refuse(*given, "--overwrite", "--vqvae", PRIOR, saying="found one of stage 'prior'")


def test_an_output_of_another_kind_is_refused_first_and_so_is_one_that_cannot_be_written() -> None:
    for command in ("sample --mode gaussian", "sample --mode pixelcnn", "reconstruct", "compare"):
        refuse(command, "--vqvae=no", "--output=new.jpg", saying=".npz (arrays), found new.jpg; try --output new.png")
    refuse("sample --mode gaussian", place="damaged/s", saying="expected to write damaged/s.npz: ")
    for command in TRAINERS:
        texts = ["expected to write damaged/run/", "name another --output-folder"]
        refuse(command, "--device", "cpu", place="damaged/run", saying=texts)


WRONG = ["", "nan", "-1", "1e999", "9" * 30, "\u221e", "no utf-8 \udcff", "a\nb\x1b[2J", "x" * 5000]


@pytest.mark.parametrize("command", [*COMMANDS, "sample --mode gaussian"])
def test_a_wrong_value_of_any_flag_ends_in_one_sentence_and_nothing_is_written(command: str) -> None:
    params = typer.main.get_command(cli.app).commands[command.split()[0]].params
    for flag in [param.opts[0] for param in params if param.opts and not param.is_flag]:
        for value in WRONG if flag != "--output-folder" else ["", "x" * 5000]:  # any other is a folder's name
            if (flag, value) == ("--temperature", "9" * 30):
                continue  # wild, but not wrong
            offline = [] if command.startswith("sample") else ["--no-download"]
            message = refuse(f"{command} --device cpu", *offline, f"{flag}={value}", saying="")
            assert message.count("\n") in (0, 4)  # the usage has four lines
            assert "\x1b" not in message


def test_paths_may_begin_with_the_home_folder(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    succeed("sample", "--mode", "gaussian", "--num-samples", 1, "--output=~/s.npz")
    assert (tmp_path / "s.npz").exists()
    for flag in ("--data-folder", "--output-folder"):
        assert tmp_path / "x" in arguments_of("prior.train.train_prior", "train-prior", f"{flag}=~/x")[1].values()


def test_what_memory_does_not_hold_ends_in_a_sentence_and_a_bug_keeps_its_traceback(monkeypatch: Patch) -> None:
    library = ImportError("libtorch_cpu.so: failed to map segment from shared object")
    allocator = RuntimeError("DefaultCPUAllocator: can't allocate memory")
    for error in (MemoryError(), torch.OutOfMemoryError(), allocator, library):
        monkeypatch.setattr("vqvae.storage.runs.find_vqvae", MagicMock(side_effect=error))
        refuse("sample --mode gaussian", saying="error: expected enough memory, found too little; choose smaller")


def test_a_current_folder_that_is_gone_is_told(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(Path, "cwd", MagicMock(side_effect=FileNotFoundError))
    refuse("sample --mode gaussian", saying="error: expected a current folder, found that it is gone or closed; change")


def test_a_bug_keeps_its_traceback(monkeypatch: Patch) -> None:
    monkeypatch.setattr("vqvae.storage.runs.find_vqvae", lambda _: int("a bug"))
    with pytest.raises(ValueError, match="a bug"):
        run("sample", "--mode", "gaussian")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_in_the_command_to_go_on_with(number: int, monkeypatch: Patch) -> None:
    interrupted = MagicMock(side_effect=Interrupted(number, 7))
    monkeypatch.setattr("prior.train.train_prior", interrupted)
    monkeypatch.setattr("prior.pair.load", interrupted)
    again = "all of it is saved; go on with: python cli.py train-prior --output-folder 'my run' --resume"
    for flag in ("--overwrite", "--resume"):
        status, _, printed = run("train-prior", flag, "--output-folder", "my run")
        assert (status, printed) == (128 + number, f"stopped by a signal after step 7; {again}\n")
    assert run("evaluate").stderr == "stopped by a signal after step 7; what was measured before is written\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("place", ["import typer", "import torch", "draw"])
def test_a_signal_at_any_time_ends_in_one_line(number: int, place: str, tmp_path: Path) -> None:
    kill = f"import os; os.kill(os.getpid(), {int(number)})"
    if place.startswith("import"):  # the module there is found before the real one
        (tmp_path / f"{place.split()[1]}.py").write_text(f"try:\n    {kill}\nexcept BaseException:\n    pass\n")
    else:
        kill = f"import vqvae.gaussian as g; g.draw_gaussian = lambda *_: exec({kill!r})"
    lines = [f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]", kill * (place == "draw"), "import cli"]
    program = "\n".join([*lines, "cli.main()"])
    done = subprocess.run(
        [sys.executable, "-c", program, "sample", "--mode=gaussian", "--output", tmp_path / "s.npz"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (128 + number, "stopped by a signal\n")
    assert not (tmp_path / "s.npz").exists()


def test_processes_of_torchrun_join_before_the_command(monkeypatch: Patch) -> None:
    calls = MagicMock()
    monkeypatch.setattr("vqvae.distributed.process_group", calls.join)
    monkeypatch.setattr(cli, "app", calls.run)
    run("sample")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    run("sample")
    assert [name for name, *_ in calls.mock_calls] == ["run", "join", "join().__enter__", "run", "join().__exit__"]


# The library's messages


def test_python_in_backticks_becomes_what_is_typed() -> None:
    message = "`num_samples` (`num_codes=8`), `code_dim`, `resume=True`, `download=False`, `vqvae='my run/v'`, "
    shown = "--num-samples (--k 8), --hidden-size, --resume, --no-download, --vqvae 'my run/v', "
    message, shown = message + "`train_vqvae()`, `width`, `height=3`, beta=3", shown + "python cli.py train-vqvae, "
    with patch.object(sys, "argv", ["cli.py"]):
        assert cli.as_flags(message) == shown + "width, height=3, beta=3"
        quoted = "`prior='`k` \\udcff'` `output=my new.png`"
        assert cli.as_flags(quoted) == r"--prior $'`k` \377' --output 'my new.png'"


def messages() -> Iterator[str]:
    """The source of everything from which an error for the user is made, with {} for each inserted value."""
    makers = {"InputError", "MissingFileError", "open_checked", "missing_files", "diverged"}
    for path in [ROOT / "cli.py", *(path for name in ("vqvae", "prior") for path in (ROOT / name).rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            made = isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in makers
            if made or (isinstance(node, ast.Assign) and "remedy" in ast.unparse(node.targets[0]).lower()):
                yield re.sub(r"\{[^{}]*\}", "{}", ast.unparse(node))


def test_messages_name_in_backticks_only_what_exists_and_no_flags() -> None:
    commands = typer.main.get_command(cli.app).commands
    flags = {param.name: param for command in commands.values() for param in command.params}
    settings = [part for _, classes, _, _ in TRAINERS.values() for part in classes]
    known = {*flags, *signature(Pair.complete).parameters, *(field.name for part in settings for field in fields(part))}
    found = []
    for text in messages():
        assert text.count("`") % 2 == 0, text
        assert not re.search(r"(^|\s)--\w|cli\.py|\bflag\b", text), text
        found += text.split("`")[1::2]
    assert len(found) > 60
    for quoted in found:
        name, _, value = quoted.partition("=")
        if name.endswith("()"):
            pattern = name.removesuffix("()").replace("_", "-").replace("{}", "*")
            assert any(fnmatch(command, pattern) for command in commands), quoted
        elif value in ("True", "False"):  # a switch that can be typed
            assert flags[name].secondary_opts if value == "False" else flags[name].opts, quoted
        else:
            assert name == "{}" or name in known, quoted
