"""Four files of images and labels, as MNIST's are: their names, their MD5 sums and their format.

Each is an IDX file (http://yann.lecun.com/exdb/mnist/ describes the format, at the end), as it is or packed by gzip.
"""

import hashlib
import math
import os
import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vqvae.data.deform import Deformation
from vqvae.errors import InputError, MissingFileError
from vqvae.storage.files import open_checked, read_at_most

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
IDX_MAGIC = 0x0800  # the first number of an IDX file of bytes, plus its number of axes
GZIP_MAGIC = b"\x1f\x8b"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")  # before the text that a Windows shell redirects to a file
MAX_SUMS = 2**16  # bytes of an MD5SUMS file
MAX_IDX = 2**26  # bytes of an IDX file, packed or not; the training images have 47 MB

# "<sum>  <name>", as md5sum writes it. A "*" stands before a binary file's name, and a "\" before an escaped line.
GNU_LINE = re.compile(r"\\?(?P<md5>[0-9a-f]{32})\s+\*?(?P<name>.+)", re.IGNORECASE)
BSD_LINE = re.compile(r"\\?MD5\s*\((?P<name>.+)\)\s*=\s*(?P<md5>[0-9a-f]{32})", re.IGNORECASE)

Sums = dict[str, set[str]]  # of each file's name, without its folder, the sums that are listed for it


@dataclass(frozen=True)
class IdxSet:
    """A set of images that is four IDX files with MNIST's names."""

    name: str  # as a user gives it
    title: str  # as a sentence gives it
    folder: str  # the files are in <data folder>/<folder>/raw, where torchvision has them
    class_names: tuple[str, ...]
    md5: Mapping[str, str]  # the originals' sums by file name; a name that ends in .gz is that of a packed file
    mirrors: tuple[str, ...]  # addresses that, with such a packed file's name after them, bring it
    deformation: Deformation
    in_package: bool = False  # whether the package index has them too (archive.py)
    installed: Path | None = None  # where Debian's package dataset-<name> puts them


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


def read_arrays(known: IdxSet, raw: Path, sums: Sums) -> dict[str, Tensor]:
    """The uint8 arrays of a set's files in a folder, by name. A file that is missing or cut short is left out.

    Args:
        sums: what the files are compared with. A file that is not listed is compared with the original.
    Raises:
        InputError: a file has another sum, its header does not fit its length, or it cannot be read.
    """
    arrays = {name: _read_array(known, raw, name, sums) for name in FILES}
    return {name: array for name, array in arrays.items() if array is not None}


def is_original(known: IdxSet, name: str, sums: Sums) -> bool:
    """Whether the original file would be accepted under this name."""
    accepted = _accepted(known, name, sums)
    return any(known.md5.get(file) in accepted.get(file, ()) for file in (name, f"{name}.gz"))


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


def _accepted(known: IdxSet, name: str, sums: Sums) -> Sums:
    """The sums that a file may have. Those of the original count where the folder lists none for this file."""
    originals = {} if name in sums else {file: {md5} for file, md5 in known.md5.items()}
    return originals | sums


def _read_array(known: IdxSet, raw: Path, name: str, sums: Sums) -> Tensor | None:
    accepted, remedy = _accepted(known, name, sums), f"put {known.title}'s file there, or name another `data_folder`"
    not_comparable = ""
    for path in (raw / name, raw / f"{name}.gz"):
        try:
            with open_checked(path, "an IDX file", remedy) as file:
                stored = read_at_most(file, MAX_IDX)
                content = unpack(stored)
                if md5_of(content) in accepted.get(name, ()) or md5_of(stored) in accepted.get(path.name, ()):
                    return _parse(content, *_header(name, content))
        except MissingFileError:
            continue
        if _is_cut_short(name, content):
            continue
        if name not in accepted and path.name not in accepted:
            not_comparable = _no_sum(path, md5_of(content), sums)  # unless it lies there packed as well
        else:
            raise InputError(_another_sum(known, path, name, md5_of(content if name in accepted else stored), sums))
    if not_comparable:
        raise InputError(not_comparable)
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


def _another_sum(known: IdxSet, path: Path, name: str, found: str, sums: Sums) -> str:
    """The sentence for a file whose sum is another than the expected one."""
    if name in sums:
        listed = " or ".join(sorted(sums[name]))
        remedy = "restore the file, or write MD5SUMS anew with md5sum if the file is right"
        return f"expected MD5 {listed} of {path}, as MD5SUMS beside it lists, found {found}; {remedy}"
    original = known.md5.get(name) or known.md5[path.name]
    return (
        f"expected MD5 {original} of {path}, which is the original's, found {found}; move the file away and run "
        f"again to fetch the original, or, if it is right, add its sum to {_beside(sums)}"
    )


def _no_sum(path: Path, found: str, sums: Sums) -> str:
    """The sentence for a file of which only the packed form has a known sum."""
    return (
        f"expected {path.name}.gz in {path.parent}, whose MD5 is known, found {path.name} with MD5 {found}, which "
        f"cannot be compared; put the packed file there too, or, if this one is right, add its sum to {_beside(sums)}"
    )


def _beside(sums: Sums) -> str:
    return "the MD5SUMS beside it, which does not list it" if sums else "an MD5SUMS file beside it"
