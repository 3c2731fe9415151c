"""The report's plots, drawn with Pillow.

A plotting library would obey a settings file in the current folder, and want a folder of its own to write to.
"""

import io
import math

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

WIDTH, HEIGHT = 800, 350  # of a plot, in pixels
ENLARGED = 2  # a plot is drawn larger and then reduced, which makes its edges smooth
WIDEST_WITH_NUMBERS = 12  # a map of more columns has no space for its numbers
SHADES = torch.tensor([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]])  # dark to bright


class Canvas:
    """A white picture to draw on. All lengths are in pixels of the finished plot, from the upper left corner."""

    def __init__(self) -> None:
        self.image = Image.new("RGB", (WIDTH * ENLARGED, HEIGHT * ENLARGED), "white")
        self.draw = ImageDraw.Draw(self.image)

    def text(self, x: float, y: float, text: str, anchor: str, color: str = "black", size: int = 12) -> None:
        font = ImageFont.load_default(size=size * ENLARGED)
        self.draw.text((x * ENLARGED, y * ENLARGED), text, color, font, anchor)

    def box(self, x: float, y: float, width: float, height: float, color: tuple[int, ...]) -> None:
        corners = (x * ENLARGED, y * ENLARGED, (x + width) * ENLARGED, (y + height) * ENLARGED)
        self.draw.rectangle(corners, fill=color)

    def line(self, points: list[tuple[float, float]], color: str, width: int = 1) -> None:
        self.draw.line([(x * ENLARGED, y * ENLARGED) for x, y in points], color, width * ENLARGED)

    def to_png(self) -> bytes:
        buffer = io.BytesIO()
        self.image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS).save(buffer, format="PNG", optimize=True)
        return buffer.getvalue()


def plot_heat_maps(maps: dict[str, Tensor]) -> bytes:
    """Nats per code by position, as PNG: maps (h, w) side by side under their titles. All share one scale from 0."""
    canvas, most = Canvas(), max(1e-9, *(float(nats.max()) for nats in maps.values()))
    top, side, panel = 40.0, 290.0, (WIDTH - 110) / len(maps)
    for number, (title, nats) in enumerate(maps.items()):
        height, width = nats.shape
        cell = min(side / height, (panel - 30) / width)
        left = panel * (number + 0.5) - cell * width / 2
        canvas.text(left + cell * width / 2, top - 12, f"{title}: {nats.mean():.2f}", "ms", size=14)
        for i, row in enumerate(nats.tolist()):
            for j, value in enumerate(row):
                x, y = left + j * cell, top + i * cell
                canvas.box(x, y, cell, cell, _shade(value / most))
                if width <= WIDEST_WITH_NUMBERS:
                    color = "white" if value < most / 2 else "black"
                    canvas.text(x + cell / 2, y + cell / 2, f"{value:.1f}", "mm", color)
    left, steps = WIDTH - 90, 100
    for step in range(steps):
        canvas.box(left, top + side * (1 - (step + 1) / steps), 18, side / steps, _shade(step / steps))
    for share in (0, 0.5, 1):
        canvas.text(left + 24, top + side * (1 - share), f"{most * share:.1f}", "lm")
    canvas.text(left + 9, top - 12, "nats per code", "ms")
    return canvas.to_png()


def plot_code_usage(counts: Tensor) -> bytes:
    """The share of each code, the most frequent first, as PNG. `counts` is (K,) int64, of a sum above 0.

    The scale is logarithmic, so the curve ends at the last code that is used at all.
    """
    canvas, num_codes = Canvas(), len(counts)
    shares = [count / int(counts.sum()) for count in counts.sort(descending=True).values.tolist() if count > 0]
    highest, lowest = math.ceil(math.log10(shares[0])), math.floor(math.log10(min(shares[-1], 1 / num_codes)))
    left, right, top, bottom = 80.0, WIDTH - 20.0, 20.0, HEIGHT - 50.0

    def position(rank: float, share: float) -> tuple[float, float]:
        height = (math.log10(share) - lowest) / (highest - lowest)
        return left + (right - left) * rank / (num_codes - 1), bottom - (bottom - top) * height

    for exponent in range(lowest, highest + 1):
        y = position(0, 10.0**exponent)[1]
        canvas.line([(left, y), (right, y)], "lightgray")
        canvas.text(left - 8, y, f"{10.0**exponent:g}", "rm")
    for part in range(5):
        rank = round((num_codes - 1) * part / 4)
        canvas.text(position(rank, 1)[0], bottom + 8, str(rank), "mt")
    canvas.line([position(0, 1 / num_codes), position(num_codes - 1, 1 / num_codes)], "gray")
    canvas.text(right - 4, position(0, 1 / num_codes)[1] - 4, "an even split", "rs", "gray")
    canvas.line([position(rank, share) for rank, share in enumerate(shares)], "#1f77b4", width=2)
    canvas.text((left + right) / 2, HEIGHT - 12, "share of all codes, by the rank of the code", "ms")
    return canvas.to_png()


def _shade(share: float) -> tuple[int, ...]:
    """The colour of a share in 0..1, from dark to bright."""
    place = share * (len(SHADES) - 1)
    below = min(int(place), len(SHADES) - 2)
    mixed = SHADES[below] + (SHADES[below + 1] - SHADES[below]) * (place - below)
    return tuple(mixed.round().int().tolist())
