"""Images of which the first rows of codes are kept and the others are drawn, for a picture or for arrays."""

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prior.labels import names_of
from prior.maps import hide_unknown
from prior.pair import Pair
from vqvae.codec import decode_images, encode_images
from vqvae.data.pixels import unit_images


class Completions(NamedTuple):
    """N images with M completions each. All images are float32 in 0..1."""

    images: Tensor  # (N, C, S, T), the originals
    kept: Tensor  # (N, C, S, T), their reconstructions, grey where the codes are not kept
    completions: Tensor  # (N, M, C, S, T)
    indices: Tensor  # (N, M, H, W) int64, the codes of the completions
    labels: Tensor  # (N, M) int64, asked for or drawn


def complete(
    pair: Pair,
    images: Tensor,
    num_rows: int | None = None,
    num_samples: int = 1,
    *,
    label: int | None = None,
    **options: Any,
) -> Completions:
    """Complete images: see `Pair.draw_completions`.

    Args:
        images: (N, C, S, T) uint8 in 0..255.
        num_rows: rows of codes to keep, 0..H. None stands for half of them.
        num_samples: completions of each image.
        label: of all completions. None draws one for each, from p(label | the kept codes).
        options: seed, guidance, temperature, top_k, top_p and progress of `Pair.draw_completions`.
    Raises:
        InputError: an option out of its range, or a label that is no class.
    """
    indices = encode_images(pair.vqvae, images).cpu()
    known = pair.keep_rows(indices, indices.shape[1] // 2 if num_rows is None else num_rows)
    labels = None if label is None else [label] * len(images)
    drawn = pair.draw_completions(known, num_samples, labels=labels, **options)
    kept = hide_unknown(decode_images(pair.vqvae, indices), known)
    of_each = (part.unflatten(0, (len(images), num_samples)) for part in drawn)
    return Completions(unit_images(images), kept, *of_each)


def as_grid(completions: Completions, class_names: Sequence[str]) -> dict[str, Any]:
    """What `output.save_images` shows: a row for each image, with the original, what was kept, and the completions
    under the names of their labels."""
    images, kept, drawn, _, labels = completions
    rows = torch.cat([images[:, None], kept[:, None], drawn], dim=1)  # (N, 2 + M, C, S, T)
    names = [names_of(row, class_names) or [""] * len(row) for row in labels]
    captions = [["original", "kept", *row] for row in names]
    return {"shown": rows.flatten(0, 1), "columns": rows.shape[1], "captions": [*chain.from_iterable(captions)]}
