"""How fast the program is beside other work: one busy process.

Each figure comes from a new process, because threads learn how to wait for each other when torch is imported."""

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from prior.codes import Codes
from prior.pair import load
from prior.train import evaluate_prior
from tests.project import (
    CPU,
    IMAGE_SHAPE,
    MAP_SHAPE,
    NUM_CLASSES,
    NUM_CODES,
    Side,
    StageOne,
    StageTwo,
    recipe_of,
    whole_run,
)
from vqvae.storage.runs import SHIPPED, weights_file

SECONDS = 1.0  # of each kind of work, and before that a fifth of it to warm up
NUM_TRAINED, NUM_DRAWN, NUM_EVALUATED = 320, 100, 500  # samples at once
STARTS = {  # of the processes: as torch has its threads, and as the command line does
    "before": "",
    "now": "from vqvae.threads import choose_threads, spin_briefly; spin_briefly(); choose_threads('cpu')",
}
FIXED = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def beside_other_work(repeats: int) -> list[dict[str, Any]]:
    """Samples a second of each kind of work, idle and beside a busy process, with threads as torch has them (before)
    and as the command line has them (now). Then, with their spread: what is kept beside it, and when idle."""
    found: list[dict[str, dict[str, float]]] = []
    for _ in range(repeats):
        found.append({})
        for start, program in STARTS.items():
            found[-1][f"{start}, idle"] = _rates_of(program)
            busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            try:
                found[-1][f"{start}, beside"] = _rates_of(program)
            finally:
                busy.kill()
    rows = []
    for what in found[0]["now, idle"]:
        per_s = {name: statistics.median(turn[name][what] for turn in found) for name in found[0]}
        row: dict[str, Any] = {"what": what, **per_s}
        for kept, (share, whole) in {
            "kept beside, before": ("before, beside", "before, idle"),
            "kept beside, now": ("now, beside", "now, idle"),
            "kept when idle": ("now, idle", "before, idle"),
        }.items():
            ratios = sorted(turn[share][what] / turn[whole][what] for turn in found)
            row[kept] = [statistics.median(ratios), ratios[0], ratios[-1]]
        rows.append(row)
    return rows


def _rates_of(program: str) -> dict[str, float]:
    environment = {name: value for name, value in os.environ.items() if name not in FIXED}
    command = [sys.executable, "-c", f"{program}\nfrom tests.rates import tell_rates\ntell_rates()"]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return dict(json.loads(done.stdout))


def tell_rates() -> None:
    """Print the samples a second of each kind of work of this process."""
    configs, trainings = zip(*(recipe_of("mnist", stage) for stage in ("vqvae", "prior")), strict=True)
    one, two = (replace(training, num_epochs=1) for training in trainings)
    images = torch.randint(256, (NUM_TRAINED, *IMAGE_SHAPE), dtype=torch.uint8)
    codes, evaluated = (
        Codes(torch.randint(NUM_CODES, (num, *MAP_SHAPE)), torch.arange(num) % NUM_CLASSES)
        for num in (NUM_TRAINED, NUM_EVALUATED)
    )
    pair = load(weights_file(SHIPPED, "vqvae"), weights_file(SHIPPED, "prior"), CPU)
    work: dict[str, tuple[Side, int]] = {
        "training stage one": (whole_run(StageOne(configs[0], one, images), one), NUM_TRAINED),
        "training stage two": (whole_run(StageTwo(configs[1], two, codes), two), NUM_TRAINED),
        "sampling": (partial(pair.draw, NUM_DRAWN), NUM_DRAWN),
        "evaluating the prior": (partial(evaluate_prior, pair.prior, evaluated), NUM_EVALUATED),
    }
    print(json.dumps({what: _rate(*side) for what, side in work.items()}))


def _rate(side: Side, num: int) -> float:
    for seconds in (SECONDS / 5, SECONDS):
        start, done = time.perf_counter(), 0
        while (spent := time.perf_counter() - start) < seconds:
            side()
            done += num
    return done / spent
