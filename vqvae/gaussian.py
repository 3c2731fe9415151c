"""The unit-Gaussian baseline: code maps picked by noise instead of by a learned prior.

Decoded, such maps give strokes and not digits. Each code is a plausible piece of a digit, but nothing makes neighbours
fit together. The first two functions are sampling modes: (model, num_samples, generator) to indices (N, H, W) int64.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from vqvae.codec import decode_images, encode_images
from vqvae.compute import eval_mode, in_batches, memory_for, require_samples, seeded
from vqvae.model import VQVAE

BATCH = 500  # maps quantised at once; each needs H W K distances


def gaussian_latents(model: VQVAE, num_samples: int, generator: torch.Generator) -> Tensor:
    """Draw z ~ N(0, 1) in the latent space, then quantise it."""
    z = torch.randn(num_samples, model.config.code_dim, *model.map_shape, generator=generator)
    return torch.cat([model.quantizer.nearest(z[rows].to(model.device)) for rows in in_batches(num_samples, BATCH)])


def gaussian_images(model: VQVAE, num_samples: int, generator: torch.Generator) -> Tensor:
    """Draw x ~ N(0, 1) in the image space, then encode and quantise it."""
    x = torch.randn(num_samples, *model.image_shape, generator=generator)
    return encode_images(model, x)


def draw_gaussian(model: VQVAE, source: Literal["latent", "image"], num_samples: int, seed: int) -> dict[str, Tensor]:
    """Images (N, C, S, T) in 0..1 and their `indices` (N, H, W), on the CPU, from Gaussian latents or images.

    Raises:
        InputError: no whole number of samples or no seed, or more samples than fit into memory.
    """
    noise = model.config.code_dim * math.prod(model.map_shape) if source == "latent" else math.prod(model.image_shape)
    num_samples = require_samples(num_samples, max(noise, 2 * math.prod(model.image_shape)))  # two: batches and all
    draw = {"latent": gaussian_latents, "image": gaussian_images}[source]
    with memory_for("num_samples"), eval_mode(model):
        indices = draw(model, num_samples, seeded(seed))
        return {"images": decode_images(model, indices), "indices": indices.cpu()}
