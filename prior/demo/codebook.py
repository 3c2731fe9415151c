"""What each code stands for: how often it is used, the patch of a picture that it draws, and where it is used."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from prior.pair import Pair
from vqvae.codec import decode_images, encode_images
from vqvae.data.pixels import unit_images
from vqvae.quantizer import count_codes

NUM_IMAGES = 2000  # whose codes are counted, at most
NUM_DRAWN = 200  # images that the prior draws, where there are none
MOST_CODES = 512  # shown, the most used ones
MOST_PLACES = 12


class Codebook(NamedTuple):
    """The codes in N images. A patch is three cells of the map high and wide, the code's own in the middle."""

    images: Tensor  # (N, C, S, T) in 0..1
    indices: Tensor  # (N, H, W) int64
    codes: Tensor  # (n,) int64, the most used first, each used at least once
    uses: Tensor  # (n,) float64, their shares of all codes in the images
    patches: Tensor  # (n, C, 3s, 3t) in 0..1, the mean of what the decoder draws there


def collect_codes(pair: Pair, images: Tensor | None = None) -> Codebook:
    """The codes in images (N, C, S, T) uint8 or, without any, in images that the prior draws."""
    if images is None:
        decoded, indices, _ = pair.draw(NUM_DRAWN)
        unit = decoded
    else:
        unit, indices = unit_images(images), encode_images(pair.vqvae, images).cpu()
        decoded = decode_images(pair.vqvae, indices)
    counts = count_codes(indices, pair.vqvae.config.num_codes)
    codes = counts.argsort(descending=True, stable=True)[: min(MOST_CODES, int((counts > 0).sum()))]
    uses = counts.double() / counts.sum()
    return Codebook(unit, indices, codes, uses[codes], _mean_patches(decoded, indices, counts)[codes])


def find_places(codebook: Codebook, code: int) -> list[tuple[Tensor, int, int]]:
    """Images (C, S, T) in 0..1 with the row and the column of the map where a code is used, one place of each."""
    places = (codebook.indices == code).nonzero().tolist()
    one = {number: (row, column) for number, row, column in places}  # of each image, the last
    return [(codebook.images[number], *cell) for number, cell in list(one.items())[:MOST_PLACES]]


def colours(codebook: Tensor) -> list[tuple[int, int, int]]:
    """A colour (red, green, blue) in 0..255 for each code (K, D). Codes whose vectors are close look alike.

    The first three principal components of the vectors, each by its ranks, give the three values.
    """
    centred = codebook.double().cpu() - codebook.double().cpu().mean(dim=0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    components = F.pad(centred @ axes[:3].T, (0, max(3 - len(axes), 0)))  # (K, 3)
    ranks = components.argsort(dim=0, stable=True).argsort(dim=0).double() / max(len(components) - 1, 1)
    return [(red, green, blue) for red, green, blue in (40 + 200 * ranks).round().int().tolist()]


def _mean_patches(images: Tensor, indices: Tensor, counts: Tensor) -> Tensor:
    """The mean patch (K, C, 3s, 3t) around the cells of each code, of images (N, C, S, T) with maps (N, H, W).

    Args:
        counts: (K,) int64, how often each code is in the maps.
    """
    height, width = images.shape[2] // indices.shape[1], images.shape[3] // indices.shape[2]
    padded = F.pad(images, (width, width, height, height))
    windows = padded.unfold(2, 3 * height, height).unfold(3, 3 * width, width)  # (N, C, H, W, 3s, 3t)
    sums = torch.zeros(len(counts), images.shape[1], 3 * height, 3 * width)
    for some, codes in zip(windows, indices, strict=True):  # image by image, because the windows overlap
        sums.index_add_(0, codes.flatten(), rearrange(some, "c h w s t -> (h w) c s t"))
    return sums / counts.clamp(min=1)[:, None, None, None]
