import numpy as np
import pytest
import torch
from torch import Tensor

from prior.evaluation import metrics
from prior.evaluation.metrics import frechet_distance, frechet_distance_at_infinity, kid, prdc, share_closer
from tests.prior.evaluation.test_sets import seeded


def features(num: int, size: int, seed: int) -> Tensor:
    """Gaussian features whose mean and covariance are of no simple form."""
    draws = torch.randn(num + size + 1, size, generator=torch.Generator().manual_seed(seed))
    return draws[:num] @ draws[num:-1] + draws[-1]


def all_distances(a: Tensor, b: Tensor) -> np.ndarray:
    """Between all items of both, in float64."""
    return np.linalg.norm(a.double().flatten(1).numpy()[:, None] - b.double().flatten(1).numpy(), axis=2)


@pytest.mark.parametrize(("num_real", "num_fake", "size"), [(200, 200, 5), (300, 120, 12), (9, 11, 20)])
def test_the_frechet_distance_is_that_of_gaussians(num_real: int, num_fake: int, size: int) -> None:
    real, fake = features(num_real, size, 1), features(num_fake, size, 2)  # at last fewer than there are features
    a, b = (np.cov(some.double().numpy(), rowvar=False) for some in (real, fake))
    apart = (real.double().mean(0) - fake.double().mean(0)).square().sum().item()
    expected = apart + np.trace(a + b) - 2 * np.sqrt(np.linalg.eigvals(a @ b).real.clip(min=0)).sum()
    assert frechet_distance(real, fake) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(fake, real) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(real, real.flip(0)) == pytest.approx(0, abs=1e-4)


def test_the_extrapolation_ends_where_a_line_over_one_over_n_meets_infinity(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, measured = [40, 57, 74, 91, 108, 125, 142, 160], []  # from a quarter to all of the smaller set

    def known(a: Tensor, b: Tensor) -> float:
        measured.append((len(a), len(b)))
        assert (len(a.unique()), len(b.unique())) == measured[-1]  # rows of both, no row twice
        turn, half = (len(measured) - 1) // 8, len(a) == 100
        return 7.0 * (len(measured) % 2) if half else 2.5 + turn + 30 / len(a)

    monkeypatch.setattr(metrics, "frechet_distance", known)
    real, fake = torch.arange(200.0)[:, None], torch.arange(160.0)[:, None]
    value, error = frechet_distance_at_infinity(real, fake, seeded())
    assert measured == [(size, size) for size in sizes] * 8 + [(100, 80)] * 20
    assert value == pytest.approx(2.5 + 3.5, abs=1e-5)  # the mean over the fits
    assert error == pytest.approx((np.var(range(8), ddof=1) / 8 + np.var([0, 7] * 10, ddof=1)) ** 0.5)


@pytest.mark.parametrize("num", [40, 63, 64, 200])
def test_the_distance_at_infinity_is_left_out_where_covariances_may_have_no_full_rank(num: int) -> None:
    found = frechet_distance_at_infinity(features(num, 15, 1), features(num + 9, 15, 2), seeded())
    assert (found is None) == (num < 64)


@pytest.mark.parametrize(("num_real", "num_fake"), [(30, 20), (9, 8), (8, 9), (5, 5), (4, 5), (4, 4)])
def test_kid_and_its_spread_over_subsets(num_real: int, num_fake: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sets, found, whole = (features(num_real, 3, 1), features(num_fake, 3, 2)), [], metrics._squared_mmd

    def recorded(*subsets: Tensor) -> float:
        for subset, full in zip(subsets, sets, strict=True):
            rows = [(full == row).all(dim=1).nonzero().item() for row in subset]
            assert len(rows) == len(set(rows)) == min(4, num_real // 2, num_fake // 2)  # no row is drawn twice
        x, y = (subset.double().numpy() for subset in subsets)
        within_x, within_y, across = ((a @ b.T / 3 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        different = ~np.eye(len(x), dtype=bool)  # no row is paired with itself
        found.append(within_x[different].mean() + within_y[different].mean() - 2 * across.mean())
        return whole(*subsets)

    monkeypatch.setattr(metrics, "KID_SUBSET_SIZE", 4)
    monkeypatch.setattr(metrics, "_squared_mmd", recorded)
    mean, spread = kid(*sets, seeded())
    assert (len(found), mean) == (50, pytest.approx(np.mean(found), rel=1e-9))
    assert spread == pytest.approx(np.std(found, ddof=1), rel=1e-9)
    assert spread > 1e-6  # subsets that were whole sets would not differ


@pytest.mark.parametrize("figure", ["kid", "fid_infinity", "share"])
def test_a_standard_error_is_the_spread_of_the_figure_over_fresh_sets(figure: str) -> None:
    def measure(seed: int) -> metrics.Estimate:
        draws = torch.randn(2, 400, 4, generator=seeded(seed))
        real, fake = draws[0], draws[1] * 1.2 + 0.3
        if figure == "share":
            return share_closer(real[:, 0], fake[:, 0])
        found = (
            kid(real, fake, seeded(seed)) if figure == "kid" else frechet_distance_at_infinity(real, fake, seeded(seed))
        )
        assert found is not None
        return found

    estimates = [measure(seed) for seed in range(40)]
    spread = np.std([estimate.value for estimate in estimates])
    assert 0.7 < np.mean([estimate.error for estimate in estimates]) / spread < 1.6


@pytest.mark.parametrize("num", [4, 30])
def test_the_share_of_closer_pairs_is_as_counted_and_its_error_is_never_0(num: int) -> None:
    a, b = (torch.randint(5, (n,), generator=seeded(n)).float() for n in (num, 2 * num))
    pairs = np.sign(b.numpy()[None] - a.numpy()[:, None])
    assert share_closer(a, b).value == pytest.approx((pairs.mean() + 1) / 2)
    for apart, share in ((torch.ones(num), 0.5), (torch.zeros(num), 1.0), (torch.full((num,), 2.0), 0.0)):
        assert share_closer(apart, torch.ones(num)) == pytest.approx((share, 1 / num))


GRID = torch.randint(4, (44, 2), generator=seeded()).float()  # many points are equal, and many lie on a ball's edge
SETS = [(features(n, 3, 1), features(m, 3, 2) * 0.7 + 1) for n, m in ((40, 40), (33, 12), (11, 50))]


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize(("real", "fake"), [*SETS, (GRID[:22], GRID[22:])], ids=["even", "few", "many", "ties"])
def test_prdc_is_as_counted_by_pairs(k: int, real: Tensor, fake: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    radii_of_real, radii_of_fake = (np.sort(all_distances(s, s), axis=1)[:, k] for s in (real, fake))  # [:, 0] is 0
    distances = all_distances(real, fake)
    held, recalled = distances < radii_of_real[:, None], (distances < radii_of_fake).any(axis=1)
    expected = [held.any(axis=0).mean(), recalled.mean(), held.sum() / (k * len(fake)), held.any(axis=1).mean()]
    assert len({round(figure, 6) for figure in expected}) > 1
    for rows in (1, 7, 11, 1000):
        monkeypatch.setattr(metrics, "ROWS_AT_ONCE", rows)
        assert prdc(real, fake, k) == pytest.approx(expected, abs=1e-6)
    assert prdc(real, fake) == prdc(real, fake, 5)
