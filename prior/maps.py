"""Code maps: drawn from the prior, hidden where codes are unknown, the labels that known codes suggest, and a check."""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prior.incremental import IncrementalLogits
from prior.labels import to_labels
from prior.likelihood import label_log_joint
from prior.model import GatedPixelCNN
from prior.sampling import invert_cumulative, sample_codes
from vqvae.compute import eval_mode, memory_for, require_samples
from vqvae.errors import InputError, plain
from vqvae.pictures import GREY


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


def hide_unknown(images: Tensor, maps: Tensor) -> Tensor:
    """Decoded images (N, C, S, T) in 0..1, grey at the cells of their maps (N, H, W) where a code is unknown, -1.

    A pixel depends on codes around its cell too, so the pixels beside a grey cell know a little of what was decoded
    there.
    """
    unknown = F.interpolate((maps < 0)[:, None].float(), images.shape[2:])  # (N, 1, S, T), each cell enlarged
    return images.where(unknown == 0, GREY)


def draw_labels_given(
    prior: GatedPixelCNN, known_codes: Tensor, frequencies: Tensor, num_samples: int, generator: torch.Generator
) -> Tensor:
    """Labels (N num_samples,) int64 drawn from p(label | the codes before the first unknown one), map by map.

    Args:
        known_codes: (N, H, W) int64, and -1 where a code is unknown. Codes after the first unknown one don't count,
            because their probability under a label is not known before the codes between are drawn.
        frequencies: p(label), (num_classes,).
        num_samples: labels for each map.
        generator: on the CPU. It gives one uniform number for each label.
    """
    counted = (known_codes >= 0).flatten(1).cumprod(dim=1).bool().view_as(known_codes)
    joint = label_log_joint(prior, known_codes.clamp(min=0), frequencies, counted=counted)
    chances = joint.softmax(dim=1).repeat_interleave(num_samples, dim=0)  # (N num_samples, num_classes)
    return invert_cumulative(chances, torch.rand(len(chances), generator=generator, dtype=torch.float64))


def check_maps(
    what: str, maps: object, map_shape: tuple[int, int], num_codes: int, *, num: int | None = None, least: int = 0
) -> None:
    """Refuse code maps that no VQ-VAE of this kind gives.

    Args:
        what: how a message names the maps.
        maps: (N, H, W) int64 in least..num_codes - 1, on any device.
        map_shape: (H, W).
        num: N; None stands for any number of at least 1.
    Raises:
        InputError: they are something else.
    """
    found = type(maps).__name__
    if isinstance(maps, Tensor):
        shape = (len(maps) if num is None and maps.ndim > 0 else num, *map_shape)
        if maps.dtype == torch.int64 and maps.shape == shape and len(maps) > 0:
            low, high = int(maps.min()), int(maps.max())
            if not least <= low <= high < num_codes:
                raise InputError(
                    f"expected {what} in {least}..{num_codes - 1}, found {low} to {high}; encode the images anew"
                )
            return
        found = f"{maps.dtype} of shape {tuple(maps.shape)}"
    expected = f"({'N' if num is None else num}, {map_shape[0]}, {map_shape[1]})"
    raise InputError(f"expected {what} as torch.int64 of shape {expected}, found {found}; encode the images anew")
