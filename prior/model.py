"""The prior: a gated PixelCNN with two stacks (arXiv:1606.05328) over maps of codes.

    indices (B, H, W), labels (B,) --GatedPixelCNN--> logits (B, K, H, W)

logits[:, :, i, j] depend on the label and on the codes before (i, j) in raster order, on all of them and
on nothing else. The input is shifted once, down for the vertical stack and right for the horizontal one;
after that every layer may look at its own position, and causality is in the shapes of the kernels:

    vertical  (2, 3)    horizontal (1, 2)    x: may be seen, o: the position itself
      x x x                                  Vertical position (i, j) holds rows < i, horizontal (i, j)
      x o x                 x o              those of row i left of j; 1x1 links go from vertical to
                                             horizontal alone, so there is no blind spot.

Departures from the paper: the vertical stack has residual links too; codes enter through an embedding
and leave through a softmax over K instead of 256 intensities; the first layer's mask is the shift.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vqvae.common import checkpoint
from vqvae.common.config import from_dict, require_range
from vqvae.common.data import NUM_CLASSES
from vqvae.common.errors import UserError
from vqvae.model import VQVAE

NO_LABEL = NUM_CLASSES  # the label of maps whose digit is not told


@dataclass(frozen=True)
class PriorConfig:
    """The network; the number of codes and the map's shape come from the VQ-VAE."""

    width: int = 64  # channels of each stack
    num_layers: int = 6
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require_range("width", self.width, 1, 2048)
        require_range("num_layers", self.num_layers, 1, 64)
        require_range("dropout", self.dropout, 0, 0.9)


class WindowProduct(nn.Conv2d):
    """A convolution as the matrix product that it is: of windows (B, H, W, R*S*C), for an RxS kernel of C channels, to
    (B, H, W, D). A CPU trains faster so than by convolutions, whose weights' gradients are slow. The weights stay a
    convolution's: so they are initialised, decayed and kept in checkpoints."""

    @property
    def matrix(self) -> Tensor:
        """(D, R*S*C)."""
        return rearrange(self.weight, "d c rows columns -> d (rows columns c)")

    def forward(self, windows: Tensor) -> Tensor:
        return F.linear(windows, self.matrix, self.bias)


