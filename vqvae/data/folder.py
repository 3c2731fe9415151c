"""A folder of images: its classes, its splits, and its images."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from vqvae.console import progress, remark
from vqvae.data.dataset import Dataset
from vqvae.data.images import SUGGESTED_SIDE, find_names, natural, read_image, read_shape, require_side
from vqvae.data.prepared import ImageFormat, SourceImages, load_prepared, stamp
from vqvae.errors import InputError

OWN_SPLITS = {"train", "test"}
SPLIT_NAMES = OWN_SPLITS | {"training", "testing", "val", "valid", "validation", "dev"}
MAX_UNREADABLE = 0.1  # of the images
NUM_NAMED = 3  # in a message


def load_folder(path: Path, wanted: ImageFormat, data_folder: Path) -> Dataset:
    """The dataset in a folder of images.

    A subfolder is a class, and the files anywhere below it are its images. Without subfolders there are no classes. If
    the subfolders are just `train` and `test`, they are the splits, and the classes are their subfolders. The images
    are grey if every file is grey by its format, or else RGB.

    Raises:
        InputError: it holds something else, or an image size is needed.
    """
    names = sorted(find_names(path))
    sha = hashlib.sha256()
    for name in names:
        found: tuple[int, ...] = ()
        with suppress(OSError):  # a link that leads nowhere; it is reported when it is read
            found = stamp(path / name)
        sha.update(json.dumps([name, *found]).encode())
    return load_prepared(path, sha.hexdigest(), wanted, data_folder, partial(_read, path, names))


def _read(path: Path, names: list[str], wanted: ImageFormat) -> SourceImages:
    """The classes and splits of a folder, and its images to be read."""
    in_test, below = None, names
    tops = {name.split("/")[0] for name in names if "/" in name}
    # One such name among other subfolders may be a class: a train is a vehicle too.
    splits = [name for name in tops if name.lower() in SPLIT_NAMES]
    if splits and (len(splits) > 1 or len(tops) == 1) and tops != OWN_SPLITS:
        raise InputError(
            f"expected in {path} a subfolder for each class, or train and test, found {_some(sorted(tops))}; put "
            f"validation images into train, or give the subfolders other names"
        )
    if tops == OWN_SPLITS:
        _class_names(path, names)  # refuses images beside the two
        in_test = np.array([name.startswith("test/") for name in names])
        below = [name.partition("/")[2] for name in names]
    class_names = _class_names(path, below)
    class_index = {name: index for index, name in enumerate(class_names)}
    labels = np.array([class_index[name.split("/")[0]] if class_index else 0 for name in below], np.int64)
    if in_test is not None and (differing := set(labels[in_test]) ^ set(labels[~in_test])):
        raise InputError(
            f"expected the same classes in train and in test of {path}, found only in one of them "
            f"{_some([class_names[index] for index in sorted(differing)])}; add images of it to the other"
        )
    shape = _shape(path, names, wanted)
    return SourceImages(shape, class_names, labels, in_test, readable_images(path, names, shape))


def _class_names(path: Path, names: list[str]) -> tuple[str, ...]:
    """The folders that files lie in, by the files' paths below them. None, if no file lies in one.

    Raises:
        InputError: some files lie in a folder and some do not.
    """
    beside = [name for name in names if "/" not in name]
    classes = {name.split("/")[0] for name in names if "/" in name}
    if beside and classes:
        raise InputError(
            f"expected images in {path} either in subfolders, one for each class, or all without, found {beside[0]} "
            f"beside the subfolder {min(classes)}; move it into a subfolder"
        )
    return tuple(sorted(classes, key=natural))


def _shape(path: Path, names: list[str], wanted: ImageFormat) -> tuple[int, int, int]:
    """The shape (C, H, W) of the images. What is not given is found out from their headers.

    Raises:
        InputError: a size is needed.
    """
    if wanted.size and wanted.channels:
        return wanted.channels, *wanted.size
    channels, examples = 1, dict[tuple[int, int], str]()  # a file of each size
    with progress(len(names), "image", doing=f"sizes in {path.name}") as bar:
        for name in names:
            with suppress(InputError):  # it is reported when its pixels are read
                its_channels, *size = read_shape(path / name)
                channels = max(channels, its_channels)
                examples.setdefault((size[0], size[1]), name)
            bar.update()
            if wanted.size and channels > 1:
                break  # no other file can change the shape
    if wanted.size or not examples:
        return wanted.channels or channels, *(wanted.size or (1, 1))
    (height, width), *others = examples
    if others:
        side = min(SUGGESTED_SIDE, *map(min, examples))
        raise InputError(
            f"expected images of one size in {path}, found {height}x{width} ({examples[height, width]}) and "
            f"{others[0][0]}x{others[0][1]} ({examples[others[0]]}); resize them by `image_size={side}`"
        )
    require_side(height, width, path)
    return wanted.channels or channels, height, width


def readable_images(path: Path, names: Sequence[str], shape: tuple[int, int, int]) -> Iterator[tuple[int, Tensor]]:
    """The images of a folder that can be read, each with its number and its pixels. The others are reported at the end.

    Args:
        names: of the files, below the folder.
        shape: (C, H, W), which the images get.
    Raises:
        InputError: too many cannot be read.
    """
    channels, *size = shape
    errors: dict[str, str] = {}  # the first ones
    num = 0
    for row, name in enumerate(names):
        try:
            image = read_image(path / name, channels, (size[0], size[1]))
        except InputError as error:
            if len(names) == 1:
                raise
            num += 1
            if num <= NUM_NAMED:
                errors[name] = str(error)
            continue
        yield row, image
    if not num:
        return
    found = f"{num} of {len(names)} that cannot be read: {_some([*errors], num)}, the first because: "
    first = next(iter(errors.values()))
    if num > MAX_UNREADABLE * len(names):
        raise InputError(f"expected images in {path}, found {found}{first}")
    remark(f"the images in {path} are used without {found}{first}")


def _some(names: list[str], num: int | None = None) -> str:
    """The first few names, of `num` or of so many as there are."""
    more = (num or len(names)) - len(names[:NUM_NAMED])
    return ", ".join(names[:NUM_NAMED]) + (f" and {more} more" if more else "")
