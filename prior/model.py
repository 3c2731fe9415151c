"""The prior: a gated PixelCNN with two stacks (arXiv:1606.05328) over maps of codes.

    indices (B, H, W), labels (B,) --GatedPixelCNN--> logits (B, K, H, W)

logits[:, :, i, j] depend on the label and on the codes before (i, j) in raster order: on all of them, and on nothing
else. The input is shifted once, down for the vertical stack and right for the horizontal one. After that every layer
may look at its own position, and the shapes of the kernels keep the order:

    vertical  (2, 3)    horizontal (1, 2)    x: may be seen, o: the position itself
      x x x                                  At (i, j) the vertical stack sees rows < i, and the horizontal one sees
      x o x                 x o              row i left of j. A 1x1 link goes from the vertical to the horizontal stack
                                             and never back, so there is no blind spot.

Departures from the paper: the vertical stack has residual links too; codes enter through an embedding and leave through
a softmax over K instead of over 256 intensities; the shift stands for the first layer's mask.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prior.kernels import dropout, gate
from vqvae.data.dataset import DatasetInfo
from vqvae.errors import InputError
from vqvae.model import VQVAE
from vqvae.storage import checkpoint
from vqvae.storage.recipe import from_dict, require_range


@dataclass(frozen=True)
class PriorConfig:
    """The network. The number of codes and the map's shape come from the VQ-VAE, the classes from the data."""

    width: int = 64  # channels of each stack
    num_layers: int | None = None  # None: as many as a position needs to see all codes before it
    dropout: float = 0.0
    deformed_share: float = 0.0  # of each training batch; over 0, deformed images have labels of their own

    def __post_init__(self) -> None:
        require_range("width", self.width, 1, 2048)
        require_range("dropout", self.dropout, 0, 0.9)
        require_range("deformed_share", self.deformed_share, 0, 0.9)
        if self.num_layers is not None:
            require_range("num_layers", self.num_layers, 1, 256)


class CausalConv(nn.Conv2d):
    """A convolution of the same size out as in, whose kernel (R, S) sees R - 1 rows up and S // 2 columns to the left.

    Its bottom row, and its middle or last column, is the position itself.
    """

    def __init__(self, channels_in: int, channels_out: int, kernel: tuple[int, int]) -> None:
        super().__init__(channels_in, channels_out, kernel)
        rows, columns = kernel
        self.margins = (columns // 2, (columns - 1) // 2, rows - 1, 0)  # left, right, above and below

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, self.margins))


