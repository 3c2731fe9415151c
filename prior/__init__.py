"""Stage two, a gated PixelCNN over the codes of a VQ-VAE, and both stages as one object.

import prior
model = prior.load()
images = model.sample(labels=range(10), seed=0)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prior.export import export_pair
    from prior.model import GatedPixelCNN, PriorConfig
    from prior.pair import Pair, Samples, load
    from prior.train import PriorTraining, train_prior

__all__ = ["GatedPixelCNN", "Pair", "PriorConfig", "PriorTraining", "Samples", "export_pair", "load", "train_prior"]

# Each name is imported when it is first used, so that importing the package takes no time.
_MODULES = {
    "GatedPixelCNN": "prior.model",
    "Pair": "prior.pair",
    "PriorConfig": "prior.model",
    "PriorTraining": "prior.train",
    "Samples": "prior.pair",
    "export_pair": "prior.export",
    "load": "prior.pair",
    "train_prior": "prior.train",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
