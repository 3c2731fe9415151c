from pathlib import Path

import pytest
import torch

from prior.completions import as_grid, complete
from tests.helpers import make_split, save_pair
from vqvae.errors import InputError

IMAGE_SHAPE = (3, 16, 12)  # to 4x3 codes
IMAGES = make_split(5, IMAGE_SHAPE).images


@pytest.mark.parametrize(("num_rows", "num_kept"), [(0, 0), (1, 1), (None, 2), (4, 4)])
@pytest.mark.parametrize("num_classes", [5, 0])
def test_a_completion_keeps_rows_and_shows_what_was_kept(
    tmp_path: Path, num_rows: int | None, num_kept: int, num_classes: int
) -> None:
    pair, done = save_pair(tmp_path, IMAGE_SHAPE, num_classes), []
    found = complete(pair, IMAGES, num_rows, 2, seed=3, top_k=9, progress=done.append)
    expected = pair.draw_completions(pair.keep_rows(pair.encode(IMAGES / 255), num_kept), 2, seed=3, top_k=9)
    assert torch.equal(found.completions.flatten(0, 1), expected.images)
    assert torch.equal(found.indices.flatten(0, 1), expected.indices)
    assert torch.equal(found.labels.flatten(), expected.labels)
    assert found.indices.shape == (5, 2, 4, 3)
    assert sum(done) == 10
    torch.testing.assert_close(found.images, IMAGES / 255, rtol=0, atol=1e-6)
    reconstructed = pair.reconstruct(IMAGES / 255)
    torch.testing.assert_close(found.kept[:, :, : 4 * num_kept], reconstructed[:, :, : 4 * num_kept])
    assert (found.kept[:, :, 4 * num_kept :] == 0.5).all()


def test_a_label_that_is_asked_for_is_that_of_all(tmp_path: Path) -> None:
    pair = save_pair(tmp_path, IMAGE_SHAPE, 5)
    assert (complete(pair, IMAGES, 1, 3, label=4).labels == 4).all()
    with pytest.raises(InputError, match=r"expected labels in 0\.\.4, found 5; choose others by `labels`"):
        complete(pair, IMAGES, label=5)
    with pytest.raises(InputError, match="`num_rows` between 0 and 4, found 5; try `num_rows=2`"):
        complete(pair, IMAGES, 5)


@pytest.mark.parametrize("num_classes", [5, 0])
def test_a_grid_has_a_row_for_each_image_with_names_over_completions(tmp_path: Path, num_classes: int) -> None:
    completions = complete(save_pair(tmp_path, IMAGE_SHAPE, num_classes), IMAGES, 1, 3)
    names = [f"class {number}" for number in range(num_classes)]
    grid = as_grid(completions, names)
    assert (grid["columns"], len(grid["captions"]), len(grid["shown"])) == (5, 25, 25)
    for n in range(5):
        shown, captions = (grid[part][5 * n : 5 * n + 5] for part in ("shown", "captions"))
        assert torch.equal(shown[0], completions.images[n])
        assert torch.equal(shown[1], completions.kept[n])
        assert torch.equal(shown[2:], completions.completions[n])
        assert captions == ["original", "kept", *(names[label] if names else "" for label in completions.labels[n])]
