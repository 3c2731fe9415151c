"""Files: written so that a cut at any moment leaves the old one or the new one, read so that a bad one ends in a
sentence."""

import io
import os
import pickle
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np
from safetensors import SafetensorError

from vqvae.common.distributed import is_main
from vqvae.common.errors import UserError

# What the parsers of JSON, TOML, IDX, safetensors, gzip, zip and pickle raise on bytes that are not what they expect.
MALFORMED = (
    ArithmeticError,  # a number too large
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,  # a size that nothing holds
    OSError,
    RuntimeError,  # nested too deeply, and all of torch's own
    SafetensorError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)

SCRATCH = ".partial"  # ends the name of what is not yet whole; a process that is killed leaves it


@contextmanager
def reading(path: Path, expected: str, remedy: str) -> Iterator[BinaryIO]:
    """The file at `path`, open; what its parser raises inside the `with` ends in one sentence.

    Args:
        expected: what the file should be, with its article.
        remedy: what to do where it is not.
    Raises:
        UserError: nothing there, something that is no regular file, or bytes that the parser refuses.
    """
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UserError(f"expected {expected} at {path}, found a pipe or a device; {remedy}")
            yield file
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"expected {expected} at {path}, found none; {remedy}") from None
    except MALFORMED as error:
        found = f"a file that is cut short, damaged or of another kind ({_in_short(error)})"
        if isinstance(error, OSError) and error.strerror:  # the system's, not a parser's
            found = f"what can't be read: {error.strerror}"
        raise UserError(f"expected {expected} at {path}, found {found}; {remedy}") from None


def read_at_most(file: IO[bytes], limit: int) -> bytes:
    """All that follows in a file, or in what a file unpacks to.

    Raises:
        ValueError: it is longer than `limit`; no more than that is taken into memory.
    """
    content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"longer than {limit} bytes")
    return content


def make_folder(path: Path) -> None:
    """Make a folder and those above it, where they are not there yet.

    Raises:
        UserError: it can't be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"expected to write to {path}: {error.strerror}; name another folder") from None


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside `path`, flush to disk, rename onto it, flush the folder. Of several processes the main one writes.

    Raises:
        UserError: the folder can't be written, or the disk is full; `path` is then as it was.
    """
    if not is_main():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=SCRATCH)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(scratch).chmod(0o644)  # mkstemp's 0600 would hide the file from everybody else
            Path(scratch).replace(path)
        except BaseException:
            Path(scratch).unlink(missing_ok=True)
            raise
        _flush_folder(path.parent)
    except OSError as error:
        raise UserError(
            f"expected to write {path}: {error.strerror or error}; name a place that can be written"
        ) from None


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write named arrays as a compressed .npz, whole or not at all."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_atomically(path, buffer.getvalue())


def _without_waiting(path: str, flags: int) -> int:
    # Opening a pipe that nobody writes to would otherwise wait for ever.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _in_short(error: BaseException) -> str:
    """The kind and the first line of an error, without what a file may have put there to trouble a terminal."""
    first_line = (str(error).splitlines() or [""])[0]
    shown = "".join(character for character in first_line if character.isprintable())[:200]
    return f"{type(error).__name__}: {shown}" if shown else type(error).__name__


def _flush_folder(folder: Path) -> None:
    """Make a rename last through a loss of power."""
    if os.name == "nt":  # there, a folder can't be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
