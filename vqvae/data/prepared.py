"""A user's own images as a dataset: read once, split, and from then on mapped from disk.

The images go through a scratch file to three files, one for each split, in `<data folder>/prepared/`. That needs twice
the disk space of the pixels, for a while, and of memory a few bytes for each image.
"""

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vqvae.console import progress, remark
from vqvae.data.dataset import SPLIT_SEED, Dataset, DatasetInfo, Split
from vqvae.errors import InputError
from vqvae.storage.files import alone_in, open_checked, refusals
from vqvae.storage.recipe import from_dict
from vqvae.storage.tensors import Streamed, TensorFile, write_streamed

SPLITS = ("train", "validation", "test")
TRAIN, VALIDATION, TEST, LEFT_OUT = range(4)
SHARE = 0.1  # of the images, for validation; and again for test, where the set has no test split of its own
VERSION = 1  # of how images are read and split; another one has files of an older version made anew
HASH_BYTES = 16


class SourceImages(NamedTuple):
    """What a dataset is made from. There are N images."""

    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]  # () if the images have no labels
    labels: np.ndarray  # (N,) int64; all 0 without classes
    in_test: np.ndarray | None  # (N,) bool: the set's own test split; None if it has none
    images: Iterator[tuple[int, Tensor]]  # each one's number and its pixels (C, H, W) uint8; some may be missing


class ImageFormat(NamedTuple):
    """The (height, width) and the channels, 1 or 3, that images get. None stands for the set's own."""

    size: tuple[int, int] | None = None
    channels: int | None = None


def load_prepared(
    source: Path, state: str, wanted: ImageFormat, data_folder: Path, read: Callable[[ImageFormat], SourceImages]
) -> Dataset:
    """The dataset that is made from a folder or a file. It is made now, if that was not done before.

    Args:
        source: the absolute path of the folder or file.
        state: text that differs whenever the source differs. Files that were made from another state are made anew.
        read: reads the source.
    Raises:
        InputError: the source cannot be a dataset, or the data folder cannot be written.
    """
    if not (source.name and str(source).isprintable()):
        raise InputError(f"expected `dataset` to have a name that can be printed, found {source}; rename it")
    # What was made for the set's own size serves too where just that size is wanted, as a checkpoint of it wants it.
    for made in dict.fromkeys((wanted, wanted._replace(channels=None), ImageFormat())):
        folder, origin = _folder_of(source, state, made, data_folder)
        if found := _load(folder, origin, wanted):
            return found
    folder, origin = _folder_of(source, state, wanted, data_folder)
    writing = refusals(f"expected to write {folder}", "name another `data_folder`")
    with writing, alone_in(folder, f"prepares {source.name}"):
        if found := _load(folder, origin, wanted):  # another process has made it by now
            return found
        _make(folder, origin, source, read(wanted))
    if found := _load(folder, origin, wanted):
        return found
    raise InputError(f"expected to read the files just written in {folder}, found others; see that nobody changes them")


def stamp(path: Path) -> tuple[int, int, int]:
    """A file's size and times, which differ when its content does. A program that copies or unpacks files may set the
    first time as it was elsewhere, but not the second.

    Raises:
        OSError: there is no file.
    """
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def assign_splits(labels: np.ndarray, hashes: np.ndarray, in_test: np.ndarray | None = None) -> np.ndarray:
    """The split of each image: TRAIN, VALIDATION, TEST, or LEFT_OUT for what the test split has too.

    It depends on the hashes alone, not on the order of the images. Images of one content are in one split. Of each
    class, one content in ten is for validation, at least one, and as many for test, where the set has no test split.

    Args:
        labels: (N,) int64.
        hashes: (N,) bytes of HASH_BYTES, of the contents. They are as good as random, so their order is a random one.
        in_test: (N,) bool: the set's own test split.
    Returns:
        (N,) int64. A class of fewer than three contents is missing from a split.
    """
    own_test = np.zeros(len(labels), bool) if in_test is None else in_test
    _, content = np.unique(hashes, return_inverse=True)  # numbers contents in the order of their hashes
    tested = np.zeros(content.max() + 1, bool)
    tested[content[own_test]] = True
    # A content of several labels counts for the first of them.
    label = np.full(len(tested), labels.max() + 1)
    np.minimum.at(label, content, labels)
    label[tested] = labels.max() + 1  # behind all classes
    counts = np.bincount(label)
    by_label = np.argsort(label, kind="stable")
    rank = np.empty(len(label), np.int64)  # of a content within its class
    rank[by_label] = np.arange(len(label)) - np.repeat(np.cumsum(counts) - counts, counts)
    share = np.maximum(np.rint(counts * SHARE), 1)[label]
    part = np.where(rank < share, VALIDATION, TRAIN)
    if in_test is None:
        part[(rank >= share) & (rank < 2 * share)] = TEST
    part[tested] = LEFT_OUT
    return np.where(own_test, TEST, part[content])


def _folder_of(source: Path, state: str, wanted: ImageFormat, data_folder: Path) -> tuple[Path, str]:
    """The folder of what is made from a source, and the text that is bound to it."""
    key = json.dumps([str(source), wanted])
    folder = data_folder / "prepared" / f"{source.name[:40]}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    return folder, hashlib.sha256(json.dumps([VERSION, SPLIT_SEED, key, state]).encode()).hexdigest()


