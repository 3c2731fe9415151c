"""Likelihoods under the prior, with a label, and without one by summing over the labels.

log p(map | label) = sum over positions of log softmax(logits)[code]
log p(map)         = log sum over labels of p(label) p(map | label)
p(label | map)     = p(label) p(map | label) / p(map)            (Bayes' rule)
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from prior.model import GatedPixelCNN
from vqvae.compute import eval_mode, in_batches

BATCH = 250  # maps at once, at most
MOST_LOGITS = 2**24  # at once; they take 64 MB in float32


def maps_at_once(prior: GatedPixelCNN) -> int:
    """How many maps to score at once, so that the memory they take is bounded for any number of codes."""
    height, width = prior.map_shape
    return max(min(BATCH, MOST_LOGITS // (prior.num_codes * height * width)), 1)


def nats_per_code(prior: GatedPixelCNN, indices: Tensor, labels: Tensor | None) -> Tensor:
    """Mean negative log-likelihood of maps (B, H, W) under labels (B,), in nats per code: a scalar, the training loss.

    Args:
        labels: None stands for `no_label` everywhere.
    """
    logits = rearrange(prior(indices, labels).float(), "b k h w -> (b h w) k")  # twice as fast as over a middle axis
    return F.cross_entropy(logits, indices.flatten())


def nats_of_codes(
    prior: GatedPixelCNN,
    indices: Tensor,
    labels: Tensor | None,
    progress: Callable[[int], object] = lambda num_done: None,
) -> Tensor:
    """Negative log-likelihood (N, H, W) float64 of each code of maps (N, H, W) under labels (N,), in nats, on the CPU.

    Args:
        labels: None stands for `no_label` everywhere.
        progress: called with the number of maps that were scored since the last call.
    """
    nats = [torch.zeros(0, *prior.map_shape, dtype=torch.float64)]  # all there is where N is 0
    with eval_mode(prior):
        for rows in in_batches(len(indices), maps_at_once(prior)):
            some = indices[rows].to(prior.device).long()
            logits = prior(some, None if labels is None else labels[rows].to(prior.device))
            nats.append(F.cross_entropy(logits, some, reduction="none").double().cpu())
            progress(len(some))
    return torch.cat(nats)


def nats_per_map(prior: GatedPixelCNN, indices: Tensor, labels: Tensor | None, counted: Tensor | None = None) -> Tensor:
    """Negative log-likelihood (N,) float64 of each map (N, H, W) under its label (N,), in nats, on the CPU.

    Args:
        counted: (N, H, W) bool, on the CPU: the codes that are counted. None stands for all.
    """
    nats = nats_of_codes(prior, indices, labels)
    return (nats if counted is None else nats * counted).sum(dim=(1, 2))


def label_log_joint(
    prior: GatedPixelCNN,
    indices: Tensor,
    frequencies: Tensor,
    *,
    counted: Tensor | None = None,
    progress: Callable[[int], object] = lambda num_done: None,
) -> Tensor:
    """log p(label) + log p(map | label), in nats: (N, num_classes) float64 for maps (N, H, W).

    Where there are no classes the one column (N, 1) is log p(map).

    Args:
        frequencies: p(label), (num_classes,).
        counted: (N, H, W) bool, on the CPU: the codes that are counted. None stands for all.
        progress: called with the number of maps that were scored since the last call, under one of the labels.
    """
    labels = range(len(frequencies)) or [prior.no_label]
    log_p_label = frequencies.double().log() if len(frequencies) > 0 else torch.zeros(1, dtype=torch.float64)
    columns = []
    for label, log_p in zip(labels, log_p_label, strict=True):
        columns.append(log_p - nats_per_map(prior, indices, torch.full((len(indices),), label), counted))
        progress(len(indices))
    return torch.stack(columns, dim=1)


def mixture_nats_per_map(prior: GatedPixelCNN, indices: Tensor, frequencies: Tensor) -> Tensor:
    """Negative log-likelihood (N,) float64 of maps (N, H, W) without a label: -log of the sum over labels, in nats."""
    return -label_log_joint(prior, indices, frequencies).logsumexp(dim=1)
