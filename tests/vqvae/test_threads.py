import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers import run
from tests.vqvae.training.test_loop import Toy, train
from vqvae import threads
from vqvae.storage.checkpoint import load_resume_state
from vqvae.threads import choose_threads, fastest, spin_briefly

Patch = pytest.MonkeyPatch
VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")


@pytest.fixture(autouse=True)
def free(monkeypatch: Patch) -> Iterator[None]:
    """Nothing is fixed by the environment, torch would compute with two threads, and one is the faster."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_speed", lambda num, seconds: 1 / num)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("users", [{}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "ACTIVE"}])
def test_threads_spin_briefly_unless_the_user_says_how_they_wait(users: dict[str, str], monkeypatch: Patch) -> None:
    for name, value in users.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    spin_briefly()
    found = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    assert found == (users or {"GOMP_SPINCOUNT": str(threads.SPIN_COUNT)})


@pytest.mark.parametrize(
    ("most", "turns", "chosen"),  # the speeds of each number in each turn
    [
        (1, {}, 1),
        (2, {2: (1.0, 1.0), 1: (1.05, 9.0)}, 2),  # by noise in one turn
        (2, {2: (1.0, 1.0), 1: (1.2, 1.2)}, 1),
        (8, {8: (1.0, 2.0), 7: (1.2, 2.4), 4: (1.3, 2.6)}, 4),  # as the clock rises
        (8, {8: (1.0, 1.0), 7: (1.3, 1.3), 4: (0.9, 2.0)}, 7),
    ],
)
def test_fewer_threads_are_chosen_where_they_are_clearly_faster_in_every_turn(
    most: int, turns: dict[int, tuple[float, ...]], chosen: int
) -> None:
    speeds, seconds = {num: iter(values) for num, values in turns.items()}, []

    def speed(num: int, trial: float) -> float:
        seconds.append(trial)
        return next(speeds[num])

    assert fastest(most, speed) == chosen
    assert sum(seconds) < 0.15
    assert [*map(list, speeds.values())] == [[]] * len(turns)


@pytest.mark.parametrize(
    ("device", "cuda", "fixed", "num"),
    [
        ("cpu", True, None, 1),
        ("auto", False, None, 1),
        ("auto", True, None, 2),
        ("cuda", True, None, 2),
        ("cpu", False, "2", 2),
    ],
)
def test_a_choice_is_told_and_none_is_made_for_cuda_or_over_the_users(
    device: str, cuda: bool, fixed: str | None, num: int, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    if fixed:
        monkeypatch.setenv("OMP_NUM_THREADS", fixed)
    assert choose_threads(device) == device
    assert torch.get_num_threads() == num
    told = capsys.readouterr().err
    assert (told == "") == (num == 2)
    assert num == 2 or ("so 1 of 2 threads compute" in told and "OMP_NUM_THREADS" in told)


def test_only_commands_that_compute_choose(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for command, num in (("sample --help", 2), ("sample --mode gaussian --num-samples 1", 1)):
        assert run(*command.split()).status == 0
        assert torch.get_num_threads() == num


@pytest.mark.parametrize(
    ("now", "fixed", "cores", "num"), [(1, None, 2, 2), (1, "1", 2, 1), (1, None, 1, 1), (2, None, 2, 2)]
)
def test_a_run_goes_on_with_its_threads_unless_the_user_fixed_them_or_there_are_fewer_cores(
    now: int,
    fixed: str | None,
    cores: int,
    num: int,
    tmp_path: Path,
    monkeypatch: Patch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train(Toy(), tmp_path, num_epochs=1)
    assert load_resume_state(tmp_path / "resume.pt")["threads"] == 2
    torch.set_num_threads(now)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    if fixed:
        monkeypatch.setenv("OMP_NUM_THREADS", fixed)
    train(Toy(), tmp_path, num_epochs=2, resume=True)
    assert torch.get_num_threads() == num
    assert ("goes on with 2 threads" in capsys.readouterr().err) == (num != now)
