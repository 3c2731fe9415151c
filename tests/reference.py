"""The reference side of the benchmark: the same networks, trained as most public code trains them."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import MNIST

from prior.model import PriorConfig
from prior.train import drop_labels
from vqvae.model import VQVAE

DATA = Path("data")
NO_LABEL = 10
NUM_LAYERS = 6  # of the project's prior on 7x7 maps


def loader(num: int, batch_size: int) -> DataLoader[tuple[Tensor, Tensor]]:
    """Images from a dataset of PIL images, transformed one by one in worker processes."""
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])
    digits = Subset(MNIST(str(DATA), transform=transform), range(num))
    workers = os.cpu_count() or 1
    return DataLoader(digits, batch_size=batch_size, shuffle=True, num_workers=workers, persistent_workers=True)


def reference_stage_one(model: VQVAE, num: int, batch_size: int) -> Callable[[], None]:
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)
    batches = loader(num, batch_size)

    def run() -> None:
        model.train()
        for x, _ in batches:
            out = model(x)
            loss = F.mse_loss(out.x_hat, x) + out.codebook_loss + out.commitment_loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return run


class MaskedConv2d(nn.Conv2d):
    """The usual causal convolution: an odd kernel whose last row or column is multiplied by zero."""

    def __init__(self, channels_in: int, channels_out: int, kernel: tuple[int, int], axis: int) -> None:
        super().__init__(channels_in, channels_out, kernel, padding=(kernel[0] // 2, kernel[1] // 2))
        mask = torch.ones(1, 1, *kernel)
        mask.select(axis, 2).zero_()
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.mask, self.bias)


class ReferenceLayer(nn.Module):
    """`GatedLayer` with masked 3x3 and 1x3 convolutions for its stacks, torch's dropout and tanh."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.vertical = MaskedConv2d(width, 2 * width, (3, 3), axis=2)
        self.horizontal = MaskedConv2d(width, 2 * width, (1, 3), axis=3)
        self.vertical_to_horizontal = nn.Conv2d(2 * width, 2 * width, 1)
        self.vertical_out, self.horizontal_out = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.label = nn.Embedding(NO_LABEL + 1, 4 * width)
        self.dropout = dropout

    def forward(self, v: Tensor, h: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        v_label, h_label = self.label(labels)[:, :, None, None].chunk(2, dim=1)
        v_features = self.vertical(F.dropout(v, self.dropout))
        h_features = self.horizontal(F.dropout(h, self.dropout)) + self.vertical_to_horizontal(v_features)
        v = v + self.vertical_out(self.gate(v_features + v_label))
        return v, h + self.horizontal_out(self.gate(h_features + h_label))

    def gate(self, features: Tensor) -> Tensor:
        f, g = features.chunk(2, dim=1)
        return torch.tanh(f) * torch.sigmoid(g)


class ReferencePrior(nn.Module):
    """`GatedPixelCNN` of such layers."""

    def __init__(self, config: PriorConfig, num_codes: int) -> None:
        super().__init__()
        width = config.width
        self.embedding = nn.Embedding(num_codes, width)
        self.layers = nn.ModuleList(ReferenceLayer(width, config.dropout) for _ in range(NUM_LAYERS))
        self.head = nn.Sequential(
            nn.ReLU(), nn.Conv2d(width, 2 * width, 1), nn.ReLU(), nn.Conv2d(2 * width, num_codes, 1)
        )

    def forward(self, indices: Tensor, labels: Tensor) -> Tensor:
        embedded = self.embedding(indices).permute(0, 3, 1, 2)
        v = F.pad(embedded, (0, 0, 1, 0))[:, :, :-1]
        h = F.pad(embedded, (1, 0))[:, :, :, :-1]
        for layer in self.layers:
            v, h = layer(v, h, labels)
        return self.head(v + h)


def reference_stage_two(vqvae: VQVAE, config: PriorConfig, num: int, batch_size: int) -> Callable[[], None]:
    """The reference prior. Images are encoded again for every batch."""
    prior = ReferencePrior(config, vqvae.config.num_codes)
    optimizer = torch.optim.Adam(prior.parameters(), lr=1e-3)
    batches = loader(num, batch_size)

    def run() -> None:
        prior.train()
        for x, labels in batches:
            with torch.no_grad():
                indices = vqvae.encode(x)
            loss = F.cross_entropy(prior(indices, drop_labels(labels, 0.1, NO_LABEL)), indices)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return run
