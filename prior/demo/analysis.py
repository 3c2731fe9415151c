"""What the model says of one image: its codes, what they bring back, how likely they are, and which label fits."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from prior.likelihood import nats_per_map
from prior.pair import Pair
from vqvae.codec import reconstruct_images
from vqvae.data.pixels import unit_images

MOST_LABELS = 3


class Analysis(NamedTuple):
    """An image in 0..1, through both stages."""

    image: Tensor  # (C, S, T), as the model reads it
    indices: Tensor  # (H, W) int64
    reconstruction: Tensor  # (C, S, T)
    bits: float  # -log2 p(map), without a label told: the more, the less likely
    likeliest: list[tuple[str, float]]  # class names with p(label | map), the likeliest first; [] without classes


def analyse(pair: Pair, image: Tensor) -> Analysis:
    """An image (C, S, T) uint8 of the model's shape, through both stages."""
    indices, reconstruction = reconstruct_images(pair.vqvae, image[None])
    names, frequencies = pair.info.class_names, pair.info.class_frequencies
    labels = torch.arange(len(names)) if names else torch.tensor([pair.prior.no_label])
    # All labels as one batch: `likelihood.label_log_joint` takes a pass for each, which is slow for a single map.
    joint = -nats_per_map(pair.prior, indices.expand(len(labels), -1, -1), labels)
    if names:
        joint += frequencies.log()
    chances = joint.softmax(dim=0)
    order = chances.argsort(descending=True)[:MOST_LABELS].tolist() if names else []
    return Analysis(
        unit_images(image),
        indices[0].cpu(),
        reconstruction[0],
        float(-joint.logsumexp(dim=0)) / math.log(2),
        [(names[label], float(chances[label])) for label in order],
    )


def bits_at_random(pair: Pair) -> float:
    """The bits of any map where all codes are equally likely everywhere."""
    return math.log2(pair.prior.num_codes) * math.prod(pair.prior.map_shape)
