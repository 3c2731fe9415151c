"""The sampling modes side by side: one labelled sheet of pictures, and figures for a table."""

from typing import NamedTuple

import torch
from torch import Tensor

from prior.model import GatedPixelCNN
from prior.sampling import GUIDANCE, sample
from prior.train import objective
from vqvae.common.data import NUM_CLASSES, Split, to_model_range, to_unit_range
from vqvae.common.engine import derive_seed, evaluating
from vqvae.common.errors import UserError
from vqvae.common.fidelity import nearest
from vqvae.common.metrics import codes_used, count_codes
from vqvae.gaussian import gaussian_images, gaussian_latents
from vqvae.model import VQVAE
from vqvae.train import decode, reconstruct


class Mode(NamedTuple):
    """One way to come by images, what it gave, and figures of it."""

    name: str  # short, for arrays
    title: str  # for people
    images: Tensor  # (N, 1, S, S) float32 in 0..1
    indices: Tensor  # (N, H, W) int64
    labels: Tensor  # (N,) int64, the digits meant, -1 where none is
    codes_used: int  # different codes in the maps
    nats_per_code: float  # of the maps under the prior, without labels
    distance: float  # root mean square over pixels to the nearest reference digit, mean over images


def compare(
    vqvae: VQVAE, prior: GatedPixelCNN, test: Split, reference: Split, num_samples: int, seed: int
) -> list[Mode]:
    """Real digits, their reconstructions, both Gaussian baselines and the prior's samples.

    Args:
        test: the real digits come from it: the first of each class, columns 0 to 9.
        reference: digits that distances are measured to; not the test split.
        num_samples: of each mode, a multiple of 10.
        seed: each mode draws from a generator of its own, derived from it.
    """
    chosen = first_of_each_class(test.labels, num_samples // NUM_CLASSES)
    labels = test.labels[chosen]
    real = test.images[chosen].to(vqvae.device)
    maps, reconstructions = reconstruct(vqvae, real)
    digits = to_unit_range(to_model_range(reference.images)).flatten(1)

    def generator(name: str) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(seed, name))

    def mode(name: str, title: str, indices: Tensor, meant: Tensor, images: Tensor | None = None) -> Mode:
        images = decode(vqvae, indices) if images is None else images
        used = codes_used(count_codes(indices, vqvae.config.k))
        distances, _ = nearest(images.flatten(1), digits)
        nats, distance = nats_per_code(prior, indices), (distances / digits.shape[1] ** 0.5).mean().item()
        return Mode(name, title, images, indices.cpu(), meant, used, nats, distance)

    with evaluating(vqvae):
        from_latents = gaussian_latents(vqvae, num_samples, generator("latents"))
        from_images = gaussian_images(vqvae, num_samples, generator("images"))
    drawn = sample(prior, num_samples, generator("pixelcnn"), labels=labels, guidance=GUIDANCE).to(vqvae.device)
    none = torch.full_like(labels, -1)
    originals = to_unit_range(to_model_range(real)).cpu()
    return [
        mode("real", "real test digits", maps, labels, originals),
        mode("reconstructed", "their reconstructions", maps, labels, reconstructions),
        mode("gaussian_latent", "gaussian: codes nearest to Gaussian latents", from_latents, none),
        mode("gaussian_image", "gaussian: Gaussian images through the model", from_images, none),
        mode("pixelcnn", "pixelcnn: codes drawn from the learned prior", drawn, labels),
    ]


def first_of_each_class(labels: Tensor, num: int) -> Tensor:
    """Positions of the first `num` of each digit, ordered so that a grid of ten columns has a digit in each.

    Raises:
        UserError: a digit has fewer.
    """
    fewest = int(torch.bincount(labels, minlength=NUM_CLASSES).min())
    if fewest < num:
        raise UserError(
            f"expected --num-samples of at most {fewest * NUM_CLASSES}, ten times the test images of the rarest "
            f"digit, found {num * NUM_CLASSES}; type --num-samples {max(fewest, 1) * NUM_CLASSES}"
        )
    per_class = [(labels == digit).nonzero().squeeze(1)[:num] for digit in range(NUM_CLASSES)]
    return torch.stack(per_class, dim=1).flatten()


def nats_per_code(prior: GatedPixelCNN, indices: Tensor) -> float:
    """Mean negative log-likelihood of maps (N, H, W) under the prior, without labels."""
    with evaluating(prior):
        return objective(prior, indices, None)["nats_per_code"].item()
