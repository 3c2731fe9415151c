"""How fast: each figure a ratio of two sides measured in turn in one run, on an idle machine.

    python -m tests.benchmark

Needs MNIST in data/, and five minutes; the first time, four more, in which the documented recipe is trained in full for
its final error, and kept in out/documented. Prints tables and writes benchmark.json and benchmark.png.
"""

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from prior.codes import extract
from prior.incremental import IncrementalLogits, Product
from prior.model import GatedPixelCNN, PriorConfig, load_prior
from prior.sampling import plain_logits, sample
from prior.train import PriorTraining
from tests.customary import DATA, customary_stage_one, customary_stage_two
from tests.ours import CPU, Side, stage_one_run, stage_one_step, stage_two_run, stage_two_step
from vqvae.common.checkpoint import read_header
from vqvae.common.config import read_recipe, resolve
from vqvae.common.data import Split, load_train_and_validation
from vqvae.common.engine import multiplies_bfloat16
from vqvae.common.runs import SHIPPED, weights_file
from vqvae.model import VQVAE, VQVAEConfig, load_vqvae
from vqvae.train import VQVAETraining, train_vqvae
from vqvae.train import evaluate as evaluate_vqvae

REPEATS = 3
STEPS = 11  # repeats of what takes well under a second
DOCUMENTED = Path("out/documented")
SHARES = (20, 50)  # the documented recipe's time over what the tuned one is given
RATE_IMAGES = 1280
PRECISIONS = {"float32": False, **({"bfloat16": True} if multiplies_bfloat16(CPU) else {})}
Row = dict[str, Any]


def seconds_of(side: Side) -> float:
    start = time.perf_counter()
    side()
    return time.perf_counter() - start


def in_turn(sides: dict[str, Side], repeats: int = REPEATS, warm_ups: int = 1) -> dict[str, list[float]]:
    """Seconds of each side, several times, one after the other so that a noisy moment meets them all."""
    for _ in range(warm_ups):
        for side in sides.values():
            side()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            seconds[name].append(seconds_of(side))
    return seconds


def ratio(what: str, slow: list[float], fast: list[float]) -> Row:
    """How many times as long the first takes, as the median of the repeats' ratios, and their spread."""
    ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
    return {
        "what": what,
        "seconds": [statistics.median(slow), statistics.median(fast)],
        "ratio": statistics.median(ratios),
        "spread": [ratios[0], ratios[-1]],
    }


def sampling(prior: GatedPixelCNN, num_threads: int) -> list[Row]:
    """The incremental sampler against the plain one and against the arithmetic's floor, one forward pass."""
    rows = []
    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    for batch in (1, 100):
        labels = torch.arange(batch) % 10
        maps = torch.randint(prior.num_codes, (batch, *prior.map_shape))

        def draw(logits_from: Any = IncrementalLogits, labels: Tensor = labels) -> Tensor:
            generator = torch.Generator().manual_seed(0)
            return sample(prior, len(labels), generator, labels=labels, batch_size=len(labels), logits_from=logits_from)

        @torch.inference_mode()
        def forward(maps: Tensor = maps, labels: Tensor = labels) -> Tensor:
            return prior(maps, labels)

        seconds = in_turn({"forward": forward, "incremental": draw}, STEPS)
        rows.append(ratio(f"sampling {batch}: over one forward pass", seconds["incremental"], seconds["forward"]))
        # All are warm by now, and the plain sampler takes long.
        seconds = in_turn({"plain": lambda: draw(plain_logits), "incremental": draw}, warm_ups=0)
        rows.append(ratio(f"sampling {batch}: plain over incremental", seconds["plain"], seconds["incremental"]))
    torch.set_num_threads(threads)
    return rows


def recipe_of(name: str, stage: str) -> tuple[Any, Any]:
    """The network and the training of one stage in `configs/`."""
    kinds = {"vqvae": (VQVAEConfig, VQVAETraining), "prior": (PriorConfig, PriorTraining)}
    config, settings = resolve(kinds[stage], read_recipe(Path("configs") / f"{name}.toml", stage), {})
    return config, settings


def training(train: Split, vqvae: VQVAE) -> list[Row]:
    """Both stages on the project's engine against the customary way, the same networks on the same images."""
    config, settings = recipe_of("baseline", "vqvae")
    num = 20 * settings.batch_size
    customary = customary_stage_one(VQVAE(config), num, settings.batch_size)
    sides = {
        precision: stage_one_run(config, replace(settings, num_epochs=1, mixed_precision=mixed), train.images[:num])[1]
        for precision, mixed in PRECISIONS.items()
    }
    rows = against("stage one", customary, sides, num)
    config, settings = recipe_of("pretrained", "prior")
    num = 10 * settings.batch_size
    codes = extract(vqvae, Split(train.images[:num], train.labels[:num]))
    customary = customary_stage_two(vqvae, config, num, settings.batch_size)
    sides = {
        precision: stage_two_run(config, replace(settings, num_epochs=1, mixed_precision=mixed), codes, vqvae.config.k)
        for precision, mixed in PRECISIONS.items()
    }
    return rows + against("stage two", customary, sides, num)


