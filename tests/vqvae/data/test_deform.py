import math

import numpy as np
import pytest
import torch

from vqvae.data.deform import ANY_KIND, Deformation, deform
from vqvae.data.mnist import HANDWRITING


def test_each_image_is_rotated_scaled_and_shifted_by_its_own_draws_before_the_background() -> None:
    # Where pixels are taken from is read off images whose values are their own x or y, from -1 to 1.
    y, x = torch.meshgrid(*[(2 * torch.arange(28.0) + 1) / 28 - 1] * 2, indexing="ij")
    places = []
    for ramp in (x, y):
        torch.manual_seed(1)  # the same draws for both
        places.append(
            deform(ramp.expand(2000, 1, 28, 28), HANDWRITING)[:, 0, 9:19, 9:19].flatten(1)
        )  # far from the outside
    pixels = torch.stack([x[9:19, 9:19].flatten(), y[9:19, 9:19].flatten(), torch.ones(100)], dim=1)
    fitted = torch.linalg.lstsq(pixels.expand(2000, 100, 3), torch.stack(places, dim=2)).solution  # (2000, 3, 2)
    torch.testing.assert_close(pixels @ fitted, torch.stack(places, dim=2), atol=1e-4, rtol=0)  # it is affine
    (a, b), (c, d), (shift_x, shift_y) = fitted.numpy().transpose(1, 2, 0)  # x' = a x + c y + shift_x
    np.testing.assert_allclose((a, b), (d, -c), atol=1e-4)  # it only rotates and scales
    drawn = np.stack([np.arctan2(b, a), np.hypot(a, b) - 1, shift_x, shift_y])
    for values, most in zip(drawn, (math.pi / 15, 0.12, 0.15, 0.15), strict=True):  # 12 degrees, 12 %, two pixels
        assert 0.98 * most < min(values.max(), -values.min()) < np.abs(values).max() < most + 1e-4
        assert np.mean(np.abs(values) < most / 2) == pytest.approx(0.5, abs=0.05)  # evenly
    np.testing.assert_allclose(np.corrcoef(drawn), np.eye(4), atol=0.1)  # independently
    white = deform(torch.ones(300, 3, 20, 36), HANDWRITING)  # what comes in from outside is the background
    assert (white.shape, white.min(), white.max()) == ((300, 3, 20, 36), -1, pytest.approx(1, abs=1e-5))
    assert (deform(-torch.ones(300, 3, 20, 36), HANDWRITING) == -1).all()


def test_half_of_the_images_are_mirrored_where_the_dataset_allows_it_and_none_elsewhere() -> None:
    torch.manual_seed(0)
    image = torch.rand(1, 3, 8, 12) * 2 - 1
    still = Deformation(rotation=0, scaling=0, shift=0)
    found = deform(image.expand(400, -1, -1, -1), still._replace(flips=True))
    is_mirrored, is_same = ((found - other).abs().amax(dim=(1, 2, 3)) < 1e-5 for other in (image.flip(3), image))
    assert (is_mirrored ^ is_same).all()
    assert is_mirrored.float().mean().item() == pytest.approx(0.5, abs=0.1)
    torch.testing.assert_close(deform(image, still), image, atol=1e-5, rtol=0)
    assert not ANY_KIND.flips  # a mirrored letter is none
