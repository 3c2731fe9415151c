"""The prior's logits position by position, each position's work done once (arXiv:1704.06001).

What a position needs of the earlier ones is kept: the vertical stack runs once a row, for the whole row, as soon as the
row above is complete; the horizontal stack and the head run once a position. What comes out must equal what
`GatedLayer` in `prior/model.py` makes.

With few maps it is the calls that take time, not the arithmetic. So a layer makes four for a position; what they read
and write are views made beforehand, and each writes to where the next one reads. A gate is one sigmoid: features are
`scaled` here, those that tanh takes times -2 (in their weights, and exact), since tanh(f) = 1 - 2 sigmoid(-2 f).
"""

from itertools import pairwise
from typing import NamedTuple, cast

import torch
from torch import Tensor

from prior.model import GatedLayer, GatedPixelCNN, WindowProduct
from vqvae.common.engine import processor_has

FEWEST_OPERATIONS = 1_000_000  # multiplications of a product from which a call of oneDNN pays


class IncrementalLogits:
    """Logits (B, K) at (i, j) of maps that are being drawn, to be asked for in raster order, each position once.

    Args:
        prior: in eval mode; made and called without gradients.
        labels: (B,) int64, digits or NO_LABEL.
    """

    def __init__(self, prior: GatedPixelCNN, labels: Tensor) -> None:
        self.embedding = prior.embedding
        num, columns, width = len(labels), prior.map_shape[1], prior.config.width
        zeros = prior.embedding.weight.new_zeros
        # One more than there are layers: the head reads as a layer does.
        inputs = [
            _Inputs(zeros(2, columns + 2, num, width), zeros(num, columns + 1, width))
            for _ in range(len(prior.layers) + 1)
        ]
        self.first, self.last = inputs[0], inputs[-1]
        shared = _Shared(
            scale=torch.cat([zeros(width).fill_(-2), zeros(width).fill_(1)]),
            windows=zeros(columns, num, 6 * width),
            v_gate=_Gate(zeros(columns * num, 2 * width), zeros(columns * num, width + 1).fill_(1)),
            h_gated=zeros(num, width + 1).fill_(1),
        )
        self.layers = [
            _Layer(cast(GatedLayer, layer), labels, own, following, shared)
            for layer, (own, following) in zip(prior.layers, pairwise(inputs), strict=True)
        ]
        products = [module for module in prior.head if isinstance(module, WindowProduct)]
        self.head = [(Product(module.matrix), _bias(module)) for module in products]

    def __call__(self, indices: Tensor, i: int, j: int) -> Tensor:
        """Logits (B, K) given the codes before (i, j) in indices (B, H, W); the others are not looked at."""
        if j == 0:
            if i > 0:
                self.first.v[i % 2].copy_(self.embedding(indices[:, i - 1].T))  # the shift down
            for layer in self.layers:
                layer.vertical(i)
        else:
            self.first.h[j].copy_(self.embedding(indices[:, i, j - 1]))  # the shift right
        for layer in self.layers:
            layer.horizontal(j)
        features = self.last.v[i % 2][j] + self.last.h[j]
        for product, bias in self.head:
            features = product(features.relu_(), plus=bias)
        return features


class _Inputs:
    """What a layer reads, as views of two tensors, zero where nothing has been written.

    Args:
        v: (2, W + 2, B, C), the vertical stack's even and odd rows, a zero to either side.
        h: (B, W + 1, C), the horizontal stack's row so far, a zero to its left.
    """

    def __init__(self, v: Tensor, h: Tensor) -> None:
        columns = h.shape[1] - 1
        even, odd = v
        self.v = (even[1:-1], odd[1:-1])  # (W, B, C), so that what belongs to a position lies together
        self.windows = [  # for either kind of row six (W, B, C): above and here, each left, middle and right
            [row[k : k + columns] for row in rows for k in range(3)] for rows in ((odd, even), (even, odd))
        ]
        self.h = h[:, 1:].unbind(dim=1)  # (B, C) of each position
        self.pairs = [h[:, j : j + 2].flatten(1) for j in range(columns)]  # (B, 2C), its left neighbour's before it