def against(stage: str, customary: Side, sides: dict[str, Side], num: int) -> list[Row]:
    seconds = in_turn({"customary": customary, **sides})
    return [
        ratio(f"{stage}, {num} samples: customary over ours in {precision}", seconds["customary"], seconds[precision])
        for precision in sides
    ]


def documented_error() -> float:
    """The documented recipe's final squared error on validation, of a run in full, made where there is none yet."""
    config, settings = recipe_of("baseline", "vqvae")
    weights = weights_file(DOCUMENTED, "vqvae")
    wanted = {**asdict(config), **asdict(settings)}.items()
    if not (weights.exists() and wanted <= read_header(weights, "vqvae").recipe.items()):
        print("training the documented recipe in full, for its final error", flush=True)
        train_vqvae(config, settings, seed=0, data_folder=DATA, output_folder=DOCUMENTED, device=CPU)
    return read_header(weights, "vqvae").metrics["squared_error"]


def time_to_quality(train: Split, validation: Split) -> list[Row]:
    """The validation error that the tuned recipe comes to in shares of the documented one's time, schedule and all,
    with as many seeds as repeats. That time is of its number of images, each as long as measured here."""
    recipes = [recipe_of(name, "vqvae") for name in ("mnist", "baseline")]
    (tuned, settings), (_, documented_settings) = recipes
    tuned_s, documented_s = in_turn(
        {
            name: stage_one_run(config, replace(settings, num_epochs=1), train.images[:RATE_IMAGES])[1]
            for name, (config, settings) in zip(("tuned", "documented"), recipes, strict=True)
        }
    ).values()
    per_image = ratio(f"stage one, {RATE_IMAGES} images: tuned over documented", tuned_s, documented_s)
    rows: list[Row] = [per_image, {"what": "stage one: the documented recipe", "squared_error": documented_error()}]
    for share in SHARES:
        num = int(documented_settings.num_epochs * len(train.labels) / share / per_image["ratio"])
        errors = []
        for seed in range(REPEATS):
            model, run = stage_one_run(tuned, replace(settings, num_epochs=1), train.images[:num], seed)
            run()
            errors.append(evaluate_vqvae(model, validation, settings)["squared_error"])
        rows.append(
            {"what": f"stage one: the tuned recipe, {num} images, 1/{share} of that time", "squared_error": errors}
        )
    return rows


def shipped_steps() -> dict[str, Callable[..., Side]]:
    """A step of each stage of the shipped networks, on 64 samples, to be made with one choice or another."""
    return {
        "stage one": partial(stage_one_step, *recipe_of("pretrained", "vqvae"), 64),
        "stage two": partial(stage_two_step, *recipe_of("pretrained", "prior"), 64),
    }


def variants() -> list[Row]:
    """What each choice of the training step gives: the step without it over the step with it."""
    rows = []
    threads = torch.get_num_threads()
    for stage, step in shipped_steps().items():
        others = {"unfused optimiser": step(fused=False)}
        if stage == "stage one":
            others["default memory format"] = step(channels_last=False)
            others["torch.compile"] = step(compiled=True)  # takes half a minute, and gave stage two as little
        others |= {precision: step(mixed=True) for precision, mixed in PRECISIONS.items() if mixed}
        seconds = in_turn({"ours": step(), **others}, STEPS, warm_ups=2)
        rows += [ratio(f"{stage}, a step: {name} over ours", seconds[name], seconds["ours"]) for name in others]

        def alone(run: Side) -> None:
            torch.set_num_threads(1)
            run()
            torch.set_num_threads(threads)

        seconds = in_turn({"ours": step(), "alone": partial(alone, step())}, STEPS)
        rows.append(ratio(f"{stage}, a step: one thread over {threads}", seconds["alone"], seconds["ours"]))
    return rows


