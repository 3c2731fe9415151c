"""The ranges of pixel values, and every conversion between them.

Datasets hold bytes, 0..255. The model reads and writes -1..1. Pictures, arrays for the user and reported errors have
the unit range, 0..1.
"""

import torch
from torch import Tensor

from vqvae.errors import InputError, plain


def to_model_range(images: Tensor) -> Tensor:
    """uint8 in 0..255 to float32 in -1..1, the range that the model reads and writes."""
    return images.float() / 127.5 - 1


def to_unit_range(x: Tensor) -> Tensor:
    """The model's -1..1 to 0..1. The model's output may lie outside -1..1; it is clamped."""
    return ((x + 1) / 2).clamp(0, 1)


def unit_images(images: Tensor) -> Tensor:
    """uint8 images as float32 in 0..1, rounded exactly as the model's output is."""
    return to_unit_range(to_model_range(images))


def to_bytes(images: Tensor) -> Tensor:
    """0..1 to uint8 in 0..255, each value rounded to the nearest, as a PNG stores it."""
    return (images * 255).round().to(torch.uint8)


def from_unit_range(images: Tensor, image_shape: tuple[int, int, int]) -> Tensor:
    """A caller's images (N, C, H, W) in 0..1, checked, to float32 in -1..1.

    Args:
        images: of any floating-point type.
        image_shape: (C, H, W), which the images must have.
    Raises:
        InputError: the images have another shape or type, or values that are NaN or outside 0..1.
    """
    if not isinstance(images, Tensor):
        raise InputError(f"expected a tensor of images, found {type(images).__name__}; convert it to a tensor")
    if images.ndim != 4 or tuple(images.shape[1:]) != tuple(image_shape):
        expected = ", ".join(map(str, image_shape))
        raise InputError(
            f"expected images of shape (N, {expected}), found {tuple(images.shape)}; resize or convert them first"
        )
    if len(images) == 0:
        raise InputError("expected at least one image, found none; give one")
    if not images.is_floating_point():
        raise InputError(f"expected images of floating-point values in 0..1, found {images.dtype}; divide bytes by 255")
    images = images.float()
    if images.isnan().any():
        raise InputError("expected images with values in 0..1, found values that are NaN; remove them first")
    if not (images.min() >= 0 and images.max() <= 1):
        least, most = (plain(value) for value in (images.min().cpu().numpy(), images.max().cpu().numpy()))
        raise InputError(f"expected images with values in 0..1, found values from {least} to {most}; scale them first")
    return images * 2 - 1


def pixel_errors(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The mean squared error and the PSNR in dB, (N,) each, of images (N, C, H, W) in 0..1 from others.

    Images that are equal have 100 dB, where the PSNR would be infinite.
    """
    error = (x - y).square().flatten(1).mean(1)
    return error, -10 * error.clamp(min=1e-10).log10()
