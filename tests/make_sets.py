"""Two sets of images, made of what other packages ship: `python -m tests.make_sets photos|letters FOLDER [NUM]`.

Each is a folder with `train` and `test`, five images to one, and in them a subfolder for each class. The test images
show what no training image shows: another part of a photograph, or other fonts.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from string import ascii_uppercase

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PHOTO_SIDE, LETTER_SIDE = 32, 28
STRIP = 64  # pixels of a photograph's width; no crop crosses from one strip to the next, and every fifth is for test
FONTS = ("DejaVu", "STIXGeneral", "cmb", "cmr", "cmss", "cmt")  # those with letters


def make_photos(folder: Path, num: int = 3600) -> None:
    """Crops of the two photographs of scikit-learn, in colour. Training and test crops have no pixel in common."""
    from sklearn.datasets import load_sample_image

    rng = np.random.default_rng(0)
    for name in ("china", "flower"):
        photo = load_sample_image(f"{name}.jpg")  # (H, W, 3)
        tops, lefts = (np.arange(side - PHOTO_SIDE + 1) for side in photo.shape[:2])
        lefts = lefts[lefts // STRIP == (lefts + PHOTO_SIDE - 1) // STRIP]
        is_test = lefts // STRIP % 5 == 2
        for part, columns, share in (("train", lefts[~is_test], 5 / 6), ("test", lefts[is_test], 1 / 6)):
            places = rng.choice(len(tops) * len(columns), round(num / 2 * share), replace=False)
            for i, (top, column) in enumerate(zip(*np.divmod(places, len(columns)), strict=True)):
                left = columns[column]
                crop = photo[top : top + PHOTO_SIDE, left : left + PHOTO_SIDE]
                _save(Image.fromarray(crop), folder / part / name / f"{i}.png")


def make_letters(folder: Path, num: int = 9360) -> None:
    """The letters A to Z, white on black, in the fonts of matplotlib, of several sizes and slants."""
    from matplotlib import get_data_path

    rng = np.random.default_rng(0)
    files = sorted(Path(get_data_path(), "fonts", "ttf").glob("*.ttf"))
    fonts = [file for file in files if file.stem.startswith(FONTS) and not file.stem.endswith("Display")]
    test, train = fonts[::6], [font for i, font in enumerate(fonts) if i % 6]
    for part, chosen, share in (("train", train, 5 / 6), ("test", test, 1 / 6)):
        for letter in ascii_uppercase:
            for i in range(round(num / len(ascii_uppercase) * share)):
                _save(_draw(letter, chosen[i % len(chosen)], rng), folder / part / letter / f"{i}.png")


def _draw(letter: str, font: Path, rng: np.random.Generator) -> Image.Image:
    """A letter, of a random size, slant and place."""
    side = LETTER_SIDE
    canvas = Image.new("L", (2 * side, 2 * side))
    size, slant = rng.uniform(16, 25), rng.uniform(-0.2, 0.3)
    ImageDraw.Draw(canvas).text((side, side), letter, 255, ImageFont.truetype(font, size), anchor="mm")
    left, top = side / 2 + rng.uniform(-2, 2, 2)
    matrix = (1, slant, left - slant * side / 2, 0, 1, top)
    return canvas.transform((side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


SETS: dict[str, Callable[..., None]] = {"photos": make_photos, "letters": make_letters}

if __name__ == "__main__":
    kind, place, *rest = sys.argv[1:]
    SETS[kind](Path(place), *map(int, rest))
