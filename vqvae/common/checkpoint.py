"""The only code that writes or reads weights.

A checkpoint is one safetensors file: the weights, and a JSON header with everything needed to rebuild
the network and to know it again. The fingerprint is a SHA-256 of the configuration and every tensor; a
prior records the fingerprint of the VQ-VAE whose codes it learned. What only resuming needs is a file
apart, read with `weights_only=True`. No file that is read here can run code.
"""

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from vqvae.common.errors import UserError
from vqvae.common.files import write_atomically

FORMAT_VERSION = 1
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
    write_atomically(path, to_safetensors(tensors, metadata={"header": json.dumps(asdict(header))}))
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
    if not path.is_file():
        raise UserError(f"expected a {stage} checkpoint at {path}, found none; create it with: {command}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        header = Header(**json.loads(metadata["header"]))
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"expected a {stage} checkpoint at {path}, found a file that is cut short, damaged or of another kind "
            f"({error}); create it anew with: {command}"
        ) from None
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"expected a {stage} checkpoint at {path}, found a safetensors file without this project's header; "
            f"create one with: {command}"
        ) from None
    if header.format_version != FORMAT_VERSION:
        raise UserError(
            f"expected format version {FORMAT_VERSION} in {path}, found {header.format_version}; "
            f"train it anew with: {command}"
        )
    if header.stage != stage:
        raise UserError(
            f"expected a {stage} checkpoint at {path}, found one of stage {header.stage!r}; name another file"
        )
    return header


def load(path: Path, header: Header, build: Callable[[], Model]) -> Model:
    """The model that `build` makes, with the weights of a checkpoint, on the CPU.

    The network is first built without memory, and the file's names, shapes and types are held against
    it, so that a damaged header is found before anything large is made.

    Raises:
        UserError: weights that don't fit the header's configuration or fingerprint.
    """
    with torch.device("meta"):
        model = build()
    expected = {name: (str(t.dtype), list(t.shape)) for name, t in model.state_dict().items()}
    with safe_open(path, framework="pt") as file:
        tensors = {}
        for name in file.keys():
            tensors[name] = file.get_tensor(name)
    found = {name: (str(t.dtype), list(t.shape)) for name, t in tensors.items()}
    if found != expected or fingerprint(header.config, tensors) != header.fingerprint:
        raise UserError(
            f"expected weights in {path} that match their header, found others; the file is damaged, "
            f"create it anew with: python cli.py train-{header.stage}"
        )
    model.load_state_dict(tensors, assign=True)
    return model


def save_resume_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write what only resuming needs (weights of the moment, optimiser, counters), whole or not at all."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    write_atomically(path, buffer.getvalue())


def load_resume_state(path: Path) -> dict[str, Any]:
    """What `save_resume_state` wrote.

    Raises:
        UserError: nothing there, or a file that is damaged or holds more than plain data and tensors.
    """
    if not path.is_file():
        raise UserError(f"expected a run to resume at {path}, found none; start one without --resume")
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # the reader raises many kinds; each of them means the same here
        raise UserError(
            f"expected resume state at {path}, found a file that is damaged or not plain data "
            f"({type(error).__name__}); start anew with --overwrite instead of --resume"
        ) from None
