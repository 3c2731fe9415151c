"""How fast: each figure a ratio of two sides measured in turn in one run, on an idle machine.

    python -m tests.benchmark

It needs MNIST in data/, and five minutes. The first time it takes four more, to train the baseline recipe in full for
its final error; that run is kept in out/baseline. It prints tables and writes benchmark.json.
"""

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prior.codes import extract
from prior.incremental import IncrementalLogits
from prior.model import GatedPixelCNN
from prior.pair import load
from prior.sampling import plain_logits, sample_codes
from tests.before import COMMIT, since_before
from tests.project import CPU, IMAGE_SHAPE, Side, StageOne, StageTwo, recipe_of, whole_run
from tests.rates import beside_other_work
from tests.reference import DATA, reference_stage_one, reference_stage_two
from vqvae.compute import eval_mode, multiplies_bfloat16
from vqvae.data.dataset import Split
from vqvae.data.mnist import load_mnist
from vqvae.loss import VQVAETraining, evaluate_vqvae
from vqvae.model import VQVAE, VQVAEConfig
from vqvae.storage.checkpoint import read_header
from vqvae.storage.runs import SHIPPED, weights_file
from vqvae.train import train_vqvae

REPEATS = 3
STEPS = 11  # repeats of what takes well under a second
BASELINE = Path("out/baseline")
SHARES = (20, 50)  # the baseline recipe's time over the time that the default recipe gets
HUNDREDTH_S = (
    8.55  # of 10 epochs of the original repository's own code on 2 cores with AVX2, at its 702 images a second
)
RATE_IMAGES = 1280
PRECISIONS = {"float32": False, **({"bfloat16": True} if multiplies_bfloat16(CPU) else {})}
Row = dict[str, Any]


def in_turn(sides: dict[str, Side], repeats: int = REPEATS, warm_ups: int = 1) -> dict[str, list[float]]:
    """Seconds of each side, several times, one after the other so that a noisy moment meets them all."""
    for _ in range(warm_ups):
        for side in sides.values():
            side()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(what: str, slow: list[float], fast: list[float]) -> Row:
    """How many times as long the first takes, as the median of the repeats' ratios, and their spread."""
    ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
    seconds = [statistics.median(slow), statistics.median(fast)]
    return {"what": what, "seconds": seconds, "ratio": statistics.median(ratios), "spread": [ratios[0], ratios[-1]]}


def sampling(prior: GatedPixelCNN, num_threads: int) -> list[Row]:
    """The incremental sampler against the plain one and against the arithmetic's floor, one forward pass."""
    rows = []
    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    for batch in (1, 100):
        labels = torch.arange(batch) % 10
        maps = torch.randint(prior.num_codes, (batch, *prior.map_shape))

        def draw(logits_for: Any, labels: Tensor = labels) -> Tensor:
            uniforms = torch.rand(len(labels), *prior.map_shape, dtype=torch.float64)
            with eval_mode(prior):
                return sample_codes(logits_for, uniforms, labels, no_label=prior.no_label, batch_size=len(labels))

        @torch.inference_mode()
        def forward(maps: Tensor = maps, labels: Tensor = labels) -> Tensor:
            return prior(maps, labels)

        incremental = partial(draw, partial(IncrementalLogits, prior))
        seconds = in_turn({"forward": forward, "incremental": incremental}, STEPS)
        rows.append(ratio(f"sampling {batch}: over one forward pass", seconds["incremental"], seconds["forward"]))
        # All are warm by now, and the plain sampler takes long.
        seconds = in_turn({"plain": partial(draw, plain_logits(prior)), "incremental": incremental}, warm_ups=0)
        rows.append(ratio(f"sampling {batch}: plain over incremental", seconds["plain"], seconds["incremental"]))
    torch.set_num_threads(threads)
    return rows


def training(train: Split, vqvae: VQVAE) -> list[Row]:
    """Both stages on the project's engine against the reference, the same networks on the same images."""
    config, settings = recipe_of("baseline", "vqvae")
    num = 20 * settings.batch_size
    reference = reference_stage_one(VQVAE(config, IMAGE_SHAPE), num, settings.batch_size)
    rows = against("stage one", reference, StageOne, config, settings, train.images[:num])
    config, settings = recipe_of("pretrained", "prior")
    num = 10 * settings.batch_size
    reference = reference_stage_two(vqvae, config, num, settings.batch_size)
    return rows + against("stage two", reference, StageTwo, config, settings, extract(vqvae, train.first(num)))


def against(stage: str, reference: Side, task: Any, config: Any, settings: Any, data: Any) -> list[Row]:
    sides, num = {"reference": reference}, len(data if task is StageOne else data.labels)
    for precision, mixed in PRECISIONS.items():
        one_epoch = replace(settings, num_epochs=1, mixed_precision=mixed)
        sides[precision] = whole_run(task(config, one_epoch, data), one_epoch)
    seconds = in_turn(sides)
    what = f"{stage}, {num} samples: reference over"
    return [ratio(f"{what} {precision}", seconds["reference"], seconds[precision]) for precision in PRECISIONS]


