"""Safe reading and writing of files.

A write leaves either the old file or the new one, whatever interrupts it. A read of a bad file ends in an `InputError`
of one sentence.
"""

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

from vqvae.distributed import is_main
from vqvae.errors import InputError, MissingFileError

# What the parsers of JSON, TOML, IDX, safetensors, gzip, zip and pickle raise for bytes that they do not expect.
MALFORMED = (
    ArithmeticError,  # a number is too large
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,  # the file asks for more memory than there is
    OSError,
    RuntimeError,  # the content is nested too deeply; torch raises it for everything
    SafetensorError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)

SCRATCH = ".partial"  # the suffix of a file that is still being written; a killed process leaves such a file behind


@contextmanager
def open_checked(path: Path, expected: str, remedy: str) -> Iterator[BinaryIO]:
    """The file at `path`, opened for a parser that runs inside the `with` block.

    An exception that the parser raises for malformed bytes becomes an `InputError`. An `InputError` that is raised
    inside the block passes through unchanged.

    Args:
        expected: what the file should be, with its article.
        remedy: what the user can do if the file is something else.
    Raises:
        MissingFileError: there is no file.
        InputError: it is not a regular file, it cannot be read, or the parser refuses its bytes.
    """
    try:
        with open(path, "rb", opener=_open_without_blocking) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise InputError(f"expected {expected} at {path}, found a pipe or a device; {remedy}")
            yield file
    except InputError:  # a ValueError, which MALFORMED would catch
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFileError(f"expected {expected} at {path}, found none; {remedy}") from None
    except MALFORMED as error:
        found = f"a file that is cut short, damaged or of another kind ({_summary(error)})"
        if isinstance(error, OSError) and error.strerror:  # the operating system raised it, not a parser
            found = f"what can't be read: {error.strerror}"
        raise InputError(f"expected {expected} at {path}, found {found}; {remedy}") from None


def read_at_most(file: IO[bytes], limit: int) -> bytes:
    """The rest of a file, or of what a compressed file unpacks to.

    Raises:
        ValueError: the rest is longer than `limit` bytes. No more than that is ever read into memory.
    """
    content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"longer than {limit} bytes")
    return content


def make_folder(path: Path) -> None:
    """Make a folder and its parents, unless they exist.

    Raises:
        InputError: the folder cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"expected to write to {path}: {error.strerror}; name another folder") from None


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file completely or not at all. If several processes run, only the main one writes.

    The content goes to a scratch file in the same folder, which is flushed to disk and then renamed to `path`.

    Raises:
        InputError: the folder cannot be written or the disk is full. The old file at `path` is then unchanged.
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
            Path(scratch).chmod(0o644)  # mkstemp makes it 0600, which would hide the file from other users
            Path(scratch).replace(path)
        except BaseException:
            Path(scratch).unlink(missing_ok=True)
            raise
        _flush_folder(path.parent)
    except OSError as error:
        raise InputError(
            f"expected to write {path}: {error.strerror or error}; name a place that can be written"
        ) from None


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write named arrays as a compressed .npz file, completely or not at all."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_atomically(path, buffer.getvalue())


def _open_without_blocking(path: str, flags: int) -> int:
    # Without this flag, opening a pipe waits until somebody writes to it, which may never happen.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _summary(error: BaseException) -> str:
    """The type of an error and the first line of its text.

    Characters that do not print are left out, because a hostile file could use them to control the terminal.
    """
    first_line = (str(error).splitlines() or [""])[0]
    shown = "".join(character for character in first_line if character.isprintable())[:200]
    return f"{type(error).__name__}: {shown}" if shown else type(error).__name__


def _flush_folder(folder: Path) -> None:
    """Flush a folder to disk, so that a rename in it survives a power failure."""
    if os.name == "nt":  # Windows cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
