"""Parts of the prior that are written for speed on a CPU. Each docstring names the plain form that it equals."""

import torch
from torch import Tensor

from vqvae.compute import processor_has

ONEDNN_FROM = 1_000_000  # multiplications from which a call of oneDNN pays


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
