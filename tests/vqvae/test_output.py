import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import make_split
from vqvae.errors import InputError
from vqvae.output import ANIMATIONS, check_output, save_images
from vqvae.pictures import grid_png, save_animation

IMAGES, OTHERS = make_split(3).images / 255, make_split(3, seed=1).images / 255
ARRAYS = {"images": IMAGES, "reconstructions": OTHERS, "indices": torch.arange(147).reshape(3, 7, 7)}


TRY = {"a.jpg": "a.png", "a": "a.png", "png": "png.png", "b/a.PNG": "b/a.png", "b/c.d/a": "b/c.d/a.png"}
TRY |= {"": "images.png", ".": "images.png", "b/..": "b/../images.png", ".png": ".png.png"}


@pytest.mark.parametrize("name", TRY)
def test_an_ending_other_than_png_and_npz_is_refused_and_the_name_to_try_is_accepted_and_in_the_same_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for good in ("b/a.png", "a.b.npz", TRY[name]):
        assert check_output(Path(good)) == Path(good)
    with pytest.raises(InputError, match=r"expected `output` to end in .png .* or .npz .*, found ") as refusal:
        check_output(Path(name))
    assert str(refusal.value).endswith(f"found {Path(name)}; try `output={TRY[name]}`")
    assert not any(tmp_path.iterdir())


def test_a_command_may_write_files_of_other_kinds() -> None:
    assert check_output(Path("a.csv"), ".csv", ".npz") == Path("a.csv")
    assert check_output(Path("a.webp"), *ANIMATIONS) == Path("a.webp")
    expected = "expected `output` to end in .csv (a table) or .npz (arrays), found a.png; try `output=a.csv`"
    with pytest.raises(InputError, match=re.escape(expected)):
        check_output(Path("a.png"), ".csv", ".npz")


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.png").mkdir()
    with pytest.raises(InputError, match=r"^expected to write .*r.png: Is a directory; mend that, or"):
        check_output(tmp_path / "r.png")


def test_arrays_keep_their_names_values_and_types_and_a_picture_shows_what_it_is_given(tmp_path: Path) -> None:
    save_images(tmp_path / "a.npz", {**ARRAYS, "names": ("a.png", "b c.png", "\udcff")}, IMAGES)
    with np.load(tmp_path / "a.npz") as found:
        assert found["names"].tolist() == ["a.png", "b c.png", "\udcff"]
        arrays = {key: torch.from_numpy(found[key]) for key in found if key != "names"}
    torch.testing.assert_close(arrays, ARRAYS, rtol=0, atol=0)
    save_images(tmp_path / "a.png", ARRAYS, OTHERS, columns=2, captions=["a", "b", "c"])
    assert (tmp_path / "a.png").read_bytes() == grid_png(OTHERS, 2, ["a", "b", "c"])
    save_images(tmp_path / "a.gif", ARRAYS, OTHERS, columns=2, stages=[IMAGES, OTHERS])
    save_animation([IMAGES, OTHERS], tmp_path / "b.gif", 2)
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()
