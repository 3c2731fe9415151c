"""The training loop, on a task that is no more than a small regression."""

import math
import os
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from tests.helpers import log_rows
from vqvae.compute import derive_seed
from vqvae.errors import InputError, Interrupted, MissingFileError
from vqvae.storage.checkpoint import load_resume_state, save_resume_state
from vqvae.training import loop
from vqvae.training.logs import RunLog
from vqvae.training.loop import Run, Task, fit
from vqvae.training.settings import Training, learning_rate

Patch = pytest.MonkeyPatch
NUM, BATCH, STEPS = 23, 4, 6  # samples, of a batch, and steps of an epoch, whose last batch is smaller


class Toy(Task):
    """A regression with dropout, which notes what the loop did to it. Each epoch has its figure."""

    unit, best_by = "things", "figure"

    def __init__(self, figures: tuple[float, ...] = (9.0, 8.0, 7.0, 6.0), width: int = 8) -> None:
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(3, width), nn.Dropout(0.5), nn.Linear(width, 1))
        self.model.register_buffer("taken", torch.tensor(0))  # steps of the run, saved like a weight
        self.data = (torch.arange(NUM), torch.randn(NUM, 3))
        self.figures, self.batches, self.kept, self.precisions = figures, [], [], []

    def prepare(self, *batch: Tensor) -> tuple[Tensor, ...]:
        return batch[0], batch[1] + 0.1 * torch.randn_like(batch[1])

    def loss(self, *batch: Tensor) -> dict[str, Tensor]:
        rows, x = batch
        self.model.taken += 1
        out = self.model(x)
        self.batches.append(rows.tolist())
        self.precisions.append(out.dtype)
        error = (out - x.sum(dim=1, keepdim=True)).square().mean()
        return {"error": error, "worse": -100 * error, "row": rows.double().mean()}

    def evaluate(self) -> dict[str, float]:
        torch.rand(3)  # what is drawn here must not matter to the next step
        self.model.eval()  # nor the mode that is left behind
        return {"figure": self.figures[int(self.model.taken) // STEPS - 1], "other": 0.0}

    def save_best(self, figures: dict[str, float]) -> None:
        self.kept.append(figures["figure"])

    def show(self, log: RunLog, epoch: int, step: int) -> None:
        log.picture("drawn", torch.full((3, 2, 2), epoch, dtype=torch.uint8), step)


def train(
    task: Any, folder: Path | None, num_epochs: int = 4, resume: bool = False, seed: int = 5, **changes: Any
) -> Any:
    training = Training(**{"batch_size": BATCH, "num_epochs": num_epochs, "lr": 0.01, **changes})
    fit(task, training, Run(folder, seed, {"k": 8, "num_epochs": num_epochs}, resume))
    return task


def before(patch: Patch, owner: Any, name: str, happens: Callable[[int], object]) -> None:
    """Let something happen before every call of a function. It is told the number of the call, from 1."""
    function, calls = getattr(owner, name), count(1)
    function = getattr(function, "__func__", function)  # of a class method
    patch.setattr(owner, name, lambda *args: [happens(next(calls)), function(*args)][1])


@pytest.mark.parametrize(("schedule", "seed", "weight_decay"), [("constant", 5, 0.0), ("one-cycle", 6, 0.1)])
def test_a_run_is_that_of_a_plain_loop(tmp_path: Path, schedule: str, seed: int, weight_decay: float) -> None:
    training = Training(BATCH, num_epochs=3, lr=0.01, schedule=schedule, warmup=0.25, weight_decay=weight_decay)
    fitted, plain, total = Toy(), Toy(), 3 * STEPS
    fit(fitted, training, Run(tmp_path, seed, {}))
    weights, biases = ([getattr(plain.model[i], name) for i in (0, 2)] for name in ("weight", "bias"))
    groups = [{"params": weights, "weight_decay": weight_decay}, {"params": biases, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, fused=True)
    for i in range(total):
        generator = torch.Generator().manual_seed(derive_seed(seed, "order", i // STEPS))
        chosen = torch.randperm(NUM, generator=generator)[i % STEPS * BATCH :][:BATCH]
        torch.manual_seed(derive_seed(seed, "step", i))
        loss = plain.loss(*plain.prepare(*(tensor[chosen] for tensor in plain.data)))["error"]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(training, i / total)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert fitted.batches == plain.batches
    assert all(map(torch.equal, fitted.model.parameters(), plain.model.parameters()))


@pytest.mark.parametrize(("wanted", "there"), [(True, True), (True, False), (False, True)])
def test_losses_are_bfloat16_if_wanted_and_fast(tmp_path: Path, monkeypatch: Patch, wanted: bool, there: bool) -> None:
    monkeypatch.setattr(loop, "multiplies_bfloat16", lambda device: there)
    toy = train(Toy(), tmp_path, num_epochs=1, mixed_precision=wanted)
    assert set(toy.precisions) == {torch.bfloat16 if wanted and there else torch.float32}
    assert all(parameter.dtype == torch.float32 for parameter in toy.model.parameters())


def test_an_epoch_is_saved_before_it_is_logged_printed_and_shown(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(loop, "LOG_EVERY", 4)
    before(monkeypatch, Toy, "loss", lambda n: monkeypatch.setattr(loop, "SAVE_EVERY_S", -1.0 if n == 4 else 60.0))
    watched = (Toy, "evaluate"), (Toy, "save_best"), (loop.checkpoint, "save_resume_state"), (RunLog, "scalars")
    diary: list[str] = []
    for owner, name in (*watched, (Toy, "show")):
        before(monkeypatch, owner, name, lambda n, name=name: diary.append(name))
    monkeypatch.setattr(loop, "say", diary.append)
    train(Toy((9.0, 9.0)), tmp_path, num_epochs=2)
    save, log = "save_resume_state", "scalars"
    first = ["evaluate", save, "save_best", log, "epoch 1: figure 9, other 0", "show"]
    second = ["evaluate", save, log, "epoch 2: figure 9, other 0", "show"]
    assert diary == [save, log, *first, log, *second]  # in step 4 both are due


def test_the_log_has_averages_over_samples_and_a_steps_own_losses(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(loop, "LOG_EVERY", 4)
    toy = train(Toy(), tmp_path, num_epochs=1, schedule="one-cycle")
    step, epoch = log_rows(tmp_path)
    losses, training = ("error", "worse", "row"), Training(lr=0.01, schedule="one-cycle")
    assert list(step) == ["step", *(f"{name}/train_step" for name in losses), "lr"]
    figures = ("figure/validation", "other/validation", "lr", "things_per_s", "epoch")
    assert list(epoch) == ["step", *(f"{name}/train" for name in losses), *figures]
    assert (step["step"], step["row/train_step"]) == (4, sum(toy.batches[3]) / 4)
    assert (epoch["step"], epoch["epoch"], epoch["figure/validation"]) == (STEPS, 1, 9.0)
    assert epoch["row/train"] == pytest.approx((NUM - 1) / 2, rel=1e-9)
    assert [row["lr"] for row in (step, epoch)] == [learning_rate(training, i / STEPS) for i in (3, 5)]


def test_a_run_is_saved_once_a_minute_and_logs_the_speed_of_its_steps(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(loop, "time", time := SimpleNamespace(now=0))
    time.perf_counter = time.monotonic = lambda: time.now
    saved: list[float] = []  # after so many steps
    before(monkeypatch, Toy, "loss", lambda n: setattr(time, "now", 25 * n))
    before(monkeypatch, Toy, "prepare", lambda n: n == 11 and signal.raise_signal(signal.SIGTERM))
    before(monkeypatch, loop.checkpoint, "save_resume_state", lambda n: saved.append(time.now / 25))
    with pytest.raises(Interrupted):
        train(Toy(), tmp_path)
    train(Toy(), tmp_path, num_epochs=2, resume=True)
    assert saved == [3, 6, 9, 11, 12]
    assert [row["things_per_s"] for row in log_rows(tmp_path)] == pytest.approx([NUM / (25 * STEPS)] * 2)


def test_the_epochs_with_the_lowest_figure_are_kept_in_parts_too_and_a_finished_run_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = (5.0, 6.0, 5.0, 4.0, 4.5, 3.5, 4.0)
    assert train(Toy(figures), tmp_path / "straight", num_epochs=7).kept == [5.0, 4.0, 3.5]
    assert train(Toy(figures), tmp_path / "parts", num_epochs=2).kept == [5.0]
    assert train(Toy(figures), tmp_path / "parts", num_epochs=7, resume=True).kept == [4.0, 3.5]
    files = [tmp_path / "parts" / name for name in ("resume.pt", "metrics.jsonl")]
    before_it = [path.read_bytes() for path in files]
    capsys.readouterr()
    assert train(Toy(figures), tmp_path / "parts", num_epochs=7, resume=True).batches == []
    assert capsys.readouterr().out == "nothing is left to do: all 7 epochs are done\n"
    assert [path.read_bytes() for path in files] == before_it


@pytest.mark.parametrize(
    "case",  # a function, which of its calls fails or gets a signal, seconds between saves, steps that are kept
    [
        (Toy, "loss", 16, None, 60.0, 12),
        (Toy, "loss", 16, None, -1.0, 15),
        (Toy, "loss", 15, None, -1.0, 14),  # step 14 is logged too
        (loop.checkpoint, "save_resume_state", 3, None, 60.0, 12),
        (RunLog, "scalars", 7, None, -1.0, 14),
        (RunLog, "scalars", 9, None, 60.0, 18),
        (RunLog, "picture", 3, None, 60.0, 18),
        (Toy, "loss", 14, signal.SIGINT, 60.0, 14),
        (Toy, "loss", 18, signal.SIGTERM, 60.0, 18),
    ],
)
def test_a_run_that_is_stopped_and_resumed_equals_one_that_is_not(
    tmp_path: Path, monkeypatch: Patch, case: Any
) -> None:
    owner, name, call, sent, save_every_s, kept_steps = case

    def stop(n: int) -> None:
        if n == call and sent is None:
            raise ZeroDivisionError
        if n == call:
            signal.raise_signal(sent)

    monkeypatch.setattr(loop, "LOG_EVERY", 2)  # and step 6, an epoch's last, is logged only once all the same
    changes, parts, states, logs = {"schedule": "one-cycle"}, Toy(), [], []
    train(Toy(), tmp_path / "straight", **changes)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "SAVE_EVERY_S", save_every_s)
        before(patch, owner, name, stop)
        with pytest.raises(ZeroDivisionError if sent is None else Interrupted) as told:
            train(parts, tmp_path / "parts", **changes)
    if sent is not None:
        assert (told.value.signal, told.value.step, len(parts.batches)) == (sent, kept_steps, kept_steps)
    torch.manual_seed(999)
    resumed = train(Toy(), tmp_path / "parts", resume=True, **changes)
    assert len(resumed.batches) == 4 * STEPS - kept_steps
    for folder in (tmp_path / "straight", tmp_path / "parts"):
        states.append(load_resume_state(folder / "resume.pt"))
        logs.append(log_rows(folder))
        for timed in (states[-1]["unlogged"][0][1], *logs[-1]):
            timed.pop("things_per_s", None)
        events = EventAccumulator(str(folder)).Reload()
        assert [event.step for event in events.Scalars("lr")] == [row["step"] for row in logs[-1]]
        assert [event.step for event in events.Images("drawn")] == [6, 12, 18, 24]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert logs[0] == logs[1]
    assert [row["step"] for row in logs[0]] == [e * STEPS + i for e in range(4) for i in (2, 4, 6)]


def test_a_first_signal_lets_the_last_step_end_and_a_second_acts_as_outside(tmp_path: Path, monkeypatch: Patch) -> None:
    def handlers() -> list[Any]:
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    outside, inside = handlers(), []
    train(Toy(), tmp_path, num_epochs=1)
    assert handlers() == outside
    before(monkeypatch, Toy, "evaluate", lambda n: inside.append([signal.raise_signal(signal.SIGTERM), *handlers()]))
    assert train(Toy(), tmp_path, num_epochs=1).kept == [9.0]
    assert (inside, handlers()) == ([[None, *outside]], outside)


@pytest.mark.parametrize(
    "case",  # what is not finite, in which step, seconds between saves, what is told, the last save
    [
        ("loss", 1, 60.0, "losses, found loss 1, other inf at step 1, after none", 0),
        ("loss", 11, 60.0, "losses, found loss 11, other inf at step 11, after loss 10, other 1", STEPS),
        ("loss", STEPS, -1.0, "losses, found loss 6, other inf at step 6, after loss 5, other 1", STEPS - 1),
        ("weights", 3, -1.0, "weights, found others after step 3", 2),
        ("weights", STEPS, 60.0, "weights, found others after step 6", 0),
        ("figure", 2 * STEPS, 60.0, "figure on validation, found nan after epoch 2", STEPS),
    ],
)
def test_what_is_not_finite_is_told_in_a_sentence_and_never_saved(
    tmp_path: Path, monkeypatch: Patch, case: Any
) -> None:
    what, bad_step, save_every_s, found, saved = case

    class Bad(Toy):
        def loss(self, *batch: Tensor) -> dict[str, Tensor]:
            self.model.taken += 1
            zero, now = self.model[0].weight.mean() * 0, self.model.taken == bad_step
            loss = (zero.sqrt() if what == "weights" and now else zero) + self.model.taken  # a root has no slope at 0
            return {"loss": loss, "other": torch.tensor(math.inf if what == "loss" and now else 1.0)}

    monkeypatch.setattr(loop, "LOG_EVERY", 4)
    monkeypatch.setattr(loop, "SAVE_EVERY_S", save_every_s)
    toy, file = Bad((9.0, math.nan if what == "figure" else 8.0)), tmp_path / "resume.pt"
    with pytest.raises(InputError) as told:
        train(toy, tmp_path)
    where = f"the last good save, of step {saved}, is {file}" if saved else "nothing is saved yet"
    assert str(told.value) == f"expected finite {found}; {where}; start anew with a smaller `lr`"
    assert (load_resume_state(file)["step"] if file.exists() else 0) == saved
    assert toy.kept == [9.0] * (saved // STEPS)


def test_what_cannot_be_written_or_does_not_fit_the_saved_run_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    def resume(settings: dict[str, Any], **toy: Any) -> None:
        fit(Toy(**toy), Training(BATCH, num_epochs=3), Run(tmp_path, 5, settings, resume=True))

    with pytest.raises(MissingFileError, match=r"expected a run to resume at .*resume.pt, found none; "):
        resume({"k": 8})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"expected to write .*; mend that, or name another place"):
        train(Toy(), tmp_path / "file" / "run")
    train(Toy(), tmp_path, num_epochs=2)
    files = contents(tmp_path)
    wrong = ({}, "k = None"), ({"k": 9}, "k = 9; resume with the first, or start anew"), ({"k": 8, "x": 1}, "x = 1")
    for settings, found in wrong:
        with pytest.raises(InputError, match=f"the run was started with, . = (8|None), found {found}"):
            resume(settings)
    with pytest.raises(
        InputError, match=r"expected this run's state in .*resume.pt, found another network's 0.weight; start"
    ):
        resume({"k": 8}, width=9)
    assert contents(tmp_path) == files
    resume({"k": 8, "num_epochs": 3})  # more epochs are what resuming is for
    save_resume_state(tmp_path / "resume.pt", {"weights": torch.zeros(3)})
    with pytest.raises(
        InputError, match=r"expected this run's state in .*resume.pt, found other data; start anew with"
    ):
        resume({"k": 8})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_nothing_of_a_run_goes_before_the_first_save_of_one_that_replaces_it(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    def stop(n: int) -> None:
        raise ZeroDivisionError

    train(Toy(), tmp_path / "straight", seed=6)
    train(Toy(), tmp_path / "run")
    old = contents(tmp_path / "run")
    monkeypatch.setattr(loop, "LOG_EVERY", 2)
    with monkeypatch.context() as patch:
        before(patch, loop.checkpoint, "save_resume_state", stop)
        with pytest.raises(ZeroDivisionError):
            train(Toy(), tmp_path / "run", seed=6)
    assert contents(tmp_path / "run") == old
    with monkeypatch.context() as patch:
        before(patch, Toy, "save_best", stop)
        with pytest.raises(ZeroDivisionError):
            train(toy := Toy(), tmp_path / "run", seed=6)
    changed = {name for name, content in contents(tmp_path / "run").items() if old[name] != content}
    assert changed == {"resume.pt"}
    assert toy.kept == []
    # What the new run had to log is saved with it, and so is what it had to keep.
    assert train(Toy(), tmp_path / "run", seed=6, resume=True).kept == [9.0, 8.0, 7.0, 6.0]
    rows = log_rows(tmp_path / "run")
    assert [row["step"] for row in rows] == [e * STEPS + i for e in range(4) for i in (2, 4, 6)]
    assert [row["error/train"] for row in rows[2::3]] == [row["error/train"] for row in log_rows(tmp_path / "straight")]
    assert len([*(tmp_path / "run").glob("events*")]) == 1


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(train(Toy(), None, num_epochs=2).batches) == 2 * STEPS
    assert list(tmp_path.iterdir()) == []


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def replaced(make: Callable[[Path], object]) -> Callable[[Path, Patch], object]:
    return lambda folder, patch: [(folder / "metrics.jsonl").unlink(), make(folder / "metrics.jsonl")]


SPOILERS: dict[str, Callable[[Path, Patch], object]] = {
    "events": lambda folder, patch: patch.setattr("vqvae.training.logs.RecordWriter.write", full),
    "picture": lambda folder, patch: patch.setattr(Toy, "show", full),
    "pipe": replaced(os.mkfifo),
    "folder": replaced(Path.mkdir),
    "device": replaced(lambda path: path.symlink_to("/dev/full")),
    "vanished": replaced(lambda path: None),
}


@pytest.mark.parametrize(("spoiler", "call"), [(s, n) for s in SPOILERS for n in (1, 3) if (s, n) != ("vanished", 1)])
def test_what_cannot_be_logged_ends_in_a_sentence_and_the_last_save_is_intact(
    tmp_path: Path, monkeypatch: Patch, spoiler: str, call: int
) -> None:
    straight = train(Toy(), tmp_path / "straight", num_epochs=2)
    folder, path = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    train(Toy(), folder, num_epochs=1)
    monkeypatch.setattr(loop, "LOG_EVERY", 2)
    with monkeypatch.context() as patch:
        before(patch, Toy, "loss", lambda n: n == call and SPOILERS[spoiler](folder, patch))
        with pytest.raises(InputError) as told:
            train(Toy(), folder, num_epochs=2, resume=True)
    saved = f"the last good save, of step {12 if spoiler == 'picture' else 6}, is {folder / 'resume.pt'}"
    assert str(told.value).startswith(f"expected to write to {folder}")
    assert str(told.value).endswith(f"; {saved}; once that is mended, go on with `resume=True`")
    if spoiler in ("pipe", "folder", "device"):
        path.rmdir() if path.is_dir() else path.unlink()
    resumed = train(Toy(), folder, num_epochs=2, resume=True)
    assert all(map(torch.equal, resumed.model.parameters(), straight.model.parameters()))
