"""The pictures of a report, each with the words that belong to it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prior.evaluation.measure import Evaluation
from prior.evaluation.plots import plot_code_usage, plot_heat_maps
from prior.evaluation.sets import ImageSet
from prior.labels import names_of
from vqvae.data.pixels import unit_images
from vqvae.pictures import COLUMNS, grid_png, whole_cycles

NUM_SHOWN = 100  # of each set, in a picture of its own
NUM_ROWS = 2  # of each set, side by side with others


class Picture(NamedTuple):
    """A picture of the report."""

    alt: str  # what it shows, for those who can't see it
    caption: str  # what to look for
    png: bytes


def draw_sets(evaluation: Evaluation) -> dict[str, Picture]:
    """The first images of each set, by the set's name."""
    pictures = {}
    for image_set in evaluation.sets:
        shown = unit_images(image_set.images[:NUM_SHOWN])
        alt = f"A grid of {len(shown)} images: {image_set.title}"
        png = grid_png(shown, captions=_names(image_set.labels, slice(NUM_SHOWN), evaluation))
        pictures[image_set.name] = Picture(alt, f"{image_set.title}: the first {len(shown)}", png)
    return pictures


def draw_side_by_side(evaluation: Evaluation) -> list[Picture]:
    """A few images of the sets that `compare` shows too, in its order."""
    prior_sets = (evaluation.labelled_samples.name, "pixelcnn_unlabelled")
    names = ("real", "reconstructions", "gaussian_latent", "gaussian_image", *prior_sets)
    sets = {image_set.name: image_set for image_set in evaluation.sets}
    pictures = []
    for image_set in (sets[name] for name in names if name in sets):
        chosen, columns = _choose(image_set, len(evaluation.figures["class_names"]))
        captions = _names(image_set.labels, chosen, evaluation)
        png = grid_png(unit_images(image_set.images[chosen]), columns, captions)
        pictures.append(Picture(f"{len(chosen)} images: {image_set.title}", image_set.title, png))
    return pictures


def _choose(image_set: ImageSet, num_classes: int) -> tuple[Tensor, int]:
    """The first images of each class, so that each column shows one class. Or else simply the first images.

    Returns:
        positions in the set, row by row, and the number of columns.
    """
    num_shown = min(num_classes, COLUMNS)  # classes
    columns = whole_cycles(max(num_shown, 1))
    num, labels = NUM_ROWS * columns, image_set.labels
    if labels is not None:
        positions = [(labels == label).nonzero()[: num // num_shown, 0] for label in range(num_shown)]
        if min(map(len, positions)) == num // num_shown:
            return torch.stack(positions, dim=1).flatten(), columns
    return torch.arange(min(num, len(image_set.images))), columns


def _names(labels: Tensor | None, chosen: slice | Tensor, evaluation: Evaluation) -> Sequence[str]:
    """The classes of some images of a set, or nothing where it has none."""
    return () if labels is None else names_of(labels[chosen], evaluation.figures["class_names"])


def draw_closest(evaluation: Evaluation) -> list[Picture]:
    """The closest pairs of a sample and a training image, a picture for each class."""
    pictures = []
    for pairs in evaluation.closest:
        what = "all samples" if pairs.label is None else f"class {evaluation.figures['class_names'][pairs.label]}"
        distances = f"distance {pairs.distances.min():.3f} to {pairs.distances.max():.3f}"
        alt = f"{len(pairs.distances)} pairs of a sample and the training image nearest to it, {what}"
        pictures.append(Picture(alt, f"{what}: {distances}", grid_png(unit_images(pairs.images))))
    return pictures


def draw_all_closest(evaluation: Evaluation) -> bytes:
    """The closest pairs of all classes in one picture."""
    return grid_png(unit_images(torch.cat([pairs.images for pairs in evaluation.closest])))


def draw_plots(evaluation: Evaluation) -> dict[str, Picture]:
    """What the prior knows of the codes, and how the codes are used."""
    nats, unigram_nats = evaluation.nats, evaluation.unigram_nats
    maps = {"per-position unigram": unigram_nats, "PixelCNN": nats}
    counts = evaluation.code_counts
    num_used = int((counts > 0).sum())
    return {
        "nats-by-position": Picture(
            f"Two heat maps of nats per code by position: {unigram_nats.mean():.2f} on average under the per-position "
            f"unigram, {nats.mean():.2f} under the PixelCNN",
            "How well each code of a held-out map is predicted, in nats; less (darker) is better. The unigram knows "
            "only how often each code occurs at a position. The PixelCNN knows the codes before it too: where its map "
            "is no darker than the unigram's, it has learned nothing from them.",
            plot_heat_maps(maps),
        ),
        "code-usage": Picture(
            f"The share of each code, most frequent first: {num_used} of {len(counts)} codes are used",
            "How often each code is chosen for held-out images, the most frequent first. "
            f"{num_used} of {len(counts)} are used. A line near the dashed one makes good use of the codebook. One "
            "that ends early leaves codes without use.",
            plot_code_usage(counts),
        ),
    }
