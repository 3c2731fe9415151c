from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import make_split
from vqvae.data.pixels import to_model_range, to_unit_range
from vqvae.pictures import columns_for, grid, grid_png, pairs, save_grid, save_sheet


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.parametrize("num", [30, 13, 4])
@pytest.mark.parametrize("image_shape", [(1, 28, 28), (3, 20, 36)])
def test_a_batch_written_and_read_back_is_the_original(tmp_path: Path, image_shape: tuple[int, ...], num: int) -> None:
    _, height, width = image_shape
    images = make_split(num, image_shape).images
    shown = to_unit_range(to_model_range(images))  # as everything that is shown goes
    save_grid(shown, tmp_path / "grid.png")
    assert grid_png(shown) == (tmp_path / "grid.png").read_bytes()
    scale = {28: 2, 20: 3}[height]  # to 56 pixels at least
    # Rows of ten, on grey of which two pixels lie between images and around them.
    rows, columns = -(-num // 10), min(num, 10)
    expected = np.full((2 + rows * (height + 2), 2 + columns * (width + 2), 3), 128, np.uint8)
    for i in range(num):
        top, left = 2 + i // 10 * (height + 2), 2 + i % 10 * (width + 2)
        expected[top : top + height, left : left + width] = images[i].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(read(tmp_path / "grid.png"), expected.repeat(scale, 0).repeat(scale, 1))


@pytest.mark.parametrize(("side", "scale"), [(28, 2), (32, 2), (55, 2), (56, 1), (64, 1), (4, 14)])
def test_a_picture_is_large_enough_to_look_at(tmp_path: Path, side: int, scale: int) -> None:
    save_grid(make_split(3, (1, side, side)).images / 255, tmp_path / "grid.png")
    assert read(tmp_path / "grid.png").shape == (scale * (side + 4), scale * (2 + 3 * (side + 2)), 3)


@pytest.mark.parametrize("num", [1, 7, 10, 13])
def test_pairs_stand_one_above_the_other_in_rows_of_a_grid(num: int) -> None:
    upper, lower = make_split(num).images / 255, make_split(num, seed=1).images / 255
    columns, both = min(num, 10), pairs(upper, lower)
    found = both["shown"]
    assert both["columns"] == columns  # of the grid, in which the lower row then follows the upper one
    for i in range(num):
        row, column = divmod(i, columns)
        assert torch.equal(found[2 * row * columns + column], upper[i])
        assert torch.equal(found[(2 * row + 1) * columns + column], lower[i])
    assert len(found) == 2 * columns * -(-num // columns)
    assert (found == 0.5).all(dim=(1, 2, 3)).sum() == len(found) - 2 * num


@pytest.mark.parametrize(("num", "columns"), [(1, 10), (2, 10), (3, 9), (6, 6), (10, 10), (26, 10)])
def test_a_grid_has_columns_for_images_that_repeat(num: int, columns: int) -> None:
    assert columns_for(num) == columns


def test_captions_of_other_alphabets_are_legible_and_differ() -> None:
    images = torch.zeros(1, 1, 28, 28)
    pictures = [grid_png(images, captions=[text]) for text in ("é", "Ä", "ß", "жук", "ελιά", "ł")]
    assert len(set(pictures)) == len(pictures)  # a letter that a font lacks is a box


@pytest.mark.parametrize("num", [5, 6])
def test_captions_stand_above_their_images_or_once_where_all_rows_have_the_same(tmp_path: Path, num: int) -> None:
    images = torch.rand(num, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    save_grid(images, tmp_path / "plain.png", 3)
    plain, each, once = read(tmp_path / "plain.png"), list("abcdef")[:num], list("abcabc")[:num]
    save_grid(images, tmp_path / "once.png", 3, once)
    picture = read(tmp_path / "once.png")
    np.testing.assert_array_equal(picture[15:], plain)
    save_grid(images, tmp_path / "each.png", 3, each)
    picture = read(tmp_path / "each.png")
    assert picture.shape == (plain.shape[0] + 2 * 15 + 4, *plain.shape[1:])
    np.testing.assert_array_equal(picture[15:79], plain[:64])  # a row is 2 (28 + 2) high, and a padding follows
    np.testing.assert_array_equal(picture[94:], plain[60:])
    for top, texts in ((0, 3), (79, num - 3)):
        columns = [picture[top : top + 15, 60 * column : 60 * column + 60] for column in range(3)]
        assert [bool((part < 100).any()) for part in columns] == [True] * texts + [False] * (3 - texts)
        assert all((part > 200).mean() > 0.9 for part in columns)


def test_a_caption_that_is_too_long_is_cut(tmp_path: Path) -> None:
    images = torch.zeros(3, 1, 28, 28)
    long = ["", "w" * 1000, ""]
    save_grid(images, tmp_path / "long.png", 3, long)
    dark = (read(tmp_path / "long.png")[:15] < 200).any(axis=(0, 2)).nonzero()[0]
    assert 60 <= dark.min() < dark.max() < 120


def test_a_sheet_has_each_grid_under_its_title(tmp_path: Path) -> None:
    first, second = make_split(10, (1, 6, 6)).images / 255, make_split(12, (1, 6, 6), seed=1).images / 255
    save_sheet([("real digits", first), ("samples", second)], tmp_path / "sheet.png")
    picture, top, titles = read(tmp_path / "sheet.png")[..., 0], 0, []
    for images in (first, second):
        whole = (grid(images)[0] * 255).round().numpy().astype(np.uint8).repeat(10, 0).repeat(10, 1)
        windows = np.lib.stride_tricks.sliding_window_view(picture, whole.shape)
        ((row, _),) = np.argwhere((windows == whole).all(axis=(2, 3)))
        titles.append(picture[row - 30 : row])  # black text on white, below the grid before
        assert row - 30 >= top
        assert (titles[-1] < 60).any()
        assert (titles[-1] > 200).mean() > 0.5
        top = row + len(whole)
    assert not np.array_equal(*titles)


def test_names_stand_above_their_columns_and_a_title_is_never_cut(tmp_path: Path) -> None:
    images = make_split(6, (1, 20, 30)).images / 255

    def drawn(*heads: str, title: str = "title") -> np.ndarray:
        save_sheet([(title, images)] * 2, tmp_path / "sheet.png", columns=3, heads=heads)
        return read(tmp_path / "sheet.png")[..., 0]

    plain, named = drawn(), drawn("cat", "", "dog")
    assert named.shape == (plain.shape[0] + 15, plain.shape[1])
    assert np.array_equal(np.delete(named, range(30, 45), axis=0), plain)
    has_text = [(named[30:45, 12 + 96 * column :][:, :96] < 60).any() for column in range(3)]
    assert has_text == [True, False, True]
    wide = drawn(title="a title that is wider than the three images below it")
    assert wide.shape[1] > plain.shape[1]
    assert (wide[:, -12:] > 200).all()
