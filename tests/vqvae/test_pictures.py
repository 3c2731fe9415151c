import io
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageSequence

from tests.helpers import make_split
from vqvae.data.pixels import to_model_range, to_unit_range
from vqvae.pictures import columns_for, grid, grid_png, save_animation, save_grid, save_sheet


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.parametrize(("num", "columns"), [(30, 10), (13, 7), (4, 4), (101, 6)])
@pytest.mark.parametrize("image_shape", [(1, 28, 28), (3, 20, 36)])
def test_a_batch_written_and_read_back_is_the_original(
    tmp_path: Path, image_shape: tuple[int, ...], num: int, columns: int
) -> None:
    _, height, width = image_shape
    images = make_split(num, image_shape).images
    shown = to_unit_range(to_model_range(images))  # as everything that is shown goes
    save_grid(shown, tmp_path / "grid.png")
    assert grid_png(shown) == (tmp_path / "grid.png").read_bytes()
    scale = {28: 2, 20: 3}[height]  # to 56 pixels at least
    # On grey, of which two pixels lie between images and around them. White is where the last row ends early.
    rows = -(-num // columns)
    expected = np.full((2 + rows * (height + 2), 2 + columns * (width + 2), 3), 128, np.uint8)
    for i in range(rows * columns):
        top, left = 2 + i // columns * (height + 2), 2 + i % columns * (width + 2)
        if i < num:
            expected[top : top + height, left : left + width] = images[i].permute(1, 2, 0).numpy()
        else:
            expected[top : top + height + 2, left : left + width + 2] = 255
    np.testing.assert_array_equal(read(tmp_path / "grid.png"), expected.repeat(scale, 0).repeat(scale, 1))


@pytest.mark.parametrize(("side", "scale"), [(28, 2), (32, 2), (55, 2), (56, 1), (64, 1), (4, 14)])
def test_a_picture_is_large_enough_to_look_at(tmp_path: Path, side: int, scale: int) -> None:
    save_grid(make_split(3, (1, side, side)).images / 255, tmp_path / "grid.png")
    assert read(tmp_path / "grid.png").shape == (scale * (side + 4), scale * (2 + 3 * (side + 2)), 3)


@pytest.mark.parametrize(("image_shape", "times"), [((1, 28, 28), 1), ((3, 30, 60), 2)])
def test_images_of_one_place_stand_one_above_the_other(image_shape: tuple[int, ...], times: int) -> None:
    upper, lower = make_split(13, image_shape).images / 255, make_split(13, image_shape, seed=1).images / 255
    line = torch.full_like(upper[:, :, :1], 0.5)
    tall = grid(torch.cat([upper, line, lower], dim=2))  # an image of twice the height may need no enlarging
    enlarged = tall.repeat_interleave(times, dim=1).repeat_interleave(times, dim=2)
    assert torch.equal(grid(torch.stack([upper, lower], dim=1)), enlarged)


@pytest.mark.parametrize(
    ("num", "cycle", "columns"),
    [
        *((100, 1, 10), (7, 1, 7), (13, 1, 7), (101, 1, 6), (12, 1, 6), (23, 1, 8)),
        *((100, 10, 10), (99, 3, 9), (100, 3, 6), (100, 6, 6), (12, 4, 8), (100, 26, 10)),
    ],
)
def test_a_grid_has_columns_for_images_that_repeat_and_few_empty_places(num: int, cycle: int, columns: int) -> None:
    assert columns_for(num, cycle) == columns


@pytest.mark.parametrize("image_shape", [(1, 28, 28), (3, 56, 60)])
@pytest.mark.parametrize(("name", "most"), [("a.gif", 6), ("a.webp", 0)])
def test_an_animation_shows_grids_in_turn_the_last_for_two_seconds_and_begins_again(
    tmp_path: Path, name: str, most: int, image_shape: tuple[int, ...]
) -> None:
    values = torch.linspace(0, 1, 7).repeat(image_shape[0], image_shape[1], 1)  # of the few colours that a GIF has
    last = torch.stack([F.interpolate(values, image_shape[2])] * 3)
    grids = [last.where(torch.arange(image_shape[2]) < seen, 0.5) for seen in (0, 9, 20, 99)]
    save_animation(iter(grids), tmp_path / name, 2, ["a", "b", "c"])
    with Image.open(tmp_path / name) as animation:
        frames = [
            (np.array(frame.convert("RGB")), frame.info["duration"]) for frame in ImageSequence.Iterator(animation)
        ]
        assert animation.info["loop"] == 0  # for ever
    assert [duration for _, duration in frames] == [80, 80, 80, 2000]
    for (found, _), images in zip(frames, grids, strict=True):
        with Image.open(io.BytesIO(grid_png(images, 2, ["a", "b", "c"]))) as picture:
            assert np.abs(np.asarray(picture).astype(int) - found).max() <= most


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
        whole = grid(images, 10)[0].numpy()
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
