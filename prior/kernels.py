"""The prior's layers and products, written for speed on a CPU. Each docstring names the plain form that it equals.

Tensors are (B, C, H, W), as everywhere. In memory the channels come last, so that a convolution is one matrix product
over windows and the windows need no transposition.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vqvae.compute import processor_has

ONEDNN_FROM = 1_000_000  # multiplications from which a call of oneDNN pays


class ConvAsLinear(nn.Conv2d):
    """A convolution as a matrix product: `nn.Conv2d` over a padded input, of the same size out as in.

    On a CPU this trains faster than a convolution, whose weights have a slow gradient. The weights keep a convolution's
    shape, so initialisation, weight decay and checkpoints treat them as such.

    Args:
        kernel: (R, S), one of (2, 3), (1, 2) and (1, 1). Its bottom row, and its middle or last column, is the
            position itself, so the padding is R - 1 rows above, and S // 2 columns to the left.
    """

    def __init__(self, channels_in: int, channels_out: int, kernel: tuple[int, int] = (1, 1)) -> None:
        assert kernel in ((2, 3), (1, 2), (1, 1))
        super().__init__(channels_in, channels_out, kernel)

    @property
    def matrix(self) -> Tensor:
        """The weights as a matrix (D, R S C) for windows whose channels run fastest."""
        return rearrange(self.weight, "d c rows columns -> d (rows columns c)")

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, D, H, W)."""
        x = x.permute(0, 2, 3, 1)  # (B, H, W, C), contiguous where channels come last in memory
        if self.kernel_size == (2, 3):
            x = VerticalWindows.apply(x)
        elif self.kernel_size == (1, 2):
            x = torch.cat([F.pad(x, (0, 0, 1, 0))[:, :, :-1], x], dim=3)  # left neighbour, then the position itself
        return F.linear(x, self.matrix, self.bias).permute(0, 3, 1, 2)


class VerticalWindows(torch.autograd.Function):
    """The 2x3 windows of x (B, H, W, C), as (B, H, W, 6C): the row above and the position's own row, left, middle and
    right of each, with zeros outside the map. The gradient is summed in place; autograd would make six tensors."""

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
    """Views (B, H, W, C) of a padded map (B, H + 1, W + 2, C), one for each position of the window."""
    height, width = padded.shape[1] - 1, padded.shape[2] - 2
    return [padded[:, i : i + height, j : j + width] for i in range(2) for j in range(3)]


def gate(features: Tensor) -> Tensor:
    """tanh(f) sigmoid(g), (B, 2C, H, W) to (B, C, H, W), where f and g are the halves of the channels (eq. 2).

    tanh is written by a sigmoid: torch's tanh takes seven times as long on a CPU.
    """
    f, g = features.chunk(2, dim=1)
    return (2 * torch.sigmoid(2 * f) - 1) * torch.sigmoid(g)


def dropout(x: Tensor, p: float) -> Tensor:
    """`F.dropout(x, p)` of (B, C, H, W), from 16 random bits for each element.

    F.dropout draws a float64 for each element on a CPU, which is several times slower. Drawing 16 bits rounds p to a
    multiple of 2^-16.
    """
    batch, channels, height, width = x.shape
    words = torch.empty(batch, height, width, -(-channels // 4), dtype=torch.int64, device=x.device)
    bits = words.random_(-(2**63), None).view(torch.int16)[..., :channels].permute(0, 3, 1, 2)
    kept = bits >= round((p - 0.5) * 2**16)  # the bits are signed, so a share of 1 - p of them is kept
    return x * (kept / (1 - p)).to(x.dtype)


class AddedProduct:
    """y + x W^T, without gradients: `torch.addmm` for a weight W (out, in) that is used many times.

    With AVX-512, large products of float32 are computed by oneDNN. MKL, which torch uses, takes twice as long there on
    AMD's processors.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.contiguous()
        self.transposed = self.weight.T
        in_float32_on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
        by_onednn = in_float32_on_cpu and torch.backends.mkldnn.is_available() and processor_has("avx512_f")
        self.fewest_inputs = ONEDNN_FROM / len(weight) if by_onednn else float("inf")

    def __call__(self, x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
        """y + x W^T (N, out), for x (N, in) and y (N, out) or (out,). `out`, if given, is written to and may be y."""
        if x.numel() < self.fewest_inputs:
            return torch.addmm(y, x, self.transposed, out=out)
        if y.ndim == 1:
            product = torch.ops.mkldnn._linear_pointwise.default(x, self.weight, y, "none", [], "")
        else:
            product = torch.ops.mkldnn._linear_pointwise.binary(x, y, self.weight, None, "add")
        return product if out is None else out.copy_(product)
