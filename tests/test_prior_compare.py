"""The comparison of the sampling modes: its figures against brute force, and what it leaves alone."""

import numpy as np
import pytest
import torch
from prior.compare import Mode, compare, first_of_each_class, nats_per_code
from vqvae.common.data import Split
from vqvae.common.errors import UserError

from prior.model import GatedPixelCNN, PriorConfig
from vqvae.model import VQVAE, VQVAEConfig

NAMES = ["real", "reconstructed", "gaussian_latent", "gaussian_image", "pixelcnn"]


def make_models() -> tuple[VQVAE, GatedPixelCNN]:
    torch.manual_seed(0)
    vqvae = VQVAE(VQVAEConfig(hidden_size=4, k=12, width=8, num_encoder_blocks=0, num_decoder_blocks=0)).eval()
    with torch.no_grad():
        vqvae.quantizer.codebook.copy_(torch.randn(12, 4) * 0.2)
    return vqvae, GatedPixelCNN(PriorConfig(width=8), 12, vqvae.map_shape).eval()


def make_split(num: int, seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (num, 1, 28, 28), dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(num)[torch.randperm(num, generator=generator)] % 10)


def run(seed: int = 0, num_samples: int = 20) -> dict[str, Mode]:
    modes = compare(*make_models(), make_split(60, 1), make_split(40, 2), num_samples, seed)
    assert [mode.name for mode in modes] == NAMES
    return {mode.name: mode for mode in modes}


def test_every_mode_gives_images_indices_and_labels_of_one_form() -> None:
    for mode in run().values():
        assert (mode.images.shape, mode.images.dtype) == ((20, 1, 28, 28), torch.float32)
        assert 0 <= mode.images.min() <= mode.images.max() <= 1
        assert (mode.indices.shape, mode.indices.dtype) == ((20, 7, 7), torch.int64)
        assert 0 <= mode.indices.min() <= mode.indices.max() < 12
        assert (mode.labels.shape, mode.labels.dtype) == ((20,), torch.int64)


def test_labels_are_the_digits_meant_and_the_gaussian_modes_mean_none() -> None:
    modes = run()
    for name in ("real", "reconstructed", "pixelcnn"):
        assert modes[name].labels.tolist() == [*range(10)] * 2
    for name in ("gaussian_latent", "gaussian_image"):
        assert modes[name].labels.tolist() == [-1] * 20


def test_the_real_digits_are_the_first_of_each_class_and_the_others_are_decoded_codes() -> None:
    modes, (vqvae, _), test = run(), make_models(), make_split(60, 1)
    rows = [[n for n in range(60) if test.labels[n] == digit][turn] for turn in range(2) for digit in range(10)]
    assert torch.allclose(modes["real"].images, test.images[rows].double().div(255).float(), atol=1e-6)
    assert torch.equal(modes["real"].indices, modes["reconstructed"].indices)
    with torch.no_grad():
        for name in NAMES[1:]:
            decoded = (vqvae.decode_indices(modes[name].indices) + 1) / 2
            assert torch.allclose(modes[name].images, decoded.clamp(0, 1), atol=1e-6)


def test_figures_equal_brute_force() -> None:
    modes, (_, prior), reference = run(), make_models(), make_split(40, 2)
    digits = reference.images.double().div(255).flatten(1).numpy()
    for mode in modes.values():
        assert mode.codes_used == len(set(mode.indices.flatten().tolist()))
        images = mode.images.double().flatten(1).numpy()
        distances = [min(np.sqrt(np.mean((image - digit) ** 2)) for digit in digits) for image in images]
        assert mode.distance == pytest.approx(np.mean(distances), abs=1e-4)
        with torch.no_grad():
            p = prior(mode.indices).double().softmax(dim=1).numpy()
        told = [p[n, mode.indices[n, i, j], i, j] for n, i, j in np.ndindex(20, 7, 7)]
        assert mode.nats_per_code == pytest.approx(-np.log(told).mean(), abs=1e-5)


def test_an_even_prior_gives_every_map_log_k_nats_a_code() -> None:
    _, prior = make_models()
    with torch.no_grad():
        prior.head[-1].weight.zero_()
        prior.head[-1].bias.fill_(3.0)
    assert nats_per_code(prior, torch.zeros(4, 7, 7, dtype=torch.int64)) == pytest.approx(np.log(12), abs=1e-6)


def test_the_same_seed_gives_the_same_and_another_seed_changes_the_drawn_modes_alone() -> None:
    first, again, other = run(0), run(0), run(1)
    for name in NAMES:
        assert torch.equal(first[name].indices, again[name].indices)
        assert torch.equal(first[name].images, again[name].images)
        drawn = name in ("gaussian_latent", "gaussian_image", "pixelcnn")
        assert torch.equal(first[name].indices, other[name].indices) != drawn


def test_the_global_random_state_and_the_models_modes_are_left_alone() -> None:
    vqvae, prior = make_models()
    vqvae.train()
    prior.train()
    before = torch.get_rng_state()
    compare(vqvae, prior, make_split(60, 1), make_split(40, 2), 10, 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert vqvae.training
    assert prior.training


def test_the_first_of_each_class_are_ordered_in_columns_of_digits() -> None:
    labels = torch.tensor([3, 3, 0, 1, 2, 9, 8, 7, 6, 5, 4, 4, 0, 1, 2, 5, 6, 7, 8, 9, 0])
    assert first_of_each_class(labels, 1).tolist() == [2, 3, 4, 0, 10, 9, 8, 7, 6, 5]
    assert first_of_each_class(labels, 2).tolist()[10:] == [12, 13, 14, 1, 11, 15, 16, 17, 18, 19]


@pytest.mark.parametrize("num_test", [60, 65])
def test_more_digits_of_a_class_than_the_test_split_has_is_an_error_that_names_the_flag(num_test: int) -> None:
    with pytest.raises(UserError, match="--num-samples"):
        compare(*make_models(), make_split(num_test, 1), make_split(40, 2), 70, 0)
