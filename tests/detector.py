"""How well the prior tells images that are unlike its training set from digits: areas under the ROC curve.

    python -m tests.detector --mnist FOLDER --others FOLDER

scores MNIST's test digits under the shipped weights, then other images of the same shape, which lie in files named like
MNIST's, and the same digits with their halves swapped. An area is the share of pairs of a digit and another image in
which the other has the higher score: 1 tells them apart without an error, and 1/2 is chance.

Two scores that know nothing of neighbours stand beside the prior's: the same codes under the frequencies that they have
at their positions, and the squared error of the reconstruction.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

import prior
from prior.codes import extract
from prior.evaluation.metrics import share_closer
from prior.independent import unigram
from prior.pair import Pair
from prior.scores import score
from tests.helpers import SHIPPED
from vqvae.codec import reconstruct
from vqvae.data.mnist import load_mnist


def suspicion(pair: Pair, log_p: Tensor, images: Tensor) -> dict[str, Tensor]:
    """Each detector's score (N,) of images (N, C, H, W) uint8: the higher, the less like the training set.

    Args:
        log_p: (K, H, W), of each code at each position of the training maps.
    """
    arrays = reconstruct(pair.vqvae, images)
    return {
        "prior, -log p(map)": -score(pair, images, [""] * len(images)).nats,
        "per-position unigram, -log p(map)": -log_p.gather(0, arrays["indices"]).sum(dim=(1, 2)),
        "squared error of the reconstruction": arrays["squared_error"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Areas under the ROC curve, of images unlike the digits.")
    parser.add_argument("--mnist", type=Path, required=True, help="MNIST's data folder")
    parser.add_argument("--others", type=Path, required=True, help="of other images, in files named like MNIST's")
    parser.add_argument("--num-images", type=int, default=2000, help="of each kind, from the first on")
    options = parser.parse_args()
    pair = prior.load(SHIPPED / "vqvae.safetensors", SHIPPED / "prior.safetensors")
    data = load_mnist(options.mnist, download=False)
    digits = data.load_test().images[: options.num_images]
    others = {
        "other images": load_mnist(options.others, download=False).load_test().images[: options.num_images],
        "digits, top and bottom halves swapped": digits.roll(digits.shape[2] // 2, dims=2),
        "digits, left and right halves swapped": digits.roll(digits.shape[3] // 2, dims=3),
    }
    log_p = unigram(extract(pair.vqvae, data.train), pair.prior.num_codes).log().permute(2, 0, 1)
    of_digits = suspicion(pair, log_p, digits)
    print(f"{len(digits)} images of each kind; the area, with its standard error")
    for name, images in others.items():
        for detector, values in suspicion(pair, log_p, images).items():
            area = share_closer(of_digits[detector], values)
            print(f"{name:40} {detector:36} {area.value:.4f} +- {area.error:.4f}", flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
