"""One image file of a user: found, read and resized.

Such a file may hold anything. It is read with limits on its bytes and on its pixels, and only by Pillow's readers of
plain pictures.
"""

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from vqvae.data.dataset import MAX_SIDE
from vqvae.errors import InputError, MissingFileError
from vqvae.storage.files import open_checked, refusals

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # of Pillow; others of its readers start programs
SUGGESTED_SIDE = 64  # for images that must be resized
MAX_FILE = 2**28  # bytes
MAX_PIXELS = 2**26  # a camera's image has half as many; Pillow's own limit is higher
DEEP_GREY = ("I", "I;16", "I;16B", "I;16L")  # Pillow's names of 16 bits
GREY = ("1", "L", "LA", "La", *DEEP_GREY)
QUARTER_TURNS = (5, 6, 7, 8)  # the orientations in Exif data that turn an image on its side
REMEDY = "name another image, or save this one anew as a PNG"


def find_images(path: Path) -> list[Path]:
    """An image file itself, or the image files of a folder and of its subfolders, sorted.

    Image files are known by their suffix. Hidden files and folders are skipped. A link to a folder is not followed,
    because the folder that it may lead to is searched anyway.

    Raises:
        MissingFileError: there is no such file or folder.
        InputError: the folder holds no image or a link that leads out of it, or it cannot be read.
    """
    remedy = "name a folder of images, or an image"
    with refusals(f"expected images at {path}", remedy):
        if not path.exists():
            raise MissingFileError(f"expected images at {path}, found nothing there; {remedy}")
        is_folder = path.is_dir()
    return [path / name for name in sorted(find_names(path), key=natural)] if is_folder else [path]


def find_names(folder: Path) -> list[str]:
    """The image files of a folder as `find_images` finds them: their paths below the folder, with /, in any order.

    Raises:
        InputError: the folder holds no image or a link that leads out of it, or it cannot be read.
    """
    remedy = "name a folder of images, or an image"
    with refusals(f"expected images in {folder}", remedy):
        found = [Path(subfolder, name).relative_to(folder).as_posix() for subfolder, name in _image_files(folder)]
    if not found:
        raise InputError(
            f"expected images in {folder}, found no file whose name ends in {', '.join(SUFFIXES)}; put some there, or "
            f"{remedy}"
        )
    return found


