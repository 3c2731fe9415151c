"""MNIST: 28x28 grey images of the ten digits.

The files on disk are torchvision's own (`<data folder>/MNIST/raw/*-ubyte`). They are compared with the MD5 sums of the
originals. If the folder holds an `MD5SUMS` file of its own, as the tests' folder does, they are compared with that.
"""

import math
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from vqvae.data.dataset import VALIDATION_SHARE, Dataset, DatasetInfo, Deformation, Split, split_validation
from vqvae.data.download import fetch, missing_files
from vqvae.data.idx import MNIST_MD5, Sums, read_arrays, read_sums
from vqvae.errors import InputError

IMAGE_SIDE = 28
IMAGE_SHAPE = (1, IMAGE_SIDE, IMAGE_SIDE)
NUM_CLASSES = 10
DIGITS = Deformation(rotation=math.radians(12), scaling=0.12, shift=0.15)


def load_mnist(data_folder: Path, download: bool = True) -> Dataset:
    """MNIST from a folder, to which it is downloaded first if it is not there.

    The 60,000 training images become 55,000 for training and 5,000 for validation. The 10,000 test images keep their
    original order. All four files are checked at once, so that a damaged test set is found before any training.

    Raises:
        MissingFileError: files are missing, and they may not or cannot be downloaded.
        InputError: a file is damaged, or the folder cannot be written.
    """
    sums = read_sums(data_folder / "MNIST" / "raw" / "MD5SUMS")
    train, validation = split_validation(_load(data_folder, "train", download, sums))
    info = DatasetInfo(
        name="mnist",
        image_shape=IMAGE_SHAPE,
        class_names=tuple(map(str, range(NUM_CLASSES))),
        class_counts=tuple(torch.bincount(train.labels, minlength=NUM_CLASSES).tolist()),
    )
    return Dataset(
        info, train, validation, load_test=partial(_load, data_folder, "t10k", download, sums), deformation=DIGITS
    )


def _load(data_folder: Path, part: str, download: bool, sums: Sums) -> Split:
    """The "train" or the "t10k" images and labels. All four files are checked."""
    raw = data_folder / "MNIST" / "raw"
    arrays = _read(raw, download, sums)
    images, labels = arrays[f"{part}-images-idx3-ubyte"], arrays[f"{part}-labels-idx1-ubyte"].long()
    fits = images.shape == (len(labels), IMAGE_SIDE, IMAGE_SIDE) and len(labels) >= VALIDATION_SHARE
    if not fits or labels.max() >= NUM_CLASSES:
        raise InputError(
            f"expected in {raw} images of {IMAGE_SIDE}x{IMAGE_SIDE}, at least {VALIDATION_SHARE}, and for each a label "
            f"from 0 to {NUM_CLASSES - 1}, found images of shape {tuple(images.shape)} and {len(labels)} labels; "
            f"put MNIST's files there, or name another `data_folder`"
        )
    return Split(images.unsqueeze(1), labels)  # (N, 1, 28, 28)


def _read(raw: Path, download: bool, sums: Sums) -> dict[str, Tensor]:
    """The arrays of all four files, by name. Those that are missing are downloaded first."""
    if read_sums(raw / "MD5SUMS") != sums:  # by which the data is known, since it was first read
        raise InputError(f"expected in {raw} the data that was there before, found that it has changed; put it back")
    arrays = read_arrays(raw, sums)
    if len(arrays) < len(MNIST_MD5) and download:
        fetch(raw, sums)
        arrays = read_arrays(raw, sums)
    if missing := [name for name in MNIST_MD5 if name not in arrays]:
        raise missing_files(raw, missing, "they were removed again" if download else "`download=False` was given")
    return arrays
