"""Priors without neighbours, to compare the learned prior with. Each position's code is drawn on its own."""

import math

import torch
from torch import Tensor

from prior.codes import Codes
from vqvae.compute import in_batches

AT_ONCE = 10_000  # maps; they may be more than fit into memory


def unigram(train: Codes, num_codes: int) -> Tensor:
    """Each position's own code frequencies in the training maps, after one count is added to each code: (H, W, K)
    float64."""
    height, width = train.indices.shape[1:]
    counts = torch.ones(height * width, num_codes, dtype=torch.float64)
    for rows in in_batches(len(train.indices), AT_ONCE):
        columns = train.indices[rows].flatten(1).T.long().cpu()
        counts += torch.stack([torch.bincount(column, minlength=num_codes) for column in columns])
    counts = counts.view(height, width, num_codes)
    return counts / counts.sum(dim=2, keepdim=True)


def uniform(map_shape: tuple[int, int], num_codes: int) -> Tensor:
    """Every code equally likely, (H, W, K) float64."""
    return torch.full((*map_shape, num_codes), 1 / num_codes, dtype=torch.float64)


def draw_independently(probabilities: Tensor, num_samples: int, generator: torch.Generator) -> Tensor:
    """Draw maps (num_samples, H, W) int64 on the CPU, each position from its own distribution (H, W, K)."""
    height, width, _ = probabilities.shape
    columns = torch.multinomial(probabilities.cpu().flatten(0, 1), num_samples, replacement=True, generator=generator)
    return columns.T.reshape(num_samples, height, width).contiguous()


def nats_by_position(probabilities: Tensor, indices: Tensor) -> Tensor:
    """Mean negative log-likelihood (H, W) of maps (N, H, W) under independent positions (H, W, K)."""
    log_p, total = probabilities.log().permute(2, 0, 1), torch.zeros(indices.shape[1:], dtype=torch.float64)
    for rows in in_batches(len(indices), AT_ONCE):
        total += log_p.gather(0, indices[rows].long().cpu()).sum(dim=0)  # of (n, H, W), the log-likelihood of each code
    return -total / len(indices)


def baselines(train: Codes, split: Codes, num_codes: int) -> dict[str, float]:
    """Nats per code of a split, under the uniform distribution and under the training maps' unigram."""
    likelihood = nats_by_position(unigram(train, num_codes), split.indices).mean().item()
    return {"uniform": math.log(num_codes), "unigram": likelihood}
