"""Whole sets of images to code maps and back, in batches, with a VQ-VAE in eval mode.

No images at all are one empty batch, so that the result has its shape and its type.
"""

import torch
from torch import Tensor

from vqvae.compute import eval_mode, images_at_once, in_batches
from vqvae.data.pixels import pixel_errors, to_model_range, to_unit_range, unit_images
from vqvae.model import VQVAE

BATCH = 500


def encode_images(model: VQVAE, images: Tensor) -> Tensor:
    """Code maps (N, H, W) int64, on the model's device, of images (N, C, S, T).

    Args:
        images: uint8, or floating point in the model's range -1..1.
    """
    with eval_mode(model):
        at_once = images_at_once(BATCH, model.image_shape)
        batches = (images[rows].to(model.device) for rows in in_batches(max(len(images), 1), at_once))
        indices = [model.encode(to_model_range(x) if x.dtype == torch.uint8 else x) for x in batches]
    return torch.cat(indices)  # outside of inference mode, so that the result can take part in training


def decode_images(model: VQVAE, indices: Tensor) -> Tensor:
    """Images (N, C, S, T), float32 in 0..1, on the CPU, of code maps (N, H, W)."""
    with eval_mode(model):
        at_once = images_at_once(BATCH, model.image_shape)
        batches = (indices[rows].to(model.device) for rows in in_batches(max(len(indices), 1), at_once))
        images = [to_unit_range(model.decode_indices(batch).float()).cpu() for batch in batches]
    return torch.cat(images)


def reconstruct_images(model: VQVAE, images: Tensor) -> tuple[Tensor, Tensor]:
    """Code maps (N, H, W), on the model's device, and reconstructions (N, C, S, T) in 0..1, on the CPU, of images as
    `encode_images` takes them."""
    indices = encode_images(model, images)
    return indices, decode_images(model, indices)


def reconstruct(model: VQVAE, images: Tensor) -> dict[str, Tensor]:
    """Images (N, C, S, T) uint8 through stage one and back, with what that loses.

    Returns:
        `images` and `reconstructions` (N, C, S, T) in 0..1, `indices` (N, H, W), and of each image's pixels the
        `squared_error` and `psnr_db` (N,), all on the CPU.
    """
    originals = unit_images(images)
    indices, reconstructions = reconstruct_images(model, images)
    error, psnr = pixel_errors(originals, reconstructions)
    arrays = {"images": originals, "reconstructions": reconstructions, "indices": indices.cpu()}
    return {**arrays, "squared_error": error, "psnr_db": psnr}
