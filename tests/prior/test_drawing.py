import pytest
import torch

from prior.drawing import require_few, stages
from prior.pair import Samples
from vqvae.errors import InputError


@pytest.mark.parametrize(("map_shape", "at_once"), [((7, 7), 1), ((2, 3), 1), ((8, 9), 2), ((16, 16), 4), ((7, 19), 3)])
def test_codes_appear_in_raster_order_and_the_last_stage_is_the_samples(
    map_shape: tuple[int, int], at_once: int
) -> None:
    height, width = map_shape
    images = torch.rand(3, 1, 2 * height, 4 * width)
    indices = torch.arange(3 * height * width).view(3, height, width)
    found = list(stages(Samples(images, indices, torch.zeros(3))))
    assert len(found) <= 65
    assert torch.equal(found[-1], images)
    for number, stage in enumerate(reversed(found)):
        shown = (torch.arange(height * width) < height * width - number * at_once).view(height, width)
        enlarged = shown.repeat_interleave(2, dim=0).repeat_interleave(4, dim=1)
        assert torch.equal(stage, images.where(enlarged, 0.5))
    assert shown.sum() < at_once  # the first stage has next to nothing


def test_an_animation_of_too_many_samples_is_refused() -> None:
    require_few(400)
    with pytest.raises(
        InputError, match="expected `num_samples` between 1 and 400, found 401; try `num_samples=400`, or"
    ):
        require_few(401)
