"""The prior's logits position by position, each position's work done once (arXiv:1704.06001).

What a position needs of the earlier ones is kept: the vertical stack runs once a row, for the whole row, as soon as the
row above is complete; the horizontal stack and the head run once a position. All convolutions are matrix products here:
`GatedLayer` in `prior/model.py` is what these must equal. Rows are (W, B, C), so that a position's share lies together.
"""

from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from prior.model import GatedLayer, GatedPixelCNN, gate

FEWEST_OPERATIONS = 1_000_000  # multiplications of a product from which a call of oneDNN pays


class IncrementalLogits:
    """Logits (B, K) at (i, j) of maps that are being drawn, to be asked for in raster order, each position once.

    Args:
        prior: in eval mode.
        labels: (B,) int64, digits or NO_LABEL.
    """

    def __init__(self, prior: GatedPixelCNN, labels: Tensor) -> None:
        self.embedding = prior.embedding
        self.layers = [_LayerState(cast(GatedLayer, layer), labels, prior.map_shape[1]) for layer in prior.layers]
        self.head = [product_of(module) if isinstance(module, nn.Conv2d) else module for module in prior.head]
        self.zeros = prior.embedding.weight.new_zeros(len(labels), prior.config.width)

    def __call__(self, indices: Tensor, i: int, j: int) -> Tensor:
        """Logits (B, K) given the codes before (i, j) in indices (B, H, W); the others are not looked at."""
        if j == 0:
            self.v = self._vertical_stack(indices, i)
        h = self.embedding(indices[:, i, j - 1]) if j > 0 else self.zeros  # the shift right
        for layer in self.layers:
            h = layer.horizontal(h, j)
        features = self.v[j] + h
        for module in self.head:
            features = module(features)
        return features

    def _vertical_stack(self, indices: Tensor, i: int) -> Tensor:
        """What the vertical stack says of row i (W, B, C)."""
        if i > 0:
            v = self.embedding(indices[:, i - 1].T)  # the shift down
        else:
            v = self.zeros.expand(indices.shape[2], -1, -1)
        for layer in self.layers:
            v = layer.vertical(v)
        return v


class _LayerState:
    """One layer, and what it keeps of the row above and of the position to the left."""

    def __init__(self, layer: GatedLayer, labels: Tensor, width: int) -> None:
        self.v_label, h_label = layer.label(labels).chunk(2, dim=1)
        self.h_known = h_label + layer.horizontal.bias  # of h's features, before h is
        self.v_product = Product(
            rearrange(layer.vertical.weight, "o c rows columns -> o (rows columns c)"), layer.vertical.bias
        )
        self.h_product = Product(rearrange(layer.horizontal.weight, "o c 1 columns -> o (columns c)"))
        self.v_to_h = product_of(layer.vertical_to_horizontal)
        self.v_out, self.h_out = product_of(layer.vertical_out), product_of(layer.horizontal_out)
        self.row_above = layer.vertical.weight.new_zeros(width + 2, len(labels), layer.vertical_out.in_channels)

    def vertical(self, v: Tensor) -> Tensor:
        """Row i of the vertical stack, (W, B, C) to (W, B, C)."""
        row = F.pad(v, (0, 0, 0, 0, 1, 1))
        windows = torch.cat([r[k : k + len(v)] for r in (self.row_above, row) for k in range(3)], dim=2)
        self.row_above = row
        features = self.v_product(windows)
        self.towards_h = self.v_to_h(features) + self.h_known
        self.left = torch.zeros_like(v[0])
        return self.v_out(gate(features + self.v_label, dim=2), plus=v)

    def horizontal(self, h: Tensor, j: int) -> Tensor:
        """Column j of the horizontal stack in that row, (B, C) to (B, C)."""
        pair = torch.cat([self.left, h], dim=1)
        self.left = h
        return self.h_out(gate(self.h_product(pair, plus=self.towards_h[j])), plus=h)


class Product:
    """x (..., in) to x W^T + b (..., out), without gradients.

    Large ones of float32 go to oneDNN: MKL, torch's own way, is half as fast on AMD's AVX-512.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight.contiguous(), bias
        there = torch.backends.mkldnn.is_available() and weight.device.type == "cpu" and weight.dtype == torch.float32
        self.fewest_inputs = FEWEST_OPERATIONS / len(weight) if there else float("inf")

    def __call__(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        """The product; `plus` (..., out) is added."""
        if x.numel() < self.fewest_inputs:
            out = F.linear(x, self.weight, self.bias)
            return out if plus is None else out.add_(plus)
        if plus is None:
            return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, plus, self.weight, self.bias, "add")


def product_of(convolution: nn.Conv2d) -> Product:
    """What a 1x1 convolution does at each position."""
    return Product(convolution.weight[:, :, 0, 0], convolution.bias)
