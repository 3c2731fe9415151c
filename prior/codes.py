"""Images to code maps by a frozen VQ-VAE, cached on disk and bound to what they were made from."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vqvae.codec import encode_images
from vqvae.compute import in_batches
from vqvae.console import progress, remark
from vqvae.data.dataset import Split, digest
from vqvae.errors import InputError
from vqvae.model import VQVAE
from vqvae.storage.files import open_checked
from vqvae.storage.tensors import Streamed, TensorFile, write_streamed

AT_ONCE = 1000  # images between two moves of the progress bar


class Codes(NamedTuple):
    """indices (N, H, W) int16 and labels (N,) int64, on the CPU."""

    indices: Tensor
    labels: Tensor


def extract(model: VQVAE, split: Split, progress: Callable[[int], object] = lambda num_done: None) -> Codes:
    """The code maps of a split.

    Args:
        progress: called with the number of images that were encoded since the last call.
    """
    return Codes(torch.cat(list(_encoded(model, split, progress))), split.labels)


def extract_cached(model: VQVAE, fingerprint: str, split: Split, name: str, folder: Path) -> Codes:
    """`extract`, or its earlier result for the same weights and the same images, mapped from disk.

    Args:
        fingerprint: of the VQ-VAE.
        name: of the split, for the file's name.
        folder: where the cache lies, as `codes-<name>.safetensors`. A stale or damaged cache is replaced. If it can't
            be written, the codes are kept in memory.
    """
    path = folder / f"codes-{name}.safetensors"
    origin = {"vqvae": fingerprint, "data": digest(split)}
    shape, num_codes = (len(split.labels), *model.map_shape), model.config.num_codes
    try:
        return Codes(_read(path, origin, shape, num_codes), split.labels)
    except InputError:
        pass  # there is none yet, or it is stale or damaged
    with progress(len(split.labels), "image", doing=f"code maps of {name}") as bar:
        try:
            write_streamed(path, origin, {"indices": Streamed(torch.int16, shape, _encoded(model, split, bar.update))})
            return Codes(_read(path, origin, shape, num_codes), split.labels)
        except InputError as error:
            remark(f"the {name} code maps are not kept for the next run: {error}")
        return extract(model, split, bar.update)


def _encoded(model: VQVAE, split: Split, progress: Callable[[int], object]) -> Iterator[Tensor]:
    """The code maps of a split, (n, H, W) int16 on the CPU, piece by piece."""
    for rows in in_batches(len(split.labels), AT_ONCE):
        yield encode_images(model, split.images[rows]).to("cpu", torch.int16)
        progress(rows.stop - rows.start)


def _read(path: Path, origin: dict[str, str], shape: tuple[int, ...], num_codes: int) -> Tensor:
    """The indices in a cache, int16, mapped.

    Raises:
        InputError: there is none, it was made from something else, or it is damaged.
    """
    with open_checked(path, "a cache of code maps", "delete it") as opened:
        file = TensorFile(opened)
        if file.found != {"indices": ("I16", list(shape))}:
            raise ValueError("codes of another shape")
        if {**file.metadata, "checksum": None} != {**origin, "checksum": None}:
            raise ValueError("codes of another origin")
        file.require_checksum()
        indices = file.map()["indices"]
        if not 0 <= indices.min() <= indices.max() < num_codes:
            raise ValueError("codes out of range")
        return indices
