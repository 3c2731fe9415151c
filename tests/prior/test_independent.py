"""Priors without neighbours, held against counting by hand."""

import math

import numpy as np
import pytest
import torch

from prior.codes import Codes
from prior.independent import baselines, draw_independently, nats_by_position, uniform, unigram


def make_codes(num: int, seed: int = 0) -> Codes:
    """Maps of 2x3 codes below 5, each position with a favourite of its own; code 4 stands nowhere."""
    generator = torch.Generator().manual_seed(seed)
    random, favourite = torch.randint(4, (num, 2, 3), generator=generator), (torch.arange(6) % 4).view(2, 3)
    indices = torch.where(torch.rand(num, 2, 3, generator=generator) < 0.5, favourite, random)
    return Codes(indices, torch.zeros(num, dtype=torch.int64))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_unigram_is_each_positions_own_counts_and_one_more_and_the_uniform_is_even() -> None:
    train, found = make_codes(30), unigram(make_codes(30), 5)
    assert (found.shape, found.dtype) == ((2, 3, 5), torch.float64)
    for i, j, code in np.ndindex(2, 3, 5):
        seen = sum(int(train.indices[n, i, j]) == code for n in range(30))
        assert found[i, j, code].item() == pytest.approx((seen + 1) / (30 + 5), abs=1e-12)
    assert not torch.allclose(found[0, 0], found[0, 1], atol=0.1)
    assert uniform((2, 3), 5).dtype == torch.float64
    assert uniform((2, 3), 5).tolist() == [[[0.2] * 5] * 3] * 2


def test_the_likelihood_of_each_position_equals_counting_by_hand() -> None:
    probabilities = torch.rand(2, 3, 5, generator=seeded(1), dtype=torch.float64).softmax(dim=2)
    indices = make_codes(11).indices
    found = nats_by_position(probabilities, indices)
    for i, j in np.ndindex(2, 3):
        nats = [-math.log(probabilities[i, j, indices[n, i, j]]) for n in range(11)]
        assert found[i, j].item() == pytest.approx(np.mean(nats), abs=1e-12)


def test_baselines_are_log_k_and_the_mean_likelihood_under_the_training_maps_unigram() -> None:
    train, split = make_codes(30), make_codes(11, seed=1)
    found, expected = baselines(train, split, 5), nats_by_position(unigram(train, 5), split.indices).mean().item()
    assert found == {"uniform": pytest.approx(math.log(5)), "unigram": pytest.approx(expected)}
    assert found["unigram"] < found["uniform"]


def test_draws_follow_each_positions_own_distribution_and_no_other_position() -> None:
    probabilities, num = unigram(make_codes(200), 5), 20_000
    probabilities[1, 2] = torch.tensor([0, 0.5, 0, 0.5, 0])
    before = torch.get_rng_state()
    maps = draw_independently(probabilities, num, seeded(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(draw_independently(probabilities, num, seeded(2)), maps)
    assert (maps.shape, maps.dtype) == ((num, 2, 3), torch.int64)
    for i, j in np.ndindex(2, 3):
        found = torch.bincount(maps[:, i, j], minlength=5) / num
        assert (found - probabilities[i, j]).abs().max() < 4 * math.sqrt(0.25 / num)
    pairs = torch.bincount(maps[:, 0, 0] * 5 + maps[:, 0, 1], minlength=25) / num
    expected = (probabilities[0, 0][:, None] * probabilities[0, 1]).flatten()
    assert (pairs - expected).abs().max() < 4 * math.sqrt(0.25 / num)
    assert maps[:, 1, 2].unique().tolist() == [1, 3]  # never an impossible one
