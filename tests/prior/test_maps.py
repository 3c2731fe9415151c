"""Maps as they fill, held against what the sampler sees, and images in which the unknown part is hidden."""

import torch
from torch import Tensor

from prior.maps import filling, hide_unknown
from prior.sampling import LogitsAt, sample_codes


def test_a_finished_map_shows_the_stages_that_the_sampler_went_through() -> None:
    seen: list[Tensor] = []

    def logits_for(labels: Tensor) -> LogitsAt:
        def logits_at(indices: Tensor, i: int, j: int) -> Tensor:
            seen.append(indices.clone())
            return torch.zeros(len(labels), 6)

        return logits_at

    uniforms = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    maps = sample_codes(logits_for, uniforms, torch.zeros(2, dtype=torch.int64), no_label=0)
    *before, last = filling(maps)
    assert torch.equal(last, maps)
    assert len(before) == len(seen) == 12
    for num_drawn, (stage, indices) in enumerate(zip(before, seen, strict=True)):
        assert torch.equal(stage.flatten(1)[:, :num_drawn], indices.flatten(1)[:, :num_drawn])
        assert (stage.flatten(1)[:, num_drawn:] == -1).all()


def test_the_cells_of_unknown_codes_are_grey_and_the_others_are_as_they_were() -> None:
    images, maps = torch.rand(2, 3, 4, 6), torch.tensor([[[0, 5, -1], [-1, 1, 2]], [[0, 0, 0], [0, 0, 0]]])
    hidden = hide_unknown(images, maps)
    assert (hidden[0, :, :2, 4:] == 0.5).all()
    assert (hidden[0, :, 2:, :2] == 0.5).all()
    assert torch.equal(hidden[0, :, :2, :4], images[0, :, :2, :4])
    assert torch.equal(hidden[0, :, 2:, 2:], images[0, :, 2:, 2:])
    assert torch.equal(hidden[1], images[1])