class _Gate:
    """The gate of scaled features, with the memory it works in.

    Args:
        features: (N, 2C), to be written before each call, which overwrites them.
        out: (N, C + 1); the last column is 1 and stays so, for the bias of the product that follows.
    """

    def __init__(self, features: Tensor, out: Tensor) -> None:
        self.features, self.out = features, out
        self.f, self.g = features.chunk(2, dim=1)
        self.gated = out[:, :-1]

    def __call__(self) -> Tensor:
        self.features.sigmoid_()
        torch.addcmul(self.g, self.f, self.g, value=-2, out=self.gated)
        return self.out


class _Shared(NamedTuple):
    """What the layers share: how features are scaled, and memory that they work in, one after the other."""

    scale: Tensor  # (2C,)
    windows: Tensor  # (W, B, 6C)
    v_gate: _Gate  # of a row
    h_gated: Tensor  # (B, C + 1), what comes of a position's features


class _Layer:
    """One layer, reading what is its own and writing what the following one reads."""

    def __init__(self, layer: GatedLayer, labels: Tensor, own: _Inputs, following: _Inputs, shared: _Shared) -> None:
        self.own, self.following, self.shared = own, following, shared
        scale = shared.scale
        across = layer.vertical_to_horizontal
        self.v_product = Product(scale[:, None] * layer.vertical.matrix)
        self.v_to_h = Product(scale[:, None] * across.matrix / scale)
        self.h_product = Product(scale[:, None] * layer.horizontal.matrix)
        self.v_out, self.h_out = (
            Product(torch.cat([out.matrix, _bias(out)[:, None]], dim=1))
            for out in (layer.vertical_out, layer.horizontal_out)
        )
        # What of the features is known beforehand, (B, 2C). v_to_h, which is not to see v's label, takes it off again.
        v_label, h_label = (layer.label(labels) * scale.repeat(2)).chunk(2, dim=1)
        self.v_known = v_label + scale * _bias(layer.vertical)
        self.h_known = h_label - v_label @ self.v_to_h.weight.T + scale * (_bias(across) + _bias(layer.horizontal))
        self.towards_h = torch.empty_like(shared.v_gate.features)
        self.h_gates = [_Gate(features, shared.h_gated) for features in self.towards_h.split(len(labels))]

    def vertical(self, i: int) -> None:
        """Row i of the vertical stack, and its part of the horizontal one's features."""
        row, gate = i % 2, self.shared.v_gate
        windows = torch.cat(self.own.windows[row], dim=2, out=self.shared.windows)
        for features, known in ((gate.features, self.v_known), (self.towards_h, self.h_known)):
            features.view(len(windows), *known.shape).copy_(known)
        self.v_product(windows.flatten(0, 1), plus=gate.features, out=gate.features)
        self.v_to_h(gate.features, plus=self.towards_h, out=self.towards_h)
        self.v_out(gate(), plus=self.own.v[row].flatten(0, 1), out=self.following.v[row].flatten(0, 1))

    def horizontal(self, j: int) -> None:
        """Column j of the horizontal stack in that row."""
        gate = self.h_gates[j]
        self.h_product(self.own.pairs[j], plus=gate.features, out=gate.features)
        self.h_out(gate(), plus=self.own.h[j], out=self.following.h[j])


class Product:
    """x (N, in) to x W^T (N, out) plus something, without gradients.

    Where there is AVX-512, large ones of float32 go to oneDNN: MKL, torch's own way, is half as fast on AMD's.

    Args:
        weight: W (out, in).
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.contiguous()
        self.transposed = self.weight.T
        can_have_it = weight.device.type == "cpu" and weight.dtype == torch.float32
        by_onednn = can_have_it and torch.backends.mkldnn.is_available() and processor_has("avx512_f")
        self.fewest_inputs = FEWEST_OPERATIONS / len(weight) if by_onednn else float("inf")

    def __call__(self, x: Tensor, plus: Tensor, out: Tensor | None = None) -> Tensor:
        """x W^T + plus (N, out) or (out,), in `out` where there is one, which `plus` may be too."""
        if x.numel() < self.fewest_inputs:
            return torch.addmm(plus, x, self.transposed, out=out)
        if plus.ndim == 1:
            product = torch.ops.mkldnn._linear_pointwise.default(x, self.weight, plus, "none", [], "")
        else:
            product = torch.ops.mkldnn._linear_pointwise.binary(x, plus, self.weight, None, "add")
        return product if out is None else out.copy_(product)


def _bias(convolution: WindowProduct) -> Tensor:
    return cast(Tensor, convolution.bias)
