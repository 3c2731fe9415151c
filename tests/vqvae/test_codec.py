import pytest
import torch
from torch.testing import assert_close

from tests.helpers import make_split, make_vqvae
from vqvae import codec
from vqvae.codec import decode_images, encode_images, reconstruct, reconstruct_images
from vqvae.model import VQVAE

SPLIT = make_split(16)


@pytest.fixture
def model() -> VQVAE:
    """A model in training mode whose decoder is in eval mode, as if it were frozen. The images use several codes."""
    made = make_vqvae()
    made.quantizer.codebook.copy_(made.encode_continuous(SPLIT.images / 127.5 - 1)[:, :, 3, 3].detach())
    made.train().decoder.eval()
    return made


@pytest.mark.parametrize("batch", [1, 3, 500])
def test_images_become_codes_and_come_back(model: VQVAE, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    monkeypatch.setattr(codec, "BATCH", batch)
    x, modes = SPLIT.images / 127.5 - 1, [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    indices, x_hat = reconstruct_images(model, SPLIT.images)
    assert torch.equal(encode_images(model, x), indices)  # floating point is in the model's range already
    assert torch.equal(decode_images(model, indices), x_hat)
    assert [module.training for module in model.modules()] == modes
    assert_close(dict(model.state_dict()), before, rtol=0, atol=0)  # no average moved
    out = model.eval()(x)
    assert len(indices.unique()) > 3
    assert torch.equal(indices, out.indices)
    assert_close(x_hat, ((out.x_hat + 1) / 2).clamp(0, 1), rtol=0, atol=1e-5)
    assert [indices.is_inference(), x_hat.is_inference()] == [False, False]  # they can take part in training


def test_no_images_are_no_codes_and_no_images(model: VQVAE) -> None:
    indices, x_hat = reconstruct_images(model, SPLIT.images[:0])
    assert (indices.shape, indices.dtype) == ((0, *model.map_shape), torch.int64)
    assert (x_hat.shape, x_hat.dtype) == ((0, *model.image_shape), torch.float32)


def test_a_reconstruction_says_what_it_loses_of_each_image(model: VQVAE) -> None:
    indices, reconstructions = reconstruct_images(model, SPLIT.images)
    originals = SPLIT.images / 255
    error = (originals - reconstructions).square().flatten(1).mean(dim=1)
    expected = {"images": originals, "reconstructions": reconstructions, "indices": indices}
    expected |= {"squared_error": error, "psnr_db": 10 * (1 / error).log10()}
    assert_close(reconstruct(model, SPLIT.images), expected, rtol=0, atol=1e-5)
