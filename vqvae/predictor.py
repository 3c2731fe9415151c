"""A small causal network beside stage one, which makes its codes easy for stage two (arXiv:2412.16326).

It predicts each place's vector from the codes before it in raster order, as the prior will have to, and the encoder is
trained to be predictable. Only training needs it; checkpoints are without it.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae.common.distributed import averaged

CHANNELS = 64


class CausalPredictor(nn.Module):
    """z_q (B, D, H, W) to a guess at z_e (B, D, H, W), each place's from the two rows above and the two places left.

    Args:
        hidden_size: D.
        map_shape: (H, W).
    """

    def __init__(self, hidden_size: int, map_shape: tuple[int, int]) -> None:
        super().__init__()
        self.above = nn.Conv2d(hidden_size, CHANNELS, (2, 5))
        self.left = nn.Conv2d(hidden_size, CHANNELS, (1, 2))
        self.place = nn.Parameter(torch.zeros(1, CHANNELS, *map_shape))
        self.out = nn.Sequential(
            nn.ReLU(), nn.Conv2d(CHANNELS, CHANNELS, 1), nn.ReLU(), nn.Conv2d(CHANNELS, hidden_size, 1)
        )

    def forward(self, z_q: Tensor) -> Tensor:
        above = self.above(F.pad(z_q[:, :, :-1], (2, 2, 2, 0)))  # never the place's own row
        left = self.left(F.pad(z_q[:, :, :, :-1], (2, 0)))  # nor the place itself
        return self.out(above + left + self.place)

    def unexplained(self, z_e: Tensor, z_q: Tensor) -> Tensor:
        """Scalar, 1 - R^2: the squared error of the guess as a share of each place's variance over the batch. A share,
        since an error alone would fall if the encoder merely shrank its output. In training the batch is that of all
        processes; evaluation, where they may have different numbers of batches, keeps to its own."""
        over_all = partial(averaged, num=len(z_e)) if self.training else Tensor.clone
        variance = over_all((z_e - over_all(z_e.detach().mean(dim=0))).square().mean())
        error = over_all(F.mse_loss(self(z_q), z_e))
        return error / variance.clamp(min=1e-3)  # nothing varies in a batch of one
