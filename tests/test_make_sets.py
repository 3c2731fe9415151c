"""The made sets: what is in them, and that both stages run on them."""

from pathlib import Path

import numpy as np
import pytest

from tests.helpers import ROOT, run
from tests.make_sets import make_letters, make_photos
from vqvae.data.load import load_dataset

SHAPES = {make_photos: (3, 32, 32), make_letters: (1, 28, 28)}


@pytest.mark.slow
@pytest.mark.parametrize("make", SHAPES)
def test_both_stages_train_draw_and_are_compared_on_a_made_set(tmp_path: Path, make: object) -> None:
    folder, place = tmp_path / "set", ["--device", "cpu", "--data-folder", tmp_path / "data"]
    make(folder, 624)
    info = load_dataset(folder, tmp_path / "data").info
    assert info.image_shape == SHAPES[make]
    assert info.class_names in (("china", "flower"), tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
    run_folder = tmp_path / "run"
    vqvae, prior = (["--" + stage, run_folder / f"{stage}.safetensors"] for stage in ("vqvae", "prior"))
    training = ["--config", ROOT / "configs" / "smoke.toml", "--num-epochs", 1, "--output-folder", run_folder, *place]
    drawn, compared = tmp_path / "drawn.npz", tmp_path / "compared.png"
    for command in (
        ["train-vqvae", "--dataset", folder, *training],
        ["train-prior", *vqvae, *training],
        ["sample", "--mode", "pixelcnn", *vqvae, *prior, "--num-samples", 8, "--device", "cpu", "--output", drawn],
        ["compare", *vqvae, *prior, *place, "--output", compared],
    ):
        result = run(*command)
        assert result.status == 0, result.stderr
    with np.load(drawn) as file:
        assert file["images"].shape == (8, *info.image_shape)
    assert compared.exists()
