"""The README: every command and every program in it as written, on the fixture's digits instead of all of MNIST."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers import FIXTURE, ROOT, SHIPPED
from tests.make_sets import make_letters, make_photos

README = (ROOT / "README.md").read_text()
LINES = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
SERVES = "python cli.py demo"  # until it is stopped; tests/prior/demo/test_browser.py runs it
COMMANDS = [part.strip() for line in LINES for part in line.split("&&") if part.strip().startswith("python cli.py")]
COMMANDS = [command for command in COMMANDS if command != SERVES]
PROGRAMS = re.findall(r"```python\n(.*?)```", README.partition("From Python\n")[2], re.DOTALL)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program in a folder of its own, with the fixture where MNIST is looked for, and with images of a user's.
    Its recipes say one epoch, and narrow networks."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("vqvae", "prior", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for recipe in (folder / "configs").glob("*.toml"):
        text = re.sub(r"^width = .*", "", recipe.read_text(), flags=re.MULTILINE)
        text = re.sub(r"\[(vqvae|prior)\]\n", r"[\1]\nwidth = 16\n", text)
        recipe.write_text(re.sub(r"num_epochs = \d+", "num_epochs = 1", text))
    shutil.copy(ROOT / "cli.py", folder)
    shutil.copytree(SHIPPED, folder / "checkpoints" / "pretrained")
    shutil.copytree(FIXTURE, folder / "data")
    make_photos(folder / "photos", num=100)
    make_letters(folder / "letters", num=312)
    letters = sorted((folder / "letters").rglob("*.png"))
    arrays = {
        "images": [np.array(Image.open(path)) for path in letters],
        "labels": [path.parent.name for path in letters],
    }
    np.savez(folder / "letters.npz", **arrays)
    return folder


def run_in(folder: Path, command: str) -> str:
    """What a shell command prints, run with this interpreter and with the program that lies in the folder."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readme_has_what_it_is_about() -> None:
    text = " ".join(COMMANDS)
    for command in ("train-vqvae", "train-prior", "sample --mode pixelcnn", "sample --mode gaussian", "compare"):
        assert f"python cli.py {command}" in text
    assert "prior.load()" in "".join(PROGRAMS)
    assert "vqvae.load()" in "".join(PROGRAMS)


def test_every_file_that_the_readme_links_to_is_there() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README) + re.findall(r'src="([^"]+)"', README)
    assert len(links) >= 5
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_runs_as_written(command: str, copy: Path) -> None:
    """In the README's order: a later command may use what an earlier one wrote."""
    written = re.findall(r"(?:wrote|best weights:) ([^\s;,]+)", run_in(copy, command))
    assert len(written) >= 1
    assert all((copy / name).stat().st_size > 0 for name in written)


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_of_the_readme_runs_and_its_tensors_have_the_shapes_in_its_comments(program: str, copy: Path) -> None:
    shapes = re.findall(r"^(\w+) = .*# (\([\d, ]+\))", program, re.MULTILINE)
    checks = [f"assert tuple({name}.shape) == {shape}" for name, shape in shapes]
    (copy / "program.py").write_text("\n".join([program, *checks]))
    run_in(copy, "python program.py")
