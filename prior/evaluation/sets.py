"""Sets of images to be measured, and the samplers that they come from."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from prior.independent import draw_independently, uniform
from prior.likelihood import maps_at_once
from prior.maps import draw_maps
from prior.model import GatedPixelCNN
from prior.sampling import draw_labels
from vqvae.codec import decode_images, encode_images
from vqvae.compute import derive_seed, eval_mode
from vqvae.data.dataset import DatasetInfo, Split
from vqvae.data.pixels import to_bytes, unit_images
from vqvae.gaussian import gaussian_images, gaussian_latents
from vqvae.model import VQVAE

Progress = Callable[[int], object]  # is called with the number of items that were finished since the last call


class ImageSet(NamedTuple):
    """Images that came about in one way."""

    name: str  # for files
    title: str  # for people
    images: Tensor  # (N, C, H, W) uint8
    indices: Tensor | None = None  # (N, h, w) int64, the codes that were decoded; None for real images
    labels: Tensor | None = None  # (N,) int64, the classes that the images should be of


class Sampler(NamedTuple):
    """One way to come by code maps."""

    name: str
    title: str
    # A generator on the CPU to codes (N, h, w) int64. The second argument is called with the number of finished maps.
    draw: Callable[[torch.Generator, Progress], Tensor]
    labels: Tensor | None = None  # (N,) int64, the classes that the maps are drawn for


def choose(split: Split, num: int, seed: int) -> Split:
    """`num` images of a split, in its order. All of them, if there are no more.

    They are drawn, because neighbours are alike: the first thousand images of MNIST are by a few people, and two such
    thousands differ by far more than chance.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "images"))
    rows = torch.randperm(len(split.labels), generator=generator)[:num].sort().values
    return Split(split.images[rows], split.labels[rows])


def real_images(held_out: Split, info: DatasetInfo) -> ImageSet:
    """The held-out images themselves."""
    return ImageSet("real", "held-out images", held_out.images, labels=held_out.labels if info.class_names else None)


def decoded_images(sampler: Sampler, vqvae: VQVAE, seed: int, progress: Progress = lambda num_done: None) -> ImageSet:
    """What a sampler draws, decoded. Each sampler has a generator of its own, derived from the seed and its name."""
    generator = torch.Generator().manual_seed(derive_seed(seed, sampler.name))
    with eval_mode(vqvae):
        indices = sampler.draw(generator, progress).to(vqvae.device)
    images = to_bytes(decode_images(vqvae, indices))
    return ImageSet(sampler.name, sampler.title, images, indices, sampler.labels)


def make_samplers(
    vqvae: VQVAE,
    prior: GatedPixelCNN,
    info: DatasetInfo,
    held_out: Split,
    labels: Tensor,
    unigram: Tensor,
    *,
    seed: int,
    guidance: float,
) -> list[Sampler]:
    """All samplers, the best one first and noise last.

    Args:
        held_out: the images to reconstruct. Every sampler draws as many maps as these are.
        labels: (N,) int64, the labels that are asked for.
        unigram: (h, w, K) float64, each position's code frequencies.
        seed: draws the labels that are not asked for.
        guidance: of the samples with labels. If it is not 1, there are samples of guidance 1 too.
    """
    num = len(held_out.images)

    def reconstruct(generator: torch.Generator, progress: Progress) -> Tensor:
        return encode_images(vqvae, held_out.images)

    even = uniform(vqvae.map_shape, vqvae.config.num_codes)
    held_out_labels = held_out.labels if info.class_names else None
    return [
        Sampler("reconstructions", "their reconstructions", reconstruct, held_out_labels),
        *prior_samplers(prior, info, labels, num, seed=seed, guidance=guidance),
        Sampler("unigram", "per-position unigram", lambda g, _: draw_independently(unigram, num, g)),
        Sampler("uniform", "uniform code", lambda g, _: draw_independently(even, num, g)),
        Sampler("gaussian_latent", "gaussian latents", lambda g, _: gaussian_latents(vqvae, num, g)),
        Sampler("gaussian_image", "gaussian images", lambda g, _: gaussian_images(vqvae, num, g)),
    ]


def prior_samplers(
    prior: GatedPixelCNN, info: DatasetInfo, labels: Tensor, num: int, *, seed: int, guidance: float
) -> list[Sampler]:
    """The prior's own samplers. The first one is measured most closely.

    The prior without any label is not the prior's unlabelled distribution, which is a mixture over the labels. It is
    there because guidance goes away from it. Where the images have no classes, it is the only sampler.
    """

    at_once = max(maps_at_once(prior), 100)  # more than `draw_maps` takes, where memory allows it, for speed

    def with_labels(name: str, title: str, labels: Tensor, guidance: float) -> Sampler:
        def draw(generator: torch.Generator, progress: Progress) -> Tensor:
            return draw_maps(
                prior, num, generator, labels=labels, guidance=guidance, progress=progress, batch_size=at_once
            )

        return Sampler(name, title, draw, labels)

    without_label = Sampler(
        "pixelcnn",
        "pixelcnn without any label",
        lambda g, progress: draw_maps(prior, num, g, progress=progress, batch_size=at_once),
    )
    if not info.class_names:
        return [without_label._replace(title="pixelcnn")]
    asked_for = "pixelcnn, labels asked for, guidance"
    samplers = [with_labels("pixelcnn_labelled", f"{asked_for} 1", labels, 1.0)]
    if guidance != 1:
        samplers.insert(0, with_labels("pixelcnn_guided", f"{asked_for} {guidance:g}", labels, guidance))
    generator = torch.Generator().manual_seed(derive_seed(seed, "labels"))
    drawn_labels = draw_labels(info.class_frequencies, num, generator)
    title = f"pixelcnn, label drawn first, guidance {guidance:g}"
    return [*samplers, with_labels("pixelcnn_unlabelled", title, drawn_labels, guidance), without_label]


def unit_vectors(images: Tensor) -> Tensor:
    """uint8 images (N, C, H, W) as vectors (N, C H W) float32 in 0..1."""
    return unit_images(images).flatten(1)
