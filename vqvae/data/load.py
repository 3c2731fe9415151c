"""Datasets by name or by path: the one place that knows where images come from."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vqvae.data.arrays import load_arrays
from vqvae.data.dataset import Dataset, DatasetInfo
from vqvae.data.folder import load_folder
from vqvae.data.images import parse_size
from vqvae.data.mnist import load_mnist
from vqvae.data.prepared import Wanted
from vqvae.errors import InputError, MissingFileError
from vqvae.storage.files import refusals

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
    if str(dataset) not in KNOWN:
        return _load_own(Path(dataset), data_folder, Wanted(parse_size(image_size), channels))
    if str(dataset) != "mnist":
        raise InputError(f"expected `dataset` to be one of {', '.join(KNOWN)}, found {dataset}")
    return load_mnist(data_folder, download)


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


def _load_own(dataset: Path, data_folder: Path, wanted: Wanted) -> Dataset:
    """A user's own folder or file.

    Raises:
        MissingFileError: there is none.
        InputError: it cannot be read.
    """
    remedy = f"name one of {', '.join(KNOWN)}, a folder of images, or an .npz file"
    with suppress(RuntimeError):  # no such user
        dataset = dataset.expanduser()
    with refusals(f"expected a dataset at {dataset}", remedy):
        path = dataset.resolve()
        is_folder, exists = path.is_dir(), path.exists()
    if is_folder:
        return load_folder(path, wanted, data_folder)
    if not exists:
        raise MissingFileError(f"expected `dataset` to be known or a path, found nothing at {dataset}; {remedy}")
    if path.suffix != ".npz":
        raise InputError(f"expected `dataset` to be a folder or an .npz file, found {dataset}; {remedy}")
    return load_arrays(path, wanted, data_folder)
