"""The shape of the program: which module may import which, how long a file may be, and what a command may load."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import prior
import vqvae
from tests.helpers import ROOT, SHIPPED

# Every module, the lowest first. A module may import only modules that stand before it.
RANKING = """
    vqvae.errors vqvae.distributed vqvae.compute
    vqvae.storage vqvae.storage.files vqvae.storage.recipe vqvae.storage.checkpoint vqvae.storage.runs
    vqvae.data vqvae.data.dataset vqvae.data.pixels vqvae.data.download vqvae.data.mnist
    vqvae.pictures vqvae.output
    vqvae.training vqvae.training.settings vqvae.training.signals vqvae.training.averages vqvae.training.logs
    vqvae.training.loop
    vqvae.quantizer vqvae.predictor vqvae.model vqvae.codec vqvae.gaussian vqvae.train vqvae
    prior.kernels prior.model prior.incremental prior.sampling
    prior.codes prior.independent prior.likelihood prior.pair prior.train
    prior.evaluation prior.evaluation.metrics prior.evaluation.sets prior.evaluation.memorisation
    prior.evaluation.classifier prior.evaluation.classifier_training prior.evaluation.figures prior.evaluation.tables
    prior.evaluation.measure prior.evaluation.report prior.evaluation.comparison prior
    cli
""".split()
MAX_LINES = 300
MAX_LINES_OF_CLI = 350


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


PATHS = [ROOT / "cli.py", *(path for folder in ("vqvae", "prior") for path in (ROOT / folder).rglob("*.py"))]
SOURCES = {module_name(path): path.read_text(encoding="utf-8") for path in sorted(PATHS)}


def imported(source: str) -> Iterator[str]:
    """The modules of this project that a source imports, at its top or inside a function. Unknown ones count too."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in RANKING else str(node.module) for name in whole]
        yield from (name for name in names if name.split(".")[0] in ("vqvae", "prior", "cli", "tests"))


def climbing(source: str, module: str) -> list[str]:
    """The imports of a module that do not stand before it."""
    before = RANKING[: RANKING.index(module)]
    return [name for name in imported(source) if name not in before]


def test_every_module_has_its_place_and_every_place_its_module() -> None:
    assert sorted(RANKING) == sorted(SOURCES)


def test_a_module_imports_only_modules_that_stand_before_it() -> None:
    found = {module: climbing(source, module) for module, source in SOURCES.items()}
    assert {module: names for module, names in found.items() if names} == {}


def test_an_import_that_climbs_is_seen() -> None:
    for statement in ("import vqvae.codec", "from vqvae import codec", "def f():\n    from vqvae.codec import BATCH"):
        assert climbing(f"import vqvae.errors\n{statement}", "vqvae.model") == ["vqvae.codec"]
    assert climbing("from vqvae.model import VQVAE", "vqvae.model") == ["vqvae.model"]
    assert climbing("from vqvae.common import data", "vqvae.model") == ["vqvae.common"]


def test_no_file_is_longer_than_it_may_be() -> None:
    lines = {module: len(source.splitlines()) for module, source in SOURCES.items()}
    assert lines.pop("cli") <= MAX_LINES_OF_CLI
    assert {module: num for module, num in lines.items() if num > MAX_LINES} == {}


def numbers_in(source: str) -> set[int]:
    """The whole numbers in a source. Exponents are left out: 2**28 is a number of bytes."""
    nodes = list(ast.walk(ast.parse(source)))
    exponents = {id(node.right) for node in nodes if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow)}
    found = (node for node in nodes if isinstance(node, ast.Constant) and id(node) not in exponents)
    return {node.value for node in found if type(node.value) is int}


def test_mnists_numbers_stand_in_one_file() -> None:
    with_its_side = {module for module, source in SOURCES.items() if numbers_in(source) & {28, 784}}
    assert with_its_side == {"vqvae.data.mnist"}
    with_its_classes = {module for module, source in SOURCES.items() if 10 in numbers_in(source)}
    # Elsewhere 10 counts columns of a grid, steps of k-means, decibels and epochs.
    others = {"vqvae.pictures", "vqvae.quantizer", "vqvae.train", "vqvae.training.settings"}
    assert with_its_classes == {"vqvae.data.mnist"} | others


def test_only_training_tasks_and_the_command_line_know_where_images_come_from() -> None:
    users = {module for module, source in SOURCES.items() if "vqvae.data.mnist" in imported(source)}
    assert users == {"vqvae.train", "prior.train", "prior.evaluation.classifier_training", "cli"}


@pytest.mark.parametrize("package", [vqvae, prior])
def test_the_public_names_of_a_package_are_there(package: ModuleType) -> None:
    assert {name for name in package.__all__ if getattr(package, name).__name__ != name} == set()
    assert not hasattr(package, "nothing")
    assert (ROOT / package.__name__ / "py.typed").exists()


def test_the_packages_load_nothing_before_it_is_used() -> None:
    program = "import sys, vqvae, prior; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A folder with modules of well-known names. Each leaves a file behind if it is imported from here."""
    for name in ("torch", "numpy", "typer", "vqvae", "prior", "safetensors", "random"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w').close()")
    return tmp_path


def modules_of(folder: Path, *arguments: object) -> set[str]:
    """The names of all modules that a command imports, run in a folder."""
    command = [sys.executable, "-X", "importtime", *map(str, [ROOT / "cli.py", *arguments])]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert not (folder / "imported").exists()
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


def test_help_needs_no_network_library(trap: Path) -> None:
    names = modules_of(trap, "--help")
    assert "typer" in names
    assert names.isdisjoint({"torch", "torchvision", "numpy", "tensorboard", "scipy", "matplotlib", "tqdm"})


def test_sampling_imports_only_what_it_needs_and_nothing_from_the_current_folder(trap: Path) -> None:
    """torchvision and torch's compiler each take more than a second, half of a cold start."""
    pair = ["--vqvae", SHIPPED / "vqvae.safetensors", "--prior", SHIPPED / "prior.safetensors"]
    names = modules_of(trap, "sample", "--mode", "pixelcnn", *pair, "--num-samples", 1, "--device", "cpu")
    assert (trap / "pixelcnn.png").exists()
    assert {"vqvae.codec", "vqvae.output", "prior.sampling", "prior.pair"} <= names
    assert names.isdisjoint({"torchvision", "torch._dynamo", "tensorboard", "torch.utils.tensorboard", "scipy"})
    assert names.isdisjoint({"matplotlib", "prior.train", "vqvae.train", "prior.evaluation"})
