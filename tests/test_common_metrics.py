import math

import numpy as np
import pytest
import torch

from vqvae.common.metrics import codes_used, count_codes, nats_to_bits, perplexity


def random_indices(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(shape, generator=generator).square() * 20).long()  # small numbers more often than large


def test_counts_equal_those_made_one_by_one() -> None:
    indices = random_indices(5, 7, 7)
    counts = count_codes(indices, 32)
    assert counts.dtype == torch.int64
    assert counts.tolist() == [int((indices.numpy() == code).sum()) for code in range(32)]


@pytest.mark.parametrize("batch", [1, 3, 5])
def test_counts_add_up_over_batches_of_any_size(batch: int) -> None:
    indices = random_indices(10, 7, 7)
    parts = torch.stack([count_codes(part, 32) for part in indices.split(batch)])
    assert torch.equal(parts.sum(0), count_codes(indices, 32))
    # Perplexity isn't an average of the parts': it needs the counts of the whole.
    assert perplexity(parts.sum(0)) > np.mean([perplexity(part) for part in parts])


def test_perplexity_is_two_to_the_entropy_in_bits() -> None:
    counts = torch.tensor([5, 0, 1, 10, 4])
    p = np.array([5, 1, 10, 4]) / 20
    assert perplexity(counts) == pytest.approx(2 ** -(p * np.log2(p)).sum(), rel=1e-12)


@pytest.mark.parametrize(("counts", "expected"), [([7] * 512, 512), ([0, 9, 0], 1), ([3, 0, 3, 0], 2)])
def test_perplexity_of_even_use_is_the_number_of_codes_used(counts: list[int], expected: int) -> None:
    assert perplexity(torch.tensor(counts)) == pytest.approx(expected, rel=1e-12)
    assert codes_used(torch.tensor(counts)) == expected


def test_a_fair_coin_is_one_bit() -> None:
    assert nats_to_bits(math.log(2)) == pytest.approx(1)
    assert nats_to_bits(49 * math.log(512)) == pytest.approx(441)
