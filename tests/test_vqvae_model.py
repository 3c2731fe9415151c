from pathlib import Path

import pytest
import torch
from torch import Tensor

from vqvae.common import checkpoint
from vqvae.common.data import load_test, to_model_range
from vqvae.common.engine import make_optimizer
from vqvae.common.errors import UserError
from vqvae.model import VQVAE, VQVAEConfig, load_vqvae
from vqvae.train import VQVAETraining, objective

TINY = {"hidden_size": 4, "k": 8, "width": 8, "num_encoder_blocks": 1, "num_decoder_blocks": 1, "ema_decay": 0.9}
LEARNING = ["gradient", "ema"]


def tiny(learning: str = "ema", **changes: int) -> VQVAE:
    """A model whose codes lie where its latents do, so that images get different maps."""
    torch.manual_seed(0)
    model = VQVAE(VQVAEConfig(**{**TINY, "codebook_learning": learning, **changes}))
    for parameter in model.parameters():  # residual blocks start at zero: a test of them needs them in play
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    side = model.config.image_size
    latents = model.latents(torch.rand(16, 1, side, side) * 2 - 1).detach()
    vectors = latents.permute(0, 2, 3, 1).reshape(-1, model.config.hidden_size)
    with torch.no_grad():
        model.quantizer.codebook.copy_(vectors[torch.randperm(len(vectors))[: model.config.k]])
    return model.eval()


def digits(folder: Path, num: int = 6) -> Tensor:
    return to_model_range(load_test(folder, download=False).images[:num])


@pytest.mark.parametrize("learning", LEARNING)
def test_decoding_the_codes_of_an_image_gives_its_reconstruction(fixture_folder: Path, learning: str) -> None:
    model, x = tiny(learning), digits(fixture_folder)
    out = model(x)
    assert len(out.indices.unique()) > 1
    assert torch.equal(model.encode(x), out.indices)
    torch.testing.assert_close(model.decode_indices(model.encode(x)), out.x_hat, rtol=0, atol=1e-6)


def test_an_image_alone_gives_what_it_gives_in_any_batch(fixture_folder: Path) -> None:
    model, x = tiny(), digits(fixture_folder, 9)
    together = model(x)
    for i in range(len(x)):
        alone = model(x[i : i + 1])
        assert torch.equal(alone.indices, together.indices[i : i + 1])
        torch.testing.assert_close(alone.x_hat, together.x_hat[i : i + 1], rtol=0, atol=1e-5)
        decoded = model.decode_indices(together.indices[i : i + 1])
        torch.testing.assert_close(decoded, together.x_hat[i : i + 1], rtol=0, atol=1e-5)
    shuffled = model(x.flip(0))
    torch.testing.assert_close(shuffled.x_hat.flip(0), together.x_hat, rtol=0, atol=1e-5)


