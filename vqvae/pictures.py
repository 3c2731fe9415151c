"""Pictures of images: grids, with captions or without, animations of them, and sheets of several with titles."""

import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vqvae.data.pixels import to_bytes
from vqvae.storage.files import write_atomically

PADDING = 2  # pixels between two images
COLUMNS = 10
GREY = 0.5  # in the place of what is not shown, and between images
LEAST_SIDE = 56  # of an image in a picture; a smaller one is enlarged
STAGE_MS, LAST_MS = 80, 2000  # how long an animation shows a picture
CAPTION_HEIGHT, CAPTION_SIZES = 15, (12, 11, 10, 9)  # pixels


def grid(images: Tensor, columns: int | None = None) -> Tensor:
    """Images in 0..1, row by row on mid grey, as one picture (3, height, width) uint8 that is large enough to look at.

    Where the last row ends early, the rest of it is white, so that nothing there looks like an image.

    Args:
        images: (N, C, H, W) of 1 or 3 channels, or (N, P, C, H, W), of which P stand one above the other.
        columns: images in a row, where there are as many. None takes those of `columns_for`.
    """
    # torchvision's make_grid does most of this, but its import takes a second of the start of `sample`.
    columns = min(len(images), columns or columns_for(len(images)))
    scale, num_missing, grey = _scale(images), -len(images) % columns, round(GREY * 255)
    cells = to_bytes(images.cpu())
    if cells.ndim == 5:  # with a line of one pixel between two parts
        cells = rearrange(F.pad(cells, (0, 0, 1, 0), value=grey), "n part c h w -> n c (part h) w")[:, :, 1:]
    height, width = (side + PADDING for side in cells.shape[2:])
    cells = F.pad(cells, (PADDING, 0, PADDING, 0, 0, 0, 0, num_missing), value=grey)
    picture = rearrange(cells, "(row column) c h w -> c (row h) (column w)", column=columns)
    picture = F.pad(picture, (0, PADDING, 0, PADDING), value=grey)
    if num_missing:
        picture[:, -height:, -num_missing * width :] = 255
    # Each pixel becomes a square of pixels.
    return repeat(picture, "c h w -> (c rgb) (h down) (w right)", rgb=3 // len(picture), down=scale, right=scale)


def columns_for(num: int, cycle: int = 1) -> int:
    """Columns of a grid: of five to ten the number that leaves the fewest places empty.

    Args:
        num: images in the grid.
        cycle: after so many the images repeat, so that each column shows the same where that is possible.
    """
    step = cycle if cycle <= COLUMNS else 1
    return min(range(whole_cycles(step), COLUMNS // 2 - 1, -step), key=lambda columns: -num % columns)


def whole_cycles(cycle: int) -> int:
    """The most columns, up to `COLUMNS`, that are a multiple of a cycle; one cycle where it is longer than that."""
    return max(COLUMNS // cycle, 1) * cycle


def grid_png(images: Tensor, columns: int | None = None, captions: Sequence[str] = ()) -> bytes:
    """Images as a grid in the PNG format.

    Args:
        images, columns: of `grid`.
        captions: one for each image, or none at all. Where all rows have the same, it stands above the first one only.
    """
    return _to_png(_drawn(images, columns, captions))


def save_grid(images: Tensor, path: Path, columns: int | None = None, captions: Sequence[str] = ()) -> None:
    """Write the grid of `grid_png` to a file."""
    write_atomically(path, grid_png(images, columns, captions))


def save_animation(
    stages: Iterable[Tensor], path: Path, columns: int | None = None, captions: Sequence[str] = ()
) -> None:
    """Write one grid after the other to a file, which shows the last one longer, and then begins again.

    Args:
        stages: images of `grid`, of equal shapes.
        path: ends in .gif or in .webp.
        columns, captions: of `grid_png`.
    """
    frames = [_drawn(images, columns, captions) for images in stages]
    if path.suffix == ".gif":  # which has 256 colours: those of the last grid for all, so that nothing flickers
        colors = frames[-1].quantize()
        frames = [frame.quantize(palette=colors, dither=Image.Dither.NONE) for frame in frames]
    buffer, durations = io.BytesIO(), [STAGE_MS] * (len(frames) - 1) + [LAST_MS]
    options: dict[str, Any] = {"duration": durations, "loop": 0, "lossless": True}  # only WebP knows the last
    frames[0].save(buffer, path.suffix[1:], save_all=True, append_images=frames[1:], **options)
    write_atomically(path, buffer.getvalue())


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
    pictures = [_drawn(images, columns, () if number else heads) for number, (_, images) in enumerate(sections)]
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


def _drawn(images: Tensor, columns: int | None, captions: Sequence[str]) -> Image.Image:
    """A grid of images with captions, if there are any."""
    columns = min(len(images), columns or columns_for(len(images)))
    picture = Image.fromarray(rearrange(grid(images, columns), "c h w -> h w c").numpy())
    return _captioned(picture, captions, images, columns) if captions else picture


def _scale(images: Tensor) -> int:
    return -(-LEAST_SIDE // min(images.shape[-2:]))


def _captioned(picture: Image.Image, captions: Sequence[str], images: Tensor, columns: int) -> Image.Image:
    """A grid of images with a caption above each of its cells, or above each column, where its rows have the same.

    The captions are as large as lets the longest fit. If none of the sizes does, the longest are cut.
    """
    num_rows, padding = -(-len(images) // columns), PADDING * _scale(images)  # the padding is below a row and above it
    height, width = (picture.height - padding) // num_rows, (picture.width - padding) // columns
    rows = [captions[start : start + columns] for start in range(0, len(captions), columns)]
    if all(row == rows[0][: len(row)] for row in rows):
        rows = [rows[0]] + [()] * (num_rows - 1)
    fonts = [_font(size, "".join(captions)) for size in CAPTION_SIZES]
    font = next((font for font in fonts if all(font.getlength(text) < width for text in captions)), fonts[-1])
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
    import matplotlib  # which takes part of a second

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


def _to_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
