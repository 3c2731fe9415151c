"""Which dataset a name or a path leads to, and what a user is told about one that cannot be used."""

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import FIXTURE
from vqvae.data.load import KNOWN, load_dataset
from vqvae.errors import InputError, MissingFileError

Patch = pytest.MonkeyPatch
NUM = 12
IMAGES = np.random.default_rng(0).integers(0, 256, (NUM, 6, 5), dtype=np.uint8)


def files(*names: str, size: tuple[int, int] = (6, 5)) -> Callable[[Path], object]:
    """What makes a folder of different images with these names."""

    def make(path: Path) -> None:
        for i, name in enumerate(names):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(i).integers(0, 256, size, dtype=np.uint8)
            Image.fromarray(pixels).save(path / name)

    return make


def numbered(*folders: str) -> list[str]:
    return [f"{folder}{i}.png" for folder in folders for i in range(NUM)]


def both(*makers: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda path: [make(path) for make in makers]


def copies(path: Path) -> None:
    for i in range(NUM):
        files(f"a/{i}.png")(path)
    files(*numbered("b/"))(path)


def unreadable(path: Path) -> None:
    files(*numbered(""))(path)
    for name in ("x.png", "y.png"):
        (path / name).write_bytes(b"text")


def linked(path: Path) -> None:
    files(*numbered(""))(path)
    (path / "link.png").symlink_to("/etc/hostname")


def npz(**content: Any) -> Callable[[Path], object]:
    return lambda path: np.savez(path, **content)


def npy_header(shape: str, descr: str = "'|u1'", order: str = "False") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}}}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def member(content: bytes) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("images.npy", content)

    return make


def evil(path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(path) + ".run",)

    member(npy_header("(1,)", "'|O'") + pickle.dumps(Evil()))(path)


def with_value(value: float) -> np.ndarray:
    images = (IMAGES / 255).astype(np.float32)
    images[7, 3, 2] = value
    return images


