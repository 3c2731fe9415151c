import pytest
import torch
from torch import Tensor

from prior.animation import require_few, stages
from prior.pair import Samples
from prior.sampling import LogitsAt, sample_codes
from vqvae.errors import InputError


def test_the_stages_are_those_that_the_sampler_went_through() -> None:
    seen: list[Tensor] = []

    def logits_for(labels: Tensor) -> LogitsAt:
        def logits_at(indices: Tensor, i: int, j: int) -> Tensor:
            seen.append(indices.clone())
            return torch.zeros(len(labels), 6)

        return logits_at

    uniforms, labels = torch.rand(2, 3, 4, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    maps = sample_codes(logits_for, uniforms, labels, no_label=0)
    images = maps[:, None] / 7  # a pixel for each code, and none that is grey
    *before, last = stages(Samples(images, maps, labels))
    assert torch.equal(last, images)
    for num_drawn, (stage, indices) in enumerate(zip(before, seen, strict=True)):
        assert torch.equal(stage.flatten(1)[:, :num_drawn], indices.flatten(1)[:, :num_drawn] / 7)
        assert (stage.flatten(1)[:, num_drawn:] == 0.5).all()


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
