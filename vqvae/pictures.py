"""Pictures of images: grids, with captions or without, and sheets of several grids with titles."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vqvae.data.pixels import to_bytes
from vqvae.storage.files import write_atomically

PADDING = 2  # pixels between two images
COLUMNS = 10
GREY = 0.5
LEAST_SIDE = 56  # of an image in a picture; a smaller one is enlarged
CAPTION_HEIGHT, CAPTION_SIZES = 15, (12, 11, 10, 9)  # pixels


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


def pairs(upper: Tensor, lower: Tensor) -> dict[str, Any]:
    """What `output.save_images` shows of images (N, C, H, W) that stand above others, with grey ones where the last row
    ends."""
    columns = min(len(upper), COLUMNS)
    both = F.pad(torch.stack([upper, lower]), (0, 0, 0, 0, 0, 0, 0, -len(upper) % columns), value=GREY)
    shown = rearrange(both, "pair (row column) c h w -> (row pair column) c h w", column=columns)
    return {"shown": shown, "columns": columns}


def columns_for(num: int) -> int:
    """Columns of a grid whose images repeat after `num`, so that each column shows the same where that is possible."""
    return COLUMNS // num * num or COLUMNS


def grid_png(images: Tensor, columns: int = COLUMNS, captions: Sequence[str] = ()) -> bytes:
    """Images (N, C, H, W) in 0..1 as a grid in the PNG format, large enough to look at.

    Args:
        columns: images in a row, where there are as many.
        captions: one for each image, or none at all. Where all rows have the same, it stands above the first one only.
    """
    picture = _enlarged(images, columns)
    if captions:
        picture = _captioned(picture, captions, min(len(images), columns), images)
    return _to_png(picture)


def save_grid(images: Tensor, path: Path, columns: int = COLUMNS, captions: Sequence[str] = ()) -> None:
    """Write the grid of `grid_png` to a file."""
    write_atomically(path, grid_png(images, columns, captions))


def save_sheet(
    sections: list[tuple[str, Tensor]], path: Path, columns: int = COLUMNS, heads: Sequence[str] = ()
) -> None:
    """Write several grids to one PNG file, one below the other, each under its title.

    Args:
        sections: (title, images (N, C, H, W) in 0..1) from top to bottom.
        columns: images in a row.
        heads: a name for each column, which stands above the first grid.
    """
    font = ImageFont.load_default(size=16)
    margin, title_height = 12, 30
    pictures = [_enlarged(images, columns) for _, images in sections]
    if heads:
        pictures[0] = _captioned(pictures[0], heads, columns, sections[0][1])
    titles = [math.ceil(font.getlength(title)) for title, _ in sections]
    width = max(*titles, *(picture.width for picture in pictures)) + 2 * margin
    height = sum(picture.height + title_height for picture in pictures) + margin
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for (title, _), picture in zip(sections, pictures, strict=True):
        draw.text((margin, top + 7), title, fill="black", font=font)
        sheet.paste(picture, (margin, top + title_height))
        top += title_height + picture.height
    write_atomically(path, _to_png(sheet))


def _enlarged(images: Tensor, columns: int) -> Image.Image:
    """A grid of which each pixel becomes a square of pixels, so that small images are large enough to look at."""
    small = Image.fromarray(rearrange(to_bytes(grid(images, columns)), "c h w -> h w c").numpy())
    scale = _scale(images)
    return small.resize((small.width * scale, small.height * scale), Image.Resampling.NEAREST)


def _scale(images: Tensor) -> int:
    return -(-LEAST_SIDE // min(images.shape[2:]))


def _captioned(picture: Image.Image, captions: Sequence[str], columns: int, images: Tensor) -> Image.Image:
    """A grid of images with a caption above each of its cells, or above each column, where its rows have the same.

    The captions are as large as lets the longest fit. If none of the sizes does, the longest are cut.
    """
    height, width = ((side + PADDING) * _scale(images) for side in images.shape[2:])
    rows = [captions[start : start + columns] for start in range(0, len(captions), columns)]
    if all(row == rows[0][: len(row)] for row in rows):
        rows = [rows[0]] + [()] * (-(-len(images) // columns) - 1)
    fonts = [_font(size, "".join(captions)) for size in CAPTION_SIZES]
    font = next((font for font in fonts if all(font.getlength(text) < width for text in captions)), fonts[-1])
    padding = picture.height - len(rows) * height  # below a row; the next one begins with it too
    num_captioned = sum(map(bool, rows))
    shown_height = picture.height + num_captioned * CAPTION_HEIGHT + (num_captioned - 1) * padding
    shown = Image.new("RGB", (picture.width, shown_height), "white")
    draw, bottom = ImageDraw.Draw(shown), 0
    for number, row in enumerate(rows):
        top = bottom if row else bottom - padding
        for column, text in enumerate(row):
            while len(text) > 1 and draw.textlength(text, font) > width:
                text = f"{text[:-2]}\u2026"
            draw.text((column * width + width / 2, top + 1), text, fill="black", font=font, anchor="ma")
        top += CAPTION_HEIGHT if row else 0
        bottom = top + height + padding
        shown.paste(picture.crop((0, number * height, picture.width, (number + 1) * height + padding)), (0, top))
    return shown


def _font(size: int, text: str) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font or, where it lacks letters of a text, that of matplotlib, which has those of most alphabets."""
    if text.isascii():
        return ImageFont.load_default(size=size)
    import matplotlib  # takes a part of a second

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


def _to_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
