"""MNIST, 28x28 grey images of the ten digits, and how it and every set of the same form are read.

The files on disk are torchvision's own (`<data folder>/MNIST/raw/*-ubyte`). They are compared with the MD5 sums of the
originals. If the folder holds an `MD5SUMS` file of its own, as the tests' folder does, they are compared with that.
"""

import math
from pathlib import Path

from torch import Tensor

from vqvae.data.dataset import VALIDATION_SHARE, Dataset, Split, from_memory
from vqvae.data.deform import Deformation
from vqvae.data.download import fetch, missing_files
from vqvae.data.idx import FILES, IdxSet, is_original, read_arrays, read_sums
from vqvae.errors import InputError

IMAGE_SIDE = 28
NUM_CLASSES = 10
HANDWRITING = Deformation(rotation=math.radians(12), scaling=0.12, shift=0.15)
MNIST_MD5 = {  # of the four original files, not packed
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
MNIST = IdxSet(
    name="mnist",
    title="MNIST",
    folder="MNIST",
    class_names=tuple(map(str, range(NUM_CLASSES))),
    md5=MNIST_MD5,
    mirrors=("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/"),
    deformation=HANDWRITING,
    in_package=True,
)


def load_mnist(data_folder: Path, download: bool = True, known: IdxSet = MNIST) -> Dataset:
    """MNIST, or another set in its form, from a folder, to which it is downloaded first if it is not there.

    The 60,000 training images become 55,000 for training and 5,000 for validation. The 10,000 test images keep their
    original order. All four files are checked at once, so that a damaged test set is found before any training.

    Raises:
        MissingFileError: files are missing, and they may not or cannot be downloaded.
        InputError: a file is damaged, or the folder cannot be written.
    """
    raw = data_folder / known.folder / "raw"
    arrays = _read(known, raw, download)
    full, test = (_split(known, raw, arrays, part) for part in ("train", "t10k"))
    return from_memory(known.name, known.class_names, full, test, known.deformation)


def _split(known: IdxSet, raw: Path, arrays: dict[str, Tensor], part: str) -> Split:
    """The "train" or the "t10k" images and labels."""
    images, labels = arrays[f"{part}-images-idx3-ubyte"], arrays[f"{part}-labels-idx1-ubyte"].long()
    fits = images.shape == (len(labels), IMAGE_SIDE, IMAGE_SIDE) and len(labels) >= VALIDATION_SHARE
    if not fits or labels.max() >= len(known.class_names):
        raise InputError(
            f"expected in {raw} images of {IMAGE_SIDE}x{IMAGE_SIDE}, at least {VALIDATION_SHARE}, and for each a label "
            f"from 0 to {len(known.class_names) - 1}, found images of shape {tuple(images.shape)} and {len(labels)} "
            f"labels; put {known.title}'s files there, or name another `data_folder`"
        )
    return Split(images.unsqueeze(1), labels)  # (N, 1, 28, 28)


def _read(known: IdxSet, raw: Path, download: bool) -> dict[str, Tensor]:
    """The arrays of all four files, by name. Those that are missing are downloaded first, unless they are installed."""
    sums = read_sums(raw / "MD5SUMS")
    arrays = read_arrays(known, raw, sums)
    if len(arrays) < len(FILES) and known.installed and all(is_original(known, name, sums) for name in FILES):
        arrays = read_arrays(known, known.installed, {}) | arrays
    if len(arrays) < len(FILES) and download:
        fetch(known, raw, sums)
        arrays = read_arrays(known, raw, sums)
    if missing := [name for name in FILES if name not in arrays]:
        why = "they were removed again" if download else "`download=False` was given"
        raise missing_files(known, raw, missing, why)
    return arrays
