from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from vqvae.gaussian import gaussian_images, gaussian_latents
from vqvae.model import VQVAE, VQVAEConfig

MODES = [gaussian_latents, gaussian_images]
Mode = Callable[[VQVAE, int, torch.Generator], Tensor]


def tiny(image_size: int = 28) -> VQVAE:
    torch.manual_seed(0)
    model = VQVAE(
        VQVAEConfig(
            hidden_size=4,
            k=8,
            width=8,
            num_encoder_blocks=1,
            num_decoder_blocks=1,
            codebook_learning="ema",
            image_size=image_size,
        )
    )
    with torch.no_grad():
        model.quantizer.codebook.normal_()
    return model.eval()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("image_size", [20, 28])
def test_a_mode_gives_code_maps_of_the_models_shape(mode: Mode, image_size: int) -> None:
    with torch.inference_mode():
        indices = mode(tiny(image_size), 3, seeded(0))
    assert indices.shape == (3, image_size // 4, image_size // 4)
    assert indices.dtype == torch.int64
    assert indices.min() >= 0
    assert indices.max() < 8


@pytest.mark.parametrize("mode", MODES)
def test_the_seed_alone_decides_and_the_global_random_state_is_left_alone(mode: Mode) -> None:
    model = tiny()
    # Latents an order smaller than the codes would all choose one code: let the encoder's noise choose several.
    with torch.no_grad():
        model.quantizer.codebook.copy_(model.latents(torch.randn(8, 1, 28, 28))[:, :, 3, 3])
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = mode(model, 4, seeded(1))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(mode(model, 4, seeded(1)), first)
    assert not torch.equal(mode(model, 4, seeded(2)), first)


def test_latents_choose_codes_as_often_as_a_unit_gaussian_does() -> None:
    model = tiny()
    codes = model.quantizer.codebook.numpy()
    noise = np.random.default_rng(0).standard_normal((100_000, 4))
    expected = np.bincount(((noise[:, None] - codes) ** 2).sum(-1).argmin(1), minlength=8) / len(noise)
    indices = gaussian_latents(model, 400, seeded(0))
    found = np.bincount(indices.flatten().numpy(), minlength=8) / indices.numel()
    # 19,600 draws: three standard errors of a share near a quarter are 0.01.
    np.testing.assert_allclose(found, expected, atol=0.012)
    # And they don't depend on the position: no noise is shared along a map.
    assert len(indices.flatten(1).unique(dim=0)) == 400
    assert len(indices.flatten(1).T.unique(dim=0)) == 49


def test_image_noise_is_unit_gaussian_and_goes_through_the_encoder() -> None:
    model = tiny()
    seen: list[Tensor] = []
    model.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    indices = gaussian_images(model, 50, seeded(0))
    assert len(seen) == 1
    noise = seen[0].clone()
    assert noise.shape == (50, 1, 28, 28)
    # 39,200 numbers: three standard errors of the mean are 0.015.
    assert noise.mean().abs() < 0.02
    assert (noise.std() - 1).abs() < 0.02
    assert (noise.abs() > 1.96).float().mean().item() == pytest.approx(0.05, abs=0.005)
    assert torch.equal(model.encode(noise), indices)
