"""Datasets by name or by path: the one place that knows where images come from."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vqvae.data.dataset import Dataset, DatasetInfo, Split
from vqvae.data.images import fit, parse_size
from vqvae.data.mnist import load_mnist
from vqvae.data.torchvision_sets import load_torchvision_set
from vqvae.errors import InputError

KNOWN = ("mnist", "fashion-mnist", "kmnist", "emnist-letters", "cifar10")


@dataclass(frozen=True)
class DatasetChoice:
    """What a recipe says of its dataset, as `load_dataset` takes it."""

    dataset: str = "mnist"
    image_size: str | None = None


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
    size = parse_size(image_size)
    if str(dataset) not in KNOWN:
        raise InputError(f"expected `dataset` to be one of {', '.join(KNOWN)}, found {dataset}")
    return _fitted(_load_known(str(dataset), data_folder, download), size, channels)


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
    chosen = dataset or info.source or info.name
    return load_dataset(chosen, data_folder, image_size=f"{height}x{width}", channels=channels, download=download)


def _load_known(name: str, data_folder: Path, download: bool) -> Dataset:
    if name == "mnist":
        return load_mnist(data_folder, download)
    return load_torchvision_set(name, data_folder, download)


def _fitted(known: Dataset, size: tuple[int, int] | None, channels: int | None) -> Dataset:
    """A set in memory, with its images in another size, or grey or in colour. None keeps what the set has."""
    own_channels, *own_size = known.info.image_shape
    shape = (channels or own_channels, *(size or own_size))
    if shape == known.info.image_shape:
        return known
    return replace(
        known,
        info=replace(known.info, image_shape=shape),
        train=_fitted_split(known.train, shape),
        validation=_fitted_split(known.validation, shape),
        load_test=lambda: _fitted_split(known.load_test(), shape),
    )


def _fitted_split(split: Split, shape: tuple[int, int, int]) -> Split:
    channels, *size = shape
    images = torch.empty(len(split.images), *shape, dtype=torch.uint8)
    for image, fitted in zip(split.images, images, strict=True):
        pixels = Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy())  # (H, W), or (H, W, 3)
        pixels = fit(pixels.convert("L" if channels == 1 else "RGB"), (size[0], size[1]))
        fitted.copy_(torch.from_numpy(np.array(pixels)).view(*size, channels).permute(2, 0, 1))
    return Split(images, split.labels)
