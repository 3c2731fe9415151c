"""Checkpoints: the only code that writes or reads weights.

A checkpoint is one safetensors file. It holds the weights and a JSON header with everything that is needed to rebuild
the network. The header's fingerprint is a SHA-256 of the configuration, the facts of the data and every tensor; a prior
records the fingerprint of the VQ-VAE whose codes it learned. The state that only resuming needs is a separate file,
which is read with `weights_only=True`.

No file that is read here can run code. Every bit of a file is covered: the weights by the fingerprint, the header and
the resume state by a checksum of their own.
"""

import hashlib
import io
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, get_origin, get_type_hints

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vqvae.errors import InputError
from vqvae.storage.files import open_checked, write_atomically
from vqvae.storage.tensors import TensorFile, update_hash

FORMAT_VERSION = 2
CHECKSUM_LENGTH = 64  # a SHA-256 in hexadecimal, at the end of a resume state
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Header:
    """The description of a model inside its checkpoint."""

    stage: str  # "vqvae", "prior" or "classifier"
    config: dict[str, Any]  # the fields of the model's configuration
    data: dict[str, Any]  # the fields of the training data's DatasetInfo
    recipe: dict[str, Any]  # how the model was trained; nothing reads it
    metrics: dict[str, float]  # on the validation split
    fingerprint: str
    vqvae_fingerprint: str | None = None  # a prior's: of the VQ-VAE that it belongs to
    format_version: int = FORMAT_VERSION


def save(
    path: Path,
    model: nn.Module,
    *,
    stage: str,
    config: dict[str, Any],
    data: dict[str, Any],
    recipe: dict[str, Any],
    metrics: Mapping[str, float],
    vqvae_fingerprint: str | None = None,
) -> Header:
    """Write a model's weights and header to a file, completely or not at all, and return the header."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    header = Header(
        stage=stage,
        config=config,
        data=json.loads(json.dumps(data)),  # its tuples become lists, as they are when the header is read
        recipe=recipe,
        metrics=dict(metrics),
        fingerprint=fingerprint({"config": config, "data": data}, tensors),
        vqvae_fingerprint=vqvae_fingerprint,
    )
    fields = asdict(header)
    text = json.dumps({**fields, "checksum": _checksum(fields)})
    write_atomically(path, to_safetensors(tensors, metadata={"header": text}))
    return header


def fingerprint(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of a description and of named tensors. It changes when any value in them changes.

    Args:
        description: JSON values; the order of the keys does not matter.
    """
    sha = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        update_hash(sha, tensor)
    return sha.hexdigest()


def read_header(path: Path, stage: str) -> Header:
    """The header of a stage's checkpoint. The weights are not read.

    Raises:
        MissingFileError: there is no file.
        InputError: it is not a checkpoint, it is cut short, or it has another stage or format.
    """
    with _open(path, stage) as (header, _):
        return header


