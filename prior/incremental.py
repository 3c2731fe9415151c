"""The prior's logits position by position, with each position's work done once (arXiv:1704.06001).

What a position needs of earlier ones is kept. The vertical stack runs once for each row, as soon as the row above is
complete. The horizontal stack and the head run once for each position. The results equal those of `GatedLayer` in
prior/model.py.

With few maps the time is spent on the overhead of calls, not on arithmetic. So a layer makes four calls for a position.
They work on views that are made beforehand, and each writes to where the next one reads:

    own.pairs[j] --h_product--> h_features of j --gate--> h_gated --h_out, + own.h[j]--> following.h[j]

A gate is one sigmoid over all of its features: those that go through tanh are multiplied by -2 in the weights (`scale`,
which is exact), because tanh(f) = 1 - 2 sigmoid(-2 f).
"""

from itertools import pairwise
from typing import NamedTuple, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from prior.kernels import AddedProduct
from prior.model import GatedLayer, GatedPixelCNN


class IncrementalLogits:
    """Logits (B, K) at (i, j) of maps that are being drawn. Ask for the positions in raster order, each once.

    Args:
        prior: in eval mode; it is used without gradients.
        labels: (B,) int64, classes or `no_label`.
    """

    def __init__(self, prior: GatedPixelCNN, labels: Tensor) -> None:
        self.embedding = prior.embedding
        num, columns, width = len(labels), prior.map_shape[1], prior.config.width
        zeros = prior.embedding.weight.new_zeros
        inputs = [  # of every layer, and of the head, which reads as a layer does
            _Inputs(zeros(2, columns + 2, num, width), zeros(num, columns + 1, width))
            for _ in range(len(prior.layers) + 1)
        ]
        self.first, self.last = inputs[0], inputs[-1]
        workspace = _Workspace(
            scale=torch.cat([zeros(width).fill_(-2), zeros(width).fill_(1)]),
            windows=zeros(columns, num, 6 * width),
            v_gate=_Gate(zeros(columns * num, 2 * width), zeros(columns * num, width + 1).fill_(1)),
            h_gated=zeros(num, width + 1).fill_(1),
        )
        self.layers = [
            _Layer(cast(GatedLayer, layer), labels, own, following, workspace)
            for layer, (own, following) in zip(prior.layers, pairwise(inputs), strict=True)
        ]
        convolutions = [module for module in prior.head if isinstance(module, nn.Conv2d)]
        self.head = [(AddedProduct(_matrix(module)), _bias(module)) for module in convolutions]

    def __call__(self, indices: Tensor, i: int, j: int) -> Tensor:
        """Logits (B, K) at (i, j), given the codes before it in indices (B, H, W). Later codes are not read."""
        if j == 0:
            if i > 0:
                self.first.v[i % 2].copy_(self.embedding(indices[:, i - 1].T))  # the shift down
            for layer in self.layers:
                layer.run_vertical(i)
        else:
            self.first.h[j].copy_(self.embedding(indices[:, i, j - 1]))  # the shift right
        for layer in self.layers:
            layer.run_horizontal(j)
        features = self.last.v[i % 2][j] + self.last.h[j]
        for product, bias in self.head:
            features = product(features.relu_(), bias)
        return features


class _Inputs:
    """What a layer reads: views of two tensors that are zero where nothing has been written.

    Args:
        v: (2, W + 2, B, C), the vertical stack's even and odd rows, with a zero column on either side.
        h: (B, W + 1, C), the horizontal stack's row so far, with a zero column on the left.
    """

    def __init__(self, v: Tensor, h: Tensor) -> None:
        columns = h.shape[1] - 1
        even, odd = v
        self.v = (even[1:-1], odd[1:-1])  # (W, B, C) each; the maps of one position lie side by side
        self.windows = [  # for an even and for an odd row, six (W, B, C): above and own row, left, middle and right
            [row[k : k + columns] for row in rows for k in range(3)] for rows in ((odd, even), (even, odd))
        ]
        self.h = h[:, 1:].unbind(dim=1)  # (B, C) for each column
        self.pairs = [h[:, j : j + 2].flatten(1) for j in range(columns)]  # (B, 2C): left neighbour, then itself


