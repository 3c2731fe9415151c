import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import ranks
from tests.helpers import FIXTURE, NO_CUDA, ROOT, run
from vqvae import distributed
from vqvae.distributed import batch_shard, shard
from vqvae.storage.checkpoint import load_resume_state

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
Found = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tests/ranks.py finds and writes, in the folders 1, 2, 3 and 4 by the number of processes."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, ROOT / "tests" / "ranks.py", folder]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    torch.save(ranks.everything(folder / "1"), folder / "1" / "0.pt")
    return folder


@pytest.fixture
def alone(folder: Path) -> Found:
    return torch.load(folder / "1" / "0.pt")


@pytest.fixture(params=[pytest.param(num, marks=pytest.mark.slow) for num in (2, 3, 4)])
def many(folder: Path, request: pytest.FixtureRequest) -> list[Found]:
    return [torch.load(folder / str(request.param) / f"{rank}.pt") for rank in range(request.param)]


def test_uneven_shares_train_as_whole_batches_and_a_signal_to_one_stops_all(
    folder: Path, alone: Found, many: list[Found]
) -> None:
    for found in many:
        torch.testing.assert_close(found["weights"], alone["weights"], rtol=1e-9, atol=1e-9)
    expected = [pytest.approx(row, rel=1e-9) for row in ranks.rows(folder / "1" / "line")]
    assert ranks.rows(folder / str(len(many)) / "line") == expected
    assert {(len(before), len(after)) for before, after in (found["drawn"] for found in many)} == {(2, 4)}
    assert many[0]["drawn"] == alone["drawn"]  # and each has a randomness of its own
    assert len({*chain(*chain(*(found["drawn"] for found in many)))}) == len(many) * 6


@pytest.mark.parametrize("stage", ["vqvae", "prior"])
def test_both_stages_come_to_the_weights_of_one_process(folder: Path, many: list[Found], stage: str) -> None:
    one, several = folder / "1" / "rank0", folder / str(len(many)) / "rank0"
    weights = [load_file(own / f"{stage}.safetensors") for own in (several, one)]
    torch.testing.assert_close(*weights, rtol=1e-3, atol=2e-5)
    assert ranks.rows(several / stage) == [pytest.approx(row, rel=1e-4) for row in ranks.rows(one / stage)]


@pytest.mark.slow
def test_a_run_of_several_processes_goes_on_with_one(folder: Path, tmp_path: Path) -> None:
    lines = ranks.Line(), ranks.Line()
    for num, line in zip("14", lines, strict=True):
        shutil.copytree(folder / num / "line", tmp_path / num)
        line.run(tmp_path / num, 3, resume=True)
    torch.testing.assert_close(*(line.model.weight for line in lines), rtol=1e-9, atol=1e-9)


def test_only_the_main_process_writes_and_prints_and_it_is_waited_for(
    folder: Path, alone: Found, many: list[Found]
) -> None:
    assert [found["files"] for found in many] == [alone["files"]] + [[]] * (len(many) - 1)
    assert {"vqvae.safetensors", "prior/resume.pt", "prior/metrics.jsonl"} <= {*alone["files"]}
    printed = [(folder / str(len(many)) / f"{rank}.txt").read_text() for rank in range(len(many))]
    assert printed[0].startswith("epoch 1")
    assert printed[1:] == [""] * (len(many) - 1)
    assert all(found["waited"] for found in many)
    assert min(found["inside"] for found in many) > 0 or not Path("/proc").is_dir()
    assert {found["after"] for found in many} == {0}  # no thread outlives the group


def test_what_ends_the_work_is_told_by_one_process_and_ends_all(many: list[Found]) -> None:
    for number, told in enumerate(["a mistake"] * 3 + ["interrupted by signal 15 after step 7"]):
        ends = [found["endings"][number] for found in many]
        assert sorted(map(str, ends)) == ["1" if number < 3 else "143"] * (len(many) - 1) + [told]


def test_figures_samples_codebook_and_prediction_gradient_are_those_of_one_process(
    alone: Found, many: list[Found]
) -> None:
    for found in many:
        assert found["figures"] == alone["figures"]
        assert torch.equal(found["maps"], alone["maps"])
        assert torch.equal(found["following"], alone["following"])  # and so is what is drawn next
    for name, expected in alone["codebook"].items():
        assert all(torch.equal(found["codebook"][name], many[0]["codebook"][name]) for found in many)
        torch.testing.assert_close(many[0]["codebook"][name], expected, rtol=1e-4, atol=1e-5)
    assert alone["gradient"].abs().max() > 1e-4
    torch.testing.assert_close(many[0]["gradient"], alone["gradient"], rtol=1e-4, atol=1e-7)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes in /proc")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_others_and_the_last_save_stays(tmp_path: Path, victim: int) -> None:
    resume_file = tmp_path / "vqvae" / "resume.pt"
    command = ["train-vqvae", "--config", ROOT / "configs" / "smoke.toml", "--data-folder", FIXTURE]
    command += ["--output-folder", tmp_path, "--device", "cpu", "--num-epochs"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = map(str, [*torchrun, ROOT / "cli.py", *command, 1000])
    started = subprocess.Popen([*script], env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    try:
        while not resume_file.exists() and started.poll() is None:
            time.sleep(0.05)
        children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
        os.kill(int(children[victim]), signal.SIGKILL)
        assert started.wait(60) != 0
    finally:
        started.kill()
    assert [Path(f"/proc/{child}").exists() for child in children] == [False, False]
    epochs = load_resume_state(resume_file)["step"] // 14  # 440 digits in batches of 32
    assert run(*command, epochs + 1, "--resume").status == 0
    assert load_resume_state(resume_file)["step"] == 14 * (epochs + 1)


@pytest.mark.cuda
@NO_CUDA
def test_nccl_sums_gradients_and_trains_on_all_devices() -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(torch.cuda.device_count())]
    program = ["--no-python", sys.executable, "-c", "from tests.ranks import one_step; one_step('cuda')"]
    subprocess.run([sys.executable, *torchrun, *program], env=ENVIRONMENT, check=True, timeout=300)


@pytest.mark.parametrize("num_processes", [1, 2, 3, 7])
def test_a_batch_is_shared_out_whole_in_order_and_evenly(monkeypatch: pytest.MonkeyPatch, num_processes: int) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: num_processes)
    for num in (0, 1, 2, 7, 8, 64, 100):
        parts = []
        for rank in range(num_processes):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            parts.append(list(range(num))[batch_shard(num)])
            assert list(shard(range(num))) == list(range(rank, num, num_processes))
        assert [*chain(*parts)] == list(range(num))
        assert len(parts[0]) - min(map(len, parts)) <= 1  # the main process has none only where nobody has
        assert len(parts[0]) == max(map(len, parts))
