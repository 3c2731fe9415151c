"""The shape of the program: which module may import which, how long a file may be, and what a command may load."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import prior
import vqvae
from tests.helpers import ROOT, SHIPPED

# Every module, the lowest first. A module may import only modules that stand before it.
RANKING = """
    vqvae.errors vqvae.distributed vqvae.compute vqvae.console vqvae.threads vqvae.stopping
    vqvae.storage vqvae.storage.shipped vqvae.shell vqvae.storage.files vqvae.storage.recipe vqvae.storage.tensors
    vqvae.storage.checkpoint vqvae.storage.runs
    vqvae.data vqvae.data.deform vqvae.data.dataset vqvae.data.pixels vqvae.data.idx vqvae.data.archive
    vqvae.data.download
    vqvae.data.mnist vqvae.data.torchvision_sets vqvae.data.images vqvae.data.prepared vqvae.data.folder
    vqvae.data.arrays vqvae.data.load vqvae.data.chosen vqvae.pictures vqvae.output
    vqvae.training vqvae.training.muon vqvae.training.settings vqvae.training.signals vqvae.training.averages
    vqvae.training.history vqvae.curves vqvae.training.logs vqvae.training.state vqvae.training.start
    vqvae.training.loop
    vqvae.quantizer vqvae.predictor vqvae.model vqvae.codec vqvae.gaussian vqvae.loss vqvae.train vqvae
    prior.kernels prior.model prior.incremental prior.sampling prior.labels
    prior.codes prior.independent prior.likelihood prior.maps prior.pair prior.export
    prior.exported.sample_onnx prior.exported.sample_torch prior.animation prior.completions prior.scores prior.train
    prior.evaluation prior.evaluation.metrics prior.evaluation.plots prior.evaluation.sets prior.evaluation.memorisation
    prior.evaluation.classifier prior.evaluation.classifier_training prior.evaluation.figures prior.evaluation.tables
    prior.evaluation.verdict prior.evaluation.measure prior.evaluation.illustrations prior.evaluation.page
    prior.evaluation.report prior.evaluation.comparison
    prior.demo prior.demo.drawing prior.demo.analysis prior.demo.codebook prior.demo.html
    prior.demo.answers prior.demo.page prior.demo.serve prior
    cli
""".split()
MAX_LINES = 300
MAX_LINES_OF_CLI = 543


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


def test_every_module_has_its_place_and_every_place_its_module() -> None:
    assert sorted(RANKING) == sorted(SOURCES)


def test_a_module_imports_only_modules_that_stand_before_it() -> None:
    before = {module: RANKING[: RANKING.index(module)] for module in SOURCES}
    assert {(m, name) for m, source in SOURCES.items() for name in imported(source) if name not in before[m]} == set()


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
    others = {"vqvae.pictures", "vqvae.data.pixels", "vqvae.quantizer", "vqvae.loss", "vqvae.training.settings"}
    assert with_its_classes == {"vqvae.data.mnist"} | others


def test_only_training_tasks_and_the_command_line_know_where_images_come_from() -> None:
    users = {module for module, source in SOURCES.items() if "vqvae.data.load" in imported(source)}
    assert users == {"vqvae.data.chosen", "vqvae.train", "prior.train", "prior.evaluation.classifier_training", "cli"}


def test_the_public_names_of_both_packages_are_there_and_load_nothing_before_they_are_used() -> None:
    program = "import sys, vqvae, prior; vqvae.InputError; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
    for package in (vqvae, prior):
        assert {name for name in package.__all__ if getattr(package, name).__name__ != name} == set()
        assert not hasattr(package, "nothing")
        assert (ROOT / package.__name__ / "py.typed").exists()


def test_a_command_imports_only_what_it_needs_and_nothing_from_the_current_folder(tmp_path: Path) -> None:
    for name in ("torch", "numpy", "typer", "vqvae", "prior", "safetensors", "random"):  # leave a file if imported
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w').close()")
    pair = ["--vqvae", SHIPPED / "vqvae.safetensors", "--prior", SHIPPED / "prior.safetensors", "--device", "cpu"]
    needed = {"vqvae.codec", "vqvae.output", "prior.sampling", "prior.incremental"}
    # torchvision and torch's compiler each take more than a second, half of a cold start.
    needless = {"torchvision", "torch._dynamo", "torch.utils.tensorboard", "prior.train", "vqvae.train"}
    needless |= {"tensorboard", "scipy", "matplotlib", "prior.evaluation"}
    for arguments, its_own, others in (
        (["--help"], {"typer"}, {*needless, "torch", "numpy", "tqdm"}),
        (["sample", "--mode", "pixelcnn", *pair, "--num-samples", 1], needed, needless),
    ):
        command = [sys.executable, "-X", "importtime", *map(str, [ROOT / "cli.py", *arguments])]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        names = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert its_own <= names
        assert names.isdisjoint(others)
    assert {path.name for path in tmp_path.glob("*[!y]")} == {"pixelcnn.png"}
