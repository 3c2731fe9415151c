"""MNIST: 28x28 grey images of the ten digits.

The files on disk are torchvision's own (`<data folder>/MNIST/raw/*-ubyte`). They are compared with the MD5 sums of the
originals. If the folder holds an `MD5SUMS` file of its own, as the tests' folder does, they are compared with that.
"""

import hashlib
import math
import re
import struct
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vqvae.data.dataset import VALIDATION_SHARE, Dataset, DatasetInfo, Split, split_validation
from vqvae.data.download import IDX_MAGIC, MNIST_MD5, fetch, missing_files
from vqvae.errors import InputError
from vqvae.storage.files import open_checked, read_at_most

IMAGE_SIDE = 28
IMAGE_SHAPE = (1, IMAGE_SIDE, IMAGE_SIDE)
NUM_CLASSES = 10
MAX_SUMS = 2**16  # bytes of an MD5SUMS file
MAX_IDX = 2**26  # bytes of an IDX file; the training images have 47 MB


def load_mnist(data_folder: Path, download: bool = True) -> Dataset:
    """MNIST from a folder, to which it is downloaded first if it is not there.

    The 60,000 training images become 55,000 for training and 5,000 for validation. The 10,000 test images keep their
    original order. All four files are checked at once, so that a damaged test set is found before any training.

    Raises:
        MissingFileError: files are missing, and they may not or cannot be downloaded.
        InputError: a file is damaged, or the folder cannot be written.
    """
    train, validation = split_validation(_load(data_folder, "train", download))
    info = DatasetInfo(
        name="mnist",
        image_shape=IMAGE_SHAPE,
        class_names=tuple(map(str, range(NUM_CLASSES))),
        class_counts=tuple(torch.bincount(train.labels, minlength=NUM_CLASSES).tolist()),
    )
    return Dataset(info, train, validation, load_test=partial(_load, data_folder, "t10k", download))


def _load(data_folder: Path, part: str, download: bool) -> Split:
    """The "train" or the "t10k" images and labels. All four files are checked."""
    raw = data_folder / "MNIST" / "raw"
    if not all(_exists(raw / name) for name in MNIST_MD5):
        if not download:
            raise missing_files(raw, "`download=False` was given")
        fetch(data_folder, IMAGE_SIDE, NUM_CLASSES)
    sums = _read_sums(raw / "MD5SUMS")
    arrays = {}
    for name in MNIST_MD5:
        array = _read_idx(raw / name, sums.get(name))
        if name.startswith(part):
            arrays[name] = array
    images, labels = arrays[f"{part}-images-idx3-ubyte"], arrays[f"{part}-labels-idx1-ubyte"].long()
    fits = images.shape == (len(labels), IMAGE_SIDE, IMAGE_SIDE) and len(labels) >= VALIDATION_SHARE
    if not fits or labels.max() >= NUM_CLASSES:
        raise InputError(
            f"expected in {raw} images of {IMAGE_SIDE}x{IMAGE_SIDE}, at least {VALIDATION_SHARE}, and for each a label "
            f"from 0 to {NUM_CLASSES - 1}, found images of shape {tuple(images.shape)} and {len(labels)} labels; "
            f"delete the files and run again to fetch them anew"
        )
    return Split(images.unsqueeze(1), labels)  # (N, 1, 28, 28)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # the name is too long, or the folder may not be read; opening the file will say so
        return False


def _read_sums(path: Path) -> dict[str, str]:
    """The MD5 sum of each file by its name: the folder's own sums if it has any, or else those of the originals."""
    if not _exists(path):
        return MNIST_MD5
    with open_checked(path, "lines of an MD5 sum and a name", "delete it, or write it anew with md5sum") as file:
        lines = [line.split() for line in read_at_most(file, MAX_SUMS).decode().splitlines()]
        sums = {name: md5 for md5, name in lines}
        if not all(re.fullmatch("[0-9a-f]{32}", md5) for md5 in sums.values()):
            raise ValueError("a sum of other than 32 hexadecimal digits")
        return sums


def _read_idx(path: Path, md5: str | None) -> Tensor:
    """The uint8 array in an IDX file (http://yann.lecun.com/exdb/mnist/ describes the format, at the end).

    Raises:
        InputError: the file has another MD5 sum, its header does not fit its length, or it holds nothing.
    """
    remedy = "delete it and run again to fetch it anew"
    num_axes = 3 if "idx3" in path.name else 1
    with open_checked(path, "an IDX file", remedy) as file:
        content = read_at_most(file, MAX_IDX)
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if found != md5:
            raise InputError(f"{path} is damaged: expected MD5 {md5}, found {found}; {remedy}")
        magic, *shape = struct.unpack_from(f">{1 + num_axes}I", content)
        start = 4 * (1 + num_axes)
        if magic != IDX_MAGIC + num_axes or 0 in shape or len(content) != start + math.prod(shape):
            raise ValueError("its header does not fit its length, or it is empty")
        return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())
