"""Code maps that a caller gives to a prior, checked."""

import torch
from torch import Tensor

from vqvae.errors import InputError


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
