"""Pictures of images: plain grids, and sheets of several grids with titles."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vqvae.data.pixels import to_bytes
from vqvae.storage.files import write_atomically

PADDING = 2  # pixels between two images
COLUMNS = 10
GREY = 0.5


def grid(images: Tensor, columns: int = COLUMNS) -> Tensor:
    """Images (N, C, H, W) in 0..1, row by row on mid grey, as one picture (3, height, width) in 0..1.

    Args:
        images: of 1 or 3 channels.
        columns: images in a row, where there are as many.
    """
    # torchvision's make_grid does the same, but its import takes a second of the start of `sample`.
    columns = min(len(images), columns)
    cells = F.pad(images.cpu(), (PADDING, 0, PADDING, 0), value=GREY)
    cells = F.pad(cells, (0, 0, 0, 0, 0, 0, 0, -len(images) % columns), value=GREY)  # fills the last row
    picture = rearrange(cells, "(row column) c h w -> c (row h) (column w)", column=columns)
    return F.pad(picture, (0, PADDING, 0, PADDING), value=GREY).expand(3, -1, -1)


def grid_png(images: Tensor) -> bytes:
    """Images (N, C, H, W) in 0..1 as a grid in the PNG format."""
    return _to_png(_to_image(grid(images)))


def save_grid(images: Tensor, path: Path) -> None:
    """Write images (N, C, H, W) in 0..1 as a grid to a PNG file."""
    write_atomically(path, grid_png(images))


def save_sheet(
    sections: list[tuple[str, Tensor]],
    path: Path,
    columns: int = COLUMNS,
    scale: int = 2,
    heads: Sequence[str] = (),
) -> None:
    """Write several grids to one PNG file, one below the other, each under its title.

    Args:
        sections: (title, images (N, C, H, W) in 0..1) from top to bottom.
        columns: images in a row.
        scale: how many times each grid is enlarged.
        heads: a name for each column, which stands above the first grid. They are left out if one is too long.
    """
    font = ImageFont.load_default(size=16)
    margin, title_height, head_height = 12, 30, 20
    pictures = []
    for _, images in sections:
        small = _to_image(grid(images, columns))
        pictures.append(small.resize((small.width * scale, small.height * scale), Image.Resampling.NEAREST))
    step = scale * (sections[0][1].shape[3] + PADDING)  # from one column to the next
    small_fonts = [ImageFont.load_default(size=size) for size in range(13, 8, -1)]
    fitting = [small for small in small_fonts if all(small.getlength(head) < step for head in heads)]
    heads = heads if fitting else ()
    titles = [math.ceil(font.getlength(title)) for title, _ in sections]
    width = max(*titles, *(picture.width for picture in pictures)) + 2 * margin
    height = sum(picture.height + title_height for picture in pictures) + margin + head_height * bool(heads)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for (title, _), picture in zip(sections, pictures, strict=True):
        draw.text((margin, top + 7), title, fill="black", font=font)
        top += title_height
        for column, head in enumerate(heads):
            center = margin + scale * PADDING // 2 + step * (column + 0.5)
            draw.text((center, top + head_height / 2), head, fill="black", font=fitting[0], anchor="mm")
        top += head_height * bool(heads)
        heads = ()  # above the first grid alone
        sheet.paste(picture, (margin, top))
        top += picture.height
    write_atomically(path, _to_png(sheet))


def _to_image(picture: Tensor) -> Image.Image:
    """A picture (3, H, W) in 0..1 as 8-bit RGB, each value rounded to the nearest."""
    return Image.fromarray(rearrange(to_bytes(picture), "c h w -> h w c").numpy())


def _to_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
