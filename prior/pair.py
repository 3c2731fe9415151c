"""Both stages as one object: a VQ-VAE and the prior over its codes.

Images are float32 in 0..1 here, (N, C, S, T), and lie on the CPU.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prior.labels import to_labels
from prior.likelihood import label_log_joint, nats_per_map
from prior.maps import check_maps, draw_labels_given, draw_maps
from prior.model import GatedPixelCNN, load_prior
from prior.sampling import check_options, draw_labels, guidance_for
from vqvae.codec import decode_images, encode_images
from vqvae.compute import derive_seed, memory_for, pick_device, require_samples, require_whole, seeded
from vqvae.data.dataset import DatasetInfo
from vqvae.data.pixels import from_unit_range
from vqvae.model import VQVAE, load_vqvae
from vqvae.storage.checkpoint import Header
from vqvae.storage.recipe import from_dict
from vqvae.storage.runs import describe, find_pair


class Samples(NamedTuple):
    """Drawn images, and what they were drawn from."""

    images: Tensor  # (N, C, S, T) float32 in 0..1
    indices: Tensor  # (N, H, W) int64
    labels: Tensor  # (N,) int64, asked for or drawn


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
        labels: Iterable[int | str] | None = None,
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
            labels: classes, by number or by name, to draw in turn, as often as it takes. None draws each label first,
                from the frequencies of the training set, and then the map given the label.
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
        cycle = None if labels is None else self._to_labels(labels)
        num = (1 if cycle is None else len(cycle)) if num_samples is None else num_samples
        num = require_samples(num, 2 * math.prod(self.vqvae.image_shape))  # two: batches of images, and all of them
        with memory_for("num_samples"):
            if cycle is None:
                drawn_labels = draw_labels(self.info.class_frequencies, num, seeded(derive_seed(seed, "labels")))
            else:
                drawn_labels = cycle[torch.arange(num) % len(cycle)]
            options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "progress": progress}
            return self._draw(generator, drawn_labels, guidance, **options)

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

    def log_likelihood(self, images: Tensor, labels: Iterable[int | str] | None = None) -> Tensor:
        """log p(map | label), or log p(map), of each image's code map: (N,) float64, in nats.

        Args:
            labels: one for each image, by number or by name. None sums over the labels, each with its frequency in the
                training set.
        Raises:
            InputError: images of another shape, or not in 0..1, or labels that do not fit them.
        """
        indices = self.encode(images)
        if labels is None:
            return label_log_joint(self.prior, indices, self.info.class_frequencies).logsumexp(dim=1)
        return -nats_per_map(self.prior, indices, self._to_labels(labels, len(indices)))

    def label_probabilities(self, images: Tensor) -> Tensor:
        """p(label | map) of each image's code map by Bayes' rule: (N, num_classes) float64, or (N, 1) without classes.

        Raises:
            InputError: images of another shape, or not in 0..1.
        """
        joint = label_log_joint(self.prior, self.encode(images), self.info.class_frequencies)
        return joint.softmax(dim=1)

    def complete(self, images: Tensor, num_rows: int, num_samples: int = 1, **options: Any) -> Tensor:
        """Keep the first rows of each image's code map and draw the rest: those of `draw_completions`.

        Args:
            num_rows: rows of codes to keep, 0..H.
            options: labels, seed and the others of `draw_completions`.
        Returns:
            new images (N num_samples, C, S, T), those of the first image first.
        Raises:
            InputError: images of another shape, or not in 0..1, or an option out of its range.
        """
        return self.draw_completions(self.keep_rows(self.encode(images), num_rows), num_samples, **options).images

    def keep_rows(self, indices: Tensor, num_rows: int) -> Tensor:
        """Code maps (N, H, W) of which the first rows are known, and -1 stands where a code is to be drawn.

        Args:
            num_rows: rows to keep, 0..H.
        Raises:
            InputError: another number of rows.
        """
        height = self.vqvae.map_shape[0]
        num_rows = require_whole("num_rows", num_rows, 0, height, f"try `num_rows={height // 2}`")
        return torch.cat([indices[:, :num_rows], torch.full_like(indices[:, num_rows:], -1)], dim=1)

    def draw_completions(
        self,
        known_codes: Tensor,
        num_samples: int = 1,
        *,
        labels: Iterable[int | str] | None = None,
        seed: int = 0,
        guidance: float | None = None,
        **options: Any,
    ) -> Samples:
        """Keep the known codes of maps and draw the others: images, codes and labels, N num_samples of each.

        The known codes may have any shape, but maps are drawn in raster order: what is drawn depends on the known codes
        before it, and not on those after it. Sample s of map n takes the random numbers that `draw` takes for its
        sample n num_samples + s. So a completion depends on the place of its map, but not on the other maps.

        Args:
            known_codes: (N, H, W) int64, codes to keep, and -1 where one is to be drawn.
            num_samples: completions of each map. Those of the first map stand first.
            labels: one for each map, by number or by name. None draws each label from p(label | the codes before the
                first one to be drawn).
            options: seed, guidance, temperature, top_k, top_p and progress of `draw`.
        Raises:
            InputError: maps of another shape or dtype, codes that do not exist, or an option out of its range.
        """
        generator = seeded(seed)
        check_options(guidance, *(options.get(name) for name in ("temperature", "top_k", "top_p")))
        check_maps("known codes", known_codes, self.prior.map_shape, self.prior.num_codes, least=-1)
        known_codes = known_codes.cpu()
        num_samples = require_whole("num_samples", num_samples, 1, remedy="try `num_samples=1`")
        require_samples(len(known_codes) * num_samples, 2 * math.prod(self.vqvae.image_shape))
        with memory_for("num_samples"):
            if labels is not None:
                of_each = self._to_labels(labels, len(known_codes)).repeat_interleave(num_samples)
            else:
                frequencies, uniforms = self.info.class_frequencies, seeded(derive_seed(seed, "labels"))
                of_each = draw_labels_given(self.prior, known_codes, frequencies, num_samples, uniforms)
            known_codes = known_codes.repeat_interleave(num_samples, dim=0)
            return self._draw(generator, of_each, guidance, known_codes=known_codes, **options)

    def _draw(self, generator: torch.Generator, labels: Tensor, guidance: float | None, **options: Any) -> Samples:
        """`draw_maps`, decoded."""
        guidance = guidance_for(self.prior.num_classes, guidance)
        indices = draw_maps(self.prior, len(labels), generator, labels=labels, guidance=guidance, **options)
        return Samples(self.decode(indices), indices, labels)

    def _to_labels(self, labels: Iterable[int | str], num: int | None = None) -> Tensor:
        return to_labels(labels, self.prior.num_classes, num, class_names=self.info.class_names)


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
