"""Stage one, a VQ-VAE: images to maps of codes, and back.

import vqvae
model = vqvae.load()
indices = model.encode(x)  # x in -1..1
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from vqvae.errors import InputError
    from vqvae.loss import VQVAETraining
    from vqvae.model import VQVAE, VQVAEConfig
    from vqvae.quantizer import VectorQuantizer
    from vqvae.train import train_vqvae

__all__ = ["VQVAE", "InputError", "VQVAEConfig", "VQVAETraining", "VectorQuantizer", "load", "train_vqvae"]

# Each name is imported when it is first used, so that importing the package takes no time.
_MODULES = {
    "VQVAE": "vqvae.model",
    "InputError": "vqvae.errors",
    "VQVAEConfig": "vqvae.model",
    "VQVAETraining": "vqvae.loss",
    "VectorQuantizer": "vqvae.quantizer",
    "train_vqvae": "vqvae.train",
}


def load(path: str | Path | None = None, device: "str | torch.device" = "auto") -> "VQVAE":
    """A trained VQ-VAE in eval mode, by default your newest run under `checkpoints/` or the shipped weights.

    Raises:
        InputError: a file that is missing or damaged.
    """
    from vqvae.compute import pick_device
    from vqvae.model import load_vqvae
    from vqvae.storage.runs import find_vqvae

    return load_vqvae(find_vqvae(None if path is None else Path(path)), pick_device(device))[0]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
