"""What training with several processes costs: the time of a step, and what it sends, counted and by arithmetic.

    python -m tests.scaling

Processes of one thread each train both stages of the default recipe, on random images and codes. The machine should be
idle. It takes a minute or two and prints two tables.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, redirect_stdout
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from prior.codes import Codes
from tests.project import IMAGE_SHAPE, MAP_SHAPE, NUM_CLASSES, NUM_CODES, StageOne, StageTwo, recipe_of
from vqvae.distributed import process_group
from vqvae.predictor import CausalPredictor
from vqvae.quantizer import VectorQuantizer
from vqvae.training import loop

NUM_PROCESSES = (1, 2, 4)
TIMED, WARM_UPS, PROFILED = 40, 5, 10  # steps
NUM_BYTES = {"float": 4, "long int": 8, "unsigned char": 1}
PARTS = {  # where processes meet in a step
    "gradients": (loop, "backward"),
    "codebook": (VectorQuantizer, "_update"),
    "restarts": (VectorQuantizer, "_restart_dead_codes"),  # within _update, and not counted there
    "prediction": (CausalPredictor, "fraction_unexplained"),
    "flags": (loop, "any_rank"),
}


def make_tasks() -> dict[str, Any]:
    (one, training_one), (two, training_two) = (recipe_of("mnist", stage) for stage in ("vqvae", "prior"))
    num_images, num_maps = ((WARM_UPS + TIMED) * training.batch_size for training in (training_one, training_two))
    images = torch.randint(256, (num_images, *IMAGE_SHAPE), dtype=torch.uint8)
    codes = Codes(torch.randint(NUM_CODES, (num_maps, *MAP_SHAPE)), torch.arange(num_maps) % NUM_CLASSES)
    tasks = StageOne(one, training_one, images), StageTwo(two, training_two, codes)
    return dict(zip(("stage one", "stage two"), tasks, strict=True))


def by_arithmetic(task: Any) -> dict[str, int]:
    """The bytes of each part, each time: 4 for a float, 8 for a whole number."""
    num_weights = sum(weight.numel() for weight in task.model.parameters())
    if isinstance(task, StageTwo):
        return {"gradients": 4 * num_weights, "flags": 2 * 8}
    codes, map_size = task.vqvae.quantizer.codebook, math.prod(task.vqvae.map_shape)
    return {
        "gradients": 4 * num_weights,
        "codebook": 4 * (len(codes) + codes.numel()),  # counts and sums
        "restarts": 8 * len(codes) + 2 * 4 * codes.numel(),  # which vectors, the vectors, and noise on them
        "prediction": 4 * (codes.shape[1] * map_size + 1 + 2 + 2),  # three means, each with a number of samples
        "flags": 2 * 8,
    }


def counted(trace: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """How often in a step each part sends something, and how many bytes each time, from a profiler's trace."""
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X"]
    spans = sorted((e["ts"], e["ts"] + e["dur"], e["name"]) for e in events if e["name"] in PARTS)
    sent: dict[str, dict[float, int]] = {}  # by the start of each time
    for e in (e for e in events if e["name"].startswith("gloo:")):
        around = [(part, start) for start, end, part in spans if start <= e["ts"] < end]
        for part, start in around[-1:]:  # the innermost; what is sent before and after the steps is in none
            pairs = zip(e["args"]["Input Dims"], e["args"]["Input type"], strict=True)
            times = sent.setdefault(part, {})
            num_bytes = sum(torch.Size(shape).numel() * NUM_BYTES[kind] for shape, kind in pairs)
            times[start] = times.get(start, 0) + num_bytes
    return {part: (len(times) / PROFILED, statistics.median(times.values())) for part, times in sent.items()}


def measure(task: Any) -> dict[str, Any]:
    """Train twice, for the time and then for the bytes: the profiler takes time itself."""
    moments, prepare = [], task.prepare
    task.prepare = lambda *batch: (moments.append(time.perf_counter()), prepare(*batch))[1]
    training, run = replace(task.training, num_epochs=1), loop.Run(None, 0, {})
    with ExitStack() as stack, redirect_stdout(stack.enter_context(Path(os.devnull).open("w"))):
        loop.fit(task, training, run)
        task.data = tuple(tensor[: PROFILED * training.batch_size] for tensor in task.data)
        for part, (owner, name) in PARTS.items():
            stack.enter_context(patch.object(owner, name, record_function(part)(getattr(owner, name))))
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            loop.fit(task, training, run)
        file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "trace.json"
        profiler.export_chrome_trace(str(file))
        trace = json.loads(file.read_text())
    ms = [1000 * (end - start) for start, end in pairwise(moments[WARM_UPS : WARM_UPS + TIMED])]
    return {"ms": ms, "counted": counted(trace), "expected": by_arithmetic(task)}


def main() -> None:
    found = {}
    for num in NUM_PROCESSES:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
        done = subprocess.run([*command, "-m", "tests.scaling"], env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(done.stderr)
        found[num] = json.loads(done.stdout)
    rows = [(f"| {stage} | {num}", row) for num, stages in found.items() for stage, row in stages.items()]
    print("| | processes | ms a step: median (tenth to ninetieth percentile) |\n|---|---|---|")
    for name, row in rows:
        tenths = statistics.quantiles(row["ms"], n=10)
        print(f"{name} | {tenths[4]:.1f} ({tenths[0]:.1f} to {tenths[-1]:.1f}) |")
    print("\n| | processes | | times a step | bytes each time, counted | by arithmetic |\n|---|---|---|---|---|---|")
    for name, row in rows:
        for part in filter(row["counted"].get, PARTS):
            times, num_bytes = row["counted"][part]
            print(f"{name} | {part} | {times:.1f} | {num_bytes:,.0f} | {row['expected'][part]:,} |")


if __name__ == "__main__":
    if "RANK" in os.environ:
        with process_group():
            torch.manual_seed(0)
            print(json.dumps({stage: measure(task) for stage, task in make_tasks().items()}))
    else:
        main()
