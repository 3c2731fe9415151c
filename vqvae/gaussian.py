"""The unit-Gaussian baseline: code maps picked by noise instead of by a learned prior.

Decoded, they give strokes and not digits: each code is a plausible piece of one, but nothing makes
neighbours fit. Both functions are sampling modes, `(num_samples, generator) -> indices (N, H, W) int64`.
"""

import torch
from torch import Tensor

from vqvae.common.engine import in_batches
from vqvae.model import VQVAE

BATCH = 500  # maps quantised at once: a matrix of distances has 49 K numbers for each


def gaussian_latents(model: VQVAE, num_samples: int, generator: torch.Generator) -> Tensor:
    """z ~ N(0, 1) in the latent space, through the vector-quantisation layer."""
    h, w = model.map_shape
    z = torch.randn(num_samples, model.config.hidden_size, h, w, generator=generator)
    return torch.cat([model.quantizer.nearest(z[rows].to(model.device)) for rows in in_batches(num_samples, BATCH)])


def gaussian_images(model: VQVAE, num_samples: int, generator: torch.Generator) -> Tensor:
    """x ~ N(0, 1) in the image space, through the encoder and the vector-quantisation layer."""
    size = model.config.image_size
    x = torch.randn(num_samples, 1, size, size, generator=generator)
    return torch.cat([model.encode(x[rows].to(model.device)) for rows in in_batches(num_samples, BATCH)])