SIDES = both(files(*numbered("")), files("tall.png", size=(9, 5)))
BAD = {
    "empty folder": ("set", Path.mkdir, "expected images in .*set, found no file whose name ends in .png, .jpg, "),
    "two sizes": ("set", SIDES, r"images of one size in .*set, found 6x5 \(0.png\) and 9x5 \(tall.png\); resize .* "
        "`image_size=5`"),
    "large": ("set", files(*numbered(""), size=(2, 1025)), "at most 1024x1024 in .*, found 2x1025; .*`image_size=64`"),
    "half in subfolders": ("set", files("a/1.png", "b/1.png", "0.png"), "either in subfolders, .* found 0.png beside "
        "the subfolder a; move it"),
    "half in splits": ("set", files("train/1.png", "test/1.png", "0.png"), "found 0.png beside the subfolder test"),
    "half in classes": ("set", files("train/a/1.png", "test/a/1.png", "test/0.png"), "found 0.png beside the subfol"),
    "validation": ("set", files("train/a/1.png", "val/a/1.png"), "or train and test, found train, val; put validation "
        "images into train"),
    "splits by other names": ("set", files("Training/a/1.png", "testing/a/1.png"), "found Training, testing; put "),
    "more than two splits": ("set", files("train/1.png", "test/1.png", "extra/1.png"), "found extra, test, train; put"),
    "other classes": ("set", files("train/a/1.png", "train/b/1.png", "test/a/1.png"), "the same classes in train and "
        "in test of .*set, found only in one of them b; add"),
    "one image": ("set", files(*numbered("a/"), "b/1.png"), "enough different images of b for each of train, valida"),
    "copies": ("set", copies, "expected in .*set enough different images of a for each of train, validation, test"),
    "two images": ("set", files("1.png", "2.png"), "enough different images for each of train, validation, test, fou"),
    "unreadable": ("set", unreadable, "expected images in .*set, found 2 of 14 that cannot be read: x.png, y.png, the "
        "first because: expected an image at .*x.png, found a file that is cut short, damaged or of another kind"),
    "link": ("set", linked, "expected only files inside .*set, found the link .*link.png, which leads out of it"),
    "name of a class": ("set", files(*numbered("a\x1b/")), r"names that can be printed, found 'a\\x1b'; re"),
    "nothing there": ("none", lambda path: None, f"found nothing at .*none; name one of {', '.join(KNOWN)}, a folder "),
    "links in circles": ("set", lambda path: path.symlink_to(path), "found nothing at .*set; name one of"),
    "text": ("set.txt", Path.touch, "expected `dataset` to be a folder or an .npz file, found .*set.txt; name one of"),
    "no zip": ("set.npz", lambda path: path.write_bytes(b"text"), "expected an .npz file with 'images' at .*set.npz, "
        "found a file that is cut short, damaged or of another kind"),
    "device": ("/dev/null", lambda path: None, "expected `dataset` to be a folder or an .npz file, found /dev/null"),
    "no images": ("set.npz", npz(x=IMAGES), "expected an array 'images' in .*set.npz, found x.npy; write it with"),
    "objects": ("set.npz", evil, "numbers or text as 'images' in .*set.npz, found Python objects, which are not loa"),
    "objects as labels": ("set.npz", npz(images=IMAGES, labels=np.array([None] * NUM)), "as 'labels' in .* found Pyth"),
    "flat": ("set.npz", npz(images=IMAGES[0]), r"of shape \(N, H, W\), .* with 1 or 3 channels, found \(6, 5\); give"),
    "channels": ("set.npz", npz(images=np.zeros((9, 6, 5, 4), "u1")), r"1 or 3 channels, found \(9, 6, 5, 4\); give"),
    "none": ("set.npz", npz(images=IMAGES[:0]), r"1 or 3 channels, found \(0, 6, 5\); give them such a shape"),
    "wide": ("set.npz", npz(images=np.zeros((3, 2, 1025), "u1")), "most 1024x1024 in .*, found 2x1025; .*`image_size="),
    "whole numbers": ("set.npz", npz(images=IMAGES.astype("i4")), "as uint8 or as floating-point values in 0..1, found "
        "int32; convert them"),
    "NaN": ("set.npz", npz(images=with_value(np.nan)), "with values in 0..1, found values that are NaN; remove them"),
    "infinite": ("set.npz", npz(images=with_value(np.inf)), "with values in 0..1, found values from 0 to inf; scale"),
    "negative": ("set.npz", npz(images=with_value(-0.5)), "with values in 0..1, found values from -0.5 to 1; scale"),
    "columns first": ("set.npz", npz(images=np.asfortranarray(IMAGES)), "row by row, found an array in Fortran's ord"),
    "too few labels": ("set.npz", npz(images=IMAGES, labels=np.arange(9)), r"'labels' in .*set.npz of shape \(12,\), "
        r"whole numbers or short text, found int64 of shape \(9,\); give each image one label"),
    "labels all differ": ("set.npz", npz(images=IMAGES, labels=np.arange(NUM) * 9), "different images of 0 for"),
    "fractions": ("set.npz", npz(images=IMAGES, labels=np.zeros(NUM)), "whole numbers or short text, found float64 of"),
    "NaN as labels": ("set.npz", npz(images=IMAGES, labels=np.full(NUM, np.nan)), "short text, found float64 of"),
    "empty label": ("set.npz", npz(images=IMAGES, labels=np.array([""] * NUM)), "be printed, found ''; rename it"),
    "cut short": ("set.npz", member(npy_header("(99, 6, 5)") + bytes(60)), "cut short, .*images is not as long as it"),
    "enormous": ("set.npz", member(npy_header(f"({10**18}, 9, 9)")), "cut short, damaged or"),
    "header": ("set.npz", member(npy_header("__import__('os').getcwd()")), "found a file that is cut short, damaged o"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_set_that_cannot_be_used_is_refused_in_one_sentence(tmp_path: Path, case: str) -> None:
    name, make, message = BAD[case]
    make(tmp_path / name)
    with pytest.raises(InputError, match=message) as caught:
        load_dataset(tmp_path / name, tmp_path / "data")
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, MissingFileError) == ("found nothing at" in message)
    assert [*tmp_path.rglob("*.safetensors"), *tmp_path.rglob("*.partial"), *tmp_path.rglob("*.run")] == []


def test_an_empty_text_is_not_the_current_folder(tmp_path: Path, monkeypatch: Patch) -> None:
    files(*numbered(""))(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="expected `dataset` to be known or a path, found ''; name one of"):
        load_dataset("")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(InputError, match=r"expected an .npz file .*, found what can't be read: It is a pipe or a dev"):
        load_dataset(tmp_path / "pipe.npz", tmp_path / "data")


@pytest.mark.parametrize(("options", "message"), [
    ({"image_size": "0"}, "expected `image_size` to be a side or HEIGHTxWIDTH"),
    ({"channels": 2}, "expected images of 1 or 3 channels, found 2"),
])  # fmt: skip
def test_arguments_out_of_range_are_refused(tmp_path: Path, options: Any, message: str) -> None:
    files(*numbered(""))(tmp_path / "set")
    with pytest.raises(InputError, match=message):
        load_dataset(tmp_path / "set", tmp_path / "data", **options)


def test_a_known_name_wins_over_a_folder_of_that_name_which_is_found_by_its_path(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    files(*numbered(""))(tmp_path / "mnist")
    assert load_dataset("mnist", FIXTURE, download=False).info.source == ""
    for dataset in ("./mnist", "~/mnist", tmp_path / "mnist", Path("x") / ".." / "mnist"):
        Path("x").mkdir(exist_ok=True)
        assert load_dataset(dataset).info.source == str(tmp_path / "mnist")
    assert len([*Path("data", "prepared").iterdir()]) == 1  # all of them are one set


def test_a_known_set_by_a_path_object_is_known(tmp_path: Path) -> None:
    assert load_dataset(Path("mnist"), FIXTURE, download=False).info.name == "mnist"


@pytest.mark.parametrize(
    ("options", "shape", "expected"),
    [
        ({"image_size": 14}, (1, 14, 14), lambda x: x.view(-1, 1, 14, 2, 14, 2).mean(dim=(3, 5))),
        ({"image_size": "7x14"}, (1, 7, 14), lambda x: x[:, :, 7:21].view(-1, 1, 7, 2, 14, 2).mean(dim=(3, 5))),
        ({"channels": 3}, (3, 28, 28), lambda x: x.expand(-1, 3, -1, -1)),
        ({"image_size": "28x28", "channels": 1}, (1, 28, 28), lambda x: x),
    ],
    ids=range(4),
)
def test_a_known_set_is_resized_by_area_from_its_centre(
    options: dict[str, Any], shape: tuple[int, ...], expected: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    own, found = load_dataset("mnist", FIXTURE), load_dataset("mnist", FIXTURE, **options)
    assert found.info.image_shape == shape
    assert (found.info.class_counts, found.deformation) == (own.info.class_counts, own.deformation)
    pairs = [(own.train, found.train), (own.validation, found.validation), (own.load_test(), found.load_test())]
    for given, fitted in pairs:
        assert fitted.images.dtype == torch.uint8
        assert torch.equal(fitted.labels, given.labels)
        torch.testing.assert_close(
            fitted.images.float(), expected(given.images.float()), rtol=0, atol=1
        )  # it rounds twice
