"""Safe reading and writing of files.

A write leaves either the old file or the new one, whatever interrupts it. A read of a bad file ends in an `InputError`
of one sentence.
"""

import errno
import io
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np
from filelock import FileLock, Timeout

from vqvae.console import remark
from vqvae.distributed import is_main
from vqvae.errors import InputError, MissingFileError, is_out_of_memory

ANOTHER_PLACE = "mend that, or name another place"
SCRATCH = ".partial"  # the suffix of a file that is still being written; a killed process leaves such a file behind
NOT_SUPPORTED = (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # of some file systems
NO_FILE = (errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO)  # a name that leads to no file
# A virus scanner, or another program that holds a file open, refuses a rename for a moment.
RENAME_WAITS_S = (0.1, 0.2, 0.4, 0.6, 0.7)


@contextmanager
def open_checked(path: Path, expected: str, remedy: str) -> Iterator[BinaryIO]:
    """The file at `path`, opened for a parser that runs inside the `with` block.

    Whatever the parser raises becomes an `InputError`, because for bytes that it does not expect a parser may raise
    anything. An `InputError` that is raised inside the block passes through unchanged.

    Args:
        expected: what the file should be, with its article.
        remedy: what the user can do if the file is something else.
    Raises:
        MissingFileError: there is no file.
        InputError: it is not a regular file, it cannot be read, or the parser refuses its bytes.
    """
    try:
        with open(path, "rb", opener=open_regular) as file:
            yield file
    except InputError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFileError(f"expected {expected} at {path}, found none; {remedy}") from None
    except Exception as error:
        found = f"a file that is cut short, damaged or of another kind ({summary(error)})"
        if isinstance(error, OSError) and error.strerror:  # the operating system raised it, not a parser
            found = f"what can't be read: {error.strerror}"
            if error.errno not in NO_FILE:
                remedy = "make it readable"  # it may be whole, and the remedy could be to replace it
        elif is_out_of_memory(error):
            found, remedy = "too little memory to read it", "end other programs, or name another file"
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


def open_regular(path: str, flags: int) -> int:
    """What `open` takes as its `opener`, to refuse whatever is no regular file.

    Raises:
        OSError: it cannot be opened, or it is a folder, a pipe or a device.
    """
    # Without this flag, opening a pipe waits until somebody writes to it, which may never happen.
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    try:
        _require_regular(os.fstat(descriptor).st_mode)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def refusals(expected: str, remedy: str) -> Iterator[None]:
    """Turn what the operating system refuses inside the `with` block into an `InputError`."""
    try:
        yield
    except InputError:  # a ValueError
        raise
    # ValueError: the name holds a null character. NotImplementedError: the file system has no locks.
    except (OSError, ValueError, NotImplementedError) as error:
        raise InputError(f"{expected}: {getattr(error, 'strerror', None) or error}; {remedy}") from None


def named(folder: Path) -> str:
    """A folder in a sentence, which a dot would seem to end."""
    return "the current folder" if folder == Path() else str(folder)


def require_writable(path: Path, remedy: str = ANOTHER_PLACE) -> None:
    """Refuse a file that `write_atomically` could not write. Nothing is made, and nothing stays.

    Where its folder does not exist yet, the nearest existing one above it is tried.

    Args:
        remedy: what the user can do.
    Raises:
        InputError: something other than a file is there, or no file can be written in its folder.
    """
    with refusals(f"expected to write {path}", remedy):
        target = _target(path)
        nearest = _nearest_existing(target)
        folder = nearest.parent if nearest == target else nearest
        if nearest == target:
            _require_own_if_sticky(target)
        scratch = folder / f".{os.urandom(8).hex()}{SCRATCH}"
        try:
            scratch.write_bytes(b"x")  # a full disk may still take an empty file
        finally:
            with suppress(OSError):
                scratch.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file completely or not at all. If several processes run, only the main one writes.

    Args:
        content: what to write, or a function that writes it to the file that it is given.

    The content goes to a scratch file in the same folder, which is flushed to disk and then renamed to `path`. If
    `path` is a link, the link stays and the file that it leads to is replaced. A new file has the mode that the umask
    gives, and an old file keeps its mode.

    Raises:
        InputError: the folder cannot be written, the disk is full, or something other than a file is at `path`. What
            is at `path` is then unchanged.
    """
    if not is_main():
        return
    with refusals(f"expected to write {path}", ANOTHER_PLACE):
        target = _target(path)
        for folder in (path.parent, target.parent):
            folder.mkdir(parents=True, exist_ok=True)
        # The name is cut because it may already be as long as the file system allows.
        scratch = target.with_name(f".{target.name[:40]}.{os.urandom(8).hex()}{SCRATCH}")
        try:
            with scratch.open("xb") as file:
                if callable(content):
                    content(file)
                else:
                    file.write(content)
                file.flush()
                _flush_to_disk(file.fileno())
            with suppress(OSError):  # there is no old file, or the file system has no modes
                scratch.chmod(stat.S_IMODE(target.stat().st_mode))
            _rename(scratch, target)
        except BaseException:
            with suppress(OSError):
                scratch.unlink(missing_ok=True)
            raise
        _flush_folder(target.parent)


def summary(error: BaseException) -> str:
    """The type of an error and the first line of its text."""
    first_line = (str(error).splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__


@contextmanager
def alone_in(folder: Path, what: str) -> Iterator[None]:
    """Inside, no other process writes to the folder by this function, and nothing is left there by a killed one.

    Args:
        folder: it is made if it does not exist.
        what: for the remark that another process is at it, such as "prepares flowers".
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        remark(f"another process {what} in {folder}; waiting for its end")
        lock.acquire()
    try:
        for left in folder.glob(f".*{SCRATCH}"):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write named arrays as a compressed .npz file, completely or not at all.

    Raises:
        ValueError: an array of Python objects, which only a pickle can hold.
    """
    if any(array.dtype.hasobject for array in arrays.values()):
        raise ValueError("expected arrays of numbers or of text, found Python objects")
    buffer = io.BytesIO()
    # Without numpy's own option to refuse objects, which numpy 2.0 does not have: it would write it as an array.
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_atomically(path, buffer.getvalue())


def _target(path: Path) -> Path:
    """The file that `path` leads to, if it is a link, or else `path`. It need not exist.

    Raises:
        OSError: it is something other than a file.
    """
    target = Path(os.path.realpath(path))
    with suppress(FileNotFoundError):
        _require_regular(target.stat().st_mode)
    return target


def _require_regular(mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        raise OSError(errno.ENXIO, "It is a pipe or a device")


def _require_own_if_sticky(path: Path) -> None:
    """Refuse a file of another user in a folder like /tmp, where only its owner may replace it."""
    user, folder = getattr(os, "geteuid", lambda: 0)(), path.parent.stat()
    if folder.st_mode & stat.S_ISVTX and user not in (0, folder.st_uid, path.stat().st_uid):
        raise PermissionError(errno.EPERM, "it belongs to another user")


def _nearest_existing(path: Path) -> Path:
    """A path, or the nearest one above it that exists.

    Raises:
        OSError: it is not to be reached, or a name in the rest of the path cannot exist there.
    """
    for nearest in (path, *path.parents):
        with suppress(FileNotFoundError, NotADirectoryError):
            nearest.stat()
            break
    for name in path.relative_to(nearest).parts:
        with suppress(FileNotFoundError, NotADirectoryError):
            (nearest / name).lstat()  # tells of a name that is too long
    return nearest


def _flush_to_disk(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise


def _rename(scratch: Path, target: Path) -> None:
    for wait_s in RENAME_WAITS_S:
        try:
            scratch.replace(target)
            return
        except PermissionError:
            time.sleep(wait_s)
    scratch.replace(target)


def _flush_folder(folder: Path) -> None:
    """Flush a folder to disk, so that a rename in it survives a power failure, where the system can."""
    with suppress(OSError):  # Windows cannot open a folder, and some file systems cannot flush one
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
