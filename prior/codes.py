"""Frozen VQ-VAE to code maps, cached on disk under what they were made from."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from vqvae.common import data
from vqvae.common.data import Split, to_model_range
from vqvae.common.engine import evaluating, in_batches
from vqvae.common.files import write_atomically
from vqvae.model import VQVAE

EXTRACTION_BATCH = 500


class Codes(NamedTuple):
    """indices (N, H, W) int64 and labels (N,) int64."""

    indices: Tensor
    labels: Tensor


def extract(model: VQVAE, split: Split) -> Codes:
    """The code maps of a split, on the model's device."""
    with evaluating(model):
        indices = [
            model.encode(to_model_range(split.images[rows].to(model.device)))
            for rows in in_batches(len(split.labels), EXTRACTION_BATCH)
        ]
    return Codes(torch.cat(indices).clone(), split.labels.to(model.device))


def extract_cached(model: VQVAE, fingerprint: str, split: Split, name: str, folder: Path) -> Codes:
    """`extract`, or its earlier result for the same weights and the same images.

    Args:
        fingerprint: of the VQ-VAE.
        name: of the split, for the file's name.
        folder: where the cache lies, as `codes-<name>.safetensors`; a stale or damaged one is replaced.
    """
    path = folder / f"codes-{name}.safetensors"
    origin = {"vqvae": fingerprint, "data": data.digest(split)}
    cached = _read(path, origin)
    if cached is None:
        print(f"extracting the code maps of {len(split.labels)} {name} images", flush=True)
        codes = extract(model, split)
        tensors = {
            "indices": codes.indices.to("cpu", torch.int16),
            "labels": codes.labels.to("cpu", torch.int16),
        }
        write_atomically(path, to_safetensors(tensors, metadata={"origin": json.dumps(origin)}))
        return codes
    return Codes(cached["indices"].to(model.device, torch.int64), cached["labels"].to(model.device, torch.int64))


def _read(path: Path, origin: dict[str, str]) -> dict[str, Tensor] | None:
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if json.loads((file.metadata() or {}).get("origin", "null")) != origin:
                return None
            return {name: file.get_tensor(name) for name in ("indices", "labels")}
    except (SafetensorError, OSError, ValueError):
        return None