def _load(folder: Path, origin: str, wanted: ImageFormat) -> Dataset | None:
    """The dataset in a folder. None, if it is missing, damaged, made from something else, or not as wanted."""
    try:
        (info, train), (info_2, validation), (info_3, test) = (_read(folder, name, origin, wanted) for name in SPLITS)
    except InputError:
        return None
    counts = torch.bincount(train.labels, minlength=info.num_classes)[: info.num_classes].tolist()
    if not info == info_2 == info_3 or info.class_counts != tuple(counts):
        return None  # the checksums are of the tensors alone
    return Dataset(info, train, validation, load_test=lambda: test)  # mapped already, whatever the file becomes


def _read(folder: Path, name: str, origin: str, wanted: ImageFormat) -> tuple[DatasetInfo, Split]:
    """One split, mapped from disk.

    Raises:
        InputError: it is missing, damaged, made from something else, or not as wanted.
    """
    with open_checked(folder / f"{name}.safetensors", "a prepared split", "start again, which makes it anew") as opened:
        file = TensorFile(opened)
        if file.metadata["origin"] != origin:
            raise ValueError("another origin")
        info = from_dict(DatasetInfo, json.loads(file.metadata["info"]))
        channels, *size = info.image_shape
        if wanted.channels not in (None, channels) or wanted.size not in (None, tuple(size)):
            raise ValueError("another size or other channels")  # before all of it is read for its checksum
        num = file.found["labels"][1][0]
        if file.found != {"images": ("U8", [num, *info.image_shape]), "labels": ("I64", [num])}:
            raise ValueError("other shapes")
        file.require_checksum()
        split = Split(**file.map())
        if not 0 <= split.labels.min() <= split.labels.max() < max(info.num_classes, 1):
            raise ValueError("labels out of range")
    return info, split


def _make(folder: Path, origin: str, source: Path, found: SourceImages) -> None:
    """Write the three splits.

    Raises:
        InputError: the images are too few, or there is too little space.
    """
    labels, shape = found.labels, found.image_shape
    counts = tuple(np.bincount(labels).tolist()) if found.class_names else ()
    info = DatasetInfo(source.name, shape, found.class_names, counts, str(source), SPLIT_SEED)  # checks them
    size = math.prod(shape)
    if (needed := 2 * size * len(labels)) > (free := shutil.disk_usage(folder).free):
        raise InputError(
            f"expected {needed} bytes of free space to prepare {source.name} in {folder}, found {free}; free some, or "
            f"name another `data_folder`"
        )
    with tempfile.TemporaryFile(dir=folder) as scratch, progress(len(labels), "image", doing=source.name) as bar:
        rows, hashes = np.zeros(len(labels), np.int64), np.zeros(len(labels), f"S{HASH_BYTES}")
        num = 0
        for row, image in found.images:
            pixels = image.numpy().tobytes()
            scratch.write(pixels)
            rows[num], hashes[num] = row, hash_content(pixels)
            num += 1
            bar.update()
        labels, hashes = labels[rows[:num]], hashes[:num]
        in_test = None if found.in_test is None else found.in_test[rows[:num]]
        parts = _checked_parts(labels, hashes, in_test, source, found.class_names)
        if found.class_names:
            counts = np.bincount(labels[parts == TRAIN], minlength=len(counts)).tolist()
            info = replace(info, class_counts=tuple(counts))
        metadata = {"origin": origin, "info": json.dumps(asdict(info))}
        order = np.argsort(hashes, kind="stable")  # mixed, whatever order the source has
        paths = [folder / f"{name}.safetensors" for name in SPLITS]
        try:
            for part, path in enumerate(paths):
                chosen = order[parts[order] == part]
                pieces = map(partial(_image, scratch, shape), chosen)
                tensors = {  # the labels first, so that they are aligned
                    "labels": Streamed(torch.int64, (len(chosen),), [torch.from_numpy(labels[chosen])]),
                    "images": Streamed(torch.uint8, (len(chosen), *shape), pieces),
                }
                write_streamed(path, metadata, tensors)
        except BaseException:
            for path in paths:  # none is of use without the others, and a full disk needs its space back
                with suppress(OSError):
                    path.unlink()
            raise


def hash_content(pixels: bytes) -> bytes:
    """A hash of an image's content, different for every split seed."""
    return hashlib.blake2b(pixels, digest_size=HASH_BYTES, key=SPLIT_SEED.to_bytes(8, "little")).digest()


def _image(scratch: BinaryIO, shape: tuple[int, int, int], row: int) -> Tensor:
    """One image of the scratch file, (1, C, H, W)."""
    size = math.prod(shape)
    scratch.seek(int(row) * size)
    return torch.frombuffer(bytearray(scratch.read(size)), dtype=torch.uint8).view(1, *shape)


def _checked_parts(
    labels: np.ndarray, hashes: np.ndarray, in_test: np.ndarray | None, source: Path, class_names: tuple[str, ...]
) -> np.ndarray:
    """`assign_splits`, after a check that every split gets an image of every class.

    Raises:
        InputError: a class has too few different images.
    """
    num_classes = max(len(class_names), 1)
    parts = assign_splits(labels, hashes, in_test) if len(labels) else np.zeros(0, np.int64)
    for part, name in enumerate(SPLITS):
        missing = np.flatnonzero(np.bincount(labels[parts == part], minlength=num_classes) == 0)
        if len(missing):
            of = f" of {class_names[missing[0]]}" if class_names else ""
            raise InputError(
                f"expected in {source} enough different images{of} for each of {', '.join(SPLITS)}, found none for "
                f"{name}; add some, or remove copies of one image"
            )
    if left_out := int((parts == LEFT_OUT).sum()):
        remark(f"{left_out} training images of {source.name} are in its test split too; training goes without them")
    return parts
