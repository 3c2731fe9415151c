"""How close a set of images is to a set of real images, measured in features of both.

Features are (N, F) float32 tensors on the CPU, one row per image. This module knows nothing of images, codes or
classifiers: any features will do, but figures compare only with figures of the same features. Give both sets the same
number of rows, because the Fréchet distance grows as the sets get smaller.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from scipy.stats import mannwhitneyu
from torch import Tensor

from vqvae.compute import in_batches

KID_NUM_SUBSETS = 50
KID_SUBSET_SIZE = 1000  # at most; never more than half of a set
NUM_HALVES = 20  # random halves that a standard error is taken over
NUM_FITS = 8  # of the extrapolation to infinity
NUM_NEIGHBOURS = 5  # k of precision, recall, density and coverage
NUM_EXTRAPOLATION_SIZES = 8
ROWS_AT_ONCE = 1000  # rows of a distance matrix that are in memory at the same time
REFERENCE_AT_ONCE = 2000  # its columns, where there may be any number of them


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """FID: the Fréchet distance |m_r - m_f|^2 + tr(C_r + C_f - 2 (C_r C_f)^(1/2)) (arXiv:1706.08500, eq. 6).

    Args:
        real, fake: (N, F) and (M, F) features; m and C are their means and covariances.
    Returns:
        0 up to rounding where means and covariances are the same, and more elsewhere.
    """
    real, fake = real.double(), fake.double()
    covariance_real, covariance_fake = real.T.cov(), fake.T.cov()
    # The trace of (A B)^(1/2) is the sum of the square roots of the eigenvalues of A B.
    # A^(1/2) B A^(1/2) has the same eigenvalues, and it is symmetric.
    values, vectors = torch.linalg.eigh(covariance_real)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance_fake @ root).clamp(min=0).sqrt().sum()
    means = (real.mean(0) - fake.mean(0)).square().sum()
    return (means + covariance_real.trace() + covariance_fake.trace() - 2 * cross).item()


class Estimate(NamedTuple):
    """A figure and its standard error."""

    value: float
    error: float


def frechet_distance_at_infinity(real: Tensor, fake: Tensor, generator: torch.Generator) -> Estimate | None:
    """The Fréchet distance extrapolated to infinitely many samples (arXiv:1911.07023).

    The distance of N samples is about a + b / N. The result is the a of a line fitted to the distances of subsets of
    several sizes, from a quarter of the samples to all of them: the mean over several fits, because the choice of the
    subsets matters much. It may be a little below 0.

    Args:
        real, fake: (N, F) and (M, F) features.
        generator: draws the subsets; it is on the CPU.
    Returns:
        None where a quarter of the samples are no more than F. Their covariance has no full rank, and there the
        distance does not follow that line. Else the error is that of the fits, and that of the samples: the standard
        deviation of the distance over random halves of both sets. A half varies twice as much as the whole, but the
        halves share half of what they have. Where the true distance is near 0 the error is up to twice too large.
    """
    if min(len(real), len(fake)) // 4 <= real.shape[1]:
        return None
    fits = torch.tensor([_intercept(real, fake, generator) for _ in range(NUM_FITS)])
    halves = [
        frechet_distance(_subset(real, len(real) // 2, generator), _subset(fake, len(fake) // 2, generator))
        for _ in range(NUM_HALVES)
    ]
    variance = fits.var() / NUM_FITS + torch.tensor(halves).var()
    return Estimate(fits.mean().item(), variance.sqrt().item())


def _intercept(real: Tensor, fake: Tensor, generator: torch.Generator) -> float:
    most = min(len(real), len(fake))
    sizes = torch.linspace(most / 4, most, NUM_EXTRAPOLATION_SIZES).long().tolist()
    distances = [frechet_distance(_subset(real, size, generator), _subset(fake, size, generator)) for size in sizes]
    inverse = torch.tensor([[1.0, 1 / size] for size in sizes], dtype=torch.float64)
    return torch.linalg.lstsq(inverse, torch.tensor(distances, dtype=torch.float64)[:, None]).solution[0, 0].item()


def kid(real: Tensor, fake: Tensor, generator: torch.Generator) -> Estimate:
    """KID: the squared maximum mean discrepancy under the kernel (x.y / F + 1)^3, unbiased (arXiv:1801.01401).

    Args:
        real, fake: (N, F) and (M, F) features, each of at least 4 rows.
        generator: draws the subsets that the mean is taken over; it is on the CPU.
    Returns:
        the mean over the subsets, which may be a little below 0, and their standard deviation. A subset is no more than
        half of a set, because subsets that share most of their rows would hardly differ. Where it is half, this is the
        standard error of the whole. Where it is less, the error is smaller.
    """
    size = min(KID_SUBSET_SIZE, len(real) // 2, len(fake) // 2)
    values = [
        _squared_mmd(_subset(real, size, generator), _subset(fake, size, generator)) for _ in range(KID_NUM_SUBSETS)
    ]
    distances = torch.tensor(values, dtype=torch.float64)
    return Estimate(distances.mean().item(), distances.std().item())


def _squared_mmd(real: Tensor, fake: Tensor) -> float:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a.double() @ b.double().T / a.shape[1] + 1) ** 3

    num = len(real)
    within = sum(k.sum() - k.trace() for k in (kernel(real, real), kernel(fake, fake))) / (num * (num - 1))
    return (within - 2 * kernel(real, fake).mean()).item()


class PRDC(NamedTuple):
    """Precision and recall (arXiv:1904.06991), density and coverage (arXiv:2002.09797).

    The ball of a feature reaches to its k-th nearest neighbour in its own set. All figures but density are in 0..1.
    """

    precision: float  # share of fake features that lie in the ball of a real one
    recall: float  # share of real features that lie in the ball of a fake one
    density: float  # number of real balls that a fake feature lies in, divided by k, mean over fakes; may exceed 1
    coverage: float  # share of real features whose ball holds a fake one


def prdc(real: Tensor, fake: Tensor, k: int = NUM_NEIGHBOURS) -> PRDC:
    """Precision, recall, density and coverage of `fake` (M, F) as a picture of `real` (N, F).

    Args:
        k: which neighbour the balls reach to; each set has more than k rows.
    """
    radii_of_fake = _radii(fake, k)
    num_balls = torch.zeros(len(fake))  # for each fake feature, the real balls that hold it
    num_covered = num_recalled = 0
    for rows, radii in zip(real.split(ROWS_AT_ONCE), _radii(real, k).split(ROWS_AT_ONCE), strict=True):
        distances = torch.cdist(rows, fake)
        inside = distances < radii[:, None]
        num_balls += inside.sum(dim=0)
        num_covered += int(inside.any(dim=1).sum())
        num_recalled += int((distances < radii_of_fake).any(dim=1).sum())
    return PRDC(
        precision=(num_balls > 0).float().mean().item(),
        recall=num_recalled / len(real),
        density=num_balls.mean().item() / k,
        coverage=num_covered / len(real),
    )


def nearest(
    vectors: Tensor,
    reference: Tensor,
    to_vectors: Callable[[Tensor], Tensor],
    progress: Callable[[int], object] = lambda num_done: None,
) -> tuple[Tensor, Tensor]:
    """For each of the vectors (N, P), its nearest among the vectors of a reference, the first of several.

    Args:
        reference: (M, ...), perhaps more than fit into memory as vectors.
        to_vectors: some rows (m, ...) of the reference to vectors (m, P).
        progress: called with the number of vectors that are done since the last call.
    Returns:
        the Euclidean distances (N,), and the rows (N,) int64 of `reference` that they are to.
    """
    distances, found = torch.full((len(vectors),), torch.inf), torch.zeros(len(vectors), dtype=torch.int64)
    for rows in in_batches(len(vectors), ROWS_AT_ONCE):
        for piece in in_batches(len(reference), REFERENCE_AT_ONCE):
            least = torch.cdist(vectors[rows], to_vectors(reference[piece])).min(dim=1)
            closer = least.values < distances[rows]
            distances[rows] = torch.where(closer, least.values, distances[rows])
            found[rows] = torch.where(closer, least.indices + piece.start, found[rows])
        progress(rows.stop - rows.start)
    return distances, found


def mann_whitney_p(a: Tensor, b: Tensor) -> float:
    """One-sided p-value of the Mann-Whitney test that the distances `a` (N,) are smaller than `b` (M,).

    A small value says that `a` lies closer. The data-copying test of arXiv:2004.05675 is this one. The test takes all
    distances as independent, and a p-value says nothing of how much closer `a` lies: `share_closer` does.
    """
    return float(mannwhitneyu(a.numpy(), b.numpy(), alternative="less").pvalue)


def share_closer(a: Tensor, b: Tensor) -> Estimate:
    """In which share of the pairs of a distance of `a` (N,) and one of `b` (M,) that of `a` is smaller.

    Ties count half. It is 1/2 where both come from one distribution. The standard error is DeLong's (Biometrics 44,
    837), for which sets that are wholly apart have none. So it is at least the share of one image.
    """
    shares_of_a, shares_of_b = 1 - _share_below(a, b), _share_below(b, a)
    variance = shares_of_a.var() / len(a) + shares_of_b.var() / len(b)
    return Estimate(shares_of_a.mean().item(), max(variance.sqrt().item(), 1 / min(len(a), len(b))))


def _share_below(values: Tensor, others: Tensor) -> Tensor:
    """For each value (N,), the share of the others (M,) below it, float64. Ties count half."""
    values, ordered = values.contiguous(), others.sort().values
    below, not_above = torch.searchsorted(ordered, values), torch.searchsorted(ordered, values, right=True)
    return (below + not_above).double() / (2 * len(others))


def _radii(features: Tensor, k: int) -> Tensor:
    """The distance (N,) of each feature to its k-th nearest neighbour, itself not counted."""
    return torch.cat(
        [
            torch.cdist(rows, features).topk(k + 1, dim=1, largest=False).values[:, -1]  # the nearest is itself
            for rows in features.split(ROWS_AT_ONCE)
        ]
    )


def _subset(features: Tensor, size: int, generator: torch.Generator) -> Tensor:
    return features[torch.randperm(len(features), generator=generator)[:size]]
