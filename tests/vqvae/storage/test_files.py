import errno
import io
import os
import pickle
import resource
import stat
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError

from vqvae.errors import InputError, MissingFileError
from vqvae.storage import files
from vqvae.storage.files import SCRATCH, make_folder, open_checked, read_at_most, write_arrays, write_atomically

Patch = pytest.MonkeyPatch
OLD, NEW = b"the last good file", b"n" * 100_000
PARSERS_ERRORS = (OverflowError, AssertionError, AttributeError, EOFError, KeyError, IndexError, MemoryError, OSError)
PARSERS_ERRORS += (RuntimeError, RecursionError, SafetensorError, TypeError, ValueError, pickle.UnpicklingError)
PARSERS_ERRORS += (struct.error, zipfile.BadZipFile, zlib.error)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file that was written before, alone in its folder."""
    path = tmp_path / "file.bin"
    path.write_bytes(OLD)
    return path


def assert_unchanged(path: Path) -> None:
    assert path.read_bytes() == OLD
    assert list(path.parent.iterdir()) == [path]


def test_a_file_and_its_folders_are_made_by_the_main_process_alone(tmp_path: Path, monkeypatch: Patch) -> None:
    path = tmp_path / "a" / "b" / "file.bin"
    for content in (NEW, b""):
        write_atomically(path, content)
        assert path.read_bytes() == content
    assert path.stat().st_mode & 0o777 == 0o644  # other users may read it
    monkeypatch.setattr(files, "is_main", lambda: False)
    write_atomically(path, NEW)
    assert path.read_bytes() == b""
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("moment", ["fdopen", "fsync", "replace"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])
def test_a_write_that_breaks_off_leaves_what_was_there(
    path: Path, monkeypatch: Patch, moment: str, error: BaseException
) -> None:
    def fail(*arguments: object) -> None:
        assert path.read_bytes() == OLD  # what a kill would leave: the old file, and a scratch file beside it
        assert len([*path.parent.glob(f".*file*{SCRATCH}")]) == 1
        if moment == "fdopen":  # half of the content is on disk
            os.write(arguments[0], NEW[: len(NEW) // 2])
            os.close(arguments[0])
        raise error

    monkeypatch.setattr(Path if moment == "replace" else os, moment, fail)
    full = r"^expected to write .*: No space left on device; name a place that can be written$"
    for target in (path, path.with_name("another file that is new")):
        with pytest.raises((InputError, KeyboardInterrupt), match=full if isinstance(error, OSError) else "^$"):
            write_atomically(target, NEW)
        assert_unchanged(path)


def test_content_is_flushed_before_the_rename_and_the_folder_after(path: Path, monkeypatch: Patch) -> None:
    flush, flushed, short = os.fsync, [], b"short, so that it waits in the buffer"

    def note(descriptor: int) -> None:
        found = os.fstat(descriptor)
        size = None if stat.S_ISDIR(found.st_mode) else found.st_size
        flushed.append((found.st_ino, size, path.read_bytes() == short))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    write_atomically(path, short)
    assert flushed == [(path.stat().st_ino, len(short), False), (path.parent.stat().st_ino, None, True)]


@pytest.mark.parametrize("reason", ["File too large", "File name too long", "Not a directory|File exists"])
def test_what_the_operating_system_refuses_is_told_in_a_sentence(path: Path, reason: str) -> None:
    targets = {"File too large": path, "File name too long": path.with_name("x" * 300)}
    target, limit = targets.get(reason, path / "file"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(NEW) // 2, limit[1]))  # a write ends in its middle
    try:
        with pytest.raises(InputError, match=f"^expected to write {target}: ({reason}); name a place that can be wri"):
            write_atomically(target, NEW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert_unchanged(path)
    for _ in range(2):
        make_folder(path.parent / "a" / "b")
    assert (path.parent / "a" / "b").is_dir()
    with pytest.raises(InputError, match=f"expected to write to {path}/b: .+; name another folder"):
        make_folder(path / "b")


def test_arrays_are_read_back_as_they_were(path: Path) -> None:
    arrays = {"images": np.random.default_rng(0).random((3, 5), dtype=np.float32), "labels": np.array(["a", "bc"])}
    with pytest.raises(ValueError, match="allow_pickle"):  # objects would be pickled
        write_arrays(path, {"x": np.array([object()], dtype=object)})
    assert_unchanged(path)
    write_arrays(path, arrays)
    with np.load(path, allow_pickle=False) as found:
        assert found.files == [*arrays]
        assert all(found[name].tobytes() == array.tobytes() for name, array in arrays.items())
        assert all(found[name].dtype == array.dtype for name, array in arrays.items())


def test_a_file_is_opened_or_the_reason_why_not_is_told(path: Path) -> None:
    with open_checked(path, "a note", "write one") as file:
        assert file.read() == OLD
    found = {"none": "none", "file.bin/x": "none", "": "what can't be read: Is a directory"}
    found |= {name: "what can't be read: File name too long" for name in ("x" * 5000, "a/" * 3000)}
    for name, reason in {**found, "/dev/null": "a pipe or a device"}.items():
        message = f"^expected a note at {path.parent / name}, found {reason}; write one$"
        with pytest.raises(MissingFileError if reason == "none" else InputError, match=message):
            open_checked(path.parent / name, "a note", "write one").__enter__()


@pytest.mark.parametrize("kind", PARSERS_ERRORS)
def test_what_a_parser_raises_is_told_in_a_sentence(path: Path, kind: type[Exception]) -> None:
    found = rf"a file that is cut short, damaged or of another kind \({kind.__name__}: .?at byte 3.?\)"
    with pytest.raises(InputError, match=f"^expected a note at {path}, found {found}; write one$") as raised:
        with open_checked(path, "a note", "write one"):
            raise kind("at byte 3")
    assert not isinstance(raised.value, FileNotFoundError)


@pytest.mark.parametrize("error", [InputError("a sentence of ours"), KeyboardInterrupt(), ImportError("a bug")])
def test_what_is_not_a_parsers_error_passes_through(path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, open_checked(path, "a note", "write one"):
        raise error
    assert raised.value is error


def test_a_parsers_text_cannot_fill_or_control_the_terminal(path: Path) -> None:
    shown = {"": "", "a\nb": ": a", "\x1b[31m\u202ered\x00": ": [31mred", "x" * 5000: f": {'x' * 200}"}
    for text in shown:
        with pytest.raises(InputError) as raised, open_checked(path, "a note", "write one"):
            raise ValueError(text)
        assert str(raised.value).endswith(f"of another kind (ValueError{shown[text]}); write one")


def test_no_more_is_read_than_the_limit() -> None:
    assert read_at_most(io.BytesIO(b"12345"), 5) == b"12345"
    file = io.BytesIO(b"1" * 1000)
    with pytest.raises(ValueError, match="longer than 5 bytes"):
        read_at_most(file, 5)
    assert file.tell() == 6
