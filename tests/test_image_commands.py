"""The commands that take images, through the command line: reconstruct, complete and score; and labels by name."""

import csv
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import prior
from prior import Pair
from prior.completions import complete
from prior.scores import score
from tests.helpers import FIXTURE, Result, make_prior, make_vqvae, mnist, run, save_model, save_pair
from vqvae.codec import reconstruct
from vqvae.data.pixels import to_bytes
from vqvae.storage import runs

COMMANDS = ["reconstruct", "complete", "score"]
ANIMALS = ("cat", "dog", "sea lion")


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the fixture as data, an untrained pair for it as the only run, and three images in `own`."""
    folder = tmp_path_factory.mktemp("work")
    shutil.copytree(FIXTURE, folder / "data")
    made, info = folder / "checkpoints" / "made", mnist().info
    header = save_model(made / "vqvae.safetensors", make_vqvae(), "vqvae", info)
    save_model(made / "prior.safetensors", make_prior(), "prior", info, header.fingerprint)
    for name, image in zip(("a", "=b", "é"), mnist().load_test().images, strict=False):
        (folder / "own").mkdir(exist_ok=True)
        Image.fromarray(image[0].numpy()).save(folder / "own" / f"{name}.png")
    (folder / "empty").mkdir()
    (folder / "empty" / "readme.txt").write_text("no image")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"broken" * 20)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(runs, "SHIPPED", folder / "shipped")
        yield folder


@pytest.fixture(scope="module")
def pair() -> Pair:
    return prior.load(device="cpu")


def succeed(*arguments: object) -> Result:
    result = run(*arguments)
    assert result.status == 0, result.stderr
    return result


def refuse(*arguments: object, saying: str) -> None:
    result = run(*arguments, "--output", "new.npz")
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert (result.status, saying in result.stderr) == (1, True), result.stderr
    assert not Path("new.npz").exists()


def arrays_in(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def assert_written(path: Path, expected: dict[str, Any], names: list[str]) -> None:
    found = arrays_in(path)
    assert found.pop("names").tolist() == names
    assert list(found) == list(expected)
    for name, values in expected.items():
        torch.testing.assert_close(torch.from_numpy(found[name]), values, rtol=0, atol=0)


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        return picture.size


TEST = mnist().load_test().images
NUMBERS = [str(number) for number in range(120)]
OWN = ["=b.png", "a.png", "é.png"]  # in the order of a folder
OWN_IMAGES = TEST[[1, 0, 2]]
SOURCES = [(["--num-images", 5], TEST[:5], NUMBERS[:5]), (["--images", "own"], OWN_IMAGES, OWN)]


@pytest.mark.parametrize(("options", "images", "names"), SOURCES, ids=["split", "own"])
def test_reconstruct_writes_arrays_and_says_what_is_lost(
    options: list[object], images: torch.Tensor, names: list[str], pair: Pair, tmp_path: Path
) -> None:
    lines = succeed("reconstruct", *options, "--output", tmp_path / "r.npz").stdout.splitlines()
    expected = reconstruct(pair.vqvae, images)
    assert_written(tmp_path / "r.npz", expected, names)
    error, psnr = expected["squared_error"].mean(), expected["psnr_db"].mean()
    assert lines[1:] == [
        f"mean of {len(images)} images: squared error {error:.5f}, PSNR {psnr:.2f} dB",
        f"wrote {tmp_path / 'r.npz'}",
    ]


def test_a_few_originals_stand_above_their_reconstructions_too(pair: Pair, tmp_path: Path) -> None:
    succeed("reconstruct", "--num-images", 3, "--output", tmp_path / "r.png")
    assert size(tmp_path / "r.png") == (4 + 3 * 60, 4 + 2 * 59)
    expected = to_bytes(reconstruct(pair.vqvae, TEST[:3])["reconstructions"])
    with Image.open(tmp_path / "r.png") as picture:
        found = torch.from_numpy(np.array(picture))[4::2, 4::2, 0]
    for i in range(3):
        assert torch.equal(found[:28, 30 * i : 30 * i + 28], TEST[i, 0])
        assert torch.equal(found[29:57, 30 * i : 30 * i + 28], expected[i, 0])


def test_reconstruct_draws_pairs_in_one_picture(tmp_path: Path) -> None:
    succeed("reconstruct", "--output", tmp_path / "r.png")
    assert size(tmp_path / "r.png") == (604, 2 * (2 + 10 * 59))  # 100 pairs, twice as large
    assert [path.name for path in tmp_path.iterdir()] == ["r.png"]
    with Image.open(tmp_path / "r.png") as picture:
        first = np.asarray(picture)[4:60, 4:60, 0]
    assert np.array_equal(first, TEST[0, 0].numpy().repeat(2, 0).repeat(2, 1))


def test_sample_shows_how_samples_are_drawn(folder: Path, tmp_path: Path) -> None:
    draw = ["sample", "--mode", "pixelcnn", "--num-samples", 3]
    assert succeed(*draw, "--gif").stdout.endswith("wrote pixelcnn.gif\n")
    for path in (tmp_path / "p.webp", tmp_path / "p.png"):
        succeed(*draw, "--output", path)
    for path, kind in ((Path("pixelcnn.gif"), "GIF"), (tmp_path / "p.webp", "WEBP")):
        with Image.open(path) as animation:
            assert (animation.format, animation.n_frames) == (kind, 50)  # of maps of 49 codes
            animation.seek(49)
            assert animation.size == size(tmp_path / "p.png")
    Path("pixelcnn.gif").unlink()
    assert "between 1 and 400, found 401; try" in run(*draw[:3], "--gif", "--num-samples", 401).stderr
    refuse(*draw, "--gif", saying="--output to end in .gif (an animation) or .webp (an animation), found new.npz; try")
    refuse("sample", "--mode", "gaussian", "--gif", saying="expected no --gif with --mode gaussian, found True; leave")


def test_plot_draws_the_logs_of_runs(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "prior").mkdir(parents=True)
        (tmp_path / name / "prior" / "metrics.jsonl").write_text('{"step": 1, "nats_per_code/validation": 2.0}\n')
    result = succeed("plot", tmp_path / "one", tmp_path / "two", "--output", tmp_path / "p.png")
    assert result.stdout == f"wrote {tmp_path / 'p.png'}\n"
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.width == 1500
    failed = run("plot", tmp_path, "--output", tmp_path / "new.png")
    assert failed.stderr.startswith(f"error: expected a run's output folder, with a log such as {tmp_path}")
    assert failed.stderr.endswith("name the --output-folder of a training\n")
    assert not (tmp_path / "new.png").exists()


@pytest.mark.parametrize(("options", "images", "names"), SOURCES, ids=["split", "own"])
def test_complete_writes_what_the_library_draws(
    options: list[object], images: torch.Tensor, names: list[str], pair: Pair, tmp_path: Path
) -> None:
    given = ["--rows", 2, "--samples", 3, "--temperature", 0.9, "--top-k", 9, "--top-p", 0.9, "--guidance", 2]
    succeed("complete", *options, *given, "--seed", 4, "--label", "7", "--output", tmp_path / "c.npz")
    wanted = {"temperature": 0.9, "top_k": 9, "top_p": 0.9, "guidance": 2.0, "seed": 4, "label": 7}
    assert_written(tmp_path / "c.npz", complete(pair, images, 2, 3, **wanted)._asdict(), names)
    succeed("complete", *options, "--output", tmp_path / "c.npz")
    default = complete(pair, images, 3, 8)  # of seven rows
    assert_written(tmp_path / "c.npz", default._asdict(), names)


def test_complete_draws_a_row_for_each_image(tmp_path: Path) -> None:
    for options, columns, captions in (([], 10, 8), (["--samples", 2, "--label", 3], 4, 1)):
        succeed("complete", "--output", tmp_path / "c.png", *options)
        width, height = size(tmp_path / "c.png")
        assert width == 60 * columns + 4
        assert height == 60 * 8 + 4 + 15 * captions + 4 * (captions - 1)


@pytest.mark.parametrize(("options", "images", "names"), SOURCES, ids=["split", "own"])
def test_score_prints_a_table_and_writes_one(
    options: list[object], images: torch.Tensor, names: list[str], pair: Pair, tmp_path: Path
) -> None:
    expected = score(pair, images, names)
    printed = succeed("score", *options).stdout.splitlines()
    assert printed[1].split() == ["name", "nats", "bits", "bits", "per", "code", "label", "probability"]
    assert [line.split()[0] for line in printed[2:-1]] == names
    assert [float(line.split()[1]) for line in printed[2:-1]] == pytest.approx(expected.nats.tolist(), rel=1e-3)
    assert printed[-1].startswith(f"mean of {len(images)} images: ")
    lines = succeed("score", *options, "--output", tmp_path / "s.csv").stdout.splitlines()
    assert lines == [*printed, f"wrote {tmp_path / 's.csv'}"]
    with (tmp_path / "s.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    assert [row[0] for row in rows] == [name.replace("=b", "'=b") for name in names]
    assert [float(row[1]) for row in rows] == expected.nats.tolist()
    succeed("score", *options, "--output", tmp_path / "s.npz")
    assert arrays_in(tmp_path / "s.npz")["nats"].tolist() == expected.nats.tolist()


def test_without_classes_there_are_no_labels_to_score_or_to_ask_for(tmp_path: Path) -> None:
    files = save_pair(tmp_path, num_classes=0).files
    named = ["--vqvae", files[0], "--prior", files[1], "--images", "own"]
    assert succeed("score", *named).stdout.splitlines()[1].split() == ["name", "nats", "bits", "bits", "per", "code"]
    succeed("complete", *named, "--output", tmp_path / "c.png")
    for label in ("cat", "0"):
        refuse("complete", *named, "--label", label, saying="expected --label to be left out, because the prior has no")
    refuse("complete", *named, "--guidance", 2, saying="expected no --guidance, because the prior has no classes to")


@pytest.mark.parametrize("command", COMMANDS)
def test_images_of_another_size_are_told_and_those_that_are_none_are_refused(command: str, tmp_path: Path) -> None:
    Image.new("RGB", (50, 30), "red").save(tmp_path / "wide.png")
    told = succeed(command, "--images", tmp_path, "--output", tmp_path / "o.npz").stderr
    assert "1 of 1 images had another size or other colours than the model's, 28x28 and grey: their centres" in told
    assert "centres" not in succeed(command, "--images", "own", "--output", tmp_path / "o.npz").stderr
    refuse(command, "--images", "empty", saying="expected images in empty, found no file whose name ends in .png")
    refuse(command, "--images", "nowhere", saying="expected images at nowhere, found nothing there; name a folder of")
    refuse(command, "--images", "broken.png", saying="expected an image at broken.png, found ")
    refuse(command, "--images", "data/MNIST/raw/MD5SUMS", saying="expected an image at data/MNIST/raw/MD5SUMS, found ")


@pytest.mark.parametrize("command", COMMANDS)
def test_contradictions_are_refused_before_any_weights_are_read(command: str) -> None:
    damaged = ["--vqvae", "nowhere", "--images", "own"]
    refuse(
        command, *damaged, "--num-images", 3, saying="expected --images or --num-images, found own and 3; give one of"
    )
    refuse(command, *damaged, "--dataset", "mnist", saying="expected --images or --dataset, found own and mnist; give")
    result = run(command, "--vqvae", "nowhere", "--output", "new.jpg")
    assert result.stderr.startswith("error: expected --output to end in .")
    assert "found new.jpg; try --output new." in result.stderr


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("--rows 8", "expected --rows between 0 and 7, found 8; try --rows 3"),
        ("--samples 99999999999", "expected --samples for which "),
        ("--temperature 0", "expected --temperature over 0, found 0; use --top-k 1"),
        ("--label 10", "found '10'; did you mean"),
        ("--label one", "expected --label to be names of classes (0, 1, 2, 3, 4, 5, 6, 7, 8, 9), found 'one'; "),
        ("--label 0-9", "found '0-9'; "),
        ("--num-images 121", "expected --num-images between 1 and 120, found 121; try --num-images 120"),
    ],
)
def test_what_cannot_be_completed_is_refused_by_its_flag(options: str, text: str) -> None:
    refuse("complete", *options.split(), saying=text)


@pytest.mark.parametrize("command", COMMANDS)
def test_another_dataset_of_the_same_shape_will_do(command: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(256, size=(60, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", images=values, labels=np.arange(60) % 2)
    options = ["--dataset", tmp_path / "set.npz", "--data-folder", tmp_path, "--output", tmp_path / "o.npz"]
    assert f"wrote {tmp_path / 'o.npz'}" in succeed(command, *options).stdout
    names = [row for row in arrays_in(tmp_path / "o.npz")["names"] if row in NUMBERS]
    assert 0 < len(names) < 20


def test_what_is_read_is_not_written_over_and_gets_no_pictures(pair: Pair, tmp_path: Path) -> None:
    set_folder, array_file = tmp_path / "set", tmp_path / "set.npz"
    (set_folder / "deep").mkdir(parents=True)
    for number, image in enumerate(TEST[:60]):
        Image.fromarray(image[0].numpy()).save(set_folder / "deep" / f"{number}.png")
    np.savez(array_file, images=TEST[:60, 0].numpy())
    (tmp_path / "link.png").symlink_to(set_folder / "deep" / "3.png")
    info = replace(pair.info, source=str(set_folder))
    header = save_model(tmp_path / "vqvae.safetensors", pair.vqvae, "vqvae", info)
    save_model(tmp_path / "prior.safetensors", pair.prior, "prior", info, header.fingerprint)
    learned = ["--vqvae", tmp_path / "vqvae.safetensors", "--prior", tmp_path / "prior.safetensors"]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def check(command: str, source: list[object], output: Path, *flag: str) -> None:
        pair_flags = learned[: 2 if command == "reconstruct" else 4]
        result = run(command, *pair_flags, *source, *(flag or ["--output"]), output, "--data-folder", tmp_path / "data")
        assert (result.status, "error: expected an output apart from images" in result.stderr) == (1, True), (
            result.stderr
        )

    for command in ("reconstruct", "complete"):
        check(command, ["--images", set_folder / "deep" / "3.png"], set_folder / "deep" / "3.png")
        check(command, ["--images", set_folder / "deep" / "3.png"], tmp_path / "link.png")
        check(command, ["--images", set_folder], set_folder / "new.png")
        check(command, ["--images", "own"], set_folder / "new.png")  # the model's own dataset
    for command in ("reconstruct", "complete", "score"):
        check(command, ["--images", array_file], array_file)
        check(command, ["--dataset", array_file], array_file)
    for command in ("reconstruct", "complete", "compare"):
        check(command, [], set_folder / "deep" / "new.png")
    check("evaluate", [], set_folder / "deep", "--output-folder")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.fixture(scope="module")
def animals(folder: Path) -> list[object]:
    """The flags that name a pair whose classes have names."""
    info = replace(mnist().info, class_names=ANIMALS, class_counts=(1, 1, 1))
    header = save_model(folder / "animals" / "vqvae.safetensors", make_vqvae(), "vqvae", info)
    save_model(folder / "animals" / "prior.safetensors", make_prior(num_classes=3), "prior", info, header.fingerprint)
    return ["--vqvae", "animals/vqvae.safetensors", "--prior", "animals/prior.safetensors"]


def test_classes_are_asked_for_by_name(animals: list[object], tmp_path: Path) -> None:
    draw, path = ["sample", "--mode", "pixelcnn", *animals, "--num-samples", 6], tmp_path / "s.npz"
    for options, labels in (
        (["--labels", "dog,cat"], [1, 0, 1, 0, 1, 0]),
        (["--labels", "sea lion,0-1"], [2, 0, 1, 2, 0, 1]),
        (["--label", "sea lion"], [2] * 6),
        (["--label", "1"], [1] * 6),
    ):
        succeed(*draw, *options, "--output", path)
        assert arrays_in(path)["labels"].tolist() == labels
    refuse(*draw, "--labels", "cat,dgo", saying="(cat, dog, sea lion), found 'dgo'; did you mean 'dog'?")
    refuse(*draw, "--labels", "cat,3", saying="expected labels in 0..2, found 3; choose others by --labels")
    completed = succeed("complete", *animals, "--images", "own", "--label", "dog", "--output", path)
    assert f"wrote {path}" in completed.stdout
    assert (arrays_in(path)["labels"] == 1).all()


def test_names_of_classes_stand_above_the_columns_that_they_were_asked_for(
    animals: list[object], tmp_path: Path
) -> None:
    draw = ["sample", "--mode", "pixelcnn", *animals, "--num-samples", 18, "--output", tmp_path / "s.png"]
    succeed(*draw, "--labels", "0-2")
    assert size(tmp_path / "s.png") == (60 * 9 + 4, 60 * 2 + 4 + 15)
    succeed(*draw)
    assert size(tmp_path / "s.png") == (60 * 9 + 4, 60 * 2 + 4 + 2 * 15 + 4)
