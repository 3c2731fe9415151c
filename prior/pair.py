"""Both stages as one object: a VQ-VAE and the prior over its codes.

Images are float32 in 0..1 here, (N, C, S, T), and lie on the CPU.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prior.checks import check_maps, to_labels
from prior.incremental import IncrementalLogits
from prior.likelihood import label_log_joint, nats_per_map
from prior.model import GatedPixelCNN, load_prior
from prior.sampling import GUIDANCE, check_options, draw_labels, invert_cumulative, sample_codes
from vqvae.codec import decode_images, encode_images
from vqvae.compute import derive_seed, eval_mode, memory_for, pick_device, require_samples, require_whole, seeded
from vqvae.data.dataset import DatasetInfo
from vqvae.data.pixels import from_unit_range
from vqvae.errors import InputError, plain
from vqvae.model import VQVAE, load_vqvae
from vqvae.storage.checkpoint import Header
from vqvae.storage.recipe import from_dict
from vqvae.storage.runs import describe, find_pair


class Samples(NamedTuple):
    """Drawn images, and what they were drawn from."""

    images: Tensor  # (N, C, S, T) float32 in 0..1
    indices: Tensor  # (N, H, W) int64
    labels: Tensor  # (N,) int64, asked for or drawn


def draw_maps(
    prior: GatedPixelCNN,
    num_samples: int,
    generator: torch.Generator,
    *,
    labels: Tensor | None = None,
    known_codes: Tensor | None = None,
    guidance: float = 1.0,
    **options: Any,
) -> Tensor:
    """Draw code maps (num_samples, H, W) int64, on the CPU.

    Args:
        generator: on the CPU. It gives num_samples H W uniform numbers, map by map.
        labels: (num_samples,) int64 classes. None draws without any label; `Pair.draw` draws the labels first instead.
        known_codes: (num_samples, H, W) int64, codes to keep, and -1 where one is to be drawn.
        guidance: needs labels, unless it is 1.
        options: temperature, top_k, top_p, batch_size and progress of `sampling.sample_codes`.
    Raises:
        InputError: an option out of its range, or labels or codes that do not exist.
    """
    num_samples = require_samples(num_samples, 4 * math.prod(prior.map_shape))  # 8 bytes a uniform, 8 a code
    if labels is not None:
        labels = to_labels(labels, prior.num_classes, num_samples)
    elif guidance != 1:
        raise InputError(f"expected labels with `guidance={plain(guidance)}`, found none; give `labels` too")
    else:
        labels = torch.full((num_samples,), prior.no_label)
    if known_codes is not None:
        check_maps("known codes", known_codes, prior.map_shape, prior.num_codes, num=num_samples, least=-1)
    with memory_for("num_samples"), eval_mode(prior):
        uniforms = torch.rand(num_samples, *prior.map_shape, generator=generator, dtype=torch.float64)
        maps = sample_codes(
            partial(IncrementalLogits, prior),
            uniforms,
            labels.to(prior.device),
            no_label=prior.no_label,
            known_codes=known_codes,
            guidance=guidance,
            **options,
        )
    return maps.clone()  # outside of inference mode, so that the maps can be used for anything


@dataclass(frozen=True)
class Pair:
    """A VQ-VAE and its prior, in eval mode."""

    vqvae: VQVAE
    prior: GatedPixelCNN
    vqvae_header: Header
    prior_header: Header
    files: tuple[Path, Path]  # where the two were loaded from

    @property
    def origin(self) -> str:
        """Where the two come from, for people."""
        return " and ".join(map(describe, self.files))

    @property
    def info(self) -> DatasetInfo:
        """The dataset that the prior learned: image shape, class names and class frequencies."""
        return from_dict(DatasetInfo, self.prior_header.data)

    def sample(self, num_samples: int | None = None, **options: Any) -> Tensor:
        """New images (N, C, S, T): those of `draw`, which has the same arguments."""
        return self.draw(num_samples, **options).images

    def draw(
        self,
        num_samples: int | None = None,
        *,
        labels: Iterable[int] | None = None,
        seed: int = 0,
        guidance: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        progress: Callable[[int], object] = lambda num_done: None,
    ) -> Samples:
        """New images with their codes and labels.

        Args:
            num_samples: how many. By default one for each label, or 1 without labels.
            labels: classes to draw in turn, as often as it takes. None draws each label first, from the frequencies
                of the training set, and then the map given the label.
            seed: the same seed gives the same images.
            guidance: 1 is the prior itself, more follows the label more closely (arXiv:2207.12598). None stands for
                `sampling.GUIDANCE`.
            temperature: over 0; below 1 safer, above 1 wilder. None stands for 1.
            top_k: draw among the k most likely codes.
            top_p: draw among the most likely codes that together have this probability, in (0, 1]. None stands for 1.
            progress: called with the number of images that were finished since the last call.
        Raises:
            InputError: an option out of its range, or a label that is no class.
        """
        check_options(guidance, temperature, top_k, top_p)
        generator = seeded(seed)
        cycle = None if labels is None else to_labels(labels, self.prior.num_classes)
        num = (1 if cycle is None else len(cycle)) if num_samples is None else num_samples
        num = require_samples(num, 2 * math.prod(self.vqvae.image_shape))  # two: batches of images, and all of them
        with memory_for("num_samples"):
            if cycle is None:
                drawn_labels = draw_labels(self.info.class_frequencies, num, seeded(derive_seed(seed, "labels")))
            else:
                drawn_labels = cycle[torch.arange(num) % len(cycle)]
            indices = draw_maps(
                self.prior,
                num,
                generator,
                labels=drawn_labels,
                guidance=self._guidance(guidance),
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                progress=progress,
            )
            return Samples(self.decode(indices), indices, drawn_labels)

    def encode(self, images: Tensor) -> Tensor:
        """Code maps (N, H, W) int64 of images.

        Raises:
            InputError: images of another shape, or not in 0..1.
        """
        return encode_images(self.vqvae, from_unit_range(images, self.vqvae.image_shape)).cpu()

    def decode(self, indices: Tensor) -> Tensor:
        """Images of code maps (N, H, W) int64.

        Raises:
            InputError: maps of another shape or dtype, or codes that do not exist.
        """
        check_maps("codes", indices, self.vqvae.map_shape, self.vqvae.config.num_codes)
        return decode_images(self.vqvae, indices)

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images through stage one and back, (N, C, S, T).

        Raises:
            InputError: images of another shape, or not in 0..1.
        """
        return self.decode(self.encode(images))

    def log_likelihood(self, images: Tensor, labels: Iterable[int] | None = None) -> Tensor:
        """log p(map | label), or log p(map), of each image's code map: (N,) float64, in nats.

        Args:
            labels: one for each image. None sums over the labels, each with its frequency in the training set.
        Raises:
            InputError: images of another shape, or not in 0..1, or labels that do not fit them.
        """
        indices = self.encode(images)
        if labels is None:
            return label_log_joint(self.prior, indices, self.info.class_frequencies).logsumexp(dim=1)
        return -nats_per_map(self.prior, indices, to_labels(labels, self.prior.num_classes, len(indices)))

    def label_probabilities(self, images: Tensor) -> Tensor:
        """p(label | map) of each image's code map by Bayes' rule: (N, num_classes) float64, or (N, 1) without classes.

        Raises:
            InputError: images of another shape, or not in 0..1.
        """
        joint = label_log_joint(self.prior, self.encode(images), self.info.class_frequencies)
        return joint.softmax(dim=1)

    def complete(
        self, images: Tensor, num_rows: int, *, labels: Iterable[int] | None = None, seed: int = 0, **options: Any
    ) -> Tensor:
        """Keep the first rows of each image's code map and draw the rest: new images (N, C, S, T).

        Args:
            num_rows: rows of codes to keep, 0..H.
            labels: one for each image. None draws each label from p(label | kept rows).
            options: guidance, temperature, top_k and top_p of `draw`.
        Raises:
            InputError: images of another shape, or not in 0..1, or an option out of its range.
        """
        height, generator = self.vqvae.map_shape[0], seeded(seed)
        num_rows = require_whole("num_rows", num_rows, 0, height, f"try `num_rows={height // 2}`")
        check_options(*(options.get(name) for name in ("guidance", "temperature", "top_k", "top_p")))
        known = self.encode(images)
        if labels is None:
            joint = label_log_joint(self.prior, known, self.info.class_frequencies, num_rows=num_rows)
            uniforms = torch.rand(len(known), generator=seeded(derive_seed(seed, "labels")), dtype=torch.float64)
            drawn_labels = invert_cumulative(joint.softmax(dim=1), uniforms)
        else:
            drawn_labels = to_labels(labels, self.prior.num_classes, len(known))
        known[:, num_rows:] = -1
        options["guidance"] = self._guidance(options.get("guidance"))
        maps = draw_maps(self.prior, len(known), generator, labels=drawn_labels, known_codes=known, **options)
        return self.decode(maps)

    def _guidance(self, guidance: float | None) -> float:
        """The default where none is given. Without classes there is nothing to guide by."""
        default = GUIDANCE if self.prior.num_classes > 0 else 1.0
        return default if guidance is None else guidance


def load(vqvae: str | Path | None = None, prior: str | Path | None = None, device: str | torch.device = "auto") -> Pair:
    """A VQ-VAE and the prior that was trained on its codes, as one object.

    Args:
        vqvae, prior: weights files. One that is not named is searched for: your newest run under `checkpoints/`, or
            else the shipped weights.
        device: "cpu", "cuda", or "auto" for CUDA where there is a device.
    Raises:
        InputError: a file that is missing or damaged, or two that do not belong together.
    """
    where = pick_device(device)
    files = find_pair(None if vqvae is None else Path(vqvae), None if prior is None else Path(prior))
    model, vqvae_header = load_vqvae(files[0], where)
    network, prior_header = load_prior(files[1], model, vqvae_header, where)
    return Pair(model, network, vqvae_header, prior_header, files)
