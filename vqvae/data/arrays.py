"""Images and labels in an .npz file. It is read piece by piece, because it may be larger than memory."""

import json
import math
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from vqvae.data.dataset import Dataset
from vqvae.data.images import MAX_PIXELS, fit_pixels, natural, require_side
from vqvae.data.pixels import to_bytes
from vqvae.data.prepared import ImageFormat, SourceImages, load_prepared, stamp
from vqvae.errors import InputError, plain
from vqvae.storage.files import open_checked

EXPECTED = "an .npz file with 'images'"
REMEDY = "write it with numpy.savez(file, images=..., labels=...)"
READ_AT_ONCE = 2**22  # bytes
MAX_LABEL = 400  # bytes of a label that is text

Header = tuple[tuple[int, ...], np.dtype]  # what the header of an array says: its shape and its type


def load_arrays(path: Path, wanted: ImageFormat, data_folder: Path) -> Dataset:
    """The dataset in an .npz file, which is one that numpy.savez or `sample` with an output of that name has written.

    Its array "images" has the shape (N, H, W), (N, H, W, C) or (N, C, H, W), where C is 1 or 3. If an array fits both
    of the last two, the second axis counts as C. The values are uint8, or floating-point numbers in 0..1. Its array
    "labels", if there is one, has the shape (N,): whole numbers or text, which become the names of the classes.

    Raises:
        MissingFileError: there is no such file.
        InputError: it holds something else, or an image size is needed.
    """
    with open_checked(path, EXPECTED, REMEDY):
        state = json.dumps(stamp(path))
    return load_prepared(path, state, wanted, data_folder, partial(_read, path))


def read_images(
    path: Path, image_shape: tuple[int, int, int]
) -> tuple[tuple[int, int, int], Iterator[tuple[int, Tensor]]]:
    """The images in an .npz file without a dataset around them.

    Args:
        image_shape: (C, H, W), which they get.
    Returns:
        the shape (C, H, W) that they have in the file, and the number of each and its pixels.
    Raises:
        MissingFileError: there is no such file.
        InputError: it holds something else.
    """
    channels_first, shape = _layout(path)
    return shape[1:], _images(path, channels_first, shape[1:], image_shape)


def _read(path: Path, wanted: ImageFormat) -> SourceImages:
    """The labels of a file, and its images to be read."""
    channels_first, shape = _layout(path)
    num, channels, height, width = shape
    class_names, labels = _read_labels(path, num)
    if wanted.size is None:
        require_side(height, width, path)
    image_shape = (wanted.channels or channels, *(wanted.size or (height, width)))
    return SourceImages(image_shape, class_names, labels, None, _images(path, channels_first, shape[1:], image_shape))


def _layout(path: Path) -> tuple[bool, tuple[int, int, int, int]]:
    """Whether the channels of a file's images come before the pixels, and the images' shape as (N, C, H, W).

    Raises:
        InputError: these are no images.
    """
    with open_checked(path, EXPECTED, REMEDY) as file, zipfile.ZipFile(file) as archive:
        shape, dtype = _header(path, archive, "images")
    if dtype != np.uint8 and dtype.kind != "f":
        raise InputError(
            f"expected 'images' in {path} as uint8 or as floating-point values in 0..1, found {dtype}; convert them"
        )
    layout = None
    if len(shape) == 3:
        layout = True, (shape[0], 1, *shape[1:])
    elif len(shape) == 4 and shape[1] in (1, 3):
        layout = True, shape
    elif len(shape) == 4 and shape[3] in (1, 3):
        layout = False, (shape[0], shape[3], *shape[1:3])
    if layout is None or min(shape) < 1 or layout[1][2] * layout[1][3] > MAX_PIXELS:
        raise InputError(
            f"expected 'images' in {path} of shape (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3 channels, found "
            f"{shape}; give them such a shape"
        )
    return layout


def _images(
    path: Path, channels_first: bool, found: tuple[int, int, int], wanted: tuple[int, int, int]
) -> Iterator[tuple[int, Tensor]]:
    """The images of a file, one after the other, each with its number.

    Args:
        found, wanted: (C, H, W) of an image in the file, and of one that is given.
    Raises:
        InputError: a value is out of range.
    """
    row = 0
    with open_checked(path, EXPECTED, REMEDY) as file, zipfile.ZipFile(file) as archive:
        for piece in _pieces(path, archive, "images"):
            pixels = torch.from_numpy(_bytes(path, piece))
            pixels = pixels.view(-1, *found) if channels_first else pixels.permute(0, 3, 1, 2)
            for image in pixels:
                yield row, image if found == wanted else fit_pixels(image, wanted)
                row += 1


