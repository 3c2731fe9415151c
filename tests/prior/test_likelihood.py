"""Likelihoods held against sums by hand: over positions, over labels, and over all maps that there are."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from prior import likelihood
from prior.likelihood import label_log_joint, mixture_nats_per_map, nats_of_codes, nats_per_code, nats_per_map
from prior.model import GatedPixelCNN, PriorConfig
from tests.helpers import make_codes, make_prior, random_maps

FREQUENCIES = torch.tensor([0.5, 0.2, 0.3])


def make_sharp_prior(num_classes: int = 3) -> GatedPixelCNN:
    network = make_prior((2, 3), num_codes=5, num_classes=num_classes, dropout=0.5)
    with torch.no_grad():
        network.head[-1].weight.mul_(5)
    return network


@torch.no_grad()
def nats_by_hand(network: GatedPixelCNN, maps: Tensor, labels: Sequence[int] | Tensor) -> np.ndarray:
    """Of every code (N, H, W)."""
    logits = network.double()(maps, torch.as_tensor(labels)).numpy()
    network.float()
    nats = np.empty(maps.shape)
    for n, i, j in np.ndindex(*maps.shape):
        column = logits[n, :, i, j]
        nats[n, i, j] = np.log(np.exp(column).sum()) - column[maps[n, i, j]]
    return nats


@pytest.mark.parametrize(("num_codes", "at_once"), [(5, 250), (512, 250), (32767, 10), (10**7, 1)])
def test_fewer_maps_are_scored_at_once_where_there_are_many_codes(num_codes: int, at_once: int) -> None:
    with torch.device("meta"):
        network = make_prior((7, 7), num_codes)
    assert likelihood.maps_at_once(network) == at_once


def test_under_autocast_the_logits_are_rounded_to_bfloat16_and_the_loss_is_float32() -> None:
    network = make_prior((7, 7), num_codes=32)
    maps, labels = random_maps(10, network), torch.arange(10)
    exact = network(maps, labels)
    with torch.autocast("cpu", torch.bfloat16):
        loss, logits = nats_per_code(network, maps, labels), network(maps, labels)
    assert (logits.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    assert 0 < (logits - exact).abs().max() < 0.1 * exact.std()
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits.float(), maps))


def test_a_fresh_network_is_near_log_k() -> None:
    torch.manual_seed(0)
    network = GatedPixelCNN(PriorConfig(), 512, (7, 7), 10)
    with torch.no_grad():
        nats = nats_per_code(network, random_maps(8, network), torch.arange(8)).item()
    assert nats == pytest.approx(math.log(512), rel=0.02)


@pytest.mark.parametrize("batch", [1, 4, 1000])
def test_codes_maps_their_parts_and_positions_have_their_likelihood(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(likelihood, "BATCH", batch)
    network = make_sharp_prior()
    codes = make_codes(11, network)
    nats, nats_unlabelled = (nats_by_hand(network, codes.indices, labels) for labels in (codes.labels, [3] * 11))
    assert nats_per_code(network, *codes).item() == pytest.approx(nats.mean(), abs=1e-5)
    assert nats_per_code(network, codes.indices, None).item() == pytest.approx(nats_unlabelled.mean(), abs=1e-5)
    network.train()
    some = torch.rand(codes.indices.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    for counted in (None, some, torch.zeros_like(some)):
        of_all = np.ones(some.shape) if counted is None else counted.numpy()
        found = nats_per_map(network, *codes, counted)
        assert found.dtype == torch.float64
        np.testing.assert_allclose(found, (nats * of_all).sum(axis=(1, 2)), atol=2e-5)
        found = nats_per_map(network, codes.indices, None, counted)
        np.testing.assert_allclose(found, (nats_unlabelled * of_all).sum(axis=(1, 2)), atol=2e-5)
    done: list[int] = []
    np.testing.assert_allclose(nats_of_codes(network, *codes, done.append), nats, atol=1e-5)
    assert (sum(done), max(done)) == (11, min(batch, 11))
    assert network.training


def test_the_probabilities_of_all_maps_sum_to_1_under_every_label_and_without() -> None:
    network = make_sharp_prior()
    maps = torch.cartesian_prod(*[torch.arange(5)] * 6).view(-1, 2, 3)
    joint = label_log_joint(network, maps, FREQUENCIES)
    torch.testing.assert_close(joint.exp().sum(dim=0), FREQUENCIES.double(), rtol=0, atol=1e-5)
    assert mixture_nats_per_map(network, maps, FREQUENCIES).neg().exp().sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("num_rows", [None, 1])
def test_the_joint_and_the_mixture_are_those_of_a_sum_over_labels_by_brute_force(num_rows: int | None) -> None:
    network, done = make_sharp_prior(), []
    maps = random_maps(7, network)
    counted = torch.ones(7, 2, 3).bool()
    counted[:, num_rows:] = num_rows is None
    nats = np.stack([nats_by_hand(network, maps, [label] * 7)[:, :num_rows].sum(axis=(1, 2)) for label in range(3)])
    joint = FREQUENCIES.double().numpy()[:, None] * np.exp(-nats)  # (labels, maps)
    found = label_log_joint(network, maps, FREQUENCIES, counted=counted, progress=done.append)
    assert found.shape == (7, 3)
    np.testing.assert_allclose(found.exp(), joint.T, rtol=1e-4)
    assert done == [7] * 3
    if num_rows is None:
        mixture = mixture_nats_per_map(network, maps, FREQUENCIES)
        np.testing.assert_allclose(mixture, -np.log(joint.sum(axis=0)), atol=1e-4)
        assert (mixture.numpy() < nats.max(axis=0)).all()


def test_without_classes_the_joint_is_the_likelihood_itself() -> None:
    network, nothing = make_sharp_prior(num_classes=0), torch.zeros(0, dtype=torch.float64)
    maps = random_maps(7, network)
    expected = nats_per_map(network, maps, None)
    assert torch.equal(label_log_joint(network, maps, nothing), -expected[:, None])
    assert torch.equal(mixture_nats_per_map(network, maps, nothing), expected)
