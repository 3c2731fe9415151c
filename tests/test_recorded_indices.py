"""The codes that every mode draws from the shipped weights, so that a change of the code that changes them is noticed.

The prior draws in float64, where two machines' rounding does not change a draw. The Gaussian modes and the encoder work
in float32; none of the vectors quantised here lies within 5e-5 of a tie between two codes.
"""

import hashlib

import pytest
import torch
from torch import Tensor

from prior.codes import extract
from prior.maps import draw_maps
from prior.model import GatedPixelCNN, load_prior
from tests.helpers import CPU, SHIPPED, mnist
from vqvae.gaussian import gaussian_images, gaussian_latents
from vqvae.model import VQVAE, load_vqvae

NUM = 20


def digest(indices: Tensor) -> str:
    return hashlib.sha256(indices.to(torch.int16).contiguous().numpy().tobytes()).hexdigest()[:16]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.fixture(scope="module")
def pair() -> tuple[VQVAE, GatedPixelCNN]:
    vqvae, header = load_vqvae(SHIPPED / "vqvae.safetensors", CPU)
    return vqvae, load_prior(SHIPPED / "prior.safetensors", vqvae, header, CPU)[0].double()


LABELS = torch.arange(NUM) % 10
KNOWN = torch.full((NUM, 7, 7), -1).index_fill(1, torch.arange(3), 5)


@pytest.mark.parametrize(
    ("options", "recorded"),
    [
        ({"labels": LABELS}, "83cb705f86413280"),
        ({"labels": LABELS, "guidance": 1.5}, "56ddb037d92718e1"),
        ({"labels": LABELS, "guidance": 1.5, "temperature": 0.9, "top_k": 100, "top_p": 0.98}, "fceee6033ebcaefa"),
        ({"labels": LABELS, "guidance": 1.5, "known_codes": KNOWN}, "9ded72f3a1b53211"),
        ({}, "2afb460d77d8e6c7"),
    ],
)
def test_the_prior_draws_the_recorded_codes(
    pair: tuple[VQVAE, GatedPixelCNN], options: dict[str, object], recorded: str
) -> None:
    assert digest(draw_maps(pair[1], NUM, generator(), **options)) == recorded  # type: ignore[arg-type]


def test_the_gaussian_modes_give_the_recorded_codes(pair: tuple[VQVAE, GatedPixelCNN]) -> None:
    with torch.inference_mode():
        assert digest(gaussian_latents(pair[0], NUM, generator())) == "f5190fa98aa109c2"
        assert digest(gaussian_images(pair[0], NUM, generator())) == "fd4ca0fe32746996"


def test_real_digits_have_the_recorded_codes(pair: tuple[VQVAE, GatedPixelCNN]) -> None:
    assert digest(extract(pair[0], mnist().load_test()).indices[:NUM]) == "5f65fda37244941d"
