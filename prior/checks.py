"""What a caller gives to a prior, checked: labels and code maps."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from vqvae.compute import require_whole
from vqvae.errors import InputError


def to_labels(labels: Iterable[int] | Tensor, num_classes: int, num: int | None = None) -> Tensor:
    """Labels as a tensor (N,) int64, checked. Without classes every label is 0, which stands for none there.

    Args:
        labels: whole numbers in a list, a tensor, an array, or anything else that gives them one by one.
        num: N; None stands for any number of at least 1.
    Raises:
        InputError: another number of labels, or labels that are no whole numbers or no classes.
    """
    tensor = _to_tensor(labels)
    if num is not None and len(tensor) != num:
        raise InputError(f"expected {num} labels, one for each image, found {len(tensor)}; give as many `labels`")
    if len(tensor) == 0:
        raise InputError("expected at least one label, found none; leave `labels` out to draw any")
    if num_classes == 0 and tensor.any():
        raise InputError("expected no labels, because the prior has no classes, found some; leave `labels` out")
    wrong = tensor[(tensor < 0) | (tensor >= max(num_classes, 1))]
    if len(wrong) > 0:
        raise InputError(f"expected labels in 0..{num_classes - 1}, found {int(wrong[0])}; choose others by `labels`")
    return tensor


def _to_tensor(labels: Any) -> Tensor:
    if isinstance(labels, Tensor) and labels.dtype == torch.int64 and labels.ndim == 1:
        return labels  # there may be millions
    try:
        values = list(labels.tolist() if hasattr(labels, "tolist") else labels)
    except TypeError:  # a single number, for instance
        raise InputError(f"expected a list of `labels`, found {labels!r:.80}; try `labels=[0, 1]`") from None
    return torch.tensor([require_whole("labels", value, -(2**63)) for value in values], dtype=torch.int64)


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
