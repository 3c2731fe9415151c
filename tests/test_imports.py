"""Imports run one way: cli -> prior -> vqvae -> vqvae.common, and never back."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ["vqvae.common", "vqvae", "prior", "cli"]  # each may import itself and what stands before it
FILES = [ROOT / "cli.py", *sorted((ROOT / "prior").rglob("*.py")), *sorted((ROOT / "vqvae").rglob("*.py"))]


def layer_of(module: str) -> int | None:
    """The layer of a dotted name, None for what is not of this project."""
    for number, layer in enumerate(LAYERS):
        if module == layer or module.startswith(layer + "."):
            return number
    return None


def imported(source: str, package: str) -> list[str]:
    """Every module that a source file of `package` imports, at its top or inside a function."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            # `from vqvae import common` imports vqvae.common, so the names count as modules too.
            names += [module, *(f"{module}.{alias.name}" for alias in node.names)]
    return names


def climbing(source: str, package: str, module: str) -> list[str]:
    """The imports of a module that reach into a layer above its own."""
    own = layer_of(module)
    assert own is not None
    return [name for name in imported(source, package) if (layer := layer_of(name)) is not None and layer > own]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_nothing_above_its_layer(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    package = ".".join(parts[:-1])
    module = package if parts[-1] == "__init__" else ".".join(parts)
    assert climbing(path.read_text(encoding="utf-8"), package, module) == []


@pytest.mark.parametrize(
    "statement",
    [
        "import prior.model",
        "from prior import sampling",
        "def f():\n    from cli import app",
        "from ..model import VQVAE",
        "from vqvae import model",
    ],
)
def test_an_import_that_climbs_is_seen(statement: str) -> None:
    assert climbing(statement, "vqvae.common", "vqvae.common.grids") != []


def test_an_import_that_descends_is_allowed() -> None:
    source = "import torch\nfrom vqvae.common import checkpoint\nfrom prior.codes import Codes"
    assert climbing(source, "prior", "prior.model") == []
