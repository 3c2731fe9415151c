"""How long both trainings of the default recipe take, against an earlier commit in a worktree of its own."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.rates import STARTS

COMMIT = "4bd31f1"  # the last one whose default recipe has AdamW
# Seconds of both trainings in full, from those of a few steps after a warm-up, by what both commits have.
PROGRAM = """
import json, sys, time
from dataclasses import replace
from pathlib import Path
import torch
from prior.codes import Codes
from tests.benchmark import recipe_of
from tests.project import StageOne, StageTwo, whole_run
from vqvae.data.mnist import load_mnist

split, num, found = load_mnist(Path(sys.argv[1])).train, 3200, {}
codes = Codes(torch.randint(512, (num, 7, 7)), split.labels[:num])
for stage, task, data in (("vqvae", StageOne, split.images[:num]), ("prior", StageTwo, codes)):
    config, settings = recipe_of("mnist", stage)
    one_epoch = replace(settings, num_epochs=1)
    for _ in range(2):
        side, start = whole_run(task(config, one_epoch, data), one_epoch), time.perf_counter()
        side()
        found[stage] = (time.perf_counter() - start) * settings.num_epochs * len(split.labels) / num
print(json.dumps(found))
"""


def since_before(data: Path, repeats: int) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of each training and of both, before and now, several times in turn."""
    turns = []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", folder, COMMIT], check=True)
        try:
            for _ in range(repeats):
                turns.append([_seconds(Path(folder), data, STARTS["before"]), _seconds(Path(), data, STARTS["now"])])
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", folder], check=True)
    before, now = zip(*turns, strict=True)
    names = {"training stage one": ("vqvae",), "training stage two": ("prior",), "both": ("vqvae", "prior")}
    return {
        what: tuple([sum(turn[stage] for stage in stages) for turn in side] for side in (before, now))
        for what, stages in names.items()
    }


def _seconds(tree: Path, data: Path, start: str) -> dict[str, float]:
    command = [sys.executable, "-c", start + PROGRAM, str(data.absolute())]
    done = subprocess.run(command, cwd=tree, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return dict(json.loads(done.stdout))
