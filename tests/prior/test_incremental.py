"""The logits position by position, held against whole passes, and what is drawn from them against a plain sampler."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from prior import kernels
from prior.incremental import IncrementalLogits
from prior.maps import draw_maps
from prior.model import GatedPixelCNN
from prior.sampling import LogitsAt, sample_codes
from tests.helpers import make_prior, random_maps


def make_sharp_prior(map_shape: tuple[int, int], dtype: torch.dtype = torch.float64) -> GatedPixelCNN:
    """A network whose softmaxes are far from even and whose codes are all in use, with dropout that must not be seen.

    In float64 the rounding of two ways to compute the logits is too small to change a draw.
    """
    network = make_prior(map_shape, num_codes=5, dropout=0.5)
    with torch.no_grad():
        logits = network(random_maps(200, network), torch.arange(200) % 11)
        head = network.head[-1]
        head.bias.sub_(logits.mean(dim=(0, 2, 3)))
        for parameter in (head.weight, head.bias):
            parameter.mul_(1.5 / logits.std(dim=0).mean())
    return network.to(dtype)


@pytest.mark.parametrize("onednn", [False, True])  # for every product of float32
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("map_shape", [(7, 7), (4, 6), (6, 3), (1, 7), (7, 1), (1, 1)])
@torch.no_grad()
def test_the_logits_are_those_of_a_whole_pass_and_two_asked_in_turn_keep_apart(
    map_shape: tuple[int, int], dtype: torch.dtype, tolerance: float, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "processor_has", lambda *_: onednn)
    monkeypatch.setattr(kernels, "ONEDNN_FROM", 0)
    network, labels = make_sharp_prior(map_shape, dtype), torch.arange(11)
    both = random_maps(22, network).split(11)
    two = [(maps, network(maps, labels), IncrementalLogits(network, labels)) for maps in both]
    for i, j in np.ndindex(network.map_shape):
        for maps, whole, logits_at in two:
            so_far = torch.full_like(maps, -1)  # to embed one of these is an IndexError
            so_far[:, :i], so_far[:, i, :j] = maps[:, :i], maps[:, i, :j]
            assert torch.allclose(logits_at(so_far, i, j), whole[:, :, i, j], rtol=0, atol=tolerance), (i, j)
    assert two[0][1].std(dim=1).mean() > 0.5  # logits that are far apart


KNOWN = torch.randint(-3, 5, (10, 4, 6), generator=torch.Generator().manual_seed(4)).clamp(min=-1)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"labels": torch.arange(10)},
    {"labels": torch.arange(10), "guidance": 0.5},
    {"temperature": 0.5, "known_codes": KNOWN},
    {"labels": torch.arange(10), "guidance": 2.0, "temperature": 1.5, "top_k": 4, "top_p": 0.9, "known_codes": KNOWN},
]


def draw_plainly(network: GatedPixelCNN, seed: int, **options: Any) -> Tensor:
    """`draw_maps` of ten maps by whole passes."""
    uniforms = torch.rand(10, *network.map_shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    labels = options.pop("labels", torch.full((10,), network.no_label)).to(network.device)

    def logits_for(labels: Tensor) -> LogitsAt:
        return lambda indices, i, j: network(indices, labels)[:, :, i, j]

    with torch.inference_mode():
        return sample_codes(logits_for, uniforms, labels, no_label=network.no_label, **options)


@pytest.mark.parametrize("batch_size", [1, 4, 100])  # each batch starts afresh
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
def test_the_codes_drawn_are_those_of_the_plain_sampler(options: dict[str, Any], batch_size: int) -> None:
    network, whole_passes = make_sharp_prior((4, 6)), []
    network.register_forward_hook(lambda *_: whole_passes.append(1))
    drawn = draw_maps(network, 10, torch.Generator().manual_seed(6), batch_size=batch_size, **options)
    assert whole_passes == []
    assert len(drawn.unique()) == 5
    assert torch.equal(drawn, draw_plainly(network, 6, **options))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
def test_on_cuda_the_codes_drawn_are_those_of_the_plain_sampler(options: dict[str, Any]) -> None:
    network = make_sharp_prior((4, 6))
    expected = draw_plainly(network, 6, **options)
    network.cuda()
    assert torch.equal(draw_maps(network, 10, torch.Generator().manual_seed(6), **options), expected)
    assert torch.equal(draw_plainly(network, 6, **options), expected)