def baseline_error() -> float:
    """The baseline recipe's final squared error on validation. The full run is made where there is none yet."""
    config, settings = recipe_of("baseline", "vqvae")
    weights = weights_file(BASELINE, "vqvae")
    wanted = {**asdict(config), **asdict(settings)}.items()
    if not (weights.exists() and wanted <= read_header(weights, "vqvae").recipe.items()):
        print("training the baseline recipe in full, for its final error", flush=True)
        train_vqvae(config, settings, seed=0, data_folder=DATA, output_folder=BASELINE, device=CPU)
    return read_header(weights, "vqvae").metrics["squared_error"]


def time_to_quality(train: Split, validation: Split) -> list[Row]:
    """The validation error that the default recipe reaches in a share of the baseline recipe's time.

    The default's whole schedule lies within that time. There are as many seeds as repeats. The baseline's time is its
    number of images times the time for each, as measured here.
    """
    recipes = [recipe_of(name, "vqvae") for name in ("mnist", "baseline")]
    (default, settings), (_, baseline_settings) = recipes
    sides = [first_images(*recipe, train.images[:RATE_IMAGES], seed=0)[1] for recipe in recipes]
    default_s, baseline_s = in_turn(dict(zip(("default", "baseline"), sides, strict=True))).values()
    per_image = ratio(f"stage one, {RATE_IMAGES} images: default over baseline", default_s, baseline_s)
    rows: list[Row] = [per_image, {"what": "stage one: the baseline recipe", "squared_error": baseline_error()}]
    whole_s = baseline_settings.num_epochs * len(train.labels) * per_image["seconds"][1] / RATE_IMAGES
    for seconds in (*(whole_s / share for share in SHARES), HUNDREDTH_S):
        num = int(seconds * RATE_IMAGES / per_image["seconds"][0])
        errors = []
        for seed in range(REPEATS):
            model, run = first_images(default, settings, train.images[:num], seed)
            run()
            errors.append(evaluate_vqvae(model, validation, settings)["squared_error"])
        what = f"stage one: the default recipe, {num} images in {seconds:.1f} s, 1/{whole_s / seconds:.0f} of that time"
        rows.append({"what": what, "squared_error": errors})
    return rows


def first_images(config: VQVAEConfig, settings: VQVAETraining, images: Tensor, seed: int) -> tuple[VQVAE, Side]:
    """A new model, and its training for one epoch of these images."""
    one_epoch = replace(settings, num_epochs=1)
    task = StageOne(config, one_epoch, images, seed=seed)
    return task.vqvae, whole_run(task, one_epoch, seed)


def recipe_since_before() -> list[Row]:
    return [ratio(what, before, now) for what, (before, now) in since_before(DATA, REPEATS).items()]


def starting() -> list[Row]:
    """Seconds of a new process, imports included; the files that it reads are in the system's cache."""
    pair = ["--vqvae", str(weights_file(SHIPPED, "vqvae")), "--prior", str(weights_file(SHIPPED, "prior"))]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        output = ["--output", str(Path(folder) / "samples.png")]
        for arguments in (["--help"], ["sample", "--mode", "pixelcnn", "--labels", "0-9", *pair, *output]):
            command = [sys.executable, "cli.py", *arguments]
            seconds = in_turn({"run": partial(subprocess.run, command, check=True, capture_output=True)})["run"]
            figures = {"seconds": statistics.median(seconds), "spread": [min(seconds), max(seconds)]}
            rows.append({"what": " ".join(arguments[:3]), **figures})
    return rows


def main() -> None:
    dataset = load_mnist(DATA)
    train, validation = dataset.train, dataset.validation
    pair = load(weights_file(SHIPPED, "vqvae"), weights_file(SHIPPED, "prior"), CPU)
    vqvae, prior = pair.vqvae, pair.prior
    machine = {
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "multiplies bfloat16": multiplies_bfloat16(CPU),
    }
    print(machine)
    results: dict[str, Any] = {"machine": machine}
    for name, section in {
        "starting": starting,
        f"the default recipe: commit {COMMIT} over now": recipe_since_before,
        "beside other work": lambda: beside_other_work(REPEATS),
        "sampling, one thread": lambda: sampling(prior, 1),
        "sampling": lambda: sampling(prior, torch.get_num_threads()),
        "training": lambda: training(train, vqvae),
        "time_to_quality": lambda: time_to_quality(train, validation),
    }.items():
        started = time.perf_counter()
        results[name] = section()
        print(f"\n{name.replace('_', ' ')} ({time.perf_counter() - started:.0f} s)")
        for row in results[name]:
            print("  " + "  ".join(f"{key} {_show(value)}" for key, value in row.items()))
    Path("benchmark.json").write_text(json.dumps(results, indent=2) + "\n")
    print("\nwrote benchmark.json")


def _show(value: Any) -> str:
    if isinstance(value, list):
        return "(" + ", ".join(_show(v) for v in value) + ")"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
