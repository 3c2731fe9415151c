"""Ancestral sampling: a map drawn code by code, in raster order, each from the softmax over those before.

Every code takes one uniform number, and sample n takes row n of them, so a sample does not depend on
the batch it is drawn in, and another sampler can be held against this one index by index.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from prior.model import NO_LABEL, GatedPixelCNN
from vqvae.common.data import NUM_CLASSES
from vqvae.common.engine import evaluating, in_batches
from vqvae.common.errors import UserError

SAMPLING_BATCH = 100


def sample(
    prior: GatedPixelCNN,
    num_samples: int,
    generator: torch.Generator,
    *,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    batch_size: int = SAMPLING_BATCH,
    progress: Callable[[int], object] = lambda num_done: None,
) -> Tensor:
    """Draw code maps (num_samples, H, W) int64.

    Args:
        generator: on the CPU; gives num_samples * H * W uniform numbers, sample by sample.
        labels: (num_samples,) int64 digits; None draws without a label.
        temperature: over 0; logits are divided by it.
        top_k: keep the k most likely codes, at least 1.
        top_p: keep the most likely codes that together reach this probability, in (0, 1].
        batch_size: maps drawn at once; the result doesn't depend on it.
        progress: called with the number of maps finished since the last call.
    Raises:
        UserError: an option out of its range, or a label that is no digit.
    """
    if num_samples < 1:
        raise UserError(f"expected --num-samples of at least 1, found {num_samples}; type --num-samples 100")
    if not temperature > 0:
        raise UserError(
            f"expected --temperature over 0, found {temperature:g}; type --top-k 1 for the most likely codes"
        )
    if top_k is not None and top_k < 1:
        raise UserError(f"expected --top-k of at least 1, found {top_k}; type --top-k 1 for the most likely codes")
    if not 0 < top_p <= 1:
        raise UserError(f"expected --top-p over 0 and at most 1, found {top_p:g}; type --top-p 1 for all codes")
    if labels is None:
        labels = torch.full((num_samples,), NO_LABEL)
    elif len(labels) != num_samples or bool(((labels < 0) | (labels >= NUM_CLASSES)).any()):
        raise UserError(
            f"expected {num_samples} labels in 0..{NUM_CLASSES - 1}, found {labels.tolist()}; "
            f"type --label 7 or --labels 0-9"
        )
    device = prior.device
    maps = []
    with evaluating(prior):
        for rows in in_batches(num_samples, batch_size):
            num = rows.stop - rows.start
            uniforms = torch.rand(num, *prior.map_shape, generator=generator, dtype=torch.float64)
            batch_labels = labels[rows].to(device)
            indices = torch.zeros(num, *prior.map_shape, dtype=torch.int64, device=device)
            for i in range(prior.map_shape[0]):
                for j in range(prior.map_shape[1]):
                    logits = prior(indices, batch_labels)[:, :, i, j]
                    probabilities = adjust(logits, temperature, top_k, top_p)
                    indices[:, i, j] = draw(probabilities, uniforms[:, i, j].to(device))
            maps.append(indices.cpu())
            progress(num)
    return torch.cat(maps)


def adjust(logits: Tensor, temperature: float, top_k: int | None, top_p: float) -> Tensor:
    """Probabilities (B, K) float64 of logits (B, K) under temperature, then top-k, then top-p.

    Ties at the edge of top-k and top-p go to the lower index.
    """
    logits = logits.double()
    # Less the largest first: the quotient would overflow at the least temperatures.
    probabilities = ((logits - logits.amax(dim=1, keepdim=True)) / temperature).softmax(dim=1)
    if (top_k is None or top_k >= logits.shape[1]) and top_p == 1:
        return probabilities
    ordered, order = probabilities.sort(dim=1, descending=True, stable=True)
    if top_k is not None:
        ordered[:, top_k:] = 0
        ordered /= ordered.sum(dim=1, keepdim=True)
    before = ordered.cumsum(dim=1) - ordered
    ordered[before >= top_p] = 0  # the code that reaches top_p is kept; the first always is
    return torch.zeros_like(probabilities).scatter(1, order, ordered / ordered.sum(dim=1, keepdim=True))


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Invert the cumulative distribution: (B,) indices of probabilities (B, K) at uniforms (B,) in [0, 1)."""
    cumulative = probabilities.cumsum(dim=1)
    scaled = uniforms[:, None] * cumulative[:, -1:]  # the last sum is 1 only up to rounding
    return (cumulative <= scaled).sum(dim=1)
