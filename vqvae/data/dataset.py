"""What a dataset is: its splits, and the facts about it that models depend on."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from vqvae.data.deform import ANY_KIND, Deformation
from vqvae.errors import InputError
from vqvae.storage.recipe import require_range
from vqvae.storage.tensors import checksum

MAX_SIDE = 1024  # of an image; a checkpoint may ask for no more
SPLIT_SEED = 20171102  # one validation split for every run, whatever the run's own seed
VALIDATION_SHARE = 12  # one image in twelve is for validation: 5,000 of MNIST's 60,000


@dataclass(frozen=True)
class DatasetInfo:
    """The facts about a dataset that models depend on, as plain data.

    A checkpoint's header holds the fields (`asdict`), and `from_dict` reads and checks them again.

    Raises:
        InputError: an image shape that no dataset here has, or class names and class counts that contradict each other.
    """

    name: str
    image_shape: tuple[int, int, int]  # (channels, height, width)
    class_names: tuple[str, ...]  # () if the images have no labels
    class_counts: tuple[int, ...]  # how many training images each class has
    source: str = ""  # the folder or file that it was read from; empty for a set that is known by its name
    split_seed: int = SPLIT_SEED  # only a record: the splits were drawn by it, where the set has none

    def __post_init__(self) -> None:
        channels, height, width = self.image_shape
        if channels not in (1, 3):
            raise InputError(f"expected images of 1 or 3 channels, found {channels}; convert them to grey or to RGB")
        require_range("image_shape[1]", height, 1, MAX_SIDE)
        require_range("image_shape[2]", width, 1, MAX_SIDE)
        for text in (self.name, *self.class_names, self.source or self.name):
            if not (text and text.isprintable()):
                raise InputError(f"expected names that can be printed, found {text[:80]!r}; rename it")
        if len(self.class_counts) != len(self.class_names):
            raise InputError(
                f"expected as many class counts as class names, {len(self.class_names)}, found "
                f"{len(self.class_counts)}; count the images of each class"
            )
        if self.class_counts and not (min(self.class_counts) >= 0 and max(self.class_counts) > 0):
            raise InputError(
                "expected class counts of 0 or more with a sum above 0, found others; count the images anew"
            )

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def class_frequencies(self) -> Tensor:
        """The share of each class in the training images, (num_classes,) float64. The sum is 1."""
        counts = torch.tensor(self.class_counts, dtype=torch.float64)
        return counts / counts.sum()


class Split(NamedTuple):
    """Images (N, C, H, W) uint8 in 0..255 and their labels (N,) int64.

    A label is an index into the class names. All labels are 0 if the dataset has no classes.
    """

    images: Tensor
    labels: Tensor

    def first(self, num: int) -> "Split":
        """The first `num` images and labels, or all of them if there are fewer."""
        return Split(self.images[:num], self.labels[:num])


@dataclass(frozen=True)
class Dataset:
    """A dataset with its splits.

    The images lie on the CPU. Those of a folder or of a file are mapped from disk, so that a set can be larger than
    memory: take rows of them, never all at once. The test split is for the final evaluation and for pictures only, so
    a caller has to ask for it.
    """

    info: DatasetInfo
    train: Split
    validation: Split
    load_test: Callable[[], Split]
    deformation: Deformation = ANY_KIND

    @cached_property
    def digest(self) -> str:
        """`digest` of the training split, by which a run knows its data."""
        return digest(self.train)


def split_validation(full: Split) -> tuple[Split, Split]:
    """A training and a validation split of the images, the same ones on every call.

    Args:
        full: at least VALIDATION_SHARE images, so that the validation split is not empty.
    Raises:
        InputError: there are fewer.
    """
    if len(full.labels) < VALIDATION_SHARE:
        raise InputError(f"expected at least {VALIDATION_SHARE} images to split, found {len(full.labels)}; add some")
    order = torch.randperm(len(full.labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    num_validation = len(full.labels) // VALIDATION_SHARE
    validation, train = order[:num_validation], order[num_validation:]
    return Split(full.images[train], full.labels[train]), Split(full.images[validation], full.labels[validation])


def from_memory(name: str, class_names: tuple[str, ...], full: Split, test: Split, deformation: Deformation) -> Dataset:
    """The dataset of a known set, of which `full` is split for training and validation.

    Raises:
        InputError: there are fewer than VALIDATION_SHARE images in `full`.
    """
    train, validation = split_validation(full)
    channels, height, width = full.images.shape[1:]
    counts = tuple(torch.bincount(train.labels, minlength=len(class_names)).tolist())
    info = DatasetInfo(name, (channels, height, width), class_names, counts)
    return Dataset(info, train, validation, lambda: test, deformation)


def digest(split: Split) -> str:
    """The SHA-256 of a split's pixels and labels. Anything that is derived from a split is stored with its digest."""
    return checksum(split)


def require_same_kind(learned: DatasetInfo, found: DatasetInfo) -> None:
    """Refuse images that are not of the kind that a model has learned.

    Raises:
        InputError: another image shape or other classes.
    """
    if (found.image_shape, found.class_names) != (learned.image_shape, learned.class_names):
        raise InputError(
            f"expected images and classes like those of {learned.name}, which the model was trained on, found those of "
            f"{found.name}; choose the same data, by `dataset`"
        )
