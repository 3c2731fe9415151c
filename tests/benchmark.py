"""How fast: each figure a ratio of two sides measured in turn in one run, on an idle machine.

    python -m tests.benchmark

Needs MNIST in data/ and a few minutes. Prints tables and writes benchmark.json and benchmark.png.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.datasets import MNIST

from prior.codes import Codes, extract
from prior.incremental import Product
from prior.model import GatedLayer, GatedPixelCNN, PriorConfig, load_prior
from prior.sampling import plain_logits, sample
from prior.train import PriorTraining, drop_labels
from prior.train import objective as prior_objective
from vqvae.common.config import read_recipe, resolve
from vqvae.common.data import Split, load_train_and_validation
from vqvae.common.engine import fit, multiplies_bfloat16
from vqvae.common.runs import SHIPPED, weights_file
from vqvae.model import VQVAE, VQVAEConfig, load_vqvae
from vqvae.predictor import CausalPredictor
from vqvae.train import VQVAETraining
from vqvae.train import evaluate as evaluate_vqvae
from vqvae.train import objective as vqvae_objective

DATA = Path("data")
BASELINE, TUNED = Path("configs/baseline.toml"), Path("configs/mnist.toml")
PRECISIONS = {"float32": False, "bfloat16": True}
REPEATS = 3
CPU = torch.device("cpu")
Side = Callable[[], object]
Row = dict[str, Any]


def seconds_of(side: Side) -> float:
    start = time.perf_counter()
    side()
    return time.perf_counter() - start


def in_turn(sides: dict[str, Side]) -> dict[str, list[float]]:
    """Seconds of each side, REPEATS times, one after the other so that a noisy moment meets them all."""
    for side in sides.values():
        side()  # warm up
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(REPEATS):
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
    for batch in (1, 100, 500):
        labels = torch.arange(batch) % 10
        maps = torch.randint(prior.num_codes, (batch, *prior.map_shape))

        def draw(logits_from: Any = None, labels: Tensor = labels, batch: int = batch) -> Tensor:
            options = {} if logits_from is None else {"logits_from": logits_from}
            return sample(prior, batch, torch.Generator().manual_seed(0), labels=labels, batch_size=batch, **options)

        @torch.inference_mode()
        def forward(maps: Tensor = maps, labels: Tensor = labels) -> Tensor:
            return prior(maps, labels)

        seconds = in_turn({"forward": forward, "incremental": draw})
        rows.append(ratio(f"sampling {batch}: over one forward pass", seconds["incremental"], seconds["forward"]))
        if batch < 500:
            seconds = in_turn({"plain": lambda: draw(plain_logits), "incremental": draw})
            rows.append(ratio(f"sampling {batch}: plain over incremental", seconds["plain"], seconds["incremental"]))
    torch.set_num_threads(threads)
    return rows


def our_training(
    model: nn.Module, data: tuple[Tensor, ...], loss_fn: Callable[..., dict[str, Tensor]], training: Any, seed: int = 0
) -> Side:
    """A run of training on the project's own engine, without validation."""

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            fit(
                model,
                data,
                loss_fn,
                lambda: {"none": 0.0},
                lambda figures: None,
                best_by="none",
                training=training,
                seed=seed,
                folder=Path(folder),
                unit="samples",
                settings={},
                after_epoch=lambda log, epoch, step: None,
            )

    return run


def loader(num: int, batch_size: int) -> DataLoader[tuple[Tensor, Tensor]]:
    """Images the customary way: from a dataset of PIL images, transformed one by one, in worker processes."""
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])
    digits = Subset(MNIST(str(DATA), transform=transform), range(num))
    workers = os.cpu_count() or 1
    return DataLoader(digits, batch_size=batch_size, shuffle=True, num_workers=workers, persistent_workers=True)


