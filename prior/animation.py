"""How samples come about, code by code, for an animation."""

from collections.abc import Iterator

import torch
from torch import Tensor

from prior.maps import hide_unknown
from prior.pair import Samples
from vqvae.compute import require_whole

MOST_STAGES = 64  # of an animation; where maps have more codes, several appear at a time
MOST_SAMPLES = 400  # in an animation, which with more would take too much memory and time


def require_few(num_samples: int) -> None:
    """Refuse an animation of too many samples.

    Raises:
        InputError: there are more than `MOST_SAMPLES`.
    """
    require_whole("num_samples", num_samples, 1, MOST_SAMPLES, f"try `num_samples={MOST_SAMPLES}`, or a .png output")


def stages(samples: Samples) -> Iterator[Tensor]:
    """Images (N, C, S, T) in 0..1, which are grey where the codes are not drawn yet. The last ones are the samples.

    Maps are drawn in raster order, and no code changes later. So the finished maps show every stage of their drawing.
    """
    num_codes = samples.indices[0].numel()
    at_once = -(-num_codes // MOST_STAGES)
    places = torch.arange(num_codes).view(samples.indices.shape[1:])
    for num_drawn in range(num_codes % at_once, num_codes + 1, at_once):
        yield hide_unknown(samples.images, torch.where(places < num_drawn, samples.indices, -1))
