"""The prior's logits position by position, each position's work done once (arXiv:1704.06001).

What a position needs of the earlier ones is kept: the vertical stack runs once a row, for the whole row, as soon as the
row above is complete; the horizontal stack and the head run once a position. All convolutions are matrix products here:
`GatedLayer` in `prior/model.py` is what these must equal.
"""

from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from prior.model import GatedLayer, GatedPixelCNN, gate

FEWEST_PRODUCTS = 1_000_000  # from which a call of oneDNN pays


class IncrementalLogits:
    """Logits (B, K) at (i, j) of maps that are being drawn, to be asked for in raster order, each position once.

    Args:
        prior: in eval mode.
        labels: (B,) int64, digits or NO_LABEL.
    """

    def __init__(self, prior: GatedPixelCNN, labels: Tensor) -> None:
        self.prior = prior
        self.layers = [_LayerState(cast(GatedLayer, layer), labels, prior.map_shape[1]) for layer in prior.layers]
        self.zeros = prior.embedding.weight.new_zeros(len(labels), prior.config.width)

    def __call__(self, indices: Tensor, i: int, j: int) -> Tensor:
        """Logits (B, K) given the codes before (i, j) in indices (B, H, W); the others are not looked at."""
        if j == 0:
            self.v = self._vertical_stack(indices, i)
        h = self.prior.embedding(indices[:, i, j - 1]) if j > 0 else self.zeros  # the shift right
        for layer in self.layers:
            h = layer.horizontal(h, j)
        features = self.v[:, j] + h
        for module in self.prior.head:
            features = product(features, *_matrix(module)) if isinstance(module, nn.Conv2d) else module(features)
        return features

    def _vertical_stack(self, indices: Tensor, i: int) -> Tensor:
        """What the vertical stack says of row i (B, W, C)."""
        width = indices.shape[2]
        if i > 0:
            v = self.prior.embedding(indices[:, i - 1])  # the shift down
        else:
            v = self.zeros[:, None].expand(-1, width, -1)
        for layer in self.layers:
            v = layer.vertical(v)
        return v


class _LayerState:
    """One layer, and what it keeps of the row above and of the position to the left."""

    def __init__(self, layer: GatedLayer, labels: Tensor, width: int) -> None:
        self.layer = layer
        self.v_label, self.h_label = layer.label(labels).chunk(2, dim=1)
        self.v_weight = rearrange(layer.vertical.weight, "o c rows columns -> o (rows columns c)")
        self.h_weight = rearrange(layer.horizontal.weight, "o c 1 columns -> o (columns c)").contiguous()
        channels = layer.vertical_out.in_channels
        self.row_above = layer.vertical.weight.new_zeros(len(labels), width + 2, channels)

    def vertical(self, v: Tensor) -> Tensor:
        """Row i of the vertical stack, (B, W, C) to (B, W, C)."""
        layer, width = self.layer, v.shape[1]
        row = F.pad(v, (0, 0, 1, 1))
        windows = torch.cat([r[:, k : k + width] for r in (self.row_above, row) for k in range(3)], dim=2)
        self.row_above = row
        features = product(windows, self.v_weight, layer.vertical.bias)
        linked = product(features, *_matrix(layer.vertical_to_horizontal))
        # Position first, so that a position's share of it lies together; all that is known before h is added here.
        known = self.h_label + layer.horizontal.bias
        self.towards_h = rearrange(linked + known[:, None], "b w c -> w b c").contiguous()
        self.left = v.new_zeros(len(v), v.shape[2])
        return v + product(gate(features + self.v_label[:, None], dim=2), *_matrix(layer.vertical_out))

    def horizontal(self, h: Tensor, j: int) -> Tensor:
        """Column j of the horizontal stack in that row, (B, C) to (B, C)."""
        pair = torch.cat([self.left, h], dim=1)
        self.left = h
        features = self.towards_h[j] + product(pair, self.h_weight)
        return h + product(gate(features), *_matrix(self.layer.horizontal_out))


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, by oneDNN where that is faster: MKL, torch's way to a product, is half as fast on AMD's AVX-512."""
    there = torch.backends.mkldnn.is_available() and x.device.type == "cpu" and x.dtype == torch.float32
    if there and x.numel() * len(weight) >= FEWEST_PRODUCTS:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _matrix(convolution: nn.Conv2d) -> tuple[Tensor, Tensor | None]:
    """Weight (out, in) and bias of a 1x1 convolution."""
    return convolution.weight[:, :, 0, 0], convolution.bias
