from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers import make_split
from vqvae.data.pixels import to_model_range, to_unit_range
from vqvae.pictures import grid, grid_png, save_grid, save_sheet


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
    # Rows of ten, on grey of which two pixels lie between images and around them.
    rows, columns = -(-num // 10), min(num, 10)
    expected = np.full((2 + rows * (height + 2), 2 + columns * (width + 2), 3), 128, np.uint8)
    for i in range(num):
        top, left = 2 + i // 10 * (height + 2), 2 + i % 10 * (width + 2)
        expected[top : top + height, left : left + width] = images[i].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(read(tmp_path / "grid.png"), expected)


def test_a_sheet_has_each_grid_under_its_title(tmp_path: Path) -> None:
    first, second = make_split(10, (1, 6, 6)).images / 255, make_split(12, (1, 6, 6), seed=1).images / 255
    save_sheet([("real digits", first), ("samples", second)], tmp_path / "sheet.png", scale=2)
    picture, top, titles = read(tmp_path / "sheet.png")[..., 0], 0, []
    for images in (first, second):
        whole = (grid(images)[0] * 255).round().numpy().astype(np.uint8).repeat(2, 0).repeat(2, 1)
        windows = np.lib.stride_tricks.sliding_window_view(picture, whole.shape)
        ((row, _),) = np.argwhere((windows == whole).all(axis=(2, 3)))
        titles.append(picture[row - 30 : row])  # black text on white, below the grid before
        assert row - 30 >= top
        assert (titles[-1] < 60).any()
        assert (titles[-1] > 200).mean() > 0.5
        top = row + len(whole)
    assert not np.array_equal(*titles)


def test_names_stand_above_their_columns_where_all_are_short_enough_and_a_title_is_never_cut(tmp_path: Path) -> None:
    images = make_split(6, (1, 20, 30)).images / 255

    def drawn(*heads: str, title: str = "title") -> np.ndarray:
        save_sheet([(title, images)] * 2, tmp_path / "sheet.png", columns=3, heads=heads)
        return read(tmp_path / "sheet.png")[..., 0]

    plain, named = drawn(), drawn("cat", "", "dog")
    assert np.array_equal(drawn("cat", "w" * 30, "dog"), plain)
    assert named.shape == (plain.shape[0] + 20, plain.shape[1])
    assert np.array_equal(np.delete(named, range(30, 50), axis=0), plain)
    has_text = [(named[30:50, 14 + 64 * column :][:, :64] < 60).any() for column in range(3)]
    assert has_text == [True, False, True]
    wide = drawn(title="a title that is wider than the three images below it")
    assert wide.shape[1] > plain.shape[1]
    assert (wide[:, -12:] > 200).all()