def natural(name: str) -> tuple[list[str | int], str]:
    """A key that sorts names as a person does: "2" stands before "10"."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)], name


def read_image(path: Path, channels: int | None = None, size: tuple[int, int] | None = None) -> Tensor:
    """The pixels of an image file, (C, H, W) uint8 in 0..255.

    The image is turned as its camera held it. Its transparent parts become black. Grey values of 16 bits are scaled to
    8. See `fit` for the size.

    Args:
        channels: 1 converts to grey, 3 to RGB. None keeps what the image has.
        size: (height, width). None keeps the image's own.
    Raises:
        MissingFileError: there is no file.
        InputError: it is no image that can be read, it is animated, or it is too large.
    """
    with _opened(path) as image:
        mode = "L" if (channels or _channels(image)) == 1 else "RGB"
        if _orientation(image) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode in DEEP_GREY:
            image = _to_8_bits(image)
        elif image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
        pixels = np.array(fit(image.convert(mode), size))
    return torch.from_numpy(pixels).view(*pixels.shape[:2], -1).permute(2, 0, 1).contiguous()


def read_shape(path: Path) -> tuple[int, int, int]:
    """What `read_image` gives as (C, H, W) for a file, known from its header alone.

    Raises:
        MissingFileError: there is no file.
        InputError: it is no image that can be read, it is animated, or it is too large.
    """
    with _opened(path) as image:
        turns = _orientation(image) in QUARTER_TURNS
        if turns and image.format == "TIFF":
            image.load()  # which turns it, and its size with it
            turns = False
        width, height = reversed(image.size) if turns else image.size
        return _channels(image), height, width


def fit(image: Image.Image, size: tuple[int, int] | None) -> Image.Image:
    """An image at another size: its centre, as large as the shape of that size allows, resized.

    Each new pixel is the mean of the area that it covers. If the image is enlarged, it is drawn by linear
    interpolation.

    Args:
        image: grey or RGB, 8 bits.
        size: (height, width). None keeps the image's own.
    """
    if size is None or size == (image.height, image.width):
        return image
    height, width = size
    scale = min(image.height / height, image.width / width)  # pixels of the image for each new one
    left, top = max(image.width - width * scale, 0) / 2, max(image.height - height * scale, 0) / 2
    box = (left, top, image.width - left, image.height - top)
    return image.resize((width, height), Image.Resampling.BOX if scale > 1 else Image.Resampling.BILINEAR, box)


def fit_pixels(image: Tensor, image_shape: tuple[int, int, int]) -> Tensor:
    """An image (C, H, W) uint8 with other channels or of another size, as `fit` resizes it.

    Args:
        image_shape: (C, H, W), where C is 1 for grey or 3 for RGB.
    """
    channels, height, width = image_shape
    pixels = image.permute(1, 2, 0).squeeze(2) if len(image) == 1 else image.permute(1, 2, 0)
    picture = Image.fromarray(np.ascontiguousarray(pixels.numpy())).convert("L" if channels == 1 else "RGB")
    fitted = torch.from_numpy(np.array(fit(picture, (height, width))))
    return fitted.view(height, width, channels).permute(2, 0, 1)


def parse_size(text: str | int | None) -> tuple[int, int] | None:
    """A size (height, width) from a side, or from "HEIGHTxWIDTH". None stays None.

    Raises:
        InputError: it is neither, or a side is out of range.
    """
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]{1,9})(?:x([0-9]{1,9}))?", str(text))
    height, width = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise InputError(
            f"expected `image_size` to be a side or HEIGHTxWIDTH, each from 1 to {MAX_SIDE}, found {str(text)[:40]}; "
            f"try `image_size=32`"
        )
    return height, width


def require_side(height: int, width: int, path: Path) -> None:
    """Refuse images that no model takes as large as they are.

    Raises:
        InputError: a side is too long.
    """
    if max(height, width) > MAX_SIDE:
        raise InputError(
            f"expected images of at most {MAX_SIDE}x{MAX_SIDE} in {path}, found {height}x{width}; resize them by "
            f"`image_size={SUGGESTED_SIDE}`"
        )


def _image_files(folder: Path) -> Iterator[tuple[str, str]]:
    """The image files of a folder and of its subfolders, each as its folder and its name, in any order.

    Raises:
        InputError: a link leads out of the folder, or a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise InputError(
            f"expected images in {error.filename}, found what can't be read: {error.strerror}; make it readable"
        )

    home = folder.resolve()
    for subfolder, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        images = [name for name in files if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
        for path in (Path(subfolder, name) for name in (*folders, *images)):
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(home):
                raise InputError(
                    f"expected only files inside {folder}, found the link {path}, which leads out of it; put a copy of "
                    f"what it leads to there, or remove it"
                )
        yield from ((subfolder, name) for name in images)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image whose header has been read, and whose pixels have not."""
    with warnings.catch_warnings(), open_checked(path, "an image", REMEDY) as file:
        warnings.simplefilter("ignore")  # of metadata that is damaged
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        if (size := os.fstat(file.fileno()).st_size) > MAX_FILE:
            raise InputError(f"expected an image of at most {MAX_FILE} bytes at {path}, found {size}; make it smaller")
        try:
            image = Image.open(file, formats=FORMATS)
            if (pixels := image.width * image.height) > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{pixels} pixels")
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise InputError(
                f"expected an image of at most {MAX_PIXELS} pixels at {path}, found more; make it smaller"
            ) from None
        except UnidentifiedImageError:
            raise ValueError(f"it is none of {', '.join(FORMATS)}") from None
        if image.mode == "F":
            raise InputError(f"expected whole numbers as pixels at {path}, found fractions; save the image as a PNG")
        # A JPEG of several pictures is one photograph and its previews.
        if getattr(image, "is_animated", False) and image.format not in ("JPEG", "MPO"):
            raise InputError(f"expected one still image at {path}, found several; save one of them as a PNG")
        yield image


def _channels(image: Image.Image) -> int:
    return 1 if image.mode in GREY else 3


def _orientation(image: Image.Image) -> int:
    """How the camera was held, by the image's Exif data: from 1, upright, to 8."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # or Pillow would read all the pixels, to look for it after them
    with suppress(Exception):  # the pixels may be whole where this is damaged
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    return 1


def _to_8_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 bits as one of 8.

    Raises:
        ValueError: the image has values of more bits.
    """
    values = np.array(image, np.int64)
    if not 0 <= values.min() <= values.max() < 2**16:
        raise ValueError("values of more than 16 bits")
    values[values == image.info.get("transparency", 0)] = 0  # that value stands for a transparent pixel
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))
