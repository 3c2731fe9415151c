"""The images that a command works on: a user's own, or the first ones of a test split."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vqvae.compute import require_whole
from vqvae.console import progress, remark
from vqvae.data.arrays import read_images
from vqvae.data.dataset import DatasetInfo
from vqvae.data.folder import readable_images
from vqvae.data.images import find_images, read_shape
from vqvae.data.load import KNOWN, load_like
from vqvae.errors import InputError


class ChosenImages(NamedTuple):
    """Images, and what they are called."""

    images: Tensor  # (N, C, H, W) uint8
    names: tuple[str, ...]  # of the files, inside their folder, or else the images' numbers in their split


@dataclass(frozen=True)
class ImageChoice:
    """Which images to take.

    Raises:
        InputError: a user's own are named, and a part of a dataset too.
    """

    images: Path | None = None  # the user's own: a file, a folder or an .npz file; None takes those of a test split
    dataset: str | None = None  # whose test split; None stands for the model's own
    num_images: int | None = None  # from the first on
    data_folder: Path = Path("data")
    download: bool = True

    def __post_init__(self) -> None:
        for name in ("dataset", "num_images"):
            if self.images is not None and (value := getattr(self, name)) is not None:
                raise InputError(
                    f"expected `images` or `{name}`, found {self.images} and {value}; give one of them, because "
                    f"`{name}` is for the images of a test split"
                )

    def read(self, info: DatasetInfo, num_images: int) -> ChosenImages:
        """The images, with the shape that a model's dataset has.

        Args:
            info: the facts that the model's checkpoint has about its dataset.
            num_images: how many of a test split, where the choice says nothing.
        Raises:
            MissingFileError: there is no such set, or no image.
            InputError: they cannot be read, or there are not so many.
        """
        if self.images is not None:
            return read_own(self.images, info.image_shape)
        images = load_like(info, self.dataset, self.data_folder, download=self.download).load_test().images
        most = len(images)
        if self.num_images is None:
            num_images = min(num_images, most)
        else:
            num_images = require_whole("num_images", self.num_images, 1, most, f"try `num_images={most}`")
        return ChosenImages(images[:num_images], tuple(map(str, range(num_images))))


def require_apart(output: Path, info: DatasetInfo, dataset: str | None, images: Path | None = None) -> None:
    """Refuse to write over a file that is read, and to put a picture among a user's images or those of a dataset.

    Args:
        output: the file that is to be written.
        info: the facts that the model's checkpoint has about its dataset.
        dataset, images: as in `ImageChoice`.
    Raises:
        InputError: the output lies there.
    """
    source = (info.source or info.name) if dataset is None else dataset
    for own in (images, None if source in KNOWN else source):
        if own is None:
            continue
        written, read = (Path(os.path.realpath(path)) for path in (output, own))
        within = os.path.isdir(read) and read in written.parents  # noqa: PTH112  # Path's own raises where a name is bad
        if written == read or (within and output.suffix == ".png"):
            raise InputError(
                f"expected an output apart from images that are there already, {own}, found {output}; name another "
                f"place"
            )


def read_own(path: Path, image_shape: tuple[int, int, int]) -> ChosenImages:
    """A user's image, the images of a folder, or those of an .npz file. Those of another shape are resized or
    converted, which is reported.

    Args:
        image_shape: (C, H, W), which they get.
    Raises:
        MissingFileError: there is nothing.
        InputError: there is no image, or more than a tenth of them cannot be read.
    """
    channels, height, width = image_shape
    if path.suffix.lower() == ".npz":
        shape, numbered = read_images(path, image_shape)
        images = torch.stack([pixels for _, pixels in numbered])
        names, shapes = tuple(map(str, range(len(images)))), [shape] * len(images)
    else:
        files = find_images(path)
        folder = path if path.is_dir() else path.parent
        all_names = [file.relative_to(folder).as_posix() for file in files]
        rows, pixels = [], []
        with progress(len(files), "image", doing="reading") as bar:
            for row, image in readable_images(folder, all_names, image_shape):
                rows.append(row)
                pixels.append(image)
                bar.update()
        images, names = torch.stack(pixels), tuple(all_names[row] for row in rows)
        shapes = [read_shape(files[row]) for row in rows]
    if num_changed := sum(shape != image_shape for shape in shapes):
        kind = "RGB" if channels > 1 else "grey"
        remark(
            f"{num_changed} of {len(images)} images had another size or other colours than the model's, "
            f"{height}x{width} and {kind}: their centres were resized and converted"
        )
    return ChosenImages(images, names)
