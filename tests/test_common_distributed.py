"""Two processes that train as one, held against one process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from vqvae.common import distributed
from vqvae.common.checkpoint import load_resume_state
from vqvae.common.distributed import averaged, main_first, share, share_of_batch, summed
from vqvae.common.errors import UserError

from tests import ranks

ROOT = Path(__file__).parents[1]
FIXTURE = ROOT / "tests" / "fixture"
# Batches of 88 are 5 equal ones; gradient steps are small enough for rounding to stay rounding.
TRAINING = ["--batch-size", "88", "--lr", "1e-4", "--data-folder", str(FIXTURE)]
EMA = ["--k", "64"]  # of the default recipe


def torchrun(*arguments: object, num: int = 2) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num)]
    return [*launcher, *map(str, arguments)]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def cli(*arguments: object) -> list[str]:
    return [str(ROOT / "cli.py"), *map(str, arguments)]


def float32_recipe(folder: Path) -> Path:
    """The default recipe without bfloat16, whose rounding is too coarse to compare one run with another."""
    recipe = folder / "recipe.toml"
    recipe.write_text((ROOT / "configs" / "mnist.toml").read_text().replace("mixed_precision = true", ""))
    return recipe


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both stages, two epochs by one process and by two."""
    folders = {}
    for name, starter in (("one", lambda c: [sys.executable, *c]), ("two", lambda c: torchrun(*c))):
        folder = folders[name] = tmp_path_factory.mktemp(name)
        training = [*TRAINING, "--num-epochs", 2, "--output-folder", folder, "--config", float32_recipe(folder)]
        vqvae = folder / "vqvae.safetensors"
        run(starter(cli("train-vqvae", *EMA, *training)))
        # Both priors on the maps of the first VQ-VAE, so that they can be compared.
        first = folders["one"] / "vqvae.safetensors"
        run(starter(cli("train-prior", *training, "--vqvae", first)))
        assert vqvae.exists()
    return folders


def last_row(folder: Path, stage: str) -> dict[str, float]:
    return json.loads((folder / stage / "metrics.jsonl").read_text().splitlines()[-1])


def assert_close(one: Path, two: Path, stage: str) -> None:
    a, b = (load_file(folder / f"{stage}.safetensors") for folder in (one, two))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


# --- Two ranks


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["vqvae", "prior"])
def test_two_ranks_come_to_the_weights_of_one_process(runs: dict[str, Path], stage: str) -> None:
    assert_close(runs["one"], runs["two"], stage)
    one, two = (last_row(folder, stage) for folder in runs.values())
    assert one.keys() == two.keys()
    for name in one.keys() - {"images_per_s", "maps_per_s"}:
        assert two[name] == pytest.approx(one[name], rel=1e-4), name


@pytest.mark.slow
def test_one_rank_writes(runs: dict[str, Path]) -> None:
    files = [{p.relative_to(f).parts[:2] for p in f.rglob("*") if "tfevents" not in p.name} for f in runs.values()]
    assert files[0] - {("prior", "codes-train.safetensors")} == files[1] - {("prior", "codes-train.safetensors")}
    assert len(list((runs["two"] / "vqvae").glob("events*"))) == len(list((runs["one"] / "vqvae").glob("events*")))