class GatedLayer(nn.Module):
    """One layer of both stacks, figure 2 of the paper: (v, h) to (v, h), each (B, C, H, W).

    A label adds a bias to the features of each stack (eq. 4).
    """

    def __init__(self, width: int, p_dropout: float, num_labels: int) -> None:
        super().__init__()
        self.vertical = CausalConv(width, 2 * width, (2, 3))
        self.horizontal = CausalConv(width, 2 * width, (1, 2))
        self.vertical_to_horizontal = nn.Conv2d(2 * width, 2 * width, 1)
        self.vertical_out = nn.Conv2d(width, width, 1)
        self.horizontal_out = nn.Conv2d(width, width, 1)
        self.label = nn.Embedding(num_labels, 4 * width)
        self.p_dropout = p_dropout

    def forward(self, v: Tensor, h: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        v_label, h_label = self.label(labels)[:, :, None, None].chunk(2, dim=1)  # (B, 2C, 1, 1) each
        v_features = self.vertical(self.dropped(v))
        h_features = self.horizontal(self.dropped(h)) + self.vertical_to_horizontal(v_features)
        v = v + self.vertical_out(gate(v_features + v_label))
        h = h + self.horizontal_out(gate(h_features + h_label))
        return v, h

    def dropped(self, x: Tensor) -> Tensor:
        return dropout(x, self.p_dropout) if self.training and self.p_dropout > 0 else x


def shift_down(x: Tensor) -> Tensor:
    """(B, C, H, W) moved down by one row, with zeros in the first."""
    return F.pad(x, (0, 0, 1, 0))[:, :, :-1]


def shift_right(x: Tensor) -> Tensor:
    """(B, C, H, W) moved right by one column, with zeros in the first."""
    return F.pad(x, (1, 0))[:, :, :, :-1]


def layers_needed(map_shape: tuple[int, int]) -> int:
    """How many layers let each position of an (H, W) map see all codes before it.

    The vertical stack sees one row further up and one column further to either side with each layer, the horizontal one
    a column further to the left. The shifts bring the row above and the column to the left before the first layer.
    """
    height, width = map_shape
    return max(width - 1 if height > 1 else width - 2, height - 2, 1)


class GatedPixelCNN(nn.Module):
    """p(indices | label), a softmax over K codes at each position.

    Args:
        config: the network.
        num_codes: K of the VQ-VAE.
        map_shape: (H, W) of its code maps.
        num_classes: labels are 0..num_classes - 1, and num_classes (`no_label`) means that the label is not told. If
            the network learns from deformed images too, `deformed` is added to the labels of those.
    Raises:
        InputError: too few layers for each position to see all codes before it.
    """

    def __init__(self, config: PriorConfig, num_codes: int, map_shape: tuple[int, int], num_classes: int) -> None:
        super().__init__()
        needed = layers_needed(map_shape)
        num_layers = needed if config.num_layers is None else config.num_layers
        if num_layers < needed:
            raise InputError(
                f"expected at least {needed} layers for a map of {map_shape[0]}x{map_shape[1]} codes, so that each "
                f"position sees all codes before it, found {num_layers}; set num_layers = {needed}, or leave it out"
            )
        self.config, self.num_codes, self.map_shape = config, num_codes, map_shape
        self.num_classes = self.no_label = num_classes
        self.deformed = num_labels = num_classes + 1
        if config.deformed_share > 0:
            num_labels *= 2
        width = config.width
        self.embedding = nn.Embedding(num_codes, width)
        self.layers = nn.ModuleList(GatedLayer(width, config.dropout, num_labels) for _ in range(num_layers))
        self.head = nn.Sequential(
            nn.ReLU(), nn.Conv2d(width, 2 * width, 1), nn.ReLU(), nn.Conv2d(2 * width, num_codes, 1)
        )

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def forward(self, indices: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits (B, K, H, W) of maps (B, H, W) int64.

        Args:
            labels: (B,) int64, classes or `no_label`. None stands for `no_label` everywhere.
        Raises:
            ValueError: maps of another shape.
            IndexError: a code or a label out of range.
        """
        if indices.shape[1:] != self.map_shape:
            raise ValueError(f"expected maps of shape {self.map_shape}, found {tuple(indices.shape[1:])}")
        if labels is None:
            labels = torch.full((len(indices),), self.no_label, device=indices.device)
        embedded = self.embedding(indices).permute(0, 3, 1, 2)  # (B, C, H, W), channels last in memory
        if torch.is_autocast_enabled(embedded.device.type):
            embedded = embedded.to(torch.get_autocast_dtype(embedded.device.type))  # once, not in every layer
        v = shift_down(embedded)  # (i, j) holds the code above it
        h = shift_right(embedded)  # (i, j) holds the code to its left
        for layer in self.layers:
            v, h = layer(v, h, labels)
        return self.head(v + h)


def load_prior(
    path: Path, vqvae: VQVAE, vqvae_header: checkpoint.Header, device: torch.device
) -> tuple[GatedPixelCNN, checkpoint.Header]:
    """The prior of a checkpoint, in eval mode, and the checkpoint's header.

    Raises:
        InputError: no whole prior checkpoint is there, or it belongs to another VQ-VAE.
    """

    def build(header: checkpoint.Header) -> GatedPixelCNN:
        if header.vqvae_fingerprint != vqvae_header.fingerprint:
            raise InputError(
                f"expected the VQ-VAE that the prior was trained on, of fingerprint "
                f"{str(header.vqvae_fingerprint)[:12]!r}, found one of fingerprint {vqvae_header.fingerprint[:12]!r}; "
                f"name a pair that belongs together, by `vqvae` and `prior`"
            )
        num_classes = from_dict(DatasetInfo, header.data).num_classes
        return GatedPixelCNN(
            from_dict(PriorConfig, header.config), vqvae.config.num_codes, vqvae.map_shape, num_classes
        )

    prior, header = checkpoint.load(path, "prior", build)
    return prior.to(device).eval(), header
