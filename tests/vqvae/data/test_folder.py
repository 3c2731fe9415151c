"""Datasets from a folder of images: classes, splits, and that they are read once."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vqvae.data import folder
from vqvae.data.dataset import Dataset, Split
from vqvae.data.images import read_image
from vqvae.data.load import load_dataset, load_like

Patch = pytest.MonkeyPatch


def noise(path: Path, size: tuple[int, int] = (6, 5), mode: str = "L", seed: int | None = None) -> None:
    """An image file of random pixels, the same ones for the same name or seed. The size is (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([*str(path.name).encode()] if seed is None else seed)
    pixels = rng.integers(0, 256, size if mode == "L" else (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def make_folder(path: Path, names: list[str], mode: str = "L") -> Path:
    for seed, name in enumerate(names):
        noise(path / name, mode=mode, seed=seed)
    return path


def load(path: Path, **options: object) -> Dataset:
    return load_dataset(path, path.parent / "data", **options)


def pixels(split: Split) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.images}


def splits(dataset: Dataset) -> tuple[Split, Split, Split]:
    return dataset.train, dataset.validation, dataset.load_test()


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_subfolders_are_classes_in_a_persons_order_and_every_pixel_arrives(tmp_path: Path, mode: str) -> None:
    names = [f"{label}/{deeper}{i}.png" for label in ("10", "9", "cat") for deeper in ("", "a/b/") for i in range(4)]
    path = make_folder(tmp_path / "my pets", [*names, ".hidden/1.png"], mode)
    (path / "9" / "notes.txt").touch()
    dataset = load(path)
    assert (dataset.info.name, dataset.info.source) == ("my pets", str(path))
    assert dataset.info.class_names == ("9", "10", "cat")
    assert dataset.info.image_shape == (1 if mode == "L" else 3, 6, 5)
    assert dataset.info.class_counts == (6, 6, 6)
    expected = {read_image(path / name).numpy().tobytes(): name.split("/")[0] for name in names}
    found = {
        image.numpy().tobytes(): dataset.info.class_names[label]
        for split in splits(dataset)
        for image, label in zip(*split, strict=True)
    }
    assert found == expected


def test_images_without_subfolders_have_no_classes(tmp_path: Path) -> None:
    dataset = load(make_folder(tmp_path / "flat", [f"{i}.png" for i in range(12)]))
    assert (dataset.info.class_names, dataset.info.class_counts) == ((), ())
    assert [len(split.labels) for split in splits(dataset)] == [10, 1, 1]
    assert not any(split.labels.any() for split in splits(dataset))


@pytest.mark.parametrize("classes", [("a/", "b/"), ("",)])
def test_train_and_test_are_the_sets_own_splits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], classes: tuple[str, ...]
) -> None:
    names = [f"{part}/{label}{i}.png" for part in ("train", "test") for label in classes for i in range(8)]
    path = make_folder(tmp_path / "own", names)
    copied = path / "train" / classes[0]
    for name in ("0.png", "1.png"):
        shutil.copy(copied / name, path / "test" / classes[0] / f"copy of {name}")
    dataset = load(path)
    in_test = {read_image(file).numpy().tobytes() for file in (path / "test").rglob("*.png")}
    assert dataset.info.class_names == tuple(label.strip("/") for label in classes if label)
    assert pixels(dataset.load_test()) == in_test
    assert len(dataset.load_test().labels) == 8 * len(classes) + 2
    train, validation, test = map(pixels, splits(dataset))
    assert train.isdisjoint(validation)
    assert test.isdisjoint(train | validation)
    assert len(train | validation) == 8 * len(classes) - 2
    assert "2 training images of own are in its test split too; training goes without them" in capsys.readouterr().err


def test_one_image_in_colour_makes_all_rgb_and_a_size_makes_all_alike(tmp_path: Path) -> None:
    path = make_folder(tmp_path / "mixed", [f"{i}.png" for i in range(9)])
    noise(path / "0 first.jpg", (40, 30), "RGB")
    dataset = load(path, image_size="4x8")
    assert dataset.info.image_shape == (3, 4, 8)
    expected = {read_image(file, 3, (4, 8)).numpy().tobytes() for file in path.iterdir()}
    assert set.union(*map(pixels, splits(dataset))) == expected
    assert load(path, image_size="4x8", channels=1).info.image_shape == (1, 4, 8)