def customary_stage_one(model: VQVAE, num: int, batch_size: int) -> Side:
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)
    batches = loader(num, batch_size)

    def run() -> None:
        model.train()
        for x, _ in batches:
            out = model(x)
            loss = F.mse_loss(out.x_hat, x) + out.codebook_loss + out.commitment_loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return run


class MaskedConv2d(nn.Conv2d):
    """The customary causal convolution: an odd kernel whose last row or column is multiplied by zero."""

    def __init__(self, channels_in: int, channels_out: int, kernel: tuple[int, int], axis: int) -> None:
        super().__init__(channels_in, channels_out, kernel, padding=(kernel[0] // 2, kernel[1] // 2))
        mask = torch.ones(1, 1, *kernel)
        mask.select(axis, 2).zero_()
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.mask, self.bias)


class CustomaryLayer(GatedLayer):
    """`GatedLayer` with masked 3x3 and 1x3 kernels for its (2, 3) and (1, 2) ones, and torch's dropout and tanh."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__(width, dropout)
        self.vertical_to_horizontal = nn.Conv2d(2 * width, 2 * width, 1)
        self.vertical_out, self.horizontal_out = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.vertical = MaskedConv2d(width, 2 * width, (3, 3), axis=2)
        self.horizontal = MaskedConv2d(width, 2 * width, (1, 3), axis=3)

    def forward(self, v: Tensor, h: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        v_label, h_label = self.label(labels)[:, :, None, None].chunk(2, dim=1)
        v_features = self.vertical(F.dropout(v, self.dropout))
        h_features = self.horizontal(F.dropout(h, self.dropout)) + self.vertical_to_horizontal(v_features)
        v = v + self.vertical_out(self.gate(v_features + v_label))
        return v, h + self.horizontal_out(self.gate(h_features + h_label))

    def gate(self, features: Tensor) -> Tensor:
        f, g = features.chunk(2, dim=1)
        return torch.tanh(f) * torch.sigmoid(g)


def customary_stage_two(vqvae: VQVAE, config: PriorConfig, num: int, batch_size: int) -> Side:
    """The customary prior, and images encoded again for every batch."""
    prior = GatedPixelCNN(config, vqvae.config.k, vqvae.map_shape)
    prior.layers = nn.ModuleList(CustomaryLayer(config.width, config.dropout) for _ in range(config.num_layers))
    for i in (1, 3):
        prior.head[i] = nn.Conv2d(prior.head[i].in_channels, prior.head[i].out_channels, 1)
    optimizer = torch.optim.Adam(prior.parameters(), lr=1e-3)
    batches = loader(num, batch_size)

    def run() -> None:
        prior.train()
        for x, labels in batches:
            with torch.no_grad():
                indices = vqvae.encode(x)
            loss = F.cross_entropy(prior(indices, drop_labels(labels, 0.1)), indices)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return run


def training(train: Split, vqvae: VQVAE, prior: GatedPixelCNN) -> list[Row]:
    """Both stages on the project's engine against the customary way, the same networks on the same images."""
    documented, settings = VQVAEConfig(), VQVAETraining(num_epochs=1)
    num = 30 * settings.batch_size
    customary = customary_stage_one(VQVAE(documented), num, settings.batch_size)
    sides = {
        precision: stage_one_run(documented, replace(settings, mixed_precision=mixed), train, num)[1]
        for precision, mixed in PRECISIONS.items()
    }
    rows = against("stage one", customary, sides, num)
    settings_two = PriorTraining(num_epochs=1, batch_size=64)
    num = 16 * settings_two.batch_size
    codes = extract(vqvae, Split(train.images[:num], train.labels[:num]))
    customary = customary_stage_two(vqvae, prior.config, num, settings_two.batch_size)
    sides = {
        precision: stage_two_run(prior, replace(settings_two, mixed_precision=mixed), codes)
        for precision, mixed in PRECISIONS.items()
    }
    return rows + against("stage two", customary, sides, num)


def against(stage: str, customary: Side, sides: dict[str, Side], num: int) -> list[Row]:
    seconds = in_turn({"customary": customary, **sides})
    return [
        ratio(f"{stage}, {num} samples: customary over ours in {precision}", seconds["customary"], seconds[precision])
        for precision in sides
    ]


def stage_one_run(
    config: VQVAEConfig, settings: VQVAETraining, train: Split, num: int, seed: int = 0
) -> tuple[VQVAE, Side]:
    """A model, and its training on `num` images."""
    torch.manual_seed(seed)
    model = VQVAE(config).to(memory_format=torch.channels_last)
    predictor = CausalPredictor(config.hidden_size, model.map_shape) if settings.predictability > 0 else None
    trained = nn.ModuleList(network for network in (model, predictor) if network is not None)
    return model, our_training(
        trained,
        (train.images[:num],),
        lambda images: vqvae_objective(model, images, settings, predictor)[0],
        settings,
        seed,
    )


def stage_two_run(prior: GatedPixelCNN, settings: PriorTraining, codes: Codes) -> Side:
    """The training of a prior such as this one."""
    model = GatedPixelCNN(prior.config, prior.num_codes, prior.map_shape).to(memory_format=torch.channels_last)
    return our_training(
        model,
        (codes.indices, codes.labels),
        lambda indices, labels: prior_objective(model, indices, drop_labels(labels, settings.label_dropout)),
        settings,
    )


def time_to_quality(train: Split, validation: Split) -> list[Row]:
    """The documented recipe in full, and the validation error that the tuned one comes to in a 25th and a 50th
    of its time, schedule and all, with as many seeds as repeats."""
    documented, settings = resolve((VQVAEConfig, VQVAETraining), read_recipe(BASELINE, "vqvae"), {})
    model, run = stage_one_run(documented, settings, train, len(train.labels))
    whole = seconds_of(run)
    rows: list[Row] = [
        {
            "what": "stage one: the documented recipe",
            "seconds": whole,
            "squared_error": squared_error(model, validation),
        }
    ]
    tuned, settings = resolve((VQVAEConfig, VQVAETraining), read_recipe(TUNED, "vqvae"), {})
    settings = replace(settings, num_epochs=1)
    num_timed = 100 * settings.batch_size
    per_image = min(seconds_of(stage_one_run(tuned, settings, train, num_timed)[1]) for _ in range(REPEATS)) / num_timed
    for share in (25, 50):
        num = int(whole / share / per_image)
        seconds, errors = [], []
        for seed in range(REPEATS):
            model, run = stage_one_run(tuned, settings, train, num, seed)
            seconds.append(seconds_of(run))
            errors.append(squared_error(model, validation))
        rows.append(
            {
                "what": f"stage one: the tuned recipe on {num} images",
                "seconds": seconds,
                "of_its_time": statistics.median(seconds) / whole,
                "squared_error": errors,
            }
        )
    return rows


def squared_error(model: VQVAE, split: Split) -> float:
    return evaluate_vqvae(model, split, VQVAETraining())["squared_error"]


def one_step(
    model: nn.Module, loss_fn: Callable[[], Tensor], fused: bool = True, compiled: bool = False, mixed: bool = False
) -> Side:
    """One step of training on a fixed batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=fused)
    loss_fn = torch.compile(loss_fn) if compiled else loss_fn

    def run() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = loss_fn()
        loss.backward()
        optimizer.step()

    return run


def stage_one_step(config: VQVAEConfig, batch: int, channels_last: bool = True, **options: bool) -> Side:
    model = VQVAE(config).train()
    model = model.to(memory_format=torch.channels_last) if channels_last else model
    images = torch.randint(256, (batch, 1, config.image_size, config.image_size), dtype=torch.uint8)
    settings = VQVAETraining()
    return one_step(model, lambda: vqvae_objective(model, images, settings)[0]["total"], **options)


def stage_two_step(prior: GatedPixelCNN, batch: int, channels_last: bool = True, **options: bool) -> Side:
    model = GatedPixelCNN(prior.config, prior.num_codes, prior.map_shape)
    model = model.to(memory_format=torch.channels_last) if channels_last else model
    maps, labels = torch.randint(prior.num_codes, (batch, *prior.map_shape)), torch.arange(batch) % 10
    return one_step(model, lambda: prior_objective(model, maps, labels)["nats_per_code"], **options)


def variants(config: VQVAEConfig, prior: GatedPixelCNN) -> list[Row]:
    """What each choice of the training step gives: the step without it over the step with it."""
    rows = []
    for stage, step in (("one", partial(stage_one_step, config, 64)), ("two", partial(stage_two_step, prior, 64))):
        others = {
            "default memory format": step(channels_last=False),
            "unfused optimiser": step(fused=False),
            "torch.compile": step(compiled=True),
            "bfloat16": step(mixed=True),
        }
        seconds = in_turn({"ours": step(), **others})
        rows += [ratio(f"stage {stage}, a step: {name} over ours", seconds[name], seconds["ours"]) for name in others]
        threads = torch.get_num_threads()
        ours, one_thread = step(), step()

        def alone(run: Side = one_thread, threads: int = threads) -> None:
            torch.set_num_threads(1)
            run()
            torch.set_num_threads(threads)

        seconds = in_turn({"ours": ours, "alone": alone})
        rows.append(ratio(f"stage {stage}, a step: one thread over {threads}", seconds["alone"], seconds["ours"]))
    return rows


def where_time_goes(config: VQVAEConfig, prior: GatedPixelCNN) -> list[Row]:
    """Of each stage's step: the share of time in convolutions and matrix products, and the speed over this machine's
    peak, which is that of one large matrix product."""
    a = torch.randn(2048, 2048)
    with torch.inference_mode():
        peak = 2 * 2048**3 / statistics.median(in_turn({"product": partial(Product(a), a)})["product"])
    rows = []
    for stage, step in (("one", stage_one_step(config, 64)), ("two", stage_two_step(prior, 64))):
        with FlopCounterMode(display=False) as counter:
            step()
        seconds = statistics.median(in_turn({"step": step})["step"])
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
                "what": f"stage {stage}",
                "of_peak": speed / peak,
                "gflops": speed / 1e9,
                "peak_gflops": peak / 1e9,
                **shares,
            }
        )
    return rows


def growth(config: VQVAEConfig) -> list[Row]:
    """Images per second of a step of stage one against batch size, code-map size and width."""
    points = [("batch size", batch, batch, config) for batch in (16, 32, 64, 128, 256)]
    points += [("side of the code map", size // 4, 32, replace(config, image_size=size)) for size in (28, 56, 112)]
    points += [("width", width, 64, replace(config, width=width)) for width in (16, 32, 64, 128)]
    rows = []
    for axis, value, batch, changed in points:
        seconds = in_turn({"step": stage_one_step(changed, batch)})["step"]
        rows.append({"axis": axis, "value": value, "images_per_s": batch / statistics.median(seconds)})
    return rows


def starting() -> list[Row]:
    """Seconds from a cold start, imports included."""
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
    for panel, axis in zip(figure.subplots(1, len(axes)), axes, strict=True):
        points = [(row["value"], row["images_per_s"]) for row in rows if row["axis"] == axis]
        panel.loglog(*zip(*points, strict=True), "o-")
        panel.set(xlabel=axis, ylabel="images per second, stage one")
        panel.set_xticks([x for x, _ in points], [str(x) for x, _ in points])
        panel.minorticks_off()
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
        "training": lambda: training(train, vqvae, prior),
        "time_to_quality": lambda: time_to_quality(train, validation),
        "where_time_goes": lambda: where_time_goes(vqvae.config, prior),
        "variants": lambda: variants(vqvae.config, prior),
        "growth": lambda: growth(vqvae.config),
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