@pytest.fixture(scope="module")
def found(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What tests/ranks.py comes to, in this process and on two and three ranks."""
    pair = (runs["one"] / "vqvae.safetensors", runs["one"] / "prior.safetensors")
    results = {"one": ranks.everything(*pair)}
    for num in (2, 3):
        folder = tmp_path_factory.mktemp("found")
        run(torchrun(ROOT / "tests" / "ranks.py", *pair, folder, num=num))
        results[str(num)] = torch.load(folder / "found.pt")
    return results


@pytest.mark.slow
@pytest.mark.parametrize("num", ["2", "3"])
def test_figures_and_samples_are_exactly_those_of_one_process(found: dict[str, dict[str, Any]], num: str) -> None:
    one, many = found["one"], found[num]
    assert many["vqvae"] == one["vqvae"]
    assert many["prior"] == one["prior"]
    assert torch.equal(many["samples"], one["samples"])
    assert torch.equal(many["generator"], one["generator"])  # and so is what is drawn next


@pytest.mark.slow
@pytest.mark.parametrize("num", ["2", "3"])
def test_every_rank_has_the_codebook_that_one_process_would_have(found: dict[str, dict[str, Any]], num: str) -> None:
    books = found[num]["codebooks"]
    assert len(books) == int(num)
    for name, expected in found["one"]["codebooks"][0].items():
        for book in books:
            assert torch.equal(book[name], books[0][name])
        torch.testing.assert_close(books[0][name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("num", ["2", "3"])
def test_the_prediction_terms_gradient_is_that_of_the_whole_batch(found: dict[str, dict[str, Any]], num: str) -> None:
    expected = found["one"]["prediction_gradient"]
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(found[num]["prediction_gradient"], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_two_ranks_write_the_samples_of_one_process_once(runs: dict[str, Path], tmp_path: Path) -> None:
    pair = ["--vqvae", runs["one"] / "vqvae.safetensors", "--prior", runs["one"] / "prior.safetensors"]
    arguments = ["sample", "--mode", "pixelcnn", "--labels", "0-9", "--num-samples", "210", *pair, "--output"]
    run([sys.executable, *cli(*arguments, tmp_path / "one.npz")])
    done = run(torchrun(*cli(*arguments, tmp_path / "two.npz")))
    assert done.stdout.count("wrote ") == 1
    one, two = (np.load(tmp_path / name) for name in ("one.npz", "two.npz"))
    for name in ("images", "indices", "labels"):
        np.testing.assert_array_equal(one[name], two[name])


@pytest.mark.slow
def test_a_classifier_is_trained_by_one_process_only(tmp_path: Path) -> None:
    command = torchrun(*cli("train-classifier", "--data-folder", FIXTURE, "--output-folder", tmp_path))
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode != 0
    assert "expected one process for a classifier, found 2; type python instead of torchrun" in done.stderr
    assert not (tmp_path / "classifier.safetensors").exists()


@pytest.mark.slow
def test_a_run_of_two_ranks_goes_on_with_one(runs: dict[str, Path], tmp_path: Path) -> None:
    arguments = ["train-vqvae", *EMA, *TRAINING, "--output-folder", tmp_path]
    run(torchrun(*cli(*arguments, "--num-epochs", 1, "--config", constant_rate(tmp_path))))
    run([sys.executable, *cli(*arguments, "--num-epochs", 2, "--config", constant_rate(tmp_path), "--resume")])
    straight = tmp_path / "straight"
    arguments[-1] = straight
    run([sys.executable, *cli(*arguments, "--num-epochs", 2, "--config", constant_rate(tmp_path))])
    assert_close(straight, tmp_path, "vqvae")


def constant_rate(folder: Path) -> Path:
    """That without its one-cycle schedule, which the number of epochs would stretch."""
    recipe = float32_recipe(folder)
    recipe.write_text(recipe.read_text().replace('"one-cycle"', '"constant"'))
    return recipe


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the ranks in /proc")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_ends_the_others_and_the_last_save_stays(tmp_path: Path, victim: int) -> None:
    resume_file = tmp_path / "vqvae" / "resume.pt"
    arguments = cli("train-vqvae", *EMA, *TRAINING, "--num-epochs", 1000, "--output-folder", tmp_path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(torchrun(*arguments), cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 240
        while not resume_file.exists() and started.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert resume_file.exists()
        found = children(started.pid)
        assert len(found) == 2
        os.kill(found[victim], signal.SIGKILL)
        started.communicate(timeout=60)
    finally:
        started.kill()
    assert started.returncode not in (0, None)
    assert not any(Path(f"/proc/{pid}").exists() for pid in found)
    step = load_resume_state(resume_file)["step"]
    assert step > 0
    run([sys.executable, *arguments, "--resume", "--num-epochs", str(-(-step // 5) + 1)])
    assert load_resume_state(resume_file)["step"] > step


THREADS_LEFT = """
import os
import torch
from vqvae.common.distributed import joined, summed
with joined():
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = summed(torch.ones(2))
    torch.optim.Adam([weight]).step()
    print(len(os.listdir("/proc/self/task")))
print(len(os.listdir("/proc/self/task")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="counts the threads in /proc")
def test_no_thread_of_the_group_outlives_it(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(THREADS_LEFT)
    inside, after = map(int, run(torchrun(script, num=1)).stdout.split())
    assert inside > 1
    assert after == 1


# --- What one process sees of several


def pretend(monkeypatch: pytest.MonkeyPatch, rank: int, num: int) -> None:
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world_size", lambda: num)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("num", [7, 8, 64, 100])
def test_a_batch_is_shared_out_whole_without_overlap_and_evenly(
    monkeypatch: pytest.MonkeyPatch, num: int, num_ranks: int
) -> None:
    parts, batches = [], []
    for rank in range(num_ranks):
        pretend(monkeypatch, rank, num_ranks)
        parts.append(list(range(num))[share_of_batch(num)])
        batches += share(range(num))
    assert [sample for part in parts for sample in part] == list(range(num))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert sorted(batches) == list(range(num))


def test_fewer_samples_than_processes_are_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 0, 4)
    with pytest.raises(UserError, match="for each of 4 processes, found a batch of 3; type another --batch-size"):
        share_of_batch(3)


def test_alone_nothing_changes() -> None:
    x = torch.randn(3, requires_grad=True)
    assert summed(x) is x
    assert averaged(x, 5) is x
    with main_first():
        pass