class _Gate:
    """The gate (eq. 2) of scaled features, with the memory that it works in.

    Args:
        features: (N, 2C), written before each call, which overwrites them.
        out: (N, C + 1). The last column is always 1; the product that follows takes its bias from there.
    """

    def __init__(self, features: Tensor, out: Tensor) -> None:
        self.features, self.out = features, out
        self.f, self.g = features.chunk(2, dim=1)
        self.gated = out[:, :-1]

    def __call__(self) -> Tensor:
        self.features.sigmoid_()
        torch.addcmul(self.g, self.f, self.g, value=-2, out=self.gated)  # (1 - 2 sigmoid(-2 f)) sigmoid(g)
        return self.out


class _Workspace(NamedTuple):
    """The scale of the features, and memory that the layers use one after the other."""

    scale: Tensor  # (2C,), -2 for tanh's half and 1 for the sigmoid's
    windows: Tensor  # (W, B, 6C)
    v_gate: _Gate  # of a row
    h_gated: Tensor  # (B, C + 1), the output of a position's gate


class _Layer:
    """A layer that reads its own inputs and writes those of the following layer."""

    def __init__(
        self, layer: GatedLayer, labels: Tensor, own: _Inputs, following: _Inputs, workspace: _Workspace
    ) -> None:
        self.own, self.following, self.workspace = own, following, workspace
        scale = workspace.scale
        link = layer.vertical_to_horizontal
        self.v_product = AddedProduct(scale[:, None] * _matrix(layer.vertical))
        self.v_to_h = AddedProduct(scale[:, None] * _matrix(link) / scale)
        self.h_product = AddedProduct(scale[:, None] * _matrix(layer.horizontal))
        self.v_out, self.h_out = (
            AddedProduct(torch.cat([_matrix(out), _bias(out)[:, None]], dim=1))
            for out in (layer.vertical_out, layer.horizontal_out)
        )
        # The constant part of the features, (B, 2C). The horizontal one takes v's label off again, because the link
        # carries the vertical features without their label.
        v_label, h_label = (layer.label(labels) * scale.repeat(2)).chunk(2, dim=1)
        self.v_constant = v_label + scale * _bias(layer.vertical)
        self.h_constant = h_label - v_label @ self.v_to_h.weight.T + scale * (_bias(link) + _bias(layer.horizontal))
        self.h_features = torch.empty_like(workspace.v_gate.features)  # of a whole row, (W B, 2C)
        self.h_gates = [_Gate(features, workspace.h_gated) for features in self.h_features.split(len(labels))]

    def run_vertical(self, i: int) -> None:
        """Row i of the vertical stack, and its part of the horizontal stack's features."""
        row, gate = i % 2, self.workspace.v_gate
        windows = torch.cat(self.own.windows[row], dim=2, out=self.workspace.windows)
        for features, constant in ((gate.features, self.v_constant), (self.h_features, self.h_constant)):
            features.view(len(windows), *constant.shape).copy_(constant)
        self.v_product(windows.flatten(0, 1), gate.features, out=gate.features)
        self.v_to_h(gate.features, self.h_features, out=self.h_features)
        self.v_out(gate(), self.own.v[row].flatten(0, 1), out=self.following.v[row].flatten(0, 1))

    def run_horizontal(self, j: int) -> None:
        """Column j of the horizontal stack, in the row that `run_vertical` was called for last."""
        gate = self.h_gates[j]
        self.h_product(self.own.pairs[j], gate.features, out=gate.features)
        self.h_out(gate(), self.own.h[j], out=self.following.h[j])


def _matrix(convolution: nn.Conv2d) -> Tensor:
    """The weights as a matrix (D, R S C) for windows whose channels run fastest."""
    return rearrange(convolution.weight, "d c rows columns -> d (rows columns c)")


def _bias(convolution: nn.Conv2d) -> Tensor:
    return cast(Tensor, convolution.bias)
