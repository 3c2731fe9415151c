import pytest
import torch
from torch.testing import assert_close

from tests.helpers import make_vqvae
from vqvae import gaussian
from vqvae.gaussian import draw_gaussian, gaussian_images, gaussian_latents


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("source", "mode"), [("latent", gaussian_latents), ("image", gaussian_images)])
def test_the_seed_alone_decides_on_the_noise(monkeypatch: pytest.MonkeyPatch, source: str, mode: object) -> None:
    model = make_vqvae((3, 20, 36))
    with torch.no_grad():  # noise images choose several codes
        model.quantizer.codebook.copy_(model.encode_continuous(torch.randn(16, 3, 20, 36))[:, :, 1, 1])
    state = torch.get_rng_state()
    indices = mode(model, 7, seeded(1))
    assert torch.equal(torch.get_rng_state(), state)
    noise = torch.randn(7, *((4, 5, 9) if source == "latent" else (3, 20, 36)), generator=seeded(1))
    assert torch.equal(indices, model.quantizer.nearest(noise) if source == "latent" else model.encode(noise))
    assert len(indices.unique()) > 3
    monkeypatch.setattr(gaussian, "BATCH", 3)
    model.train().decoder.eval()  # a mixture, as when a part of a model is frozen
    modes, codebook = [module.training for module in model.modules()], model.quantizer.codebook.clone()
    drawn = draw_gaussian(model, source, 7, seed=1)
    assert torch.equal(drawn["indices"], indices)
    assert_close(drawn["images"], ((model.decode_indices(indices) + 1) / 2).clamp(0, 1), rtol=0, atol=1e-6)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model.quantizer.codebook, codebook)
