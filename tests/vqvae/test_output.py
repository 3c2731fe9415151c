from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import make_split
from vqvae.errors import InputError
from vqvae.output import check_output, save_images, save_reconstructions
from vqvae.pictures import grid_png

IMAGES, OTHERS = make_split(3).images / 255, make_split(3, seed=1).images / 255
ARRAYS = {"images": IMAGES, "reconstructions": OTHERS, "indices": torch.arange(147).reshape(3, 7, 7)}


@pytest.mark.parametrize("name", ["a.jpg", "a", "png", "a.PNG"])
def test_an_ending_other_than_png_and_npz_is_refused(name: str) -> None:
    assert [check_output(Path(good)) for good in ("b/a.png", "a.b.npz")] == [Path("b/a.png"), Path("a.b.npz")]
    message = rf"expected `output` to end in .png .* or .npz .*, found {name}; try `output={Path(name).stem}.png`"
    with pytest.raises(InputError, match=message):
        check_output(Path(name))


def test_arrays_keep_their_names_values_and_types_and_a_picture_has_the_originals_beside_it(tmp_path: Path) -> None:
    save_images(tmp_path / "a.npz", ARRAYS)
    assert save_reconstructions(tmp_path / "b.npz", ARRAYS) == [tmp_path / "b.npz"]
    for name in ("a.npz", "b.npz"):
        with np.load(tmp_path / name) as found:
            torch.testing.assert_close({key: torch.from_numpy(found[key]) for key in found}, ARRAYS, rtol=0, atol=0)
    written = save_reconstructions(tmp_path / "r.png", ARRAYS)
    assert written == [tmp_path / "r-original.png", tmp_path / "r.png"]
    assert [path.read_bytes() for path in written] == [grid_png(IMAGES), grid_png(OTHERS)]