def where_time_goes() -> list[Row]:
    """Of each stage's step: the share of time in convolutions and matrix products, and the speed over this machine's
    peak, which is that of one large matrix product."""
    a, out = torch.randn(2048, 2048), torch.zeros(2048, 2048)
    with torch.inference_mode():
        peak = 2 * 2048**3 / statistics.median(in_turn({"product": partial(Product(a), a, plus=out)}, STEPS)["product"])
    rows = []
    for stage, make in shipped_steps().items():
        step = make()
        with FlopCounterMode(display=False) as counter:
            step()
        seconds = statistics.median(in_turn({"step": step}, STEPS)["step"])
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(5):
                step()
        events = profiler.key_averages()
        total = sum(event.self_cpu_time_total for event in events)
        shares = {
            kind: sum(event.self_cpu_time_total for event in events if any(name in event.key for name in names)) / total
            for kind, names in (("convolutions", ("convolution", "conv2d")), ("products", ("mm", "linear")))
        }
        speed = counter.get_total_flops() / seconds
        rows.append(
            {
                "what": stage,
                "of_peak": speed / peak,
                "gflops": speed / 1e9,
                "peak_gflops": peak / 1e9,
                **shares,
            }
        )
    return rows


def growth() -> list[Row]:
    """Images per second of a step of stage one against batch size, code-map size and width."""
    config, settings = recipe_of("pretrained", "vqvae")
    points = [("batch size", batch, batch, config) for batch in (16, 32, 64, 128, 256)]
    points += [("side of the code map", size // 4, 32, replace(config, image_size=size)) for size in (28, 56, 112)]
    points += [("width", width, 64, replace(config, width=width)) for width in (16, 32, 64, 128)]
    rows = []
    for axis, value, batch, changed in points:
        seconds = in_turn({"step": stage_one_step(changed, settings, batch)})["step"]
        rows.append({"axis": axis, "value": value, "images_per_s": batch / statistics.median(seconds)})
    return rows


def starting() -> list[Row]:
    """Seconds of a new process, imports included; the files that it reads are in the system's cache."""
    pair = ["--vqvae", str(weights_file(SHIPPED, "vqvae")), "--prior", str(weights_file(SHIPPED, "prior"))]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        output = ["--output", str(Path(folder) / "samples.png")]
        for arguments in (["--help"], ["sample", "--mode", "pixelcnn", "--labels", "0-9", *pair, *output]):
            command = [sys.executable, "cli.py", *arguments]
            seconds = in_turn({"run": partial(subprocess.run, command, check=True, capture_output=True)})["run"]
            rows.append(
                {
                    "what": " ".join(arguments[:3]),
                    "seconds": statistics.median(seconds),
                    "spread": [min(seconds), max(seconds)],
                }
            )
    return rows


def plot(rows: list[Row], path: Path) -> None:
    axes = list(dict.fromkeys(row["axis"] for row in rows))
    figure = Figure(figsize=(4 * len(axes), 3.2), layout="constrained")
    panels = figure.subplots(1, len(axes), sharey=True)
    panels[0].set_ylabel("images per second, stage one")
    for panel, axis in zip(panels, axes, strict=True):
        points = [(row["value"], row["images_per_s"]) for row in rows if row["axis"] == axis]
        panel.loglog(*zip(*points, strict=True), "o-")
        for point in points:
            panel.annotate(f"{point[1]:,.0f}", point, xytext=(0, 6), textcoords="offset points", ha="center")
        panel.set_xlabel(axis)
        panel.set_xticks([x for x, _ in points], [str(x) for x, _ in points])
        panel.minorticks_off()
        panel.margins(0.15, 0.1)
    figure.savefig(path, dpi=100)


def processor() -> str:
    """The processor's name, from where Linux has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())


def main() -> None:
    train, validation = load_train_and_validation(DATA)
    vqvae, header = load_vqvae(weights_file(SHIPPED, "vqvae"), CPU)
    prior, _ = load_prior(weights_file(SHIPPED, "prior"), vqvae, header, CPU)
    machine = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "multiplies bfloat16": multiplies_bfloat16(CPU),
    }
    print(machine)
    results: dict[str, Any] = {"machine": machine}
    for name, section in {
        "starting": starting,
        "sampling, one thread": lambda: sampling(prior, 1),
        "sampling": lambda: sampling(prior, torch.get_num_threads()),
        "training": lambda: training(train, vqvae),
        "time_to_quality": lambda: time_to_quality(train, validation),
        "where_time_goes": where_time_goes,
        "variants": variants,
        "growth": growth,
    }.items():
        started = time.perf_counter()
        results[name] = section()
        print(f"\n{name.replace('_', ' ')} ({time.perf_counter() - started:.0f} s)")
        for row in results[name]:
            print("  " + "  ".join(f"{key} {_show(value)}" for key, value in row.items()))
    Path("benchmark.json").write_text(json.dumps(results, indent=2) + "\n")
    plot(results["growth"], Path("benchmark.png"))
    print("\nwrote benchmark.json and benchmark.png")


def _show(value: Any) -> str:
    if isinstance(value, list):
        return "(" + ", ".join(_show(v) for v in value) + ")"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
