from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from tests.helpers import CPU, both_ways, devices, make_info, make_split, make_vqvae, save_model
from vqvae.data.pixels import to_model_range
from vqvae.errors import InputError
from vqvae.loss import VQVAETraining, loss_terms
from vqvae.model import VQVAE, ResidualBlock, VQVAEConfig, load_vqvae
from vqvae.quantizer import VectorQuantizer


def make_varied(
    learning: str = "ema", image_shape: tuple[int, int, int] = (1, 28, 28), downsampling: int = 4
) -> tuple[VQVAE, torch.Tensor]:
    """A model whose codes are latents and whose residual blocks do something, and 16 images in -1..1."""
    model = make_vqvae(image_shape, codebook_learning=learning, downsampling=downsampling)
    x = to_model_range(make_split(16, image_shape).images)
    for block in (module for module in model.modules() if isinstance(module, ResidualBlock)):
        torch.nn.init.normal_(block[-1].weight, std=0.3)
    model.quantizer.codebook.data.copy_(model.encode_continuous(x)[:, :, 0, 0])
    return model, x


@both_ways
def test_decoding_the_codes_of_an_image_gives_its_reconstruction_alone_and_in_any_batch(learning: str) -> None:
    model, x = make_varied(learning)
    out = model(x)
    assert len(out.indices.unique()) > 5
    assert torch.equal(model.encode(x), out.indices)
    assert_close(model.decode_indices(model.encode(x)), out.x_hat, rtol=0, atol=1e-6)
    alone = [model(image[None]) for image in x]
    assert torch.equal(torch.cat([each.indices for each in alone]), out.indices)
    assert_close(torch.cat([each.x_hat for each in alone]), out.x_hat, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("image_shape", "downsampling"),
    [((1, 4, 4), 4), ((1, 28, 28), 4), ((1, 20, 36), 4), ((3, 64, 64), 4), ((3, 64, 64), 8), ((1, 8, 40), 8)],
)
def test_the_shapes_follow_from_the_images_and_the_downsampling(
    image_shape: tuple[int, int, int], downsampling: int
) -> None:
    model, x = make_varied(image_shape=image_shape, downsampling=downsampling)
    out = model(x)
    assert model.image_shape == image_shape
    assert model.map_shape == tuple(side // downsampling for side in image_shape[1:]) == out.indices.shape[1:]
    assert (out.x_hat.shape, out.x_hat.dtype, out.indices.dtype) == (x.shape, torch.float32, torch.int64)
    assert out.z_e.shape == out.z_q.shape == (16, 4, *model.map_shape)


@both_ways
@pytest.mark.parametrize(("image_shape", "downsampling"), [((1, 28, 28), 4), ((3, 24, 40), 8)])
@pytest.mark.parametrize(("dtype", "others"), [(torch.float64, 0.0), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_the_model_works_in_every_type_and_float64_gives_the_codes_of_float32(
    learning: str, dtype: torch.dtype, others: float, image_shape: tuple[int, int, int], downsampling: int
) -> None:
    model, x = make_varied(learning, image_shape, downsampling)
    expected = model.encode(x)
    model.to(dtype)
    for mode, images in ((False, x.to(dtype)), (False, x), (True, x.to(dtype))):  # the images follow the model
        out = model.train(mode)(images)
        assert {part.dtype for part in (out.x_hat, out.z_e, out.z_q, *out[4:])} == {dtype}
        assert (out.indices != expected).float().mean() <= others
        if not mode:
            assert torch.equal(model.decode_indices(model.encode(images)), out.x_hat)
    sum(out[4:], out.x_hat.square().mean()).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(part.isfinite().all() for part in (*model.state_dict().values(), *gradients) if part is not None)


def test_bytes_are_not_taken_for_images_in_the_models_range() -> None:
    with pytest.raises(ValueError, match=r"expected images of floating-point values in -1\.\.1, found torch\.uint8"):
        make_vqvae()(make_split(2).images)


@pytest.mark.parametrize(
    ("downsampling", "side", "fitting"),
    [(4, (30, 45), "28x44"), (4, (28, 27), "28x24"), (4, (0, 3), "4x4"), (8, (28, 64), "24x64"), (8, (7, 15), "8x8")],
)
def test_a_side_that_the_network_cannot_take_is_refused_with_one_that_it_takes(
    downsampling: int, side: tuple[int, int], fitting: str
) -> None:
    message = f"divide by {downsampling}, found {side[0]}x{side[1]}; try `image_size={fitting}`$"
    with pytest.raises(InputError, match=message):
        VQVAE(VQVAEConfig(downsampling=downsampling), (1, *side))
    height, width = map(int, fitting.split("x"))
    VQVAE(VQVAEConfig(downsampling=downsampling), (1, height, width))
    with pytest.raises(InputError, match="expected `downsampling` to be 4 or 8, found 6; choose one of the two"):
        VQVAEConfig(downsampling=6)


def test_images_of_another_shape_are_refused() -> None:
    for shape in ((2, 1, 32, 32), (2, 3, 28, 28), (2, 28, 28)):
        for call in (make_vqvae().forward, make_vqvae().encode):
            with pytest.raises(ValueError, match=r"expected images of shape \(B, 1, 28, 28\), found \(2, "):
                call(torch.zeros(shape))


def test_a_fresh_residual_block_is_the_identity_and_a_trained_one_is_not() -> None:
    torch.manual_seed(0)
    block, x = ResidualBlock(8), torch.randn(2, 8, 5, 7)
    assert torch.equal(block(x), x)
    torch.nn.init.ones_(block[-1].weight)
    assert_close(block(x), x + block[1](x.relu()).relu().sum(1, keepdim=True))


def test_the_settings_reach_the_network() -> None:
    assert VQVAEConfig() == VQVAEConfig(40, 512, 40, 2, 2, "gradient", 0.99, 4)  # the baseline recipe
    assert VQVAETraining() == VQVAETraining(beta=1.0, clipped_loss=False, prediction_weight=0.0)
    model = VQVAE(VQVAEConfig(6, 10, 8, 3, 2, "ema", 0.7), (3, 8, 8))
    for part, num_blocks in ((model.encoder, 3), (model.decoder, 2)):
        shapes = [module[1].weight.shape for module in part if isinstance(module, ResidualBlock)]
        assert shapes == [(8, 8, 3, 3)] * num_blocks
    layer = model.quantizer
    assert (layer.codebook.shape, layer.learning, layer.decay) == ((10, 6), "ema", 0.7)


@both_ways
def test_the_gradient_at_the_decoders_input_is_the_gradient_at_the_encoders_output(learning: str) -> None:
    model, x = make_varied(learning)
    out = model.train()(x)
    at_z_e, at_z_q = torch.autograd.grad((out.x_hat - x).square().mean(), (out.z_e, out.z_q), retain_graph=True)
    assert at_z_e.abs().max() > 0
    assert torch.equal(at_z_e, at_z_q)
    # The reconstruction trains encoder and decoder and leaves the codebook alone.
    (out.x_hat - x).square().mean().backward()
    assert model.quantizer.codebook.grad is None or not model.quantizer.codebook.grad.any()
    assert all(p.grad is not None and p.grad.any() for p in (*model.decoder.parameters(), *model.encoder.parameters()))


def test_latents_losses_and_reconstructions_are_float32_under_autocast() -> None:
    model, x = make_varied()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.encoder(x).dtype == torch.bfloat16
        terms, x_hat, _ = loss_terms(model, make_split(2).images, VQVAETraining())
        assert {t.dtype for t in (model.encode_continuous(x), x_hat, *terms.values())} == {torch.float32}


@both_ways
@devices
def test_a_model_is_rebuilt_from_its_file_alone(tmp_path: Path, learning: str, device: str) -> None:
    model, x = make_varied(learning, (3, 20, 36))
    state, x_hat = {name: tensor.clone() for name, tensor in model.state_dict().items()}, model(x).x_hat
    written = save_model(tmp_path / "vqvae", model.to(device), "vqvae", make_info((3, 20, 36), 0))
    loaded, header = load_vqvae(tmp_path / "vqvae", CPU)
    assert (header, loaded.config, loaded.image_shape) == (written, model.config, (3, 20, 36))
    assert not any(module.training for module in loaded.modules())
    assert_close(dict(loaded.state_dict()), state, rtol=0, atol=0)  # on the CPU
    assert torch.equal(loaded(x).x_hat, x_hat)
    assert load_vqvae(tmp_path / "vqvae", torch.device(device))[0].device.type == device


@both_ways
def test_weights_are_loaded_as_they_are_whatever_torchs_default_type_is(tmp_path: Path, learning: str) -> None:
    model = make_vqvae(codebook_learning=learning)
    save_model(tmp_path / "vqvae.safetensors", model, "vqvae", make_info())
    torch.set_default_dtype(torch.float64)
    try:
        loaded, _ = load_vqvae(tmp_path / "vqvae.safetensors", CPU)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_layer_whose_first_state_is_loaded_again_starts_again_from_k_means() -> None:
    layer = VectorQuantizer(4, 2, "ema", decay=1.0)
    first = deepcopy(layer.state_dict())
    layer(torch.randn(50, 2))
    layer.load_state_dict(first)
    layer(100 + torch.randn(50, 2))
    assert layer.codebook.min() > 90
    with pytest.raises(ValueError, match=r"expected z_e of floating-point values, found torch\.int64"):
        layer(torch.zeros(5, 2, dtype=torch.int64))


@pytest.mark.parametrize("far", [1e4, 1e6])
def test_codes_far_from_the_others_do_not_change_which_of_them_is_nearest(far: float) -> None:
    layer, vectors = VectorQuantizer(64, 8), torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    for num_far in (1, 32):
        with torch.no_grad():
            layer.codebook.copy_(torch.randn(64, 8, generator=torch.Generator().manual_seed(1)))
            layer.codebook[:num_far] += far
        expected = torch.cdist(vectors.double(), layer.codebook.double()).argmin(dim=1)
        assert torch.equal(layer.nearest(vectors), expected)
