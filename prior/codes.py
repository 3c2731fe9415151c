"""Images to code maps by a frozen VQ-VAE, cached on disk and bound to what they were made from."""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from vqvae.codec import encode_images
from vqvae.console import remark, say
from vqvae.data.dataset import Split, digest
from vqvae.errors import InputError
from vqvae.model import VQVAE
from vqvae.storage import checkpoint
from vqvae.storage.files import open_checked, write_atomically
from vqvae.storage.tensors import TensorFile


class Codes(NamedTuple):
    """indices (N, H, W) int64 and labels (N,) int64."""

    indices: Tensor
    labels: Tensor


def extract(model: VQVAE, split: Split) -> Codes:
    """The code maps of a split, on the model's device."""
    return Codes(encode_images(model, split.images), split.labels.to(model.device))


def extract_cached(model: VQVAE, fingerprint: str, split: Split, name: str, folder: Path) -> Codes:
    """`extract`, or its earlier result for the same weights and the same images.

    Args:
        fingerprint: of the VQ-VAE.
        name: of the split, for the file's name.
        folder: where the cache lies, as `codes-<name>.safetensors`. A stale or damaged cache is replaced. One that
            can't be written costs only the time to extract the codes again.
    """
    path = folder / f"codes-{name}.safetensors"
    origin = {"vqvae": fingerprint, "data": digest(split)}
    labels = split.labels.to(model.device)
    try:
        indices = _read(path, origin, (len(labels), *model.map_shape), model.config.num_codes)
    except InputError:
        say(f"extracting the code maps of {len(labels)} {name} images")
        codes = extract(model, split)
        tensors = {"indices": codes.indices.to("cpu", torch.int16)}
        metadata = {"fingerprint": checkpoint.fingerprint(origin, tensors)}
        try:
            write_atomically(path, to_safetensors(tensors, metadata=metadata))
        except InputError as error:
            remark(f"the {name} code maps are not kept for the next run: {error}")
        return codes
    return Codes(indices.to(model.device, torch.int64), labels)


def _read(path: Path, origin: dict[str, str], shape: tuple[int, ...], num_codes: int) -> Tensor:
    """The indices in a cache, int16.

    Raises:
        InputError: there is none, it was made from something else, or it is damaged.
    """
    with open_checked(path, "a cache of code maps", "delete it") as opened:
        file = TensorFile(opened)
        tensors = file.read({"indices": torch.empty(shape, dtype=torch.int16, device="meta")})
        # One hash of the origin and of the codes. A stale cache and a damaged one look the same.
        if file.metadata != {"fingerprint": checkpoint.fingerprint(origin, tensors)}:
            raise ValueError("codes of another origin")
        indices = tensors["indices"]
        if not 0 <= indices.min() <= indices.max() < num_codes:
            raise ValueError("codes out of range")
        return indices
