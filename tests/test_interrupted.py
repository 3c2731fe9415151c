"""Real training processes ended by signals at random moments, and gone on with to the end."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vqvae.common.checkpoint import load_resume_state
from vqvae.common.runs import claimed

ROOT = Path(__file__).parents[1]
FIXTURE = ROOT / "tests" / "fixture"
VQVAE = ["train-vqvae", "--k", "32", "--batch-size", "16", "--num-epochs", "7", "--data-folder", str(FIXTURE)]
PRIOR = ["train-prior", "--batch-size", "16", "--num-epochs", "7", "--data-folder", str(FIXTURE)]


def launch(seed: int, folder: Path, stage: str, signals: list[int], arguments: list[str]) -> tuple[list[int], str]:
    """The status of each run, and what they wrote to the terminal."""
    resume_file = folder / stage / "resume.pt"
    command = [str(ROOT / "tests" / "launcher.py"), str(seed), str(resume_file), ",".join(map(str, map(int, signals)))]
    done = subprocess.run(
        [sys.executable, *command, "--", *arguments, "--output-folder", str(folder)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("status")], done.stderr


def assert_same_run(straight: Path, parts: Path, stage: str) -> None:
    """The same weights, resume state and curves, bit for bit."""
    name = f"{stage}.safetensors"
    assert (parts / name).read_bytes() == (straight / name).read_bytes()
    states = [load_resume_state(folder / stage / "resume.pt") for folder in (straight, parts)]
    assert all(torch.equal(states[0]["model"][key], states[1]["model"][key]) for key in states[0]["model"])
    assert states[0]["best"] == states[1]["best"]
    assert states[0]["step"] == states[1]["step"]
    assert str(states[0]["optimizer"]["state"]) == str(states[1]["optimizer"]["state"])
    curves = [curve(folder / stage) for folder in (straight, parts)]
    assert curves[0] == curves[1]
    rows = [
        [
            {k: v for k, v in json.loads(line).items() if not k.endswith("_per_s")}
            for line in (folder / stage / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in (straight, parts)
    ]
    assert rows[0] == rows[1]


def curve(folder: Path) -> list[tuple[int, float]]:
    """What TensorBoard shows of the learning rate."""
    events = EventAccumulator(str(folder)).Reload()
    return [(event.step, event.value) for event in events.Scalars("lr")]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages trained without a stop."""
    folder = tmp_path_factory.mktemp("straight")
    assert launch(0, folder, "vqvae", [], VQVAE)[0] == [0]
    assert launch(0, folder, "prior", [], [*PRIOR, "--vqvae", str(folder / "vqvae.safetensors")])[0] == [0]
    return folder


@pytest.mark.slow
def test_stage_one_killed_a_dozen_times_equals_a_run_that_was_not(straight: Path, tmp_path: Path) -> None:
    statuses, _ = launch(1, tmp_path, "vqvae", [signal.SIGKILL] * 12, VQVAE)
    assert statuses.count(-signal.SIGKILL) >= 10  # a run may be over before its signal
    assert statuses[-1] == 0
    assert_same_run(straight, tmp_path, "vqvae")


@pytest.mark.slow
def test_stage_two_killed_a_dozen_times_equals_a_run_that_was_not(straight: Path, tmp_path: Path) -> None:
    arguments = [*PRIOR, "--vqvae", str(straight / "vqvae.safetensors")]
    statuses, _ = launch(2, tmp_path, "prior", [signal.SIGKILL] * 12, arguments)
    assert statuses.count(-signal.SIGKILL) >= 10
    assert statuses[-1] == 0
    assert_same_run(straight, tmp_path, "prior")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_asked_to_end_saves_says_how_to_go_on_and_exits_as_is_usual(
    straight: Path, tmp_path: Path, number: signal.Signals
) -> None:
    statuses, told = launch(5, tmp_path, "vqvae", [number] * 3, VQVAE)
    assert statuses == [128 + number] * 3 + [0]
    assert "all of it is saved; go on with: python cli.py train-vqvae --k 32" in told
    assert f"--output-folder {tmp_path} --resume\n" in told
    assert "Traceback" not in told
    assert_same_run(straight, tmp_path, "vqvae")


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    with claimed(tmp_path, "vqvae", resume=False, overwrite=False):
        done = subprocess.run(
            [sys.executable, str(ROOT / "cli.py"), *VQVAE, "--output-folder", str(tmp_path)],
            capture_output=True,
            text=True,
        )
    assert done.returncode == 1
    assert (
        f"expected nobody else at work in {tmp_path}, found a vqvae run that goes on; wait for its end" in done.stderr
    )
    assert not (tmp_path / "vqvae.safetensors").exists()


def test_weights_are_those_of_the_files(straight: Path) -> None:
    """That the runs compared above are of networks that learned something, not of two that failed alike."""
    weights = load_file(straight / "vqvae.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values() if tensor.is_floating_point())
    losses = [json.loads(line) for line in (straight / "vqvae" / "metrics.jsonl").read_text().splitlines()]
    errors = [row["squared_error/validation"] for row in losses if "epoch" in row]
    assert errors[-1] < 0.8 * errors[0]
