"""Priors without neighbours, held against counting by hand."""

import math

import numpy as np
import pytest
import torch

from prior.codes import Codes
from prior.unigram import baselines, draw_independently, nats_by_position, uniform, unigram


def make_codes(num: int, seed: int = 0) -> Codes:
    """Maps of 2x3 codes below 5, each position with a favourite of its own; code 4 stands nowhere."""
    generator = torch.Generator().manual_seed(seed)
    random, favourite = torch.randint(4, (num, 2, 3), generator=generator), (torch.arange(6) % 4).view(2, 3)
    indices = torch.where(torch.rand(num, 2, 3, generator=generator) < 0.5, favourite, random)
    return Codes(indices, torch.randint(10, (num,), generator=generator))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_unigram_is_each_positions_own_counts_and_one_more() -> None:
    train = make_codes(30)
    found = unigram(train, 5)
    assert (found.shape, found.dtype) == ((2, 3, 5), torch.float64)
    for i, j, code in np.ndindex(2, 3, 5):
        seen = sum(int(train.indices[n, i, j]) == code for n in range(30))
        assert found[i, j, code].item() == pytest.approx((seen + 1) / (30 + 5), abs=1e-12)
    assert not torch.allclose(found[0, 0], found[0, 1], atol=0.1)


def test_under_the_uniform_every_code_is_as_likely_as_any_other() -> None:
    found = uniform((2, 3), 5)
    assert found.dtype == torch.float64
    assert found.tolist() == [[[0.2] * 5] * 3] * 2


def test_the_likelihood_of_each_position_equals_counting_by_hand() -> None:
    probabilities = torch.rand(2, 3, 5, generator=seeded(1), dtype=torch.float64).softmax(dim=2)
    indices = make_codes(11).indices
    found = nats_by_position(probabilities, indices)
    assert found.shape == (2, 3)
    for i, j in np.ndindex(2, 3):
        nats = [-math.log(probabilities[i, j, indices[n, i, j]]) for n in range(11)]
        assert found[i, j].item() == pytest.approx(np.mean(nats), abs=1e-12)


def test_baselines_equal_counting_by_hand() -> None:
    train, split = make_codes(30), make_codes(11, seed=1)
    nats = []
    for n, i, j in np.ndindex(11, 2, 3):
        seen = sum(int(train.indices[m, i, j] == split.indices[n, i, j]) for m in range(30))
        nats.append(-math.log((seen + 1) / (30 + 5)))
    found = baselines(train, split, 5)
    assert found == {"uniform": pytest.approx(math.log(5)), "unigram": pytest.approx(np.mean(nats), abs=1e-6)}
    assert found["unigram"] < found["uniform"]


def test_a_code_that_no_training_map_has_is_unlikely_and_not_impossible() -> None:
    split = Codes(torch.full((3, 2, 3), 4), torch.zeros(3, dtype=torch.int64))
    assert baselines(make_codes(30), split, 5)["unigram"] == pytest.approx(math.log(35))


def test_draws_follow_each_positions_own_distribution_and_heed_no_other_position() -> None:
    probabilities, num = unigram(make_codes(200), 5), 20_000
    probabilities[1, 2] = torch.tensor([0, 0.5, 0, 0.5, 0])
    maps = draw_independently(probabilities, num, seeded(2))
    assert (maps.shape, maps.dtype) == ((num, 2, 3), torch.int64)
    for i, j in np.ndindex(2, 3):
        found = torch.bincount(maps[:, i, j], minlength=5) / num
        assert (found - probabilities[i, j]).abs().max() < 4 * math.sqrt(0.25 / num)
    pairs = torch.bincount(maps[:, 0, 0] * 5 + maps[:, 0, 1], minlength=25) / num
    expected = (probabilities[0, 0][:, None] * probabilities[0, 1]).flatten()
    assert (pairs - expected).abs().max() < 4 * math.sqrt(0.25 / num)
    assert maps[:, 1, 2].unique().tolist() == [1, 3]  # never an impossible one


def test_the_same_seed_draws_the_same_maps_and_leaves_the_global_state_alone() -> None:
    even = uniform((2, 3), 5)
    before = torch.get_rng_state()
    maps = draw_independently(even, 9, seeded(3))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(draw_independently(even, 9, seeded(3)), maps)
    assert not torch.equal(draw_independently(even, 9, seeded(4)), maps)