def _bytes(path: Path, values: np.ndarray) -> np.ndarray:
    """Values in 0..1 as uint8 in 0..255. Those of uint8 stay as they are.

    Raises:
        InputError: a value is NaN or out of range.
    """
    if values.dtype == np.uint8:
        return values
    if np.isnan(values).any():
        raise InputError(f"expected 'images' in {path} with values in 0..1, found values that are NaN; remove them")
    if not 0 <= values.min() <= values.max() <= 1:
        raise InputError(
            f"expected 'images' in {path} with values in 0..1, found values from {plain(values.min())} to "
            f"{plain(values.max())}; scale them, or save them as uint8"
        )
    return to_bytes(torch.from_numpy(values.astype(np.float32))).numpy()


def _read_labels(path: Path, num: int) -> tuple[tuple[str, ...], np.ndarray]:
    """The class names and the labels (N,) int64. No names and zeros, if the file has no labels.

    Raises:
        InputError: they are no labels of these images.
    """
    with open_checked(path, EXPECTED, REMEDY) as file, zipfile.ZipFile(file) as archive:
        if "labels.npy" not in archive.namelist():
            return (), np.zeros(num, np.int64)
        shape, dtype = _header(path, archive, "labels")
        if shape != (num,) or dtype.kind not in "iuU" or (dtype.kind == "U" and dtype.itemsize > MAX_LABEL):
            raise InputError(
                f"expected 'labels' in {path} of shape ({num},), whole numbers or short text, found {dtype} of shape "
                f"{shape}; give each image one label"
            )
        values = np.concatenate([*_pieces(path, archive, "labels")])
    names, labels = np.unique(values, return_inverse=True)
    if dtype.kind == "U":
        order = sorted(range(len(names)), key=lambda row: natural(str(names[row])))
        names, labels = names[order], np.argsort(order)[labels]
    return tuple(map(str, names)), labels


def _header(path: Path, archive: zipfile.ZipFile, name: str) -> Header:
    """The header of an array, checked: nothing else is read."""
    if f"{name}.npy" not in archive.namelist():
        found = ", ".join(archive.namelist()[:5]) or "nothing"
        raise InputError(f"expected an array '{name}' in {path}, found {found[:200]}; {REMEDY}")
    with archive.open(f"{name}.npy") as member:
        shape, dtype = _start(path, member, name)
        if archive.getinfo(member.name).file_size != member.tell() + dtype.itemsize * math.prod(shape):
            raise ValueError(f"{name} is not as long as it says")
    return shape, dtype


def _start(path: Path, member: IO[bytes], name: str) -> Header:
    """The header of an array, after which the values follow.

    Raises:
        InputError: it holds Python objects, or it does not lie row by row.
    """
    read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(member)]
    shape, columns_first, dtype = read_header(member)
    if dtype.hasobject:
        raise InputError(
            f"expected numbers or text as '{name}' in {path}, found Python objects, which are not loaded; save an "
            f"array of one type"
        )
    if columns_first and len(shape) > 1:
        raise InputError(
            f"expected '{name}' in {path} row by row, found an array in Fortran's order; save "
            f"numpy.ascontiguousarray({name})"
        )
    return shape, dtype


def _pieces(path: Path, archive: zipfile.ZipFile, name: str) -> Iterator[np.ndarray]:
    """The rows of an array, some at a time.

    Raises:
        ValueError: it is cut short.
    """
    with archive.open(f"{name}.npy") as member:
        shape, dtype = _start(path, member, name)
        size = dtype.itemsize * math.prod(shape[1:])  # bytes of a row
        at_once = max(READ_AT_ONCE // max(size, 1), 1)
        for start in range(0, shape[0], at_once):
            num = min(at_once, shape[0] - start)
            content = bytearray(member.read(num * size))
            if len(content) < num * size:
                raise ValueError(f"{name} is cut short")
            yield np.frombuffer(content, dtype).reshape(num, *shape[1:])