def read_shapes(path: Path, stage: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights in a stage's checkpoint, by name. The weights are not read.

    Raises:
        InputError: as `read_header`.
    """
    with _open(path, stage) as (_, file):
        return {name: tuple(map(int, shape)) for name, (_, shape) in file.found.items()}


def load(path: Path, stage: str, build: Callable[[Header], Model]) -> tuple[Model, Header]:
    """The model that `build` makes from a checkpoint's header, with its weights, on the CPU; and the header.

    Both come from one opening, so they belong together even if another file takes this one's place meanwhile. The model
    is first built without memory. The names, shapes and types in the file are compared with it before any weights are
    read, so a wrong header cannot make this function take a lot of memory.

    Raises:
        MissingFileError: there is no file.
        InputError: it is not a checkpoint of the stage, `build` refuses the header, the weights fit neither it nor the
            fingerprint, or some weights are not finite.
    """
    remedy = f"create it anew with `train_{stage}()`"
    with _open(path, stage) as (header, file):
        try:
            with torch.device("meta"), _NoInitialisation():
                model = build(header).float()  # whatever torch's default type is
        except InputError as error:
            raise InputError(f"{error} (the {stage} checkpoint is {path})") from None
        expected = model.state_dict()
        tensors = file.read(expected)
    description = {"config": header.config, "data": header.data}
    if tensors.keys() != expected.keys() or fingerprint(description, tensors) != header.fingerprint:
        raise InputError(
            f"expected weights in {path} that match their header, found others; the file is damaged, {remedy}"
        )
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise InputError(f"expected finite weights in {path}, found {name} with values that are not; {remedy}")
    model.load_state_dict(tensors, assign=True)
    return model, header


@contextmanager
def _open(path: Path, stage: str) -> Iterator[tuple[Header, TensorFile]]:
    """A stage's checkpoint, opened: its header, and its weights, which are not read yet."""
    with open_checked(path, f"a {stage} checkpoint", f"create one with `train_{stage}()`") as opened:
        file = TensorFile(opened)
        fields = json.loads(file.metadata["header"])
        version = fields["format_version"]
        if type(version) is not int:
            raise TypeError("its header has no format version")
        if version != FORMAT_VERSION:  # checked first, because the other fields depend on the version
            raise InputError(
                f"expected format version {FORMAT_VERSION} in {path}, found {str(version)[:20]}; "
                f"train it anew with `train_{stage}()`"
            )
        if fields.pop("checksum") != _checksum(fields):
            raise ValueError("its header is not the one that was written")
        header = Header(**fields)
        for name, kind in get_type_hints(Header).items():
            if not isinstance(getattr(header, name), get_origin(kind) if get_origin(kind) is dict else kind):
                raise TypeError(f"{name} of its header is of type {type(getattr(header, name)).__name__}")
        if header.stage != stage:
            raise InputError(
                f"expected a {stage} checkpoint at {path}, found one of stage {header.stage[:20]!r}; name another file"
            )
        yield header, file


class _NoInitialisation(TorchFunctionMode):
    """A context in which the functions of torch.nn.init do nothing.

    A model that is built without memory has no values to initialise. Calling `normal_` there would also import torch's
    compiler, which took a third of the start of `sample`.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return None if getattr(function, "__module__", None) == "torch.nn.init" else function(*args, **(kwargs or {}))


def save_resume_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write the state that only resuming needs (current weights, optimiser, counters), completely or not at all."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    checksum = hashlib.sha256(buffer.getvalue()).hexdigest()
    # torch writes a zip file. A reader of zip files ignores what follows the end, so the checksum can stand there.
    write_atomically(path, buffer.getvalue() + checksum.encode())


def load_resume_state(path: Path) -> dict[str, Any]:
    """The state that `save_resume_state` wrote.

    The file can be forged together with its checksum: check the names, shapes, types and ranges before you use it.

    Raises:
        MissingFileError: there is no file.
        InputError: the file is damaged, or it holds more than plain data and tensors.
    """
    remedy = "start anew with `overwrite=True` instead of `resume=True`"
    with open_checked(path, "a run to resume", remedy) as file, warnings.catch_warnings():
        _require_checksum(file)
        _require_uncompressed(file)
        warnings.simplefilter("ignore")  # torch warns of files of other kinds, which are refused below
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # torch's text would explain how to load the file unsafely
            raise ValueError("it holds more than plain data and tensors") from None
        if type(state) is not dict:
            raise TypeError(f"it holds a {type(state).__name__} and no dictionary")
    return state


def _checksum(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()


def _require_checksum(file: BinaryIO) -> None:
    """Compare a file with the checksum at its end, then return to its start."""
    left = file.seek(0, os.SEEK_END) - CHECKSUM_LENGTH
    file.seek(0)
    sha = hashlib.sha256()
    while left > 0 and (chunk := file.read(min(left, 2**20))):
        sha.update(chunk)
        left -= len(chunk)
    if file.read() != sha.hexdigest().encode():
        raise ValueError("its checksum is not that of its content")
    file.seek(0)


def _require_uncompressed(file: BinaryIO) -> None:
    """Refuse a torch file with compressed entries: torch writes none, and a small one could unpack to any size."""
    with zipfile.ZipFile(file) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("it has compressed entries")
    file.seek(0)
