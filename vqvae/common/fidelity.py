"""How good a set of images is against a real set, from their features; it knows nothing of codes or digits.

Sets of features are (N, F) float32 on the CPU. Both sides of a comparison should be of one size: the Fréchet distance
is larger the fewer the samples.
"""

from typing import NamedTuple

import torch
from scipy.stats import mannwhitneyu
from torch import Tensor

KID_SUBSETS = 50
KID_SUBSET_SIZE = 1000
NEAREST = 5  # k of precision, recall, density and coverage
ROWS_AT_ONCE = 1000  # of a distance matrix
EXTRAPOLATION_SIZES = 8


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """The Fréchet distance of two Gaussians fitted to the features (arXiv:1706.08500, eq. 6)."""
    real, fake = real.double(), fake.double()
    covariance_real, covariance_fake = real.T.cov(), fake.T.cov()
    # tr sqrt(A B) is the sum of the roots of the eigenvalues of A B, which are those of sqrt(A) B sqrt(A).
    values, vectors = torch.linalg.eigh(covariance_real)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance_fake @ root).clamp(min=0).sqrt().sum()
    means = (real.mean(0) - fake.mean(0)).square().sum()
    return (means + covariance_real.trace() + covariance_fake.trace() - 2 * cross).item()


def frechet_distance_at_infinity(real: Tensor, fake: Tensor, generator: torch.Generator) -> float:
    """Extrapolated to infinitely many samples on both sides: a line through the distances of subsets, over 1/N
    (arXiv:1911.07023)."""
    most = min(len(real), len(fake))
    sizes = torch.linspace(most / 4, most, EXTRAPOLATION_SIZES).long().tolist()
    distances = [frechet_distance(_subset(real, size, generator), _subset(fake, size, generator)) for size in sizes]
    inverse = torch.tensor([[1.0, 1 / size] for size in sizes], dtype=torch.float64)
    return torch.linalg.lstsq(inverse, torch.tensor(distances, dtype=torch.float64)[:, None]).solution[0, 0].item()


def kernel_distance(real: Tensor, fake: Tensor, generator: torch.Generator) -> tuple[float, float]:
    """KID (arXiv:1801.01401): the unbiased squared MMD under the cubic kernel, its mean and standard deviation over
    subsets."""
    size = min(KID_SUBSET_SIZE, len(real), len(fake))
    values = [_squared_mmd(_subset(real, size, generator), _subset(fake, size, generator)) for _ in range(KID_SUBSETS)]
    distances = torch.tensor(values, dtype=torch.float64)
    return distances.mean().item(), distances.std().item()


def _squared_mmd(real: Tensor, fake: Tensor) -> float:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a.double() @ b.double().T / a.shape[1] + 1) ** 3

    num = len(real)
    within = sum(k.sum() - k.trace() for k in (kernel(real, real), kernel(fake, fake))) / (num * (num - 1))
    return (within - 2 * kernel(real, fake).mean()).item()


class Neighbourhoods(NamedTuple):
    """Each in 0..1 but density, which may exceed 1 (arXiv:1904.06991, arXiv:2002.09797)."""

    precision: float  # share of fakes within reach of a real one: its distance to its k-th nearest real one
    recall: float  # share of reals within reach of a fake one
    density: float  # how many reals' reaches hold a fake, over k, mean over fakes
    coverage: float  # share of reals with a fake within their reach


def neighbourhoods(real: Tensor, fake: Tensor, k: int = NEAREST) -> Neighbourhoods:
    """Precision, recall, density and coverage of two sets of more than k features each."""
    reach_of_fake = _reach(fake, k)
    num_holding = torch.zeros(len(fake))  # reals whose reach holds each fake
    num_covered = num_recalled = 0
    for chosen, reach in zip(real.split(ROWS_AT_ONCE), _reach(real, k).split(ROWS_AT_ONCE), strict=True):
        distances = torch.cdist(chosen, fake)
        held = distances < reach[:, None]
        num_holding += held.sum(dim=0)
        num_covered += int(held.any(dim=1).sum())
        num_recalled += int((distances < reach_of_fake).any(dim=1).sum())
    return Neighbourhoods(
        precision=(num_holding > 0).float().mean().item(),
        recall=num_recalled / len(real),
        density=num_holding.mean().item() / k,
        coverage=num_covered / len(real),
    )


def nearest(images: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Distances (N,) of vectors (N, P) to the nearest of the reference's (M, P), and which those are (N,)."""
    found = [torch.cdist(rows, reference).min(dim=1) for rows in images.split(ROWS_AT_ONCE)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def closer(a: Tensor, b: Tensor) -> float:
    """One-sided p-value that distances `a` are no smaller than `b` (Mann-Whitney; the data-copying test of
    arXiv:2004.05675): a small one says that `a` lies closer."""
    return float(mannwhitneyu(a.numpy(), b.numpy(), alternative="less").pvalue)


def _reach(features: Tensor, k: int) -> Tensor:
    """The distance of each (N,) to its k-th nearest other."""
    return torch.cat(
        [
            torch.cdist(rows, features).topk(k + 1, dim=1, largest=False).values[:, -1]  # the nearest is itself
            for rows in features.split(ROWS_AT_ONCE)
        ]
    )


def _subset(features: Tensor, size: int, generator: torch.Generator) -> Tensor:
    return features[torch.randperm(len(features), generator=generator)[:size]]