def test_where_the_size_is_given_no_header_is_read_after_an_image_in_colour(tmp_path: Path, monkeypatch: Patch) -> None:
    path = make_folder(tmp_path / "set", [f"{i}.png" for i in range(20)])
    noise(path / "14.png", mode="RGB")
    opened, read_shape = [], folder.read_shape
    monkeypatch.setattr(folder, "read_shape", lambda file: (opened.append(file.name), read_shape(file))[1])
    assert load(path, image_size=4).info.image_shape == (3, 4, 4)
    assert opened == ["0.png", "1.png", *(f"{i}.png" for i in range(10, 15))]


def test_a_later_start_opens_no_image_and_a_changed_file_is_noticed(tmp_path: Path, monkeypatch: Patch) -> None:
    path = make_folder(tmp_path / "set", [f"{label}/{i}.png" for label in "ab" for i in range(5)])
    dataset = load(path)
    opened: list[Path] = []
    for name in ("read_image", "read_shape"):
        whole = getattr(folder, name)
        monkeypatch.setattr(folder, name, lambda p, *rest, whole=whole: (opened.append(p), whole(p, *rest))[1])
    for again in (load(path), load_like(dataset.info, data_folder=tmp_path / "data")):
        assert again.info == dataset.info
        assert torch.equal(again.train.images, dataset.train.images)
    assert opened == []
    stat = (path / "a" / "0.png").stat()
    os.utime(path / "a" / "0.png", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    load(path)
    assert len(opened) == 20  # each once for its header, once for its pixels
    noise(path / "b" / "new.png")
    assert sum(len(split.labels) for split in splits(load(path))) == 11


def test_two_files_that_change_places_are_noticed(tmp_path: Path) -> None:
    path = make_folder(tmp_path / "set", [f"{label}/{i}.bmp" for label in "ab" for i in range(5)])  # all of one size
    for file in path.rglob("*.bmp"):
        os.utime(file, (1, 1))  # as programs do that unpack files

    def labels() -> dict[bytes, int]:
        images = [pair for split in splits(load(path)) for pair in zip(*split, strict=True)]
        return {image.numpy().tobytes(): int(label) for image, label in images}

    one, other, aside = path / "a" / "0.bmp", path / "b" / "0.bmp", tmp_path / "aside"
    expected = labels()
    for file in (one, other):
        expected[read_image(file).numpy().tobytes()] ^= 1
    one.rename(aside), other.rename(one), aside.rename(other)
    assert labels() == expected


def test_the_split_of_an_image_depends_on_nothing_but_its_content(tmp_path: Path) -> None:
    path = make_folder(tmp_path / "set", [f"{i}.png" for i in range(40)])
    other = tmp_path / "other"
    for i in range(40):
        noise(other / f"renamed {39 - i}.bmp", seed=i)
    assert [*map(pixels, splits(load(path)))] == [*map(pixels, splits(load(other)))]
    for i in range(10):
        shutil.copy(path / f"{i}.png", path / f"copy of {i}.png")
    again = [*map(pixels, splits(load(path)))]
    assert again == [*map(pixels, splits(load(other)))]


def test_images_that_cannot_be_read_are_named_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_folder(tmp_path / "set", [f"{i}.png" for i in range(50)])
    (path / "a\x1b.png").write_bytes(b"")
    whole = (path / "49.png").read_bytes()
    (path / "cut.png").write_bytes(whole[:50])
    frames = [Image.new("L", (5, 6), colour) for colour in (0, 255)]
    frames[0].save(path / "moving.gif", save_all=True, append_images=frames[1:])
    (path / "nowhere.png").symlink_to(path / "missing")
    dataset = load(path)
    assert sum(len(split.labels) for split in splits(dataset)) == 50
    told = capsys.readouterr().err
    assert (
        "are used without 4 of 54 that cannot be read: a\\x1b.png, cut.png, moving.gif and 1 more, the first bec"
        in told
    )
