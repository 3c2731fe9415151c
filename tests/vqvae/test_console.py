import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import ROOT
from vqvae import console
from vqvae.console import LenientStream, be_quiet, progress, remark, say

PROGRAM = """
from vqvae.console import progress, remark, say
with progress(3, "step") as bar:
    for i in range(3):
        say("∞ \\udcff" * 20_000)
        remark(f"remark {i}")
        bar.update()
open("done", "w").close()
"""


@pytest.mark.parametrize("streams", [">/dev/full 2>/dev/full", ">&- 2>&-", "| true", "2>&1 | true", ">ascii 2>&1"])
def test_a_stream_that_is_full_closed_or_ascii_only_ends_nothing(tmp_path: Path, streams: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "PROGRAM": PROGRAM}
    command = f'set -o pipefail; "{sys.executable}" -c "$PROGRAM" {streams}'
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    assert re.fullmatch(r"(remark \d\n)*", done.stderr)
    assert (tmp_path / "done").exists()
    if "ascii" in streams:
        assert r"\u221e \udcff" in (tmp_path / "ascii").read_text()


def test_a_stream_whose_reader_is_slow_is_kept() -> None:
    class Slow(io.StringIO):
        def flush(self) -> None:
            raise BlockingIOError

    stream = LenientStream(slow := Slow())
    print("first", file=stream, flush=True)
    print("second", file=stream, flush=True)
    assert slow.getvalue() == "first\nsecond\n"


@pytest.mark.parametrize("tell", [say, remark])
def test_only_the_main_process_tells(
    tell: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tell("one")
    monkeypatch.setattr("vqvae.distributed.is_main", lambda: False)
    tell("two")
    assert "".join(capsys.readouterr()) == "one\n"
    assert progress(3, "step").disable


def test_what_is_told_cannot_control_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    say("two\nlines \x1b[2J")
    remark("one\nline \x1b[2J")
    assert capsys.readouterr() == ("two\nlines \\x1b[2J\n", "one\\nline \\x1b[2J\n")


def test_progress_is_a_line_now_and_then_without_a_terminal_and_none_if_it_is_turned_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "LINE_EVERY_S", 0.0)
    with progress(4, "step", initial=1, doing="drawing") as bar:
        bar.update(3)
    lines = capsys.readouterr().err.splitlines()
    assert re.match(r"drawing: 100% 4/4 \[", lines[-1])
    assert "\r" not in "".join(lines)
    monkeypatch.setattr(console, "LINE_EVERY_S", 60.0)
    with progress(4, "step") as bar:  # is done before a minute has passed
        bar.update(4)
    monkeypatch.setattr(console, "LINE_EVERY_S", 0.0)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    with progress(4, "step") as bar:
        bar.update(4)
    assert capsys.readouterr().err == ""


def test_a_standard_stream_that_is_closed_is_not_taken_by_a_file(tmp_path: Path) -> None:
    lines = ["import sys, vqvae.console", "vqvae.console.guard_streams()", "file = open('data', 'wb')"]
    lines += ["print('told')", "sys.stderr.write('told')", "assert file.fileno() > 2"]
    lines += ["assert not hasattr(sys.stdout, 'buffer')"]
    command = f'"{sys.executable}" -c "$PROGRAM" <&- >&- 2>&-'
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PROGRAM": "\n".join(lines)}
    subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "data").read_bytes() == b""


def test_quiet_turns_progress_off_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "0")
    for quiet in (False, True):
        be_quiet(quiet)
        assert progress(3, "step").disable == quiet
    remark("a remark")
    say("a result")
    assert capsys.readouterr() == ("a result\n", "a remark\n")
