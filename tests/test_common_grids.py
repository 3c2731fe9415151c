from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vqvae.common.data import load_test, to_model_range, to_unit_range
from vqvae.common.grids import COLUMNS, PADDING, grid, grid_png, save_grid, save_sheet


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "RGB"
        return np.asarray(image)


def cell(picture: np.ndarray, number: int, columns: int, side: int) -> np.ndarray:
    """The pixels of one image in a grid, cut out by where it must stand."""
    row, column = divmod(number, columns)
    top, left = PADDING + row * (side + PADDING), PADDING + column * (side + PADDING)
    return picture[top : top + side, left : left + side]


@pytest.mark.parametrize("num", [30, 13, 4])
def test_a_batch_written_as_a_grid_and_read_back_is_the_original(
    tmp_path: Path, fixture_folder: Path, num: int
) -> None:
    images = load_test(fixture_folder, download=False).images[:num]
    # Through the model's pixel range and back, as everything that is shown goes.
    shown = to_unit_range(to_model_range(images))
    save_grid(shown, tmp_path / "grid.png")
    picture = read(tmp_path / "grid.png")
    for i in range(num):
        for channel in range(3):
            np.testing.assert_array_equal(cell(picture[..., channel], i, COLUMNS, 28), images[i, 0].numpy())
    assert grid_png(shown) == (tmp_path / "grid.png").read_bytes()


def test_every_pixel_value_survives_a_grid(tmp_path: Path) -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(2, 1, 8, 16).repeat(1, 1, 2, 1)
    save_grid(to_unit_range(to_model_range(images)), tmp_path / "grid.png")
    for i in range(2):
        found = cell(read(tmp_path / "grid.png")[..., 0], i, COLUMNS, 16)
        np.testing.assert_array_equal(found, images[i, 0].numpy())


def test_images_stand_row_by_row_on_mid_grey() -> None:
    images = torch.stack([torch.full((1, 5, 5), i / 20) for i in range(13)])
    picture = grid(images)
    assert picture.shape == (3, 2 * 7 + PADDING, 10 * 7 + PADDING)
    for i in range(13):
        assert (cell(picture[0].numpy(), i, 10, 5) == np.float32(i / 20)).all()
    assert (picture[:, :PADDING] == 0.5).all()
    assert (picture[:, :, 5 + PADDING : 5 + 2 * PADDING] == 0.5).all()


def positions(picture: np.ndarray, part: np.ndarray) -> list[tuple[int, int]]:
    """Where a smaller picture stands in a larger one, exactly."""
    windows = np.lib.stride_tricks.sliding_window_view(picture, part.shape)
    return [(int(y), int(x)) for y, x in np.argwhere((windows == part).all(axis=(2, 3)))]


def test_a_sheet_has_each_grid_beneath_its_title(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.rand(num, 1, 6, 6, generator=generator) for num in (10, 12))
    save_sheet([("real digits", first), ("samples", second)], tmp_path / "sheet.png", scale=2)
    picture = read(tmp_path / "sheet.png")[..., 0]
    found = []
    for images in (first, second):
        last = (images[-1, 0] * 255).round().numpy().astype(np.uint8).repeat(2, 0).repeat(2, 1)
        where = positions(picture, last)
        assert len(where) == 1
        found.append(where[0])
    assert found[0][0] < found[1][0]
    # Black text on white above each grid: dark pixels in rows that no grid reaches.
    grid_height = 2 * (6 + 2 * PADDING)
    bottom_of_first = found[0][0] + 12 + 2 * PADDING
    assert (picture[: bottom_of_first - grid_height] < 60).any()
    between = picture[bottom_of_first : found[1][0] - 2 * (6 + 2 * PADDING)]
    assert len(between) > 10
    assert (between < 60).any()
    assert picture[0, 0] == 255


def test_a_title_changes_only_the_rows_of_text(tmp_path: Path) -> None:
    images = torch.rand(3, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    save_sheet([("one", images)], tmp_path / "one.png")
    save_sheet([("another", images)], tmp_path / "another.png")
    one, another = read(tmp_path / "one.png"), read(tmp_path / "another.png")
    assert one.shape == another.shape
    differ = np.argwhere((one != another).any(-1))
    assert len(differ) > 0
    assert differ[:, 0].max() < 30
