"""The prior's fast parts, each held against the plain form that its docstring names."""

import itertools
import math

import pytest
import torch

from prior import kernels
from prior.kernels import ONEDNN_FROM, AddedProduct, dropout, gate


def test_the_gate_is_tanh_of_the_first_half_times_sigmoid_of_the_second() -> None:
    values = torch.linspace(-20, 20, 1001)
    features = torch.stack([values, values.flip(0) / 3])[None, :, None]  # (1, 2, 1, 1001)
    f, g = features.double().chunk(2, dim=1)
    assert gate(features).shape == (1, 1, 1, 1001)
    torch.testing.assert_close(gate(features).double(), f.tanh() * g.sigmoid(), rtol=0, atol=3e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.3, 0.6])
def test_dropout_zeroes_its_share_everywhere_alike_and_keeps_the_mean(dtype: torch.dtype, p: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(30, 7, 40, 50, dtype=dtype, requires_grad=True)
    out = dropout(x, p)
    assert out.dtype == dtype
    assert out.unique().tolist() == pytest.approx([0, 1 / (1 - p)], rel=4e-3)
    zeros = (out == 0).double()
    for dim in range(4):  # of every sample, channel, row and column alike
        shares = zeros.transpose(0, dim).flatten(1).mean(1)
        assert (shares - p).abs().max() < 5 * (p * (1 - p) * len(shares) / x.numel()) ** 0.5
    for dim in range(4):  # neighbours are dropped independently
        both = (zeros * zeros.roll(1, dim)).mean().item()
        assert both == pytest.approx(p**2, abs=5 * p / x.numel() ** 0.5)
    out.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, out)


@pytest.mark.parametrize("avx512", [False, True])
@pytest.mark.parametrize("num", [1, ONEDNN_FROM // (8 * 24) - 1, ONEDNN_FROM // (8 * 24) + 1])
@torch.no_grad()
def test_an_added_product_is_the_same_by_any_library(num: int, avx512: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "processor_has", lambda *_: avx512)  # oneDNN computes the same on any processor
    if avx512 and num * 8 * 24 > ONEDNN_FROM:
        monkeypatch.delattr(torch, "addmm")
    torch.manual_seed(0)
    x, weight, y, bias = torch.randn(num, 8), torch.randn(24, 8), torch.randn(num, 24), torch.randn(24)
    product, expected = AddedProduct(weight), x.double() @ weight.T.double()
    torch.testing.assert_close(product(x, bias).double(), expected + bias, rtol=0, atol=1e-5)
    kept, out = y.clone(), torch.empty(num, 24)
    torch.testing.assert_close(product(x, y).double(), expected + kept, rtol=0, atol=1e-5)
    assert product(x, y, out=out) is out
    torch.testing.assert_close(out.double(), expected + kept, rtol=0, atol=1e-5)
    assert torch.equal(y, kept)
    product(x, y, out=y)
    torch.testing.assert_close(y.double(), expected + kept, rtol=0, atol=1e-5)


def test_onednn_is_used_for_large_products_of_float32_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    for avx512, built, dtype in itertools.product((True, False), (True, False), (torch.float32, torch.float64)):
        monkeypatch.setattr(kernels, "processor_has", lambda name, avx512=avx512: avx512 and name == "avx512_f")
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda built=built: built)
        fewest = ONEDNN_FROM / 25 if avx512 and built and dtype == torch.float32 else math.inf
        assert AddedProduct(torch.ones(25, 8, dtype=dtype)).fewest_inputs == fewest
