"""Deformed images: how far each kind may be deformed and still show the same, and the deforming."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Deformation(NamedTuple):
    """How far an image may be deformed and still show the same. A classifier learns from images that are deformed so,
    and a prior from some that are deformed less. Each amount is drawn uniformly up to the one that stands here. The
    default is for images of any kind.
    """

    rotation: float = 0.0  # radians
    scaling: float = 0.1  # share of the size
    shift: float = 0.1  # share of half the image's side
    flips: bool = False  # left and right, half of the images

    def scaled(self, share: float) -> "Deformation":
        """The same with each amount multiplied by `share`."""
        return self._replace(rotation=share * self.rotation, scaling=share * self.scaling, shift=share * self.shift)


ANY_KIND = Deformation()


def deform(x: Tensor, deformation: Deformation) -> Tensor:
    """Images (B, C, H, W) in -1..1, each rotated, scaled, shifted and perhaps mirrored. What comes in from outside is
    -1, black.

    The amounts come from the global generator, separately for each image.
    """

    def draw(most: float) -> Tensor:
        return torch.empty(len(x), device=x.device).uniform_(-most, most)

    angle, scale = draw(deformation.rotation), 1 + draw(deformation.scaling)
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    shift = deformation.shift
    rows = [torch.stack([cosine, -sine, draw(shift)], 1), torch.stack([sine, cosine, draw(shift)], 1)]
    if deformation.flips:
        rows[0] = rows[0] * draw(1).sign()[:, None]
    positions = F.affine_grid(torch.stack(rows, dim=1), list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, positions, align_corners=False) - 1  # grid_sample fills with 0, which becomes -1
