"""Safetensors files, read from an opened file: first what it says that it holds, then the tensors.

The package safetensors opens a file by its name. Here it gets the bytes instead. So the metadata and the tensors come
from one and the same file, even if another takes its place meanwhile; and the name may be any name. Tensors that need
not fit into memory are written piece by piece, and mapped from disk.
"""

import ctypes
import hashlib
import json
import math
import mmap
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor

from vqvae.storage.files import read_at_most, write_atomically

TYPE_NAMES = {  # of all tensors here
    torch.float32: "F32",
    torch.int64: "I64",
    torch.int16: "I16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
MAX_TABLE = 2**24  # bytes; ten times what the largest network's names take
HASHED_AT_ONCE = 2**24  # bytes


class Streamed(NamedTuple):
    """A tensor that is written piece by piece."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Iterable[Tensor]  # rows of it, in order


def write_streamed(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Streamed]) -> None:
    """Write tensors as a safetensors file, completely or not at all. All pieces of one are written before the next.

    Args:
        metadata: text by name. It may not have the name "checksum", which gets the SHA-256 of all pieces.
    Raises:
        InputError: the file cannot be written.
    """

    def write(file: BinaryIO) -> None:
        table: dict[str, object] = {"__metadata__": {**metadata, "checksum": "0" * 64}}
        end = 0
        for name, (dtype, shape, _) in tensors.items():
            start, end = end, end + dtype.itemsize * math.prod(shape)
            table[name] = {"dtype": TYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(table)
        text += " " * (-len(text) % 8)  # so that what follows is aligned
        place = text.index("0" * 64)
        file.write(len(text).to_bytes(8, "little") + text.encode())
        sha = hashlib.sha256()
        for tensor in tensors.values():
            for piece in tensor.pieces:
                content = piece.to("cpu", tensor.dtype).contiguous().numpy().tobytes()
                sha.update(content)
                file.write(content)
        if file.tell() != 8 + len(text) + end:
            raise ValueError(f"expected pieces of {end} bytes in all, found {file.tell() - 8 - len(text)}")
        file.seek(8 + place)
        file.write(sha.hexdigest().encode())

    write_atomically(path, write)


def expect_random_reads(tensor: Tensor) -> None:
    """Tell the system that rows of a mapped tensor will be read in random order. It would otherwise read their
    neighbours from the disk too, some ten times as much. A tensor in memory is none the worse for it.
    """
    if hasattr(mmap, "MADV_RANDOM"):
        start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        length = tensor.data_ptr() + tensor.nbytes - start
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_RANDOM)


def checksum(tensors: Iterable[Tensor]) -> str:
    """The SHA-256 of tensors' values, one after the other."""
    sha = hashlib.sha256()
    for tensor in tensors:
        update_hash(sha, tensor)
    return sha.hexdigest()


def update_hash(sha: "hashlib._Hash", tensor: Tensor) -> None:
    """Add a tensor's values to a hash, a piece at a time, so that a mapped one is never in memory as a whole."""
    values = tensor.detach().cpu().contiguous().view(-1)
    for piece in values.split(max(HASHED_AT_ONCE // values.element_size(), 1)):
        sha.update(piece.numpy().data)


class TensorFile:
    """A safetensors file whose table has been read, and whose tensors have not.

    It is made and read inside `files.open_checked`, because any exception may say that the file is another kind of file
    or is cut short.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_TABLE:
            raise ValueError("its table of tensors is too long")
        table = json.loads(file.read(length))
        self.metadata: dict[str, str] = table.pop("__metadata__", None) or {}
        self.found = {name: (entry["dtype"], entry["shape"]) for name, entry in table.items()}
        self.offsets = {name: entry["data_offsets"] for name, entry in table.items()}
        self.start = 8 + length
        if self.start + max(entry["data_offsets"][1] for entry in table.values()) != os.fstat(file.fileno()).st_size:
            raise ValueError("it is not as long as it says")

    def require_checksum(self) -> None:
        """Compare what `write_streamed` wrote with its checksum. It is read, not mapped, which takes no memory.

        Raises:
            ValueError: they are others.
        """
        self.file.seek(self.start)
        if self.metadata["checksum"] != hashlib.file_digest(self.file, "sha256").hexdigest():  # type: ignore[arg-type]
            raise ValueError("another checksum")

    def map(self) -> dict[str, Tensor]:
        """All tensors, mapped from disk: their values are read where they are used. They must not be changed.

        Raises:
            Exception: the table contradicts itself.
        """
        types = {name: dtype for dtype, name in TYPE_NAMES.items()}
        tensors = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of arrays that must not be changed
            for name, (kind, shape) in self.found.items():
                start, end = self.offsets[name]
                content = np.memmap(self.file, np.uint8, "r", self.start + start, end - start)
                tensors[name] = torch.from_numpy(content).view(types[kind]).view(shape)
        return tensors

    def read(self, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors, on the CPU. Nothing, if they have other names, shapes or types than the expected ones.

        Args:
            expected: tensors whose values don't matter. They may lie on the meta device.
        """
        if self.found != {name: (TYPE_NAMES[t.dtype], list(t.shape)) for name, t in expected.items()}:
            return {}
        self.file.seek(0)
        return load(read_at_most(self.file, self.start + sum(t.nbytes for t in expected.values())))
