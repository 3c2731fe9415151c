"""The unit-Gaussian baseline: its noise, the codes that it picks, and what the seed decides."""

import numpy as np
import pytest
import torch

from tests.helpers import make_vqvae
from vqvae import gaussian
from vqvae.gaussian import draw_gaussian, gaussian_images, gaussian_latents


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("source", "mode"), [("latent", gaussian_latents), ("image", gaussian_images)])
def test_the_seed_alone_decides_on_the_maps(monkeypatch: pytest.MonkeyPatch, source: str, mode: object) -> None:
    model = make_vqvae((3, 20, 36))
    with torch.no_grad():  # noise images choose several codes
        model.quantizer.codebook.copy_(model.encode_continuous(torch.randn(16, 3, 20, 36))[:, :, 1, 1])
    state = torch.get_rng_state()
    indices = mode(model, 7, seeded(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert (indices.shape, indices.dtype) == ((7, 5, 9), torch.int64)
    assert len(indices.unique()) > 3
    monkeypatch.setattr(gaussian, "BATCH", 3)
    torch.manual_seed(6)
    assert not torch.equal(mode(model, 7, seeded(2)), indices)
    model.train().decoder.eval()  # a mixture, as when a part of a model is frozen
    modes, codebook = [module.training for module in model.modules()], model.quantizer.codebook.clone()
    drawn = draw_gaussian(model, source, 7, seed=1)
    assert torch.equal(drawn["indices"], indices)
    torch.testing.assert_close(
        drawn["images"], ((model.decode_indices(indices) + 1) / 2).clamp(0, 1), rtol=0, atol=1e-6
    )
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model.quantizer.codebook, codebook)


def test_latents_choose_codes_as_often_as_a_unit_gaussian_does() -> None:
    model = make_vqvae(num_codes=8)
    noise = np.random.default_rng(0).standard_normal((100_000, 1, 4))
    chosen = ((noise - model.quantizer.codebook.numpy()) ** 2).sum(-1).argmin(1)
    indices = gaussian_latents(model, 400, seeded(0)).flatten(1)
    found = indices.flatten().bincount(minlength=8).numpy() / indices.numel()
    # There are 19,600 draws: three standard errors of a share near a quarter are 0.01.
    np.testing.assert_allclose(found, np.bincount(chosen, minlength=8) / len(noise), atol=0.012)
    assert (len(indices.unique(dim=0)), len(indices.T.unique(dim=0))) == (400, 49)  # no noise is shared


def test_image_noise_is_unit_gaussian_and_goes_through_the_encoder() -> None:
    model, seen = make_vqvae(), []
    model.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    indices = gaussian_images(model, 50, seeded(0))
    (noise,) = seen  # 39,200 numbers: three standard errors of their mean are 0.015
    assert [noise.mean().item(), noise.std().item()] == pytest.approx([0, 1], abs=0.02)
    assert (noise.abs() > 1.96).float().mean().item() == pytest.approx(0.05, abs=0.005)
    assert torch.equal(model.encode(noise), indices)
