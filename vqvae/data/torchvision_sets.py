"""Known sets whose facts come from torchvision: Fashion-MNIST and KMNIST, EMNIST's letters, CIFAR-10.

The first two have MNIST's form and are read as MNIST is. torchvision has the names of their classes, their mirrors and
the MD5 sums of their packed files. The other two are downloaded and read by its own classes, from the folders where
it has them. CIFAR-10's files are pickles: torchvision opens none before its MD5 sum is known to be the original's.
"""

import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vqvae.data.dataset import VALIDATION_SHARE, Dataset, Split, from_memory
from vqvae.data.deform import Deformation
from vqvae.data.download import TIMEOUT_S, writing
from vqvae.data.idx import IdxSet, exists
from vqvae.data.mnist import HANDWRITING, load_mnist
from vqvae.errors import InputError, MissingFileError, is_out_of_memory
from vqvae.storage.files import SCRATCH, alone_in, summary

THINGS = Deformation(flips=True)  # a shoe or a car shows its other side
FASHION_MD5 = {  # of the four original files, not packed; Debian has packed them anew
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")

Labelled = tuple[Split, tuple[str, ...]]  # images, labels, and the names of the classes


@dataclass(frozen=True)
class _OwnClass:
    """A set that a class of torchvision downloads and reads."""

    name: str  # as a user gives it
    title: str  # as a sentence gives it
    folder: str  # of its files, in the data folder
    url: str  # of the archive that has them
    files: tuple[str, ...]  # their names
    read: Callable[..., Labelled]  # from a data folder: (root, train=..., download=...)
    deformation: Deformation


def load_torchvision_set(name: str, data_folder: Path, download: bool = True) -> Dataset:
    """A known set from a folder, to which it is downloaded first if it is not there.

    One training image in twelve is for validation. The test images keep their original order.

    Args:
        name: one of `SETS`.
    Raises:
        MissingFileError: files are missing, and they may not or cannot be downloaded.
        InputError: a file is not the original, the folder cannot be written, or torchvision does not load.
    """
    try:
        from torchvision import datasets  # it takes a second, so only for these sets
    except Exception as error:  # an old one beside a new torch raises others than ImportError
        raise InputError(
            f"expected the package torchvision, which knows {name}, found that it does not load ({summary(error)}); "
            f"install the release that fits your torch, by pip install torchvision"
        ) from None
    known = SETS[name](datasets)
    if isinstance(known, IdxSet):
        return load_mnist(data_folder, download, known)
    return _load(known, data_folder, download)


def _idx_set(name: str, title: str, facts: Any, deformation: Deformation) -> IdxSet:
    """A set in MNIST's form, by the facts that its class in torchvision has."""
    md5, classes, mirrors = dict(facts.resources), tuple(facts.classes), tuple(facts.mirrors)
    return IdxSet(name, title, facts.__name__, classes, md5, mirrors, deformation)


def _fashion_mnist(datasets: Any) -> IdxSet:
    known = _idx_set("fashion-mnist", "Fashion-MNIST", datasets.FashionMNIST, THINGS)
    return replace(known, md5={**known.md5, **FASHION_MD5}, installed=DEBIAN_FASHION)


def _kmnist(datasets: Any) -> IdxSet:
    return _idx_set("kmnist", "KMNIST", datasets.KMNIST, HANDWRITING)


def _emnist_letters(datasets: Any) -> _OwnClass:
    own_class = datasets.EMNIST

    def read(root: Path, *, train: bool, download: bool = False) -> Labelled:
        found = own_class(root, split="letters", train=train, download=download)
        upright = found.data.transpose(1, 2).contiguous()  # the files have each image's columns as its rows
        return Split(upright.unsqueeze(1), found.targets - 1), tuple(found.classes[1:])  # label 0 stands for no letter

    kinds = ("train-images-idx3", "train-labels-idx1", "test-images-idx3", "test-labels-idx1")
    files = tuple(f"emnist-letters-{kind}-ubyte" for kind in kinds)
    return _OwnClass("emnist-letters", "EMNIST letters", "EMNIST/raw", own_class.url, files, read, HANDWRITING)


def _cifar10(datasets: Any) -> _OwnClass:
    own_class = datasets.CIFAR10

    def read(root: Path, *, train: bool, download: bool = False) -> Labelled:
        try:
            found = own_class(root, train=train, download=download)
        except RuntimeError as error:  # it unpickles only files whose sums it has checked
            raise error if download else ValueError("other MD5 sums than the originals'") from None
        images = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
        return Split(images, torch.tensor(found.targets)), tuple(found.classes)

    batches = [name for name, _ in (*own_class.train_list, *own_class.test_list)]
    files = (*batches, own_class.meta["filename"])
    return _OwnClass("cifar10", "CIFAR-10", own_class.base_folder, own_class.url, files, read, THINGS)


SETS: dict[str, Callable[[Any], IdxSet | _OwnClass]] = {  # the facts of each, from the module torchvision.datasets
    "fashion-mnist": _fashion_mnist,
    "kmnist": _kmnist,
    "emnist-letters": _emnist_letters,
    "cifar10": _cifar10,
}


def _load(known: _OwnClass, data_folder: Path, download: bool) -> Dataset:
    folder = data_folder / known.folder
    if missing := _missing(known, folder):
        if not download:
            raise _missing_files(known, folder, missing, "`download=False` was given")
        _fetch(known, folder)
    try:
        (full, class_names), (test, _) = (_read_part(known, data_folder, train) for train in (True, False))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"expected the {known.title} files in {folder}, found some that are cut short or of another kind "
            f"({summary(error)}); move them away and run again to fetch the originals, or name another `data_folder`"
        ) from None
    return from_memory(known.name, class_names, full, test, known.deformation)


