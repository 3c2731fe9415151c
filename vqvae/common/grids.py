"""Images to pictures: plain grids, and labelled sheets of them."""

import io
from pathlib import Path

import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vqvae.common.data import to_bytes
from vqvae.common.files import write_atomically

PADDING = 2  # pixels between images
COLUMNS = 10
GREY = 0.5


def grid(images: Tensor) -> Tensor:
    """(N, 1, S, S) images in 0..1 as one (3, H, W) picture, row by row, on mid grey."""
    # torchvision's make_grid does this too, and costs a second of `sample`'s start.
    columns = min(len(images), COLUMNS)
    cells = F.pad(images.cpu(), (PADDING, 0, PADDING, 0), value=GREY)
    cells = F.pad(cells, (0, 0, 0, 0, 0, 0, 0, -len(images) % columns), value=GREY)
    picture = rearrange(cells, "(row column) 1 h w -> (row h) (column w)", column=columns)
    return repeat(F.pad(picture, (0, PADDING, 0, PADDING), value=GREY), "h w -> 3 h w")


def grid_png(images: Tensor) -> bytes:
    """(N, 1, S, S) images in 0..1 as a grid, in PNG."""
    return _to_png(_to_image(grid(images)))


def save_grid(images: Tensor, path: Path) -> None:
    """Write (N, 1, S, S) images in 0..1 as a PNG grid."""
    write_atomically(path, grid_png(images))


def save_sheet(sections: list[tuple[str, Tensor]], path: Path, scale: int = 2) -> None:
    """Write several grids under one another as a PNG, each beneath its title, enlarged `scale` times.

    Args:
        sections: (title, images (N, 1, S, S) in 0..1) from top to bottom.
    """
    font = ImageFont.load_default(size=16)
    margin, title_height = 12, 30
    pictures = []
    for _, images in sections:
        small = _to_image(grid(images))
        pictures.append(small.resize((small.width * scale, small.height * scale), Image.Resampling.NEAREST))
    width = max(picture.width for picture in pictures) + 2 * margin
    height = sum(picture.height + title_height for picture in pictures) + margin
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for (title, _), picture in zip(sections, pictures, strict=True):
        draw.text((margin, top + 7), title, fill="black", font=font)
        sheet.paste(picture, (margin, top + title_height))
        top += title_height + picture.height
    write_atomically(path, _to_png(sheet))


def _to_image(picture: Tensor) -> Image.Image:
    """A (3, H, W) picture in 0..1 as 8-bit RGB, each value rounded to the nearest."""
    return Image.fromarray(rearrange(to_bytes(picture), "c h w -> h w c").numpy())


def _to_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
