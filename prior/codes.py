"""Frozen VQ-VAE to code maps, cached on disk under what they were made from."""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from vqvae.common import checkpoint, data
from vqvae.common.data import Split, to_model_range
from vqvae.common.engine import evaluating, in_batches
from vqvae.common.errors import UserError
from vqvae.common.files import reading, write_atomically
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
    Raises:
        UserError: the cache can't be written.
    """
    path = folder / f"codes-{name}.safetensors"
    origin = {"vqvae": fingerprint, "data": data.digest(split)}
    labels = split.labels.to(model.device)
    try:
        indices = _read(path, origin, (len(labels), *model.map_shape), model.config.k)
    except UserError:
        print(f"extracting the code maps of {len(labels)} {name} images", flush=True)
        codes = extract(model, split)
        tensors = {"indices": codes.indices.to("cpu", torch.int16)}
        metadata = {"fingerprint": checkpoint.fingerprint(origin, tensors)}
        write_atomically(path, to_safetensors(tensors, metadata=metadata))
        return codes
    return Codes(indices.to(model.device, torch.int64), labels)


def _read(path: Path, origin: dict[str, str], shape: tuple[int, ...], num_codes: int) -> Tensor:
    """The indices in a cache, int16.

    Raises:
        UserError: none there, of another origin, or not whole.
    """
    with reading(path, "a cache of code maps", "delete it"), safe_open(path, framework="pt") as file:
        if tuple(file.get_slice("indices").get_shape()) != shape:  # before as much memory is taken
            raise ValueError("codes of another shape")
        indices: Tensor = file.get_tensor("indices").clone()
        # One hash of where they come from and what they are: stale and damaged look the same.
        if file.metadata() != {"fingerprint": checkpoint.fingerprint(origin, {"indices": indices})}:
            raise ValueError("codes of another origin")
        if not 0 <= indices.min() <= indices.max() < num_codes:
            raise ValueError("codes out of range")
        return indices
