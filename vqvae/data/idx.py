"""MNIST's four files on disk: their names, their MD5 sums and their format.

Each is an IDX file (http://yann.lecun.com/exdb/mnist/ describes the format, at the end), as it is or packed by gzip.
"""

import hashlib
import math
import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vqvae.errors import InputError, MissingFileError
from vqvae.storage.files import open_checked, read_at_most

# The four original files, not packed, and their MD5 sums.
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
IDX_MAGIC = 0x0800  # the first number of an IDX file of bytes, plus its number of axes
GZIP_MAGIC = b"\x1f\x8b"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")  # before the text that a Windows shell redirects to a file
MAX_SUMS = 2**16  # bytes of an MD5SUMS file
MAX_IDX = 2**26  # bytes of an IDX file, packed or not; the training images have 47 MB

# "<sum>  <name>", as md5sum writes it. A "*" stands before a binary file's name, and a "\" before an escaped line.
GNU_LINE = re.compile(r"\\?(?P<md5>[0-9a-f]{32})\s+\*?(?P<name>.+)", re.IGNORECASE)
BSD_LINE = re.compile(r"\\?MD5\s*\((?P<name>.+)\)\s*=\s*(?P<md5>[0-9a-f]{32})", re.IGNORECASE)

Sums = dict[str, set[str]]  # of each file's name, without its folder, the sums that are listed for it


def exists(path: Path) -> bool:
    """Whether something is at a path. If the system does not say, False: opening the file will tell the cause."""
    return os.path.exists(path)  # noqa: PTH110  # Path.exists() may raise


def read_sums(path: Path) -> Sums:
    """What an MD5SUMS file lists, or nothing if there is none. As md5sum does, it skips a line that is no sum.

    Raises:
        InputError: no line is a sum, or the file cannot be read.
    """
    if not exists(path):
        return {}
    with open_checked(path, "lines of an MD5 sum and a name", "write it anew with md5sum, or move it away") as file:
        content = read_at_most(file, MAX_SUMS)
        text = content.decode("utf-16" if content[:2] in UTF16_MARKS else "utf-8-sig", "replace")
        sums: Sums = {}
        for line in map(str.strip, text.splitlines()):
            if match := GNU_LINE.fullmatch(line) or BSD_LINE.fullmatch(line):
                sums.setdefault(re.split(r"[/\\]", match["name"])[-1], set()).add(match["md5"].lower())
        if not sums:
            raise ValueError("no line of 32 hexadecimal digits and a name")
        return sums


def read_arrays(raw: Path, sums: Sums) -> dict[str, Tensor]:
    """The uint8 arrays of MNIST's files in a folder, by name. A file that is missing or cut short is left out.

    Args:
        sums: what the files are compared with. A file that is not listed is compared with the original.
    Raises:
        InputError: a file has another sum, its header does not fit its length, or it cannot be read.
    """
    arrays = {name: _read_array(raw, name, sums) for name in MNIST_MD5}
    return {name: array for name, array in arrays.items() if array is not None}


def is_original(name: str, sums: Sums) -> bool:
    """Whether the original file would be accepted under this name."""
    return name not in sums or MNIST_MD5[name] in sums[name]


def to_idx(array: np.ndarray) -> bytes:
    """A uint8 array as an IDX file."""
    return np.array([IDX_MAGIC + array.ndim, *array.shape], dtype=">i4").tobytes() + array.tobytes()


def unpack(content: bytes) -> bytes:
    """The content of a file, unpacked if gzip has packed it. If it is cut short, as much as there is of it.

    Raises:
        ValueError: it unpacks to more than `MAX_IDX` bytes.
        zlib.error: it is damaged.
    """
    if content.startswith(GZIP_MAGIC):
        content = zlib.decompressobj(wbits=31).decompress(content, MAX_IDX + 1)
        if len(content) > MAX_IDX:
            raise ValueError(f"longer than {MAX_IDX} bytes")
    return content


def md5_of(content: bytes) -> str:
    """The MD5 sum in hexadecimal digits."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _read_array(raw: Path, name: str, sums: Sums) -> Tensor | None:
    for path in (raw / name, raw / f"{name}.gz"):
        try:
            with open_checked(path, "an IDX file", "put MNIST's file there, or name another `data_folder`") as file:
                stored = read_at_most(file, MAX_IDX)
                content = unpack(stored)
                found = md5_of(content)
                if found in sums.get(name, {MNIST_MD5[name]}) or md5_of(stored) in sums.get(path.name, ()):
                    return _parse(content, *_header(name, content))
        except MissingFileError:
            continue
        if not _is_cut_short(name, content):
            raise InputError(_another_sum(path, name, found, sums))
    return None


def _header(name: str, content: bytes) -> tuple[int, list[int]]:
    """Where an IDX file's values start, and the shape that its header promises.

    Raises:
        struct.error: it is shorter than its header.
        ValueError: it does not hold bytes, or has another number of axes.
    """
    num_axes = 3 if "idx3" in name else 1
    magic, *shape = struct.unpack_from(f">{1 + num_axes}I", content)
    if magic != IDX_MAGIC + num_axes:
        raise ValueError("its header does not fit")
    return 4 * (1 + num_axes), shape


def _parse(content: bytes, start: int, shape: list[int]) -> Tensor:
    if 0 in shape or len(content) != start + math.prod(shape):
        raise ValueError("its header does not fit its length, or it is empty")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())


def _is_cut_short(name: str, content: bytes) -> bool:
    """Whether a file is shorter than its header promises. A download that was killed leaves such a file."""
    try:
        start, shape = _header(name, content)
    except ValueError:
        return False
    except struct.error:
        return True
    return len(content) < start + math.prod(shape)


def _another_sum(path: Path, name: str, found: str, sums: Sums) -> str:
    """The sentence for a file whose sum is another than the expected one."""
    if name in sums:
        listed = " or ".join(sorted(sums[name]))
        remedy = "restore the file, or write MD5SUMS anew with md5sum if the file is right"
        return f"expected MD5 {listed} of {path}, as MD5SUMS beside it lists, found {found}; {remedy}"
    beside = "the MD5SUMS beside it, which does not list it" if sums else "an MD5SUMS file beside it"
    return (
        f"expected MD5 {MNIST_MD5[name]} of {path}, which is the original's, found {found}; move the file away and run "
        f"again to fetch the original, or, if it is right, add its sum to {beside}"
    )
