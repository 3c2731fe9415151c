"""Figures of two sets of features, each held against its definition written out the slow way."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor
from vqvae.common import fidelity
from vqvae.common.fidelity import (
    closer,
    frechet_distance,
    frechet_distance_at_infinity,
    kernel_distance,
    nearest,
    neighbourhoods,
)


def gaussian(num: int, size: int, seed: int) -> Tensor:
    """Independent standard normal features (num, size)."""
    return torch.randn(num, size, generator=torch.Generator().manual_seed(seed))


def correlated(num: int, size: int, seed: int) -> Tensor:
    """Features whose covariance is of no simple form."""
    return gaussian(num, size, seed) @ gaussian(size, size, seed + 100) + gaussian(1, size, seed + 200)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Fréchet distance


@pytest.mark.parametrize(("num_real", "num_fake", "size"), [(200, 200, 5), (300, 120, 12), (50, 80, 2)])
def test_the_frechet_distance_is_the_closed_form_with_a_matrix_square_root(
    num_real: int, num_fake: int, size: int
) -> None:
    real, fake = correlated(num_real, size, 1), correlated(num_fake, size, 2)
    a, b = (np.atleast_2d(np.cov(features.double().numpy(), rowvar=False)) for features in (real, fake))
    means = real.double().numpy().mean(0) - fake.double().numpy().mean(0)
    expected = means @ means + np.trace(a + b - 2 * np.real(sqrtm(a @ b)))
    assert frechet_distance(real, fake) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(fake, real) == pytest.approx(expected, rel=1e-6)


def test_fewer_samples_than_features_are_no_trouble() -> None:
    real, fake = correlated(9, 20, 1), correlated(11, 20, 2)
    a, b = (np.cov(features.double().numpy(), rowvar=False) for features in (real, fake))
    means = real.double().numpy().mean(0) - fake.double().numpy().mean(0)
    roots = np.sqrt(np.linalg.eigvals(a @ b).real.clip(min=0)).sum()
    assert frechet_distance(real, fake) == pytest.approx(means @ means + np.trace(a + b) - 2 * roots, rel=1e-5)


@pytest.mark.parametrize(("num", "size"), [(300, 8), (10, 20)])
def test_the_frechet_distance_of_a_set_to_itself_in_any_order_is_0(num: int, size: int) -> None:
    real = correlated(num, size, 3)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-4)
    assert frechet_distance(real, real.flip(0)) == pytest.approx(0, abs=1e-4)


def test_moving_a_set_adds_the_squared_length_of_the_move() -> None:
    real, move = correlated(200, 4, 4), torch.tensor([1.0, -2.0, 0.5, 0.0])
    assert frechet_distance(real, real + move) == pytest.approx(5.25, rel=1e-4)


def test_stretching_a_set_by_c_adds_its_variance_times_the_square_of_c_less_1() -> None:
    real = correlated(200, 4, 5)
    stretched = real.mean(0) + 3 * (real - real.mean(0))
    assert frechet_distance(real, stretched) == pytest.approx(4 * real.double().var(dim=0).sum().item(), rel=1e-4)


def test_turning_a_set_with_two_unlike_axes_counts_though_no_variance_was_added() -> None:
    flat = gaussian(200, 2, 6)
    flat -= flat.mean(0)
    even = flat @ torch.linalg.inv(torch.linalg.cholesky(flat.T.cov())).T  # of covariance 1
    real, turned = even * torch.tensor([3.0, 1.0]), even * torch.tensor([1.0, 3.0])
    assert frechet_distance(real, turned) == pytest.approx(2 * (3 - 1) ** 2, rel=1e-4)


@pytest.mark.parametrize(("move", "stretch"), [(0.0, 1.0), (0.5, 1.0), (0.0, 1.5)])
def test_the_extrapolated_distance_is_nearer_to_the_true_one_than_the_plain_one(move: float, stretch: float) -> None:
    size, true = 12, 12 * move**2 + 12 * (stretch - 1) ** 2
    plain, extrapolated = [], []
    for seed in range(8):
        real, fake = gaussian(300, size, 2 * seed), gaussian(300, size, 2 * seed + 1) * stretch + move
        plain.append(frechet_distance(real, fake))
        extrapolated.append(frechet_distance_at_infinity(real, fake, generator(seed)))
    assert np.mean(plain) - true > 0.1  # few samples make the distance larger
    assert abs(np.mean(extrapolated) - true) < (np.mean(plain) - true) / 3


def test_the_extrapolation_ends_where_a_line_over_one_over_n_meets_infinity(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def known(real: Tensor, fake: Tensor) -> float:
        assert len(real) == len(fake)
        seen.append(len(real))
        return 2.5 + 30 / len(real)

    monkeypatch.setattr(fidelity, "frechet_distance", known)
    found = frechet_distance_at_infinity(gaussian(200, 2, 1), gaussian(160, 2, 2), generator())
    assert found == pytest.approx(2.5, abs=1e-9)
    assert (seen[0], seen[-1]) == (40, 160)  # from a quarter to all of the smaller set
    assert seen == sorted(set(seen))


def test_the_extrapolation_is_a_function_of_the_seed() -> None:
    real, fake = gaussian(100, 3, 1), gaussian(100, 3, 2)
    first, again, other = (frechet_distance_at_infinity(real, fake, generator(seed)) for seed in (1, 1, 2))
    assert first == again != other


# Kernel distance


def kernel_by_hand(a: np.ndarray, b: np.ndarray) -> float:
    return (sum(x * y for x, y in zip(a, b, strict=True)) / len(a) + 1) ** 3


def squared_mmd_by_hand(real: Tensor, fake: Tensor) -> float:
    """The unbiased estimate, pair by pair."""
    x, y = real.double().numpy(), fake.double().numpy()
    n = len(x)
    within = [kernel_by_hand(s[i], s[j]) for s in (x, y) for i in range(n) for j in range(n) if i != j]
    across = [kernel_by_hand(x[i], y[j]) for i in range(n) for j in range(n)]
    return sum(within) / (n * (n - 1)) - 2 * sum(across) / n**2


@pytest.mark.parametrize(("num", "size"), [(2, 3), (7, 1), (12, 5)])
def test_the_kernel_distance_is_the_unbiased_estimate_pair_by_pair(num: int, size: int) -> None:
    real, fake = correlated(num, size, 1), correlated(num, size, 2)
    mean, _ = kernel_distance(real, fake, generator())
    assert mean == pytest.approx(squared_mmd_by_hand(real, fake), rel=1e-9)


def test_the_kernel_distance_is_the_mean_and_deviation_over_equal_subsets_of_both_sets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fidelity, "KID_SUBSET_SIZE", 4)
    found, whole = [], fidelity._squared_mmd

    def watched(real: Tensor, fake: Tensor) -> float:
        assert len(real) == len(fake) == 4
        for part, full in ((real, real_set), (fake, fake_set)):
            rows = [(full == row).all(dim=1).nonzero().item() for row in part]
            assert len(set(rows)) == 4  # drawn without putting back
        found.append(squared_mmd_by_hand(real, fake))
        return whole(real, fake)

    real_set, fake_set = correlated(30, 3, 1), correlated(20, 3, 2)
    monkeypatch.setattr(fidelity, "_squared_mmd", watched)
    mean, deviation = kernel_distance(real_set, fake_set, generator())
    assert len(found) == fidelity.KID_SUBSETS
    assert len(set(found)) > fidelity.KID_SUBSETS / 2
    assert mean == pytest.approx(np.mean(found), rel=1e-9)
    assert deviation == pytest.approx(np.std(found, ddof=1), rel=1e-9)


def test_the_kernel_distance_of_equal_distributions_is_0_on_average_and_that_of_others_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fidelity, "KID_SUBSETS", 2)  # they are all the whole set here
    same, moved = [], []
    for seed in range(300):
        real, fake = gaussian(10, 4, 2 * seed), gaussian(10, 4, 2 * seed + 1)
        same.append(kernel_distance(real, fake, generator())[0])
        moved.append(kernel_distance(real, fake + 0.5, generator())[0])
    error = np.std(same) / math.sqrt(300)
    assert abs(np.mean(same)) < 4 * error  # the biased estimate is off by 30 errors
    assert 0.2 < np.mean(np.array(same) < 0) < 0.9
    assert np.mean(moved) > 20 * error


def test_the_kernel_distance_is_a_function_of_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "KID_SUBSET_SIZE", 10)
    real, fake = gaussian(40, 3, 1), gaussian(40, 3, 2)
    first, again, other = (kernel_distance(real, fake, generator(seed)) for seed in (1, 1, 2))
    assert first == again
    assert first[0] != other[0]


# Precision, recall, density, coverage


def distance_by_hand(a: list[float], b: list[float]) -> float:
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))


def reach_by_hand(points: list[list[float]], k: int) -> list[float]:
    others = ([q for m, q in enumerate(points) if m != n] for n in range(len(points)))
    return [sorted(distance_by_hand(p, q) for q in rest)[k - 1] for p, rest in zip(points, others, strict=True)]


def neighbourhoods_by_hand(real: Tensor, fake: Tensor, k: int) -> tuple[float, float, float, float]:
    """The four definitions of arXiv:2002.09797, one pair at a time."""
    reals, fakes = real.double().tolist(), fake.double().tolist()
    of_real, of_fake = reach_by_hand(reals, k), reach_by_hand(fakes, k)
    held = [[distance_by_hand(r, f) < reach for f in fakes] for r, reach in zip(reals, of_real, strict=True)]
    precision = sum(any(row[m] for row in held) for m in range(len(fakes))) / len(fakes)
    recall = sum(
        any(distance_by_hand(r, f) < reach for f, reach in zip(fakes, of_fake, strict=True)) for r in reals
    ) / len(reals)
    density = sum(map(sum, held)) / (k * len(fakes))
    coverage = sum(map(any, held)) / len(reals)
    return precision, recall, density, coverage


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize(("num_real", "num_fake"), [(40, 40), (33, 12), (11, 50)])
def test_neighbourhoods_are_as_counted_pair_by_pair(k: int, num_real: int, num_fake: int) -> None:
    real, fake = gaussian(num_real, 3, 1), gaussian(num_fake, 3, 2) * 0.7 + 1
    found = neighbourhoods(real, fake, k)
    assert found == pytest.approx(neighbourhoods_by_hand(real, fake, k), abs=1e-6)
    assert len({round(figure, 6) for figure in found}) > 1


def test_k_is_5_if_nobody_says_otherwise() -> None:
    real, fake = gaussian(30, 3, 1), gaussian(30, 3, 2) + 1
    assert neighbourhoods(real, fake) == neighbourhoods(real, fake, 5) != neighbourhoods(real, fake, 4)


@pytest.mark.parametrize("rows", [1, 7, 24, 25])
def test_neighbourhoods_do_not_depend_on_how_many_rows_are_taken_at_once(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, fake = gaussian(24, 3, 1), gaussian(20, 3, 2) + 0.5
    whole = neighbourhoods(real, fake)
    monkeypatch.setattr(fidelity, "ROWS_AT_ONCE", rows)
    assert neighbourhoods(real, fake) == whole


def test_points_on_a_grid_with_many_ties_are_as_counted_pair_by_pair() -> None:
    points = torch.randint(4, (44, 2), generator=generator()).float()
    real, fake = points[:22], points[22:]
    assert len(real.unique(dim=0)) < len(real)
    for k in (1, 3, 5):
        assert neighbourhoods(real, fake, k) == pytest.approx(neighbourhoods_by_hand(real, fake, k), abs=1e-6)


def test_a_point_just_at_the_end_of_a_reach_is_outside_it() -> None:
    real = torch.arange(10.0)[:, None]  # each reaches to the next one
    inside, at_the_end = torch.tensor([[0.5], [9.5]]), torch.tensor([[-1.0], [10.0]])
    # 0.5 is in the reach of 0 and of 1, 9.5 in that of 9 alone.
    assert neighbourhoods(real, inside, 1)[0::2] == (1.0, 1.5)
    assert neighbourhoods(real, at_the_end, 1) == (0.0, 1.0, 0.0, 0.0)  # the fakes' own reach, 11, holds all


def test_a_set_against_itself_has_every_figure_1() -> None:
    real = gaussian(20, 6, 1)
    assert neighbourhoods(real, real) == pytest.approx((1, 1, 1, 1))  # a reach holds itself and k - 1 others


def test_sets_far_apart_have_every_figure_0() -> None:
    real = gaussian(20, 6, 1)
    assert neighbourhoods(real, gaussian(20, 6, 2) + 100) == (0, 0, 0, 0)


def test_fakes_crowded_into_one_spot_are_precise_and_cover_nothing_else() -> None:
    corner = torch.zeros(20, 2)
    corner[:, 0] = 50
    real = torch.cat([gaussian(60, 2, 1), gaussian(20, 2, 2) * 0.1 + corner])
    fake = gaussian(40, 2, 3) * 0.01 + corner[:1]
    found = neighbourhoods(real, fake)
    assert found.precision == 1
    assert found.recall < 0.05
    assert found.density > 1  # where reals stand close together, fakes count for more
    assert 0 < found.coverage <= 0.25


def test_half_the_fakes_beside_the_point_halve_precision_and_density_alone() -> None:
    real, fake = gaussian(40, 4, 1), gaussian(40, 4, 2)
    alone, diluted = neighbourhoods(real, fake), neighbourhoods(real, torch.cat([fake, gaussian(40, 4, 3) + 1000]))
    assert diluted.precision == pytest.approx(alone.precision / 2, abs=1e-6)
    assert diluted.density == pytest.approx(alone.density / 2, abs=1e-6)
    assert diluted.coverage == alone.coverage
    assert diluted.recall == alone.recall


# Nearest, and whether one set lies closer


@pytest.mark.parametrize("rows", [1, 9, 1000])
def test_the_nearest_is_the_one_found_by_looking_at_all(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "ROWS_AT_ONCE", rows)
    images, reference = gaussian(31, 7, 1), gaussian(45, 7, 2)
    distances, which = nearest(images, reference)
    for n, image in enumerate(images.double().numpy()):
        all_of_them = [np.sqrt(np.sum((image - other) ** 2)) for other in reference.double().numpy()]
        assert which[n] == np.argmin(all_of_them)
        assert distances[n].item() == pytest.approx(min(all_of_them), rel=1e-4)


def test_a_copy_is_found_at_no_distance() -> None:
    reference = torch.rand(60, 784, generator=generator())
    distances, which = nearest(reference[[41, 3, 3]], reference)
    assert which.tolist() == [41, 3, 3]
    assert distances.max() < 0.05  # of about 11 between two that have nothing to do with each other


def test_the_p_value_of_two_below_two_is_one_in_six() -> None:
    low, high = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    assert closer(low, high) == pytest.approx(1 / 6)
    assert closer(high, low) == pytest.approx(1)


def test_p_is_small_for_the_closer_set_and_for_no_other() -> None:
    a, b = gaussian(200, 2, 1).abs().T
    assert closer(0.5 * a, b) < 1e-6
    assert closer(b, 0.5 * a) > 1 - 1e-6
    assert 0.01 < closer(a, b) < 0.99
    assert closer(a, a) == pytest.approx(0.5, abs=0.01)


def test_p_is_even_over_0_to_1_where_nothing_is_closer() -> None:
    values = [closer(*gaussian(40, 2, seed).abs().T) for seed in range(300)]
    for share in (0.05, 0.5, 0.9):
        assert np.mean(np.array(values) < share) == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 300))
