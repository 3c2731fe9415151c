import io
import os
import subprocess
import sys

import pytest

from vqvae.shell import command_line, program

WORDS = ["plain", "", "my run", "it's", "$HOME `x` \\", "-x", "café ∞", "new\nline\x1b[2J", "not utf-8 \udcff", "\\'"]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_command_line_that_is_pasted_into_a_shell_gives_its_words_again(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    shown = command_line(*WORDS)
    assert shown.encode(encoding).decode(encoding) == shown.replace("\n", "")
    repeat = f"{sys.executable} -c 'import sys; print(ascii(sys.argv[1:]))' {shown}"
    done = subprocess.run(["bash", "-c", repeat], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ascii(WORDS)
    monkeypatch.setattr(os, "name", "nt")
    assert command_line("my run", "it's") == '"my run" it\'s'  # there ' is a letter like any other


def test_the_program_is_called_as_it_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    for started, found, expected in (
        ("cli.py", None, "python cli.py"),
        ("some where/cli.py", None, "python 'some where/cli.py'"),
        ("/usr/bin/vqvae-pixelcnn", "/usr/bin/vqvae-pixelcnn", "vqvae-pixelcnn"),
        ("/my env/bin/vqvae-pixelcnn", None, "'/my env/bin/vqvae-pixelcnn'"),
    ):
        monkeypatch.setattr(sys, "argv", [started])
        monkeypatch.setattr("shutil.which", lambda name, found=found: found)
        assert program() == expected
