"""What training with several processes costs: the time of a step, and what it sends, counted and by arithmetic.

    python -m tests.scaling

Processes of one thread each train both stages of the default recipe, on random images and codes. The machine should be
idle. It takes a minute or two and prints two tables.
"""

import json
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
from tests.benchmark import recipe_of
from tests.project import IMAGE_SHAPE, MAP_SHAPE, NUM_CLASSES, NUM_CODES, StageOne, StageTwo
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
    num_steps = WARM_UPS + TIMED
    images = torch.randint(256, (num_steps * training_one.batch_size, *IMAGE_SHAPE), dtype=torch.uint8)
    maps = torch.randint(NUM_CODES, (num_steps * training_two.batch_size, *MAP_SHAPE))
    codes = Codes(maps, torch.arange(len(maps)) % NUM_CLASSES)
    return {
        "stage one": StageOne(one, replace(training_one, num_epochs=1), images),
        "stage two": StageTwo(two, replace(training_two, num_epochs=1), codes),
    }


def by_arithmetic(task: Any) -> dict[str, int]:
    """The bytes of each part, each time."""
    expected = {"gradients": 4 * sum(weight.numel() for weight in task.model.parameters()), "flags": 2 * 8}
    if isinstance(task, StageOne):
        num_codes, code_dim = task.vqvae.quantizer.codebook.shape
        expected["codebook"] = 4 * num_codes * (code_dim + 1)  # counts and sums
        expected["restarts"] = 8 * num_codes * (code_dim + 1)  # which vectors, the vectors, and noise on them
        expected["prediction"] = 4 * code_dim * task.vqvae.map_shape[0] * task.vqvae.map_shape[1]  # means
    return expected


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
    return {part: (len(times) / PROFILED, statistics.mean(times.values())) for part, times in sent.items()}


def measure(task: Any) -> dict[str, Any]:
    """Train twice, for the time and then for the bytes: the profiler takes time itself."""
    moments, prepare = [], task.prepare
    task.prepare = lambda *batch: (moments.append(time.perf_counter()), prepare(*batch))[1]
    run = loop.Run(None, 0, {})
    with ExitStack() as stack, redirect_stdout(stack.enter_context(Path(os.devnull).open("w"))):
        loop.fit(task, task.training, run)
        task.data = tuple(tensor[: PROFILED * task.training.batch_size] for tensor in task.data)
        for part, (owner, name) in PARTS.items():
            stack.enter_context(patch.object(owner, name, record_function(part)(getattr(owner, name))))
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            loop.fit(task, task.training, run)
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
    print("| | processes | ms a step: median (tenth to ninetieth percentile) |\n|---|---|---|")
    for num, stages in found.items():
        for stage, row in stages.items():
            tenths = statistics.quantiles(row["ms"], n=10)
            print(f"| {stage} | {num} | {tenths[4]:.1f} ({tenths[0]:.1f} to {tenths[-1]:.1f}) |")
    print("\n| | processes | | times a step | bytes each time, counted | by arithmetic |\n|---|---|---|---|---|---|")
    for num, stages in found.items():
        for stage, row in stages.items():
            for part, (times, num_bytes) in row["counted"].items():
                print(f"| {stage} | {num} | {part} | {times:.2f} | {num_bytes:,.0f} | {row['expected'][part]:,} |")


if __name__ == "__main__":
    if "RANK" in os.environ:
        with process_group():
            torch.manual_seed(0)
            print(json.dumps({stage: measure(task) for stage, task in make_tasks().items()}))
    else:
        main()
