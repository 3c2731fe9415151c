"""Every command of the README, as written, on the fixture's digits instead of all of MNIST."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
LINES = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
COMMANDS = [part.strip() for line in LINES for part in line.split("&&") if part.strip().startswith("python cli.py")]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program in a folder of its own, with the fixture where MNIST is looked for."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("vqvae", "prior", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "cli.py", folder)
    shutil.copytree(ROOT / "checkpoints" / "pretrained", folder / "checkpoints" / "pretrained")
    shutil.copytree(ROOT / "tests" / "fixture", folder / "data")
    return folder


def test_the_readme_has_the_commands_that_it_is_about() -> None:
    text = " ".join(COMMANDS)
    for command in ("train-vqvae", "train-prior", "sample --mode pixelcnn", "sample --mode gaussian", "compare"):
        assert f"python cli.py {command}" in text


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_runs_as_written(command: str, copy: Path) -> None:
    """In the README's order: a later command may use what an earlier one wrote."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(copy),  # this copy, not the installed one
    }
    done = subprocess.run(command, shell=True, cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "wrote " in done.stdout
    for written in re.findall(r"wrote ([^\s;,]+)", done.stdout):
        assert (copy / written).stat().st_size > 0
