import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT
from vqvae.errors import InputError
from vqvae.shell import PACKAGE, command_line, program, require_extra, tell_version

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
    monkeypatch.setattr(sys, "executable", "/env/bin/python3")
    for started, found, expected in (
        ("cli.py", "/env/bin/python", "python cli.py"),
        ("some where/cli.py", "/env/bin/python", "python 'some where/cli.py'"),
        ("cli.py", "/another/bin/python", "/env/bin/python3 cli.py"),
        ("cli.py", None, "/env/bin/python3 cli.py"),
        ("/usr/bin/vqvae-pixelcnn", "/usr/bin/vqvae-pixelcnn", "vqvae-pixelcnn"),
        ("/usr/bin/vqvae-pixelcnn", "/another/bin/vqvae-pixelcnn", "/usr/bin/vqvae-pixelcnn"),
        ("/my env/bin/vqvae-pixelcnn", None, "'/my env/bin/vqvae-pixelcnn'"),
        ("./draw", None, "./draw"),
        ("draw", None, "./draw"),  # python draw
    ):
        monkeypatch.setattr(sys, "argv", [started])
        monkeypatch.setattr("shutil.which", lambda name, found=found: found)
        assert program() == expected


def test_the_version_is_that_of_this_installation_and_not_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, version in (("this", "1.2.3"), ("another", "9.9.9")):
        about = tmp_path / folder / f"vqvae_pixelcnn_mnist-{version}.dist-info" / "METADATA"
        about.parent.mkdir(parents=True)
        about.write_text(f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path / "another")
    monkeypatch.setattr("vqvae.shell.HOME", tmp_path / "this" / "vqvae_pixelcnn")
    with pytest.raises(SystemExit):
        tell_version(True)
    assert capsys.readouterr().out == f"{PACKAGE} 1.2.3\n"


def test_what_an_extra_lacks_is_told_with_what_to_type_in_a_clone_elsewhere_and_without_a_clone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)  # as if it were not installed
    for folder, home, line in (
        (ROOT, ROOT, "pip install -e '.[export]'"),
        (tmp_path, ROOT, f"pip install -e '{ROOT}[export]'"),
        (ROOT, tmp_path, f"pip install '{PACKAGE}[export]'"),
    ):
        monkeypatch.chdir(folder)
        monkeypatch.setattr("vqvae.shell.HOME", home)
        with pytest.raises(InputError) as refused:
            require_extra("export", "json", "onnx", "no_such_package")
        assert str(refused.value) == (
            f"expected the packages of the extra export, found no onnx, no_such_package; install them with: {line}"
        )
    require_extra("export", "json")
