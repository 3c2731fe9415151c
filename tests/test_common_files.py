import io
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vqvae.common.errors import UserError
from vqvae.common.files import write_arrays, write_atomically

OLD, NEW = b"the last good file", b"n" * 100_000


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_and_its_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.bin"
    write_atomically(path, NEW)
    assert path.read_bytes() == NEW
    assert left_in(path.parent) == ["file.bin"]
    assert path.stat().st_mode & 0o777 == 0o644
    write_atomically(path, b"")
    assert path.read_bytes() == b""


def cut_at(patch: pytest.MonkeyPatch, moment: str, error: BaseException) -> None:
    """Make one of the steps of a write fail; a write of content fails after half of it is on disk."""

    def fail(*args: object, **kwargs: object) -> None:
        raise error

    if moment == "write":
        fdopen = os.fdopen

        def opened(descriptor: int, mode: str) -> io.BufferedWriter:
            file = fdopen(descriptor, mode, buffering=0)
            os.write(descriptor, NEW[: len(NEW) // 2])
            file.close()
            raise error

        patch.setattr(os, "fdopen", opened)
    elif moment == "flush":
        patch.setattr(os, "fsync", fail)
    elif moment == "rename":
        patch.setattr(Path, "replace", fail)


@pytest.mark.parametrize("moment", ["write", "flush", "rename"])
@pytest.mark.parametrize("existed", [True, False])
def test_a_write_that_is_broken_off_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, existed: bool
) -> None:
    path = tmp_path / "file.bin"
    if existed:
        path.write_bytes(OLD)
    with monkeypatch.context() as patch:
        cut_at(patch, moment, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            write_atomically(path, NEW)
    assert left_in(tmp_path) == (["file.bin"] if existed else [])
    assert not existed or path.read_bytes() == OLD


@pytest.mark.parametrize("moment", ["write", "flush", "rename"])
def test_a_full_disk_is_told_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(OLD)
    with monkeypatch.context() as patch:
        cut_at(patch, moment, OSError(28, "No space left on device"))
        with pytest.raises(UserError, match=r"expected to write .*file.bin: No space left on device; name a place"):
            write_atomically(path, NEW)
    assert path.read_bytes() == OLD
    assert left_in(tmp_path) == ["file.bin"]


def test_a_process_that_is_killed_in_a_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(OLD)
    # Dies between the content and the rename, with no chance to tidy up.
    program = (
        "import os, sys; from pathlib import Path; from vqvae.common.files import write_atomically; "
        "os.fsync = lambda descriptor: os._exit(9); write_atomically(Path(sys.argv[1]), b'n' * 100_000)"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program, str(path)], cwd=root, check=False)
    assert done.returncode == 9
    assert path.read_bytes() == OLD


def test_what_was_written_is_flushed_before_it_is_renamed_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, fsync = tmp_path / "file.bin", os.fsync
    path.write_bytes(OLD)
    seen = []

    def flush(descriptor: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        seen.append((kind, os.fstat(descriptor).st_ino, path.read_bytes() == NEW))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", flush)
    write_atomically(path, NEW)
    assert seen == [("file", path.stat().st_ino, False), ("folder", tmp_path.stat().st_ino, True)]


def run_in_process(program: str, path: Path) -> str:
    """What `write_atomically(path, NEW)` ends in, in a process where something else is done first."""
    end = (
        "\ntry: write_atomically(Path(sys.argv[1]), b'n' * 100_000)\nexcept UserError as error: print(error)\n"
        "else: print('written')"
    )
    start = (
        "import os, resource, sys; from pathlib import Path; from vqvae.common.errors import UserError; "
        "from vqvae.common.files import write_atomically; "
    )
    command = [sys.executable, "-c", start + program + end, str(path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_a_file_that_may_grow_no_further_is_told_in_a_sentence(tmp_path: Path) -> None:
    """The operating system itself breaks the write off in its middle, as at a full disk or a spent quota."""
    path = tmp_path / "file.bin"
    path.write_bytes(OLD)
    told = run_in_process("resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))", path)
    assert told == f"expected to write {path}: File too large; name a place that can be written"
    assert path.read_bytes() == OLD
    assert left_in(tmp_path) == ["file.bin"]


def test_a_folder_that_may_not_be_written_is_told_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(OLD)
    tmp_path.chmod(0o555)
    try:
        told = run_in_process("os.getuid() or os.setuid(65534)", path)  # root may write anywhere
    finally:
        tmp_path.chmod(0o755)
    assert told == f"expected to write {path}: Permission denied; name a place that can be written"
    assert path.read_bytes() == OLD
    assert left_in(tmp_path) == ["file.bin"]


def test_a_place_that_is_no_folder_is_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(OLD)
    with pytest.raises(UserError, match=r"expected to write .*weights.bin: .*; name a place that can be written"):
        write_atomically(tmp_path / "file" / "weights.bin", NEW)
    assert (tmp_path / "file").read_bytes() == OLD


def test_arrays_are_read_back_as_they_were(tmp_path: Path) -> None:
    arrays = {
        "images": np.random.default_rng(0).random((3, 28, 28), dtype=np.float32),
        "indices": np.arange(49).reshape(1, 7, 7),
        "names": np.array(["real", "pixelcnn"]),
    }
    write_arrays(tmp_path / "arrays.npz", arrays)
    with np.load(tmp_path / "arrays.npz", allow_pickle=False) as read:
        assert sorted(read.files) == sorted(arrays)
        for name, array in arrays.items():
            assert read[name].dtype == array.dtype
            np.testing.assert_array_equal(read[name], array)


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="allow_pickle"):
        write_arrays(tmp_path / "arrays.npz", {"x": np.array([object()], dtype=object)})
    assert left_in(tmp_path) == []
