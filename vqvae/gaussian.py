"""The unit-Gaussian baseline: code maps picked by noise instead of by a learned prior.

Decoded, they give strokes and not digits: each code is a plausible piece of one, but nothing makes
neighbours fit. Both functions are sampling modes, `(num_samples, generator) -> indices (N, H, W) int64`.
"""

import torch
from torch import Tensor

from vqvae.model import VQVAE


def gaussian_latents(model: VQVAE, num_samples: int, generator: torch.Generator) -> Tensor:
    """z ~ N(0, 1) in the latent space, through the vector-quantisation layer."""
    h, w = model.map_shape
    z = torch.randn(num_samples, model.config.hidden_size, h, w, generator=generator)
    return model.quantizer.nearest(z.to(model.device))


def gaussian_images(model: VQVAE, num_samples: int, generator: torch.Generator) -> Tensor:
    """x ~ N(0, 1) in the image space, through the encoder and the vector-quantisation layer."""
    size = model.config.image_size
    x = torch.randn(num_samples, 1, size, size, generator=generator)
    return model.encode(x.to(model.device))
