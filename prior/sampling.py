"""Ancestral sampling: a map drawn code by code, in raster order, each from the softmax over those before.

Every code takes one uniform number, and sample n takes row n of them, so a sample does not depend on
the batch it is drawn in, and the two ways to the logits can be held against each other index by index.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from prior.incremental import IncrementalLogits
from prior.model import NO_LABEL, GatedPixelCNN
from vqvae.common.data import NUM_CLASSES
from vqvae.common.distributed import rank, summed, world_size
from vqvae.common.engine import evaluating, in_batches
from vqvae.common.errors import UserError

SAMPLING_BATCH = 100
MAX_GUIDANCE = 100
GUIDANCE = 1.5  # what the command line draws labelled digits with; chosen on validation (README, "What was tried")

# Logits (B, K) at (i, j) given the codes before it in indices (B, H, W): called as logits_at(indices, i, j).
LogitsAt = Callable[[Tensor, int, int], Tensor]


def plain_logits(prior: GatedPixelCNN, labels: Tensor) -> LogitsAt:
    """One full pass over the map for each position: the reference that IncrementalLogits is held against."""
    return lambda indices, i, j: prior(indices, labels)[:, :, i, j]


def sample(
    prior: GatedPixelCNN,
    num_samples: int,
    generator: torch.Generator,
    *,
    labels: Tensor | None = None,
    given: Tensor | None = None,
    guidance: float = 1.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    logits_from: Callable[[GatedPixelCNN, Tensor], LogitsAt] = IncrementalLogits,
    batch_size: int = SAMPLING_BATCH,
    progress: Callable[[int], object] = lambda num_done: None,
) -> Tensor:
    """Draw code maps (num_samples, H, W) int64, each of several processes its share of the batches.

    Args:
        generator: on the CPU; gives num_samples * H * W uniform numbers, sample by sample.
        labels: (num_samples,) int64 digits; None draws without a label.
        given: (num_samples, H, W) int64 codes to keep, -1 where one is to be drawn; a draw heeds those before it only.
        guidance: at least 0; how far to go from the logits without the label towards those with it, and beyond
            (classifier-free guidance, arXiv:2207.12598); 1 is the prior itself. Needs labels.
        temperature: over 0; logits are divided by it.
        top_k: keep the k most likely codes, at least 1.
        top_p: keep the most likely codes that together reach this probability, in (0, 1].
        logits_from: IncrementalLogits, or plain_logits for the same indices the slow way.
        batch_size: maps drawn at once; the result doesn't depend on it.
        progress: called with the number of maps finished since the last call.
    Raises:
        UserError: an option out of its range, or a label that is no digit.
        ValueError: given codes of another shape, or that there are none of.
    """
    if num_samples < 1:
        raise UserError(f"expected --num-samples of at least 1, found {num_samples}; type --num-samples 100")
    if not 0 <= guidance <= MAX_GUIDANCE:
        raise UserError(
            f"expected --guidance between 0 and {MAX_GUIDANCE}, found {guidance:g}; type --guidance 1 for none"
        )
    if guidance != 1 and labels is None:
        raise UserError(f"expected labels with --guidance {guidance:g}, found none; type --labels 0-9 too")
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
    shape = (num_samples, *prior.map_shape)
    if given is not None and (given.dtype != torch.int64 or given.shape != shape):
        raise ValueError(f"expected given codes int64 of shape {shape}, found {given.dtype} of {tuple(given.shape)}")
    if given is not None and given.max() >= prior.num_codes:
        raise ValueError(f"expected given codes below {prior.num_codes}, found {int(given.max())}")
    device = prior.device
    maps = torch.zeros(shape, dtype=torch.int64, device=device)
    with evaluating(prior):
        for number, rows in enumerate(in_batches(num_samples, batch_size)):
            num = rows.stop - rows.start
            uniforms = torch.rand(num, *prior.map_shape, generator=generator, dtype=torch.float64)
            if number % world_size() != rank():
                continue  # another process's
            batch_labels = labels[rows].to(device)
            indices = maps[rows]
            logits_at = guided(prior, batch_labels, guidance, logits_from)
            for i in range(prior.map_shape[0]):
                for j in range(prior.map_shape[1]):
                    probabilities = adjust(logits_at(indices, i, j), temperature, top_k, top_p)
                    drawn = draw(probabilities, uniforms[:, i, j].to(device))
                    if given is not None:
                        kept = given[rows, i, j].to(device)
                        drawn = torch.where(kept >= 0, kept, drawn)
                    indices[:, i, j] = drawn
            progress(num)
    return summed(maps).cpu()  # zero where another process drew


def guided(
    prior: GatedPixelCNN, labels: Tensor, guidance: float, logits_from: Callable[[GatedPixelCNN, Tensor], LogitsAt]
) -> LogitsAt:
    """Logits under guidance: u + guidance * (l - u) of those with the label, l, and those without, u."""
    if guidance == 1:
        return logits_from(prior, labels)
    both = logits_from(prior, torch.cat([labels, torch.full_like(labels, NO_LABEL)]))

    def logits_at(indices: Tensor, i: int, j: int) -> Tensor:
        labelled, unlabelled = both(indices.repeat(2, 1, 1), i, j).chunk(2)
        return unlabelled + guidance * (labelled - unlabelled)

    return logits_at


def adjust(logits: Tensor, temperature: float, top_k: int | None, top_p: float) -> Tensor:
    """Probabilities (B, K) float64 of logits (B, K) under temperature, then top-k, then top-p.

    Ties at the edge of top-k and top-p go to the lower index.
    """
    if temperature != 1:  # less the largest first: the quotient would overflow at the least temperatures
        logits = logits.double()
        logits = (logits - logits.amax(dim=1, keepdim=True)) / temperature
    probabilities = logits.softmax(dim=1, dtype=torch.float64)
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
    return torch.searchsorted(cumulative, scaled, right=True).squeeze(1)
