"""How a network is optimised: the settings, the learning rate of a step, the optimiser."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from vqvae.storage.recipe import require_range
from vqvae.training.muon import Muon


@dataclass(frozen=True)
class Training:
    """Settings that every stage's training shares. The defaults are the baseline recipe's."""

    batch_size: int = 128
    num_epochs: int = 10
    lr: float = 2e-4
    optimizer: Literal["adamw", "muon"] = "adamw"
    schedule: Literal["constant", "one-cycle"] = "constant"
    warmup: float = 0.05  # share of a one-cycle run in which the rate rises
    weight_decay: float = 0.0
    mixed_precision: bool = False  # matrix products in bfloat16, where the device multiplies it faster than float32

    def __post_init__(self) -> None:
        require_range("batch_size", self.batch_size, 1, 65536)
        require_range("num_epochs", self.num_epochs, 1, 100_000)
        require_range("lr", self.lr, 1e-8, 1)
        require_range("warmup", self.warmup, 0, 0.9)
        require_range("weight_decay", self.weight_decay, 0, 1)


def learning_rate(training: Training, progress: float) -> float:
    """The rate at `progress` in 0..1 of the run: constant, or a linear rise and then half a cosine down to 0."""
    if training.schedule == "one-cycle" and progress < training.warmup:
        return training.lr * progress / training.warmup
    return training.lr * decline(training, progress)


def decline(training: Training, progress: float) -> float:
    """The learning rate as a share of its peak, in 0..1. During the warm-up, which leads there, it is 1."""
    if training.schedule == "constant" or progress < training.warmup:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (progress - training.warmup) / (1 - training.warmup)))


def make_optimizer(model: nn.Module, training: Training) -> torch.optim.Optimizer:
    """AdamW for all parameters, or Muon for the weights of convolutions and linear layers and AdamW for the rest.

    Weight decay applies to those weights and to nothing else.
    """
    weights = {id(module.weight) for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    by_muon = training.optimizer == "muon"
    apart = weights if by_muon or training.weight_decay > 0 else set()  # one group is faster than two
    groups = [
        {"params": [p for p in model.parameters() if id(p) in apart], "weight_decay": training.weight_decay},
        {"params": [p for p in model.parameters() if id(p) not in apart], "weight_decay": 0.0},
    ]
    groups[0]["orthogonal"] = by_muon
    groups = [group for group in groups if group["params"]]
    return Muon(groups, training.lr) if by_muon else torch.optim.AdamW(groups, training.lr, fused=True)
