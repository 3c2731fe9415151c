"""The only code that writes or reads weights.

A checkpoint is one safetensors file: the weights, and a JSON header with everything needed to rebuild
the network and to know it again. The fingerprint is a SHA-256 of the configuration and every tensor; a
prior records the fingerprint of the VQ-VAE whose codes it learned. What only resuming needs is a file
apart, read with `weights_only=True`. No file that is read here can run code, and of each file every bit
is bound: the weights by the fingerprint, the header and the resume state by a checksum of their own.
"""

import hashlib
import io
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vqvae.common.errors import UserError
from vqvae.common.files import reading, write_atomically

FORMAT_VERSION = 1
STORED_AS = {torch.float32: "F32", torch.int64: "I64", torch.bool: "BOOL"}  # safetensors' names of what models have
HEADER_TYPES = {
    "stage": str,
    "config": dict,
    "recipe": dict,
    "metrics": dict,
    "fingerprint": str,
    "vqvae_fingerprint": str | None,
}
CHECKSUM_LENGTH = 64  # of a SHA-256 in hexadecimal, which ends a resume state
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Header:
    """What a checkpoint says of itself."""

    stage: str  # "vqvae" or "prior"
    config: dict[str, Any]  # the model's dataclass
    recipe: dict[str, Any]  # how it was trained, for the record
    metrics: dict[str, float]  # on the validation split
    fingerprint: str
    vqvae_fingerprint: str | None = None  # of the VQ-VAE that a prior belongs to
    format_version: int = FORMAT_VERSION


def save(
    path: Path,
    model: nn.Module,
    *,
    stage: str,
    config: dict[str, Any],
    recipe: dict[str, Any],
    metrics: Mapping[str, float],
    vqvae_fingerprint: str | None = None,
) -> Header:
    """Write a model's weights and header, whole or not at all."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    header = Header(
        stage=stage,
        config=config,
        recipe=recipe,
        metrics=dict(metrics),
        fingerprint=fingerprint(config, tensors),
        vqvae_fingerprint=vqvae_fingerprint,
    )
    fields = asdict(header)
    text = json.dumps({**fields, "checksum": _checksum(fields)})
    write_atomically(path, to_safetensors(tensors, metadata={"header": text}))
    return header


def fingerprint(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over a configuration and named tensors: one changed value anywhere changes it."""
    sha = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.numpy().tobytes())
    return sha.hexdigest()


def read_header(path: Path, stage: str) -> Header:
    """The header of a stage's checkpoint, without its weights.

    Raises:
        UserError: nothing there, not a checkpoint, one cut short, or one of another stage or format.
    """
    command = f"python cli.py train-{stage}"
    with reading(path, f"a {stage} checkpoint", f"create one with: {command}"):
        with safe_open(path, framework="pt") as file:
            fields = json.loads((file.metadata() or {})["header"])
        version = fields["format_version"]
        if type(version) is not int:
            raise TypeError("its header has no format version")
        if version != FORMAT_VERSION:  # before the rest, which may differ there
            raise UserError(
                f"expected format version {FORMAT_VERSION} in {path}, found {version}; train it anew with: {command}"
            )
        header = _to_header(fields)
    if header.stage != stage:
        raise UserError(
            f"expected a {stage} checkpoint at {path}, found one of stage {header.stage[:20]!r}; name another file"
        )
    return header


def load(path: Path, header: Header, build: Callable[[], Model]) -> Model:
    """The model that `build` makes, with the weights of a checkpoint, on the CPU.

    The network is first built without memory, and the file's names, shapes and types are held against
    it, so that a damaged header is found before anything large is made.

    Raises:
        UserError: a configuration that no network has, weights that don't fit it or the fingerprint, or
            weights that are not finite.
    """
    remedy = f"create it anew with: python cli.py train-{header.stage}"
    try:
        with torch.device("meta"), _Uninitialised():
            model = build()
    except UserError as error:
        raise UserError(f"expected a network's configuration in the header of {path}: {error}") from None
    expected = {name: (STORED_AS[t.dtype], list(t.shape)) for name, t in model.state_dict().items()}
    tensors = {}
    with reading(path, f"a {header.stage} checkpoint", remedy), safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        found = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
        if found == expected:
            # Copies, because safetensors maps the file: what is written to it later would change the weights.
            tensors = {name: file.get_tensor(name).clone() for name in found}
    if found != expected or fingerprint(header.config, tensors) != header.fingerprint:
        raise UserError(
            f"expected weights in {path} that match their header, found others; the file is damaged, {remedy}"
        )
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"expected finite weights in {path}, found {name} with values that are not; {remedy}")
    model.load_state_dict(tensors, assign=True)
    return model


class _Uninitialised(TorchFunctionMode):
    """Leaves out torch.nn.init, of which nothing comes without memory; there its normal_ would import torch's compiler,
    a third of `sample`'s start."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return None if getattr(function, "__module__", None) == "torch.nn.init" else function(*args, **(kwargs or {}))


def save_resume_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write what only resuming needs (weights of the moment, optimiser, counters), whole or not at all."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    checksum = hashlib.sha256(buffer.getvalue()).hexdigest()
    write_atomically(path, buffer.getvalue() + checksum.encode())  # readers of zip files skip what follows the end


def load_resume_state(path: Path) -> dict[str, Any]:
    """What `save_resume_state` wrote.

    Raises:
        UserError: nothing there, or a file that is damaged or holds more than plain data and tensors.
    """
    remedy = "start anew without --resume, with --overwrite where there is a run already"
    with reading(path, "a run to resume", remedy) as file, warnings.catch_warnings():
        _require_checksum(file)
        _require_unpacked(file)
        warnings.simplefilter("ignore")  # of torch, about files that it would rather not read
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # whose text tells how to load what should not be loaded
            raise ValueError("it holds more than plain data and tensors") from None
        if type(state) is not dict:
            raise TypeError(f"it holds a {type(state).__name__} and no dictionary")
    return state


def _to_header(fields: dict[str, Any]) -> Header:
    """The header of its JSON fields; raises what `reading` expects where one of them is not what was written."""
    if fields.pop("checksum") != _checksum(fields):
        raise ValueError("its header is not the one that was written")
    header = Header(**fields)
    for name, kind in HEADER_TYPES.items():
        if not isinstance(getattr(header, name), kind):
            raise TypeError(f"{name} of its header is of type {type(getattr(header, name)).__name__}")
    return header


def _checksum(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()


def _require_checksum(file: BinaryIO) -> None:
    """Hold a file against the checksum that it ends with, and go back to its start."""
    left = file.seek(0, os.SEEK_END) - CHECKSUM_LENGTH
    file.seek(0)
    sha = hashlib.sha256()
    while left > 0 and (chunk := file.read(min(left, 2**20))):
        sha.update(chunk)
        left -= len(chunk)
    if file.read() != sha.hexdigest().encode():
        raise ValueError("its checksum is not that of its content")
    file.seek(0)


def _require_unpacked(file: BinaryIO) -> None:
    """Refuse a torch file with packed entries, which could swell past any memory; torch packs none."""
    with zipfile.ZipFile(file) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("it has packed entries")
    file.seek(0)