class VerticalWindows(torch.autograd.Function):
    """x (B, H, W, C) to (B, H, W, 6C): of each position the row above and its own, each left, middle and right, and
    zeros outside. The gradient is added up in one place, where autograd would make six."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        padded = F.pad(x, (0, 0, 1, 1, 1, 0))
        return torch.cat(_six_shifts(padded), dim=3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        batch, height, width, channels = grad.shape
        padded = grad.new_zeros(batch, height + 1, width + 2, channels // 6)
        for shifted, part in zip(_six_shifts(padded), grad.chunk(6, dim=3), strict=True):
            shifted += part
        return padded[:, 1:, 1:-1]


def _six_shifts(padded: Tensor) -> list[Tensor]:
    """Views (B, H, W, C) of (B, H + 1, W + 2, C)."""
    height, width = padded.shape[1] - 1, padded.shape[2] - 2
    return [padded[:, i : i + height, j : j + width] for i in range(2) for j in range(3)]


class GatedLayer(nn.Module):
    """One layer of both stacks: (v, h) to (v, h), each (B, H, W, C); eq. 2 conditioned as in eq. 4."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.vertical = WindowProduct(width, 2 * width, (2, 3))
        self.horizontal = WindowProduct(width, 2 * width, (1, 2))
        self.vertical_to_horizontal = WindowProduct(2 * width, 2 * width, 1)
        self.vertical_out = WindowProduct(width, width, 1)
        self.horizontal_out = WindowProduct(width, width, 1)
        self.label = nn.Embedding(NUM_CLASSES + 1, 4 * width)
        self.dropout = dropout

    def forward(self, v: Tensor, h: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        v_label, h_label = self.label(labels)[:, None, None].chunk(2, dim=3)
        v_features = self.vertical(VerticalWindows.apply(self._dropped(v)))
        here = self._dropped(h)
        pairs = torch.cat([to_the_right(here), here], dim=3)
        h_features = self.horizontal(pairs) + self.vertical_to_horizontal(v_features)
        v = v + self.vertical_out(gate(v_features + v_label))
        h = h + self.horizontal_out(gate(h_features + h_label))
        return v, h

    def _dropped(self, x: Tensor) -> Tensor:
        """Dropout from 16 random bits an element: F.dropout draws a double, several times slower on a CPU."""
        if not self.training or self.dropout == 0:
            return x
        channels = x.shape[-1]
        words = torch.empty(*x.shape[:-1], -(-channels // 4), dtype=torch.int64, device=x.device)
        bits = words.random_(-(2**63), None).view(torch.int16)[..., :channels]
        kept = bits >= round((self.dropout - 0.5) * 2**16)
        return x * (kept / (1 - self.dropout)).to(x.dtype)


def gate(features: Tensor) -> Tensor:
    """tanh of one half of the channels, (..., 2C) to (..., C), times the sigmoid of the other (eq. 2)."""
    f, g = features.chunk(2, dim=-1)
    return (2 * torch.sigmoid(2 * f) - 1) * torch.sigmoid(g)  # torch's tanh takes seven times its sigmoid's time


def to_the_right(x: Tensor) -> Tensor:
    """(B, H, W, C) moved by one column, zeros in the first."""
    return F.pad(x, (0, 0, 1, 0))[:, :, :-1]


class GatedPixelCNN(nn.Module):
    """p(indices | label), one softmax for each position.

    Args:
        config: the network.
        num_codes: K of the VQ-VAE.
        map_shape: (H, W) of its code maps.
    Raises:
        UserError: too few layers for a position to see all that come before it on such a map.
    """

    def __init__(self, config: PriorConfig, num_codes: int, map_shape: tuple[int, int]) -> None:
        super().__init__()
        # Each layer sees one column further to either side and one row further up than the last, and
        # the shift has brought the first row and the first column to the left already.
        height, width = map_shape
        needed = max(width - 1 if height > 1 else width - 2, height - 2, 1)
        if config.num_layers < needed:
            raise UserError(
                f"expected at least {needed} layers for a map of {height}x{width} codes, so that each "
                f"position sees all before it, found {config.num_layers}; set num_layers = {needed} in [prior]"
            )
        self.config, self.num_codes, self.map_shape = config, num_codes, map_shape
        self.embedding = nn.Embedding(num_codes, config.width)
        self.layers = nn.ModuleList(GatedLayer(config.width, config.dropout) for _ in range(config.num_layers))
        self.head = nn.Sequential(
            nn.ReLU(),
            WindowProduct(config.width, 2 * config.width, 1),
            nn.ReLU(),
            WindowProduct(2 * config.width, num_codes, 1),
        )

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def forward(self, indices: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits (B, K, H, W) of maps (B, H, W) int64.

        Args:
            labels: (B,) int64, the dataset's digits or NO_LABEL; None is NO_LABEL for all.
        Raises:
            ValueError: a map of another shape.
            IndexError: a code or a label that there is none of.
        """
        if indices.shape[1:] != self.map_shape:
            raise ValueError(f"expected maps of shape {self.map_shape}, found {tuple(indices.shape[1:])}")
        if labels is None:
            labels = torch.full((len(indices),), NO_LABEL, device=indices.device)
        embedded = self.embedding(indices)
        if torch.is_autocast_enabled(embedded.device.type):
            embedded = embedded.to(torch.get_autocast_dtype(embedded.device.type))  # else each layer would
        v = F.pad(embedded, (0, 0, 0, 0, 1, 0))[:, :-1]  # the shift down: (i, j) holds the code above it
        h = to_the_right(embedded)  # (i, j) holds the code left of it
        for layer in self.layers:
            v, h = layer(v, h, labels)
        logits: Tensor = self.head(v + h)
        return logits.movedim(3, 1)


def load_prior(
    path: Path, vqvae: VQVAE, vqvae_header: checkpoint.Header, device: torch.device
) -> tuple[GatedPixelCNN, checkpoint.Header]:
    """The prior of a checkpoint, in eval mode, and its header.

    Raises:
        UserError: no whole prior checkpoint is there, or it belongs to another VQ-VAE.
    """
    header = checkpoint.read_header(path, "prior")
    if header.vqvae_fingerprint != vqvae_header.fingerprint:
        raise UserError(
            f"expected the VQ-VAE that the prior at {path} was trained on, of fingerprint "
            f"{str(header.vqvae_fingerprint)[:12]}, found one of fingerprint {vqvae_header.fingerprint[:12]}; "
            f"name the right pair: --vqvae FILE --prior FILE"
        )

    def build() -> GatedPixelCNN:
        return GatedPixelCNN(from_dict(PriorConfig, header.config), vqvae.config.k, vqvae.map_shape)

    prior = checkpoint.load(path, header, build)
    return prior.to(device).eval(), header
