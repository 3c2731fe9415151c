"""Training by the command line, in processes that are ended by signals and gone on with.

`test_interrupted.py FOLDER` starts them. It has imported all that they need, so that they start at once."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import cli
from tests.helpers import FIXTURE, ROOT
from tests.ranks import rows
from vqvae.storage.checkpoint import load_resume_state
from vqvae.training import loop

MOMENTS = random.Random(1)
RECIPE = (ROOT / "configs" / "mnist.toml").read_text()  # the default, made small
RECIPE = RECIPE.replace("width = 64", "width = 8").replace("width = 40", "dropout = 0.1\nwidth = 8")
SIGNALS = [signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGTERM]
RUNS = {
    f"{name} {stage}": sent for name, sent in (("straight", []), ("halted", SIGNALS)) for stage in ("vqvae", "prior")
}


def work(arguments: list[object], output: Path) -> None:
    """What a process does: train, and save at every step."""
    with output.open("a") as sys.stdout, output.open("a") as sys.stderr:
        torch.set_num_threads(1)
        loop.SAVE_EVERY_S = -1.0
        sys.argv = ["cli.py", *map(str, arguments)]
        cli.main()


def statuses(folder: Path, name: str, signals: list[int]) -> list[int]:
    """The exit statuses of processes that go on with one run. Each but the last is sent a signal, at a random moment
    after its first save, or after its start if the first signal is SIGKILL."""
    stage, own, ended = name.split()[1], folder / name, []
    own.mkdir()
    (own / "recipe.toml").write_text(RECIPE)
    arguments = [f"train-{stage}", "--output-folder", own, "--config", own / "recipe.toml", "--data-folder", FIXTURE]
    arguments += ["--vqvae", folder / "straight vqvae" / "vqvae.safetensors"] if stage == "prior" else ["--k", 32]
    arguments += ["--device", "cpu", "--batch-size", 32, "--num-epochs", 4]
    path = own / stage / "resume.pt"
    for number, sent in enumerate([*signals, None]):
        before, again = path.exists() and path.stat().st_mtime, "--resume" if path.exists() else "--overwrite"
        options = {"target": work, "args": ([*arguments, again], own / "output.txt")}
        process = multiprocessing.get_context("fork").Process(**options)
        process.start()
        if sent is not None:
            saved = number == 0 and sent == signal.SIGKILL
            while not saved and process.is_alive():
                time.sleep(0.005)
                saved = (path.exists() and path.stat().st_mtime) != before
            time.sleep(MOMENTS.uniform(0, 0.15))
            os.kill(process.pid, sent)
        process.join()
        ended.append(process.exitcode)
    return ended


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of all runs, and the exit statuses in statuses.json."""
    folder, environment = tmp_path_factory.mktemp("runs"), {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, __file__, folder], env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["vqvae", "prior"])
def test_a_run_that_is_killed_and_asked_to_end_and_resumed_equals_one_that_is_not(folder: Path, stage: str) -> None:
    statuses = json.loads((folder / "statuses.json").read_text())
    expected = [-sent if sent == signal.SIGKILL else 128 + sent for sent in SIGNALS]
    assert statuses[f"halted {stage}"] == [*expected, 0]
    straight, halted = (folder / f"{name} {stage}" for name in ("straight", "halted"))
    told = (halted / "output.txt").read_text()
    assert told.count(f"all of it is saved; go on with: python cli.py train-{stage} --output-folder '{halted}'") == 2
    assert "--num-epochs 4 --resume\n" in told
    assert "Traceback" not in told
    assert (halted / f"{stage}.safetensors").read_bytes() == (straight / f"{stage}.safetensors").read_bytes()
    states = [load_resume_state(own / stage / "resume.pt") for own in (straight, halted)]
    for state in states:
        ((_, last),) = state["unlogged"]
        del last["images_per_s" if stage == "vqvae" else "maps_per_s"]
    assert states[0].pop("settings") == states[1].pop("settings")
    torch.testing.assert_close(*states, rtol=0, atol=0)
    curves = rows(straight / stage)
    assert rows(halted / stage) == curves
    events = EventAccumulator(str(halted / stage)).Reload().Scalars("lr")
    assert [event.step for event in events] == [row["step"] for row in curves]
    name = "total/train" if stage == "vqvae" else "nats_per_code/train"
    losses = [row[name] for row in curves if name in row]
    assert losses[-1] < 0.95 * losses[0]  # they learned something, and did not merely fail alike


if __name__ == "__main__":
    import torch._dynamo  # what every optimiser imports, so that the processes have it already

    ended = {name: statuses(Path(sys.argv[1]), name, signals) for name, signals in RUNS.items()}
    (Path(sys.argv[1]) / "statuses.json").write_text(json.dumps(ended))
