import errno
import io
import os
import resource
import stat
import tempfile
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError

from vqvae.errors import InputError, MissingFileError
from vqvae.storage import files
from vqvae.storage.files import SCRATCH, open_checked, read_at_most, require_writable, write_arrays, write_atomically

Patch = pytest.MonkeyPatch
OLD, NEW = b"the last good file", b"n" * 100_000


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
    monkeypatch.setattr(files, "is_main", lambda: False)
    write_atomically(path, NEW)
    assert path.read_bytes() == b""
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("moment", ["fsync", "replace"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])
def test_a_write_that_breaks_off_leaves_what_was_there(
    path: Path, monkeypatch: Patch, moment: str, error: BaseException
) -> None:
    def fail(*arguments: object) -> None:
        assert path.read_bytes() == OLD  # what a kill would leave: the old file, and a scratch file beside it
        assert len([*path.parent.glob(f".*file*{SCRATCH}")]) == 1
        raise error

    monkeypatch.setattr(Path if moment == "replace" else os, moment, fail)
    full = r"^expected to write .*: No space left on device; mend that, or name another place$"
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


def test_a_write_ends_in_its_middle(path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(NEW) // 2, limit[1]))
    try:
        with pytest.raises(InputError, match=f"^expected to write {path}: File too large; mend that, or name another"):
            write_atomically(path, NEW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert_unchanged(path)


# What cannot be written, as seen from the folder of a file, and why. Root is refused too.
REFUSED = {"x" * 300: "File name too long", "new/" + "x" * 300: "File name too long", "a/" * 3000: "File name too long"}
REFUSED |= {"file.bin/x": "Not a directory|File exists", "\0": "embedded null byte", "a\0b/c": "embedded null byte"}
REFUSED |= {"/proc/x": ".+", "/proc/new/x": ".+", "loop/x": "Too many levels of symbolic links"}
REFUSED |= {"": "Is a directory", "/": "Is a directory", "/dev/null": "It is a pipe or a device"}
REFUSED |= {"pipe": "It is a pipe or a device", "link to a device": "It is a pipe or a device", "loop": "Too many.*"}


@pytest.mark.parametrize("name", REFUSED, ids=lambda name: name[:20])
def test_what_cannot_be_written_is_told_in_a_sentence_and_before_anything_is_made(path: Path, name: str) -> None:
    (path.parent / "loop").symlink_to("loop")
    (path.parent / "link to a device").symlink_to("/dev/null")
    os.mkfifo(path.parent / "pipe")
    before, target = sorted(path.parent.rglob("*")), path.parent / name
    for write in (require_writable, lambda path: write_atomically(path, NEW)):
        with pytest.raises(
            InputError, match=rf"^expected to write .*: ({REFUSED[name]}); mend that, or name another place$"
        ):
            write(target)
    assert [left for left in sorted(path.parent.rglob("*")) if left.name != "new"] == before
    assert path.read_bytes() == OLD


def test_a_place_that_can_be_written_is_tried_and_left_as_it_was(path: Path) -> None:
    longest = "x" * 255
    for place in (path, path.with_name(longest), path.parent / "a" / "b" / "new", path.parent / longest / "new"):
        require_writable(place)
    assert_unchanged(path)
    write_atomically(path.with_name(longest), NEW)


def test_the_mode_is_the_umasks_or_the_old_files_and_a_link_is_written_through(path: Path) -> None:
    umask = os.umask(0o027)
    try:
        write_atomically(path.with_name("new"), NEW)
        path.chmod(0o604)
        (path.parent / "link").symlink_to("file.bin")
        (path.parent / "link to nothing yet").symlink_to("there/new")
        write_atomically(path.parent / "link", NEW)
        write_atomically(path.parent / "link to nothing yet", NEW)
    finally:
        os.umask(umask)
    assert (path.parent / "link").readlink() == Path("file.bin")
    assert (path.parent / "there" / "new").read_bytes() == path.read_bytes() == NEW
    assert [file.stat().st_mode & 0o777 for file in (path, path.with_name("new"))] == [0o604, 0o640]


def refuse(patch: Patch, module: object, name: str, code: int, times: int = 10**6) -> None:
    """Let a function of the operating system refuse, the first few times that it is called."""
    real, refusals = getattr(module, name), iter(range(times))

    def call(*arguments: object, **options: object) -> object:
        if next(refusals, None) is None:
            return real(*arguments, **options)
        raise OSError(code, os.strerror(code))

    patch.setattr(module, name, call)


@pytest.mark.parametrize(
    ("module", "name", "code", "times"),
    [(Path, "chmod", code, 99) for code in (errno.EPERM, errno.ENOTSUP, errno.EIO)]
    + [(os, "fsync", code, 99) for code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)]
    + [(tempfile, "gettempdir", errno.ENOENT, 99)]
    + [(os, "open", code, 99) for code in (errno.EACCES, errno.EINVAL)]  # of the folder, to flush it
    + [(Path, "replace", code, times) for code in (errno.EACCES, errno.EPERM) for times in (1, 3)],
)
def test_what_some_file_systems_refuse_stops_no_write(
    path: Path, monkeypatch: Patch, module: object, name: str, code: int, times: int
) -> None:
    monkeypatch.setattr(files, "RENAME_WAITS_S", (0.0, 0.0, 0.0))
    refuse(monkeypatch, module, name, code, times)
    write_atomically(path, NEW)
    assert path.read_bytes() == NEW
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fails_is_an_error_and_so_is_a_rename_that_is_refused_for_long(
    path: Path, monkeypatch: Patch, code: int
) -> None:
    monkeypatch.setattr(files, "RENAME_WAITS_S", (0.0, 0.0))
    for module, name, why in ((os, "fsync", code), (Path, "replace", errno.EACCES)):
        with monkeypatch.context() as patch:
            refuse(patch, module, name, why)
            with pytest.raises(InputError, match=f": {os.strerror(why)}; mend that, or"):
                write_atomically(path, NEW)
        assert_unchanged(path)


def test_arrays_are_read_back_as_they_were(path: Path) -> None:
    arrays = {"images": np.random.default_rng(0).random((3, 5), dtype=np.float32), "labels": np.array(["a", "bc"])}
    with pytest.raises(ValueError, match="found Python objects"):  # they would be pickled
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
    for name, reason in {**found, "/dev/null": "what can't be read: It is a pipe or a device"}.items():
        message = f"^expected a note at {path.parent / name}, found {reason}; write one$"
        with pytest.raises(MissingFileError if reason == "none" else InputError, match=message):
            open_checked(path.parent / name, "a note", "write one").__enter__()


@pytest.mark.parametrize("kind", [KeyError, OSError, RuntimeError, SafetensorError, ValueError])
def test_what_a_parser_raises_is_told_in_a_sentence(path: Path, kind: type[Exception]) -> None:
    found = rf"a file that is cut short, damaged or of another kind \({kind.__name__}: .?at byte 3.?\)"
    with pytest.raises(InputError, match=f"^expected a note at {path}, found {found}; write one$") as raised:
        with open_checked(path, "a note", "write one"):
            raise kind("at byte 3")
    assert not isinstance(raised.value, FileNotFoundError)


@pytest.mark.parametrize("error", [InputError("a sentence of ours"), KeyboardInterrupt()])
def test_what_is_not_a_parsers_error_passes_through(path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, open_checked(path, "a note", "write one"):
        raise error
    assert raised.value is error


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_file_is_not_called_damaged_where_memory_is_short(path: Path, error: Exception) -> None:
    with pytest.raises(InputError, match="found too little memory to read it; end other programs, or name another"):
        with open_checked(path, "a note", "write one"):
            raise error


def test_a_parsers_text_cannot_fill_or_control_the_terminal(path: Path) -> None:
    shown = {"": "", "a\nb": ": a", "\x1b[31m\u202ered": r": \x1b[31m\u202ered", "x" * 5000: f": {'x' * 200}"}
    for text in shown:
        with pytest.raises(InputError) as raised, open_checked(path, "a note", "write one"):
            raise ValueError(text)
        assert str(raised.value).endswith(f"of another kind (ValueError{shown[text]}); write one")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE])
def test_a_file_that_cannot_be_read_is_never_to_be_replaced(path: Path, monkeypatch: Patch, code: int) -> None:
    refuse(monkeypatch, os, "open", code)
    with pytest.raises(InputError, match=f"found what can't be read: {os.strerror(code)}; make it readable$"):
        open_checked(path, "a run to resume", "start anew").__enter__()


def test_no_more_is_read_than_the_limit() -> None:
    assert read_at_most(io.BytesIO(b"12345"), 5) == b"12345"
    file = io.BytesIO(b"1" * 1000)
    with pytest.raises(ValueError, match="longer than 5 bytes"):
        read_at_most(file, 5)
    assert file.tell() == 6


@pytest.mark.skipif(os.name != "posix", reason="only there a folder can be sticky")
def test_a_file_of_another_user_in_a_sticky_folder_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs").touch()
    tmp_path.chmod(0o1777)
    require_writable(tmp_path / "theirs")
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    require_writable(tmp_path / "new")
    with pytest.raises(InputError, match="theirs: it belongs to another user; mend that, or name another place"):
        require_writable(tmp_path / "theirs")
