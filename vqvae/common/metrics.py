"""Figures from counts and likelihoods; no tensors of images here."""

import math

import torch
from torch import Tensor


def count_codes(indices: Tensor, num_codes: int) -> Tensor:
    """How often each code stands in indices of any shape: (K,) int64. Add counts up over a whole split."""
    return torch.bincount(indices.flatten(), minlength=num_codes)


def perplexity(counts: Tensor) -> float:
    """exp of the entropy of the codes' frequencies, 1..K: how many codes are in effective use."""
    p = counts.double() / counts.sum()
    return math.exp(-torch.special.xlogy(p, p).sum().item())


def codes_used(counts: Tensor) -> int:
    """How many codes were chosen at least once."""
    return int((counts > 0).sum())


def nats_to_bits(nats: float) -> float:
    """A likelihood in nats as bits."""
    return nats / math.log(2)
