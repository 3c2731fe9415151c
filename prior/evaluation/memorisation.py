"""Whether samples repeat training images.

A prior that has learned its training maps by heart draws images that lie closer to training images than new images do.
So three sets are compared by the distance of each image to its nearest training image: held-out images, their
reconstructions, and samples. The reconstructions are there because samples are as smooth as they are, and smooth images
lie closer to everything. A second check counts the samples whose code map is that of a training image.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prior.evaluation.metrics import mann_whitney_p, nearest, share_closer
from prior.evaluation.sets import ImageSet, unit_vectors
from vqvae.compute import in_batches

NUM_PAIRS = 50  # of closest ones that are shown where there are no classes
NUM_PAIRS_OF_CLASS = 5
AT_ONCE = 10_000  # training maps
COMPARED = (  # a name, the set that might lie closer, and the other
    ("closer_than_real", "samples", "real"),
    ("closer_than_reconstructions", "samples", "reconstructions"),
    ("reconstructions_closer_than_real", "reconstructions", "real"),
)


class ClosestPairs(NamedTuple):
    """Samples and their nearest training images, the closest pair first."""

    images: Tensor  # (n, 2, C, H, W) uint8: a sample, then the training image nearest to it
    distances: Tensor  # (n,), root mean squares over the values of an image in 0..1
    label: int | None = None  # the class that these samples were drawn for; None where they have no labels


def measure_memorisation(
    real: Tensor,
    reconstructions: Tensor,
    samples: ImageSet,
    train_images: Tensor,
    train_indices: Tensor,
    real_indices: Tensor,
    progress: Callable[[int], object] = lambda num_done: None,
) -> tuple[dict[str, Any], list[ClosestPairs]]:
    """Compare held-out images, their reconstructions and samples with the training images.

    Args:
        real, reconstructions: (N, C, H, W) uint8.
        samples: with their indices, and with labels where there are classes.
        train_images: (M, C, H, W) uint8, perhaps mapped from disk.
        train_indices: (M, h, w), the code maps of the training images.
        real_indices: (N, h, w), the code maps of the held-out images.
        progress: called with the number of images that were compared since the last call, 3 N in all.
    Returns:
        the figures, and the closest pairs of each class, because all that are closest of all may be of one class.
        Distances are root mean squares over the values of an image in 0..1. `closer_than_real` and the
        like are the share of pairs of an image of either set in which that of the first lies closer to the training
        images, [value, standard error]; 1/2 says that none does. A p-value is one-sided (arXiv:2004.05675): a small one
        says that the first set lies closer. Errors and p-values take images as independent. Where many of
        them are by the same people, as in MNIST, true errors are larger.
    """
    distances, rows = {}, {}
    for name, images in {"real": real, "reconstructions": reconstructions, "samples": samples.images}.items():
        distance, rows[name] = nearest(unit_vectors(images), train_images, unit_vectors, progress)
        distances[name] = distance / images[0].numel() ** 0.5
    assert samples.indices is not None
    figures: dict[str, Any] = {
        "num_images": len(samples.images),
        "distance": {name: distance.mean().item() for name, distance in distances.items()},
        "copied_maps": count_copies(samples.indices, train_indices),
        "copied_maps_real": count_copies(real_indices, train_indices),
    }
    for name, closer, other in COMPARED:
        figures[f"p_{name}"] = mann_whitney_p(distances[closer], distances[other])
        figures[name] = list(share_closer(distances[closer], distances[other]))
    return figures, _closest_pairs(samples, distances["samples"], train_images, rows["samples"])


def _closest_pairs(
    samples: ImageSet, distances: Tensor, train_images: Tensor, nearest_rows: Tensor
) -> list[ClosestPairs]:
    """NUM_PAIRS_OF_CLASS of each class, or NUM_PAIRS where there are none."""
    order = distances.argsort()

    def pairs(closest: Tensor, label: int | None) -> ClosestPairs:
        both = torch.stack([samples.images[closest], train_images[nearest_rows[closest]]], dim=1)
        return ClosestPairs(both, distances[closest], label)

    if samples.labels is None:
        return [pairs(order[:NUM_PAIRS], None)]
    labels = samples.labels[order]
    return [pairs(order[labels == label][:NUM_PAIRS_OF_CLASS], label) for label in labels.unique().tolist()]


def count_copies(indices: Tensor, train_indices: Tensor) -> int:
    """How many of the maps (N, h, w) are among the training maps (M, h, w), of which there may be far more."""
    maps = [code_map.tobytes() for code_map in indices.cpu().short().numpy()]
    sought, found = set(maps), set()
    for rows in in_batches(len(train_indices), AT_ONCE):
        found |= sought & {code_map.tobytes() for code_map in train_indices[rows].cpu().short().numpy()}
    return sum(code_map in found for code_map in maps)
