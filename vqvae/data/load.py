"""Datasets by name or by path: the one place that knows where images come from."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from vqvae.data.arrays import load_arrays
from vqvae.data.dataset import Dataset, DatasetInfo, Split
from vqvae.data.folder import load_folder
from vqvae.data.images import fit_pixels, parse_size
from vqvae.data.mnist import load_mnist
from vqvae.data.prepared import ImageFormat
from vqvae.data.torchvision_sets import SETS, load_torchvision_set
from vqvae.errors import InputError, MissingFileError
from vqvae.storage.files import refusals

KNOWN = ("mnist", *SETS)


@dataclass(frozen=True)
class DatasetChoice:
    """What a recipe says of its dataset, as `load_dataset` takes it."""

    dataset: str = "mnist"
    image_size: str | int | None = None


def load_dataset(
    dataset: str | Path = "mnist",
    data_folder: Path = Path("data"),
    *,
    image_size: str | int | None = None,
    channels: int | None = None,
    download: bool = True,
) -> Dataset:
    """A dataset with its splits.

    Args:
        dataset: one of `KNOWN`, or the path of a folder of images or of an .npz file.
        data_folder: where a known set is, or is put, and where a set that was made from a folder or file is kept.
        image_size: images are resized to it: a side, or "HEIGHTxWIDTH". None stands for the set's own size.
        channels: 1 for grey, 3 for RGB. None stands for the set's own.
        download: fetch a known set where it is missing.
    Raises:
        MissingFileError: there is no such set.
        InputError: it cannot be read, or an argument is out of range.
    """
    wanted = ImageFormat(parse_size(image_size), channels)
    if str(dataset) not in KNOWN:
        return _load_own(dataset, data_folder, wanted)
    if str(dataset) == "mnist":
        return _fitted(load_mnist(data_folder, download), wanted)
    return _fitted(load_torchvision_set(str(dataset), data_folder, download), wanted)


def load_like(
    info: DatasetInfo, dataset: str | Path | None = None, data_folder: Path = Path("data"), *, download: bool = True
) -> Dataset:
    """The dataset that a model was trained on, or another, with images of the same shape.

    What depends on the classes too checks them by `dataset.require_same_kind`.

    Args:
        info: the facts that the model's checkpoint has about its dataset.
        dataset: as in `load_dataset`. None stands for the model's own.
    Raises:
        MissingFileError: there is no such set.
        InputError: it cannot be read.
    """
    channels, height, width = info.image_shape
    chosen = (info.source or info.name) if dataset is None else dataset
    return load_dataset(chosen, data_folder, image_size=f"{height}x{width}", channels=channels, download=download)


def _load_own(named: str | Path, data_folder: Path, wanted: ImageFormat) -> Dataset:
    """A user's own folder or file.

    Raises:
        MissingFileError: there is none.
        InputError: it cannot be read.
    """
    remedy = f"name one of {', '.join(KNOWN)}, a folder of images, or an .npz file"
    if not str(named):  # as a path it would be the current folder
        raise InputError(f"expected `dataset` to be known or a path, found ''; {remedy}")
    dataset = Path(os.path.expanduser(named))  # noqa: PTH111  # Path's own raises where there is no such user
    with refusals(f"expected a dataset at {dataset}", remedy):
        path = Path(os.path.realpath(dataset))  # Path.resolve() raises where links go in circles
        is_folder, exists = path.is_dir(), path.exists()
    if is_folder:
        return load_folder(path, wanted, data_folder)
    if not exists:
        raise MissingFileError(f"expected `dataset` to be known or a path, found nothing at {dataset}; {remedy}")
    if path.suffix.lower() != ".npz":
        raise InputError(f"expected `dataset` to be a folder or an .npz file, found {dataset}; {remedy}")
    return load_arrays(path, wanted, data_folder)


def _fitted(known: Dataset, wanted: ImageFormat) -> Dataset:
    """A known set, which lies in memory, with the wanted size and channels."""
    channels, *size = known.info.image_shape
    height, width = wanted.size or size
    image_shape = (wanted.channels or channels, height, width)
    if image_shape == known.info.image_shape:
        return known

    def fitted(split: Split) -> Split:
        return Split(torch.stack([fit_pixels(image, image_shape) for image in split.images]), split.labels)

    return replace(
        known,
        info=replace(known.info, image_shape=image_shape),
        train=fitted(known.train),
        validation=fitted(known.validation),
        load_test=lambda: fitted(known.load_test()),
    )
