"""What an installed program has: every file that it looks for, found from any folder."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.helpers import ROOT
from vqvae.storage.shipped import RECIPES, find_recipe

SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of installed packages with the modules and the data that `pyproject.toml` declares, and no others."""
    folder = tmp_path_factory.mktemp("installed")
    for package in SETUPTOOLS["packages"]:
        source = ROOT / SETUPTOOLS["package-dir"].get(package, package.replace(".", "/"))
        for pattern in ("*.py", *SETUPTOOLS["package-data"].get(package, ())):
            for path in source.glob(pattern):
                place = folder / package.replace(".", "/") / path.relative_to(source)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, place)
    return folder


def files_in(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}


def test_an_installation_has_every_file_and_claims_no_name_that_others_may_have(installed: Path) -> None:
    for package in ("vqvae", "prior"):
        assert files_in(installed / package) == files_in(ROOT / package)
    weights = {Path("checkpoints/pretrained") / f"{stage}.safetensors" for stage in ("vqvae", "prior", "classifier")}
    recipes = {path.relative_to(ROOT) for path in (ROOT / "configs").glob("*.toml")}
    assert files_in(installed / "vqvae_pixelcnn") == {Path("cli.py"), *weights, *recipes}
    assert {path.name for path in installed.iterdir()} == {"vqvae", "prior", "vqvae_pixelcnn"}


def test_an_installed_program_finds_its_weights_and_its_recipes_from_any_folder(
    installed: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed)}

    def run(arguments: str) -> str:
        command = [sys.executable, "-m", "vqvae_pixelcnn.cli", *arguments.split()]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return done.stdout + done.stderr

    weights = installed / "vqvae_pixelcnn" / "checkpoints" / "pretrained" / "vqvae.safetensors"
    assert run("sample --mode gaussian --num-samples 1").splitlines()[0] == f"weights: {weights} (the shipped weights)"
    for recipe in ("", "--config configs/smoke.toml"):
        assert "MNIST files" in run(f"train-vqvae {recipe} --data-folder nowhere --no-download")


def test_a_shipped_recipe_is_meant_where_no_file_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = Path("configs/mnist.toml")
    assert find_recipe(name) == RECIPES / "mnist.toml"
    for unknown in (Path("configs/other.toml"), tmp_path / name, Path("a" * 300)):
        assert find_recipe(unknown) == unknown
    (tmp_path / "configs").mkdir()
    (tmp_path / name).symlink_to("nowhere")
    assert find_recipe(name) == name  # and not the shipped one, without a word
    (tmp_path / "configs" / "nowhere").write_text("")
    assert find_recipe(name) == name
