"""Safetensors files, read from an opened file: first what it says that it holds, then the tensors.

The package safetensors opens a file by its name. Here it gets the bytes instead. So the metadata and the tensors come
from one and the same file, even if another takes its place meanwhile; and the name may be any name.
"""

import json
import os
from collections.abc import Mapping
from typing import BinaryIO

import torch
from safetensors.torch import load
from torch import Tensor

from vqvae.storage.files import read_at_most

TYPE_NAMES = {torch.float32: "F32", torch.int64: "I64", torch.int16: "I16", torch.bool: "BOOL"}  # of all tensors here
MAX_TABLE = 2**24  # bytes; ten times what the largest network's names take


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
        self.start = 8 + length
        if self.start + max(entry["data_offsets"][1] for entry in table.values()) != os.fstat(file.fileno()).st_size:
            raise ValueError("it is not as long as it says")

    def read(self, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors, on the CPU. Nothing, if they have other names, shapes or types than the expected ones.

        Args:
            expected: tensors whose values don't matter. They may lie on the meta device.
        """
        if self.found != {name: (TYPE_NAMES[t.dtype], list(t.shape)) for name, t in expected.items()}:
            return {}
        self.file.seek(0)
        return load(read_at_most(self.file, self.start + sum(t.nbytes for t in expected.values())))
