"""What a visitor draws or uploads, as an image like those that the model has learned."""

import base64
import binascii
import io
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vqvae.data.images import fit_pixels, read_image
from vqvae.data.pixels import to_bytes
from vqvae.errors import InputError
from vqvae.storage.files import refusals

BOX = 5 / 7  # of the frame; MNIST's digits fill 20 of 28 pixels
LEAST_INK = 0.3  # of the full range; fainter pixels are the paper's
MOST_BYTES = 2**23  # of a file
MOST_SIDE = 1000  # pixels of a picture; a larger one, which may have millions of them, is reduced first


def to_url(image: Tensor) -> str:
    """An image (C, S, T) in 0..1 as the URL of a PNG that holds it."""
    buffer = io.BytesIO()
    Image.fromarray(to_bytes(image).permute(1, 2, 0).squeeze(2).numpy()).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def read_url(url: object, image_shape: tuple[int, int, int]) -> Tensor:
    """The picture that a page sends, as an image (C, S, T) uint8 like those that the model has learned.

    A picture of the model's own size is taken as it is. Any other is fitted to that size, and where the model knows
    grey images it is taken for a drawing: see `centred`.

    Args:
        url: "data:...;base64,..." of an image file.
        image_shape: (C, S, T) of the model.
    Raises:
        InputError: it is no image that can be read, it is too large, or nothing is drawn on it.
    """
    if not isinstance(url, str) or len(url) > MOST_BYTES * 4 / 3 + 100:
        raise InputError(f"expected a picture of at most {MOST_BYTES // 2**20} MB, found none; choose a smaller file")
    try:
        encoded = base64.b64decode(url.partition(";base64,")[2], validate=True)
    except (binascii.Error, ValueError):
        encoded = b""
    with (
        refusals("expected to keep a picture", "free some space"),
        tempfile.TemporaryDirectory() as folder,
    ):
        file = Path(folder) / "picture"
        file.write_bytes(encoded)
        try:
            picture = read_image(file, channels=image_shape[0])
        except InputError as error:
            raise InputError(str(error).replace(f" at {file}", "")) from None
    if picture.shape == image_shape:
        return picture
    return centred(picture[0], image_shape) if image_shape[0] == 1 else fit_pixels(picture, image_shape)


def centred(picture: Tensor, image_shape: tuple[int, int, int]) -> Tensor:
    """A drawing (height, width) uint8 as MNIST was made: what is drawn is scaled, with its shape, into a box of 5/7 of
    the frame (20 of 28 pixels), and its centre of mass is moved to the frame's centre. It is white on black.

    Dark strokes on light paper are inverted, by the picture's edge. The strokes get the full range of values.

    Args:
        image_shape: (1, S, T) of the result.
    Raises:
        InputError: nothing is drawn.
    """
    reduced = Image.fromarray(picture.numpy()).reduce(max(max(picture.shape) // MOST_SIDE, 1))
    ink = torch.from_numpy(np.array(reduced)).double() / 255
    edge = torch.cat([ink[0], ink[-1], ink[:, 0], ink[:, -1]]).median()
    ink = (edge - ink if edge > 0.5 else ink - edge).clamp(min=0)
    if ink.max() < LEAST_INK:
        raise InputError("expected a drawing, found an empty picture; draw something, or choose a file")
    ink = ink / ink.max()
    rows, columns = ((ink > LEAST_INK).any(dim=axis).nonzero() for axis in (1, 0))
    ink = ink[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    _, height, width = image_shape
    scale = BOX * min(height / ink.shape[0], width / ink.shape[1])
    size = [max(round(side * scale), 1) for side in ink.shape]
    resized = Image.fromarray(ink.float().numpy()).resize((size[1], size[0]), Image.Resampling.BOX)
    small = torch.from_numpy(np.array(resized))
    frame = torch.zeros(1, height, width)
    top, left = (_start(small.sum(dim=1 - axis), side) for axis, side in ((0, height), (1, width)))
    frame[0, top : top + size[0], left : left + size[1]] = small / small.max()
    return to_bytes(frame)


def _start(mass: Tensor, side: int) -> int:
    """Where to put a row of masses (n,) in a frame of that side, so that their centre is in its middle, and all fit.

    Of an even number of pixels, MNIST takes the one after the middle: its centres lie at 14.5 of 28 on average.
    """
    centre = (mass * (torch.arange(len(mass)) + 0.5)).sum() / mass.sum()
    return min(max(round(side // 2 + 0.5 - float(centre)), 0), side - len(mass))