@pytest.mark.parametrize("image_size", [4, 20, 28])
def test_shapes_and_types_of_what_goes_in_and_out(image_size: int) -> None:
    model = tiny(image_size=image_size)
    out = model(torch.zeros(2, 1, image_size, image_size))
    assert model.map_shape == (image_size // 4, image_size // 4)
    assert out.indices.shape == (2, *model.map_shape)
    assert out.indices.dtype == torch.int64
    assert out.x_hat.shape == (2, 1, image_size, image_size)
    assert out.x_hat.dtype == torch.float32


@pytest.mark.parametrize("image_size", [26, 27, 29, 30])
def test_an_image_size_that_does_not_divide_is_refused(image_size: int) -> None:
    with pytest.raises(UserError, match=f"expected an image size that divides by 4, found {image_size}"):
        VQVAE(VQVAEConfig(image_size=image_size))


@pytest.mark.parametrize("shape", [(2, 1, 27, 27), (2, 1, 32, 32), (2, 3, 28, 28), (2, 28, 28)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    for call in (tiny().forward, tiny().encode):
        with pytest.raises(ValueError, match=r"expected images of shape \(B, 1, 28, 28\), found \(2, "):
            call(torch.zeros(shape))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "expected hidden_size between 1 and 1024, found 0"),
        ({"k": 1}, "expected k between 2 and 32767, found 1"),
        ({"k": 40000}, "expected k between 2 and 32767, found 40000"),
        ({"ema_decay": 1.0}, "expected ema_decay between 0 and 0.99999, found 1"),
        ({"ema_decay": float("nan")}, "expected ema_decay between 0 and 0.99999, found nan"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(changes: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        VQVAEConfig(**changes)


@pytest.mark.parametrize("learning", LEARNING)
def test_the_gradient_at_the_decoders_input_is_the_gradient_at_the_encoders_output(
    fixture_folder: Path, learning: str
) -> None:
    model, x = tiny(learning).train(), digits(fixture_folder)
    seen: dict[str, Tensor] = {}

    def keep(name: str, tensor: Tensor) -> None:
        tensor.retain_grad()
        seen[name] = tensor

    model.encoder.register_forward_hook(lambda module, inputs, output: keep("z_e", output))
    model.decoder.register_forward_pre_hook(lambda module, inputs: keep("z_q", inputs[0]))
    (model(x).x_hat - x).square().mean().backward()
    assert seen["z_e"] is not seen["z_q"]
    assert seen["z_e"].grad.abs().max() > 0
    assert torch.equal(seen["z_e"].grad, seen["z_q"].grad)
    # The reconstruction trains encoder and decoder and leaves the codebook alone.
    assert model.quantizer.codebook.grad is None or not model.quantizer.codebook.grad.any()
    assert all(p.grad is not None and p.grad.any() for p in model.decoder.parameters())


def test_a_codebook_that_is_averaged_is_in_no_group_of_the_optimizer() -> None:
    model = tiny("ema")
    optimizer = make_optimizer(model, VQVAETraining(weight_decay=0.1))
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    assert all(p is not model.quantizer.codebook for p in trained)
    assert len({id(p) for p in trained}) == len(trained) == len(list(model.parameters()))


def test_a_codebook_that_is_learned_has_no_weight_decay() -> None:
    model = tiny("gradient")
    optimizer = make_optimizer(model, VQVAETraining(weight_decay=0.1))
    decay_of = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay_of[id(model.quantizer.codebook)] == 0
    for name, parameter in model.named_parameters():
        expected = 0.1 if name.endswith("weight") else 0.0  # all weights here are convolutions'
        assert decay_of[id(parameter)] == expected, name


def save(model: VQVAE, path: Path) -> checkpoint.Header:
    config = {**TINY, "codebook_learning": model.config.codebook_learning, "image_size": 28}
    return checkpoint.save(path, model, stage="vqvae", config=config, recipe={}, metrics={})


@pytest.mark.parametrize("learning", LEARNING)
def test_a_model_is_rebuilt_from_its_file_alone(tmp_path: Path, fixture_folder: Path, learning: str) -> None:
    model, x = tiny(learning), digits(fixture_folder)
    written = save(model, tmp_path / "vqvae.safetensors")
    loaded, header = load_vqvae(tmp_path / "vqvae.safetensors", torch.device("cpu"))
    assert header == written
    assert loaded.config == model.config
    assert not any(module.training for module in loaded.modules())
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(loaded(x).x_hat, model(x).x_hat)


def test_a_header_that_asks_for_another_network_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "vqvae.safetensors"
    config = {**TINY, "codebook_learning": "ema", "width": 2048, "num_encoder_blocks": 64, "num_decoder_blocks": 64}
    checkpoint.save(path, tiny(), stage="vqvae", config=config, recipe={}, metrics={})
    with pytest.raises(UserError, match=r"expected weights in .*vqvae.safetensors that match their header"):
        load_vqvae(path, torch.device("cpu"))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_weights_saved_on_cuda_load_on_the_cpu(tmp_path: Path, fixture_folder: Path) -> None:
    model, x = tiny(), digits(fixture_folder)
    expected = model(x)
    save(model.cuda(), tmp_path / "vqvae.safetensors")
    loaded, _ = load_vqvae(tmp_path / "vqvae.safetensors", torch.device("cpu"))
    assert {tensor.device.type for tensor in loaded.state_dict().values()} == {"cpu"}
    assert torch.equal(loaded(x).indices, expected.indices)
    torch.testing.assert_close(loaded(x).x_hat, expected.x_hat)
    on_cuda, _ = load_vqvae(tmp_path / "vqvae.safetensors", torch.device("cuda"))
    assert {tensor.device.type for tensor in on_cuda.state_dict().values()} == {"cuda"}


def test_latents_and_losses_are_float32_under_autocast() -> None:
    model = VQVAE(VQVAEConfig(hidden_size=4, k=8, width=8))
    images = torch.randint(256, (3, 1, 28, 28), dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.encoder(to_model_range(images)).dtype == torch.bfloat16
        assert model.latents(to_model_range(images)).dtype == torch.float32
        terms, x_hat, _ = objective(model, images, VQVAETraining())
    assert {term.dtype for term in terms.values()} == {torch.float32}
    assert x_hat.dtype == torch.float32
