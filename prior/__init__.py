"""Stage two, a gated PixelCNN over the codes of a VQ-VAE, and both stages as one object.

import prior
model = prior.load()
images = model.sample(labels=range(10), seed=0)
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from prior.model import GatedPixelCNN, PriorConfig
    from prior.pair import Pair, Samples
    from prior.train import PriorTraining, train_prior

__all__ = ["GatedPixelCNN", "Pair", "PriorConfig", "PriorTraining", "Samples", "load", "train_prior"]

# Each name is imported when it is first used, so that importing the package takes no time.
_MODULES = {
    "GatedPixelCNN": "prior.model",
    "Pair": "prior.pair",
    "PriorConfig": "prior.model",
    "PriorTraining": "prior.train",
    "Samples": "prior.pair",
    "train_prior": "prior.train",
}


def load(
    vqvae: str | Path | None = None, prior: str | Path | None = None, device: "str | torch.device" = "auto"
) -> "Pair":
    """A VQ-VAE and its prior as one object (prior/pair.py), by default your newest run or the shipped weights.

    Args:
        vqvae, prior: weights files.
        device: "cpu", "cuda", or "auto" for CUDA where there is a device.
    Raises:
        InputError: a file that is missing or damaged, or two that do not belong together.
    """
    from prior.pair import load_pair

    return load_pair(vqvae, prior, device)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