def _read_part(known: _OwnClass, data_folder: Path, train: bool) -> Labelled:
    """The training images or the test images.

    Raises:
        Exception: torchvision cannot read them, or they do not fit each other.
    """
    split, class_names = known.read(data_folder, train=train)
    if not len(split.images) == len(split.labels) >= VALIDATION_SHARE:
        raise ValueError(f"{len(split.images)} images and {len(split.labels)} labels")
    if not 0 <= split.labels.min() <= split.labels.max() < len(class_names):
        raise ValueError(f"labels that are none of its {len(class_names)} classes")
    return split, class_names


def _missing(known: _OwnClass, folder: Path) -> list[str]:
    return [name for name in known.files if not exists(folder / name)]


def _fetch(known: _OwnClass, folder: Path) -> None:
    """Let torchvision download to a scratch folder, from which the missing files are moved to `folder`."""
    with writing(folder, known.title), alone_in(folder, f"downloads {known.title}"):
        missing = _missing(known, folder)  # another process may have brought them by now
        if not missing:
            return
        with tempfile.TemporaryDirectory(
            dir=folder, prefix=".download.", suffix=SCRATCH, ignore_cleanup_errors=True
        ) as scratch:
            try:
                with redirect_stdout(sys.stderr), _patience():
                    known.read(Path(scratch), train=True, download=True)
            except Exception as error:
                raise _missing_files(
                    known, folder, missing, f"torchvision's download failed ({summary(error)})"
                ) from None
            for name in missing:
                (Path(scratch) / known.folder / name).replace(folder / name)


@contextmanager
def _patience() -> Iterator[None]:
    """Inside, a server that says nothing is not waited for without end. torchvision sets no limit."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _missing_files(known: _OwnClass, folder: Path, missing: list[str], why: str) -> MissingFileError:
    found = f"{', '.join(missing)} missing" if len(missing) < len(known.files) else "all of them missing"
    return MissingFileError(
        f"expected the {known.title} files {', '.join(known.files)} in {folder}, found {found}, and {why}; either mend "
        f"that and run again (without `download=False`), or put the files there yourself, unpacked from {known.url}, "
        f"or name the folder that has them as `data_folder`"
    )
