"""The causal regulariser: a small causal network that makes the codes of stage one predictable (arXiv:2412.16326).

The network predicts each position's vector from the codes before it in raster order, as the prior will have to. The
encoder is trained to make that easy. Only training needs the network, so checkpoints do not hold it.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae.distributed import all_reduce_mean

CHANNELS = 64


class CausalPredictor(nn.Module):
    """z_q (B, D, H, W) to a prediction of z_e (B, D, H, W).

    Each position's prediction sees the two rows above it and the two positions to its left.

    Args:
        code_dim: D.
        map_shape: (H, W).
    """

    def __init__(self, code_dim: int, map_shape: tuple[int, int]) -> None:
        super().__init__()
        self.above = nn.Conv2d(code_dim, CHANNELS, (2, 5))
        self.left = nn.Conv2d(code_dim, CHANNELS, (1, 2))
        self.position_embedding = nn.Parameter(torch.zeros(1, CHANNELS, *map_shape))
        self.out = nn.Sequential(
            nn.ReLU(), nn.Conv2d(CHANNELS, CHANNELS, 1), nn.ReLU(), nn.Conv2d(CHANNELS, code_dim, 1)
        )

    def forward(self, z_q: Tensor) -> Tensor:
        above = self.above(F.pad(z_q[:, :, :-1], (2, 2, 2, 0)))  # sees nothing of the position's own row
        left = self.left(F.pad(z_q[:, :, :, :-1], (2, 0)))  # does not see the position itself
        return self.out(above + left + self.position_embedding)

    def fraction_unexplained(self, z_e: Tensor, z_q: Tensor) -> Tensor:
        """1 - R^2, a scalar: the prediction's squared error over the variance of z_e.

        The variance is each position's own, over the batch. An error that is not divided by it would fall if the
        encoder merely shrank its output. In training the batch is that of all processes together. In evaluation each
        process uses its own batch, because the processes may have different numbers of batches.
        """
        mean = partial(all_reduce_mean, num=len(z_e)) if self.training else Tensor.clone
        variance = mean((z_e - mean(z_e.detach().mean(dim=0))).square().mean())
        error = mean(F.mse_loss(self(z_q), z_e))
        return error / variance.clamp(min=1e-3)  # nothing varies in a batch of one
