import numpy as np
import pytest
import torch
from torch.testing import assert_close

from vqvae.data.pixels import from_unit_range, to_bytes, to_model_range, to_unit_range
from vqvae.errors import InputError


def test_bytes_come_back_from_the_models_range_as_they_were() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(4, 1, 8, 8)
    x = to_model_range(pixels)
    unit = to_unit_range(x)
    assert_close(x, torch.linspace(-1, 1, 256).reshape(4, 1, 8, 8))
    assert_close(unit, torch.linspace(0, 1, 256).reshape(4, 1, 8, 8))
    assert_close(to_bytes(unit), pixels, rtol=0, atol=0)
    assert (x.min(), x.max()) == (-1, 1)
    assert to_unit_range(torch.tensor([-3.0, 3.0])).tolist() == [0, 1]
    between = torch.arange(255)[:, None] + torch.tensor([0.0, 0.4, 0.49, 0.51, 0.6])  # goes to the nearest
    expected = torch.arange(255)[:, None] + torch.tensor([0, 0, 0, 1, 1])
    assert torch.equal(to_bytes(between / 255), expected.to(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_callers_images_of_any_floating_type_and_number_are_taken(dtype: torch.dtype) -> None:
    images = torch.linspace(0, 1, 24, dtype=dtype).reshape(1, 3, 2, 4).repeat(5, 1, 1, 1)
    for some in (images, images[:1]):
        assert_close(from_unit_range(some, (3, 2, 4)), some.float() * 2 - 1)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((5, 3, 2, 4)), "expected a tensor of images, found ndarray"),
        (torch.zeros(5, 2, 4), r"expected images of shape \(N, 3, 2, 4\), found \(5, 2, 4\)"),
        (torch.zeros(0, 3, 2, 4), "expected at least one image, found none"),
        (torch.zeros(5, 3, 4, 2), r"expected images of shape \(N, 3, 2, 4\), found \(5, 3, 4, 2\)"),
        (torch.zeros(5, 3, 2, 4, dtype=torch.uint8), "of floating-point values in 0..1, found torch.uint8; divide"),
        (torch.full((5, 3, 2, 4), torch.nan), "values in 0..1, found values that are NaN"),
        (torch.full((5, 3, 2, 4), -0.01), "values in 0..1, found values from -0.01 to -0.01"),
        (torch.full((5, 3, 2, 4), 1.0000001), "values in 0..1, found values from 1.0000001 to 1.0000001"),
    ],
    ids=range(8),
)
def test_images_of_another_shape_type_or_range_are_refused(images: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_unit_range(images, (3, 2, 4))
