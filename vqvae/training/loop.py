"""The training loop of every network here. It knows neither codes nor pixels.

A task says what is trained: a model, its data, its loss, its evaluation and what to show. A run says where and how:
a folder, a seed, and whether to resume.

Everything random in a step is a function of (seed, epoch, step), and dropout also of the process's rank. The batch
order comes from a generator of its own. The global generator (dropout, label dropout, codebook restarts) is seeded anew
before every step. So resuming needs the step count, the weights, the optimiser's state and the averages of the epoch so
far, and nothing else.

Within an epoch the order is: train, evaluate, save, and only then log, print and draw. What was computed is on disk
before anything that could fail for the sake of showing it.

Under torchrun every process holds all the data and takes its share of each batch (vqvae/distributed.py).
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from signal import SIGTERM
from typing import Any

import torch
from torch import Tensor, nn

from vqvae.compute import derive_seed, multiplies_bfloat16, seed_globally
from vqvae.console import progress, say
from vqvae.distributed import any_rank, barrier, batch_shard, is_main, rank, sum_gradients
from vqvae.errors import InputError, Interrupted
from vqvae.storage import checkpoint
from vqvae.training.averages import MetricAverager
from vqvae.training.logs import RunLog
from vqvae.training.settings import Training, learning_rate, make_optimizer
from vqvae.training.signals import StopRequest, catch_signals

LOG_EVERY = 50  # steps between readings of the losses; each reading waits for the device
SAVE_EVERY_S = 60.0  # the most work that a kill may cost


class Task:
    """What is trained."""

    model: nn.Module  # everything that the optimiser changes, on the device where the data is
    data: tuple[Tensor, ...]  # tensors of one length; a batch is the same rows of each
    unit: str  # what a sample is: "images" or "maps"; the log names the speed by it
    best_by: str  # the validation figure whose lowest value is the best

    def prepare(self, *batch: Tensor) -> tuple[Tensor, ...]:
        """What happens to a whole batch before the processes take their shares of it."""
        return batch

    def loss(self, *batch: Tensor) -> dict[str, Tensor]:
        """Named scalars, each a mean over the batch. The first is minimised."""
        raise NotImplementedError

    def evaluate(self) -> dict[str, float]:
        """Figures of the validation split."""
        raise NotImplementedError

    def save_best(self, figures: dict[str, float]) -> None:
        """Keep the weights. Called after every epoch that is the best so far, with its figures."""

    def show(self, log: RunLog, epoch: int, step: int) -> None:
        """Log pictures. Called with the numbers of finished epochs and steps, when everything is saved."""


@dataclass(frozen=True)
class Run:
    """Where and how a task is trained."""

    folder: Path  # gets `resume.pt`, TensorBoard's events and `metrics.jsonl`
    seed: int
    settings: Mapping[str, Any]  # all that the result depends on; a resumed run must have the same, but for num_epochs
    resume: bool = False  # go on from `resume.pt`; the result equals that of a run never stopped


def fit(task: Task, training: Training, run: Run) -> None:
    """Train, and evaluate after every epoch. The run is saved after every epoch, every minute, and when a signal comes.

    Raises:
        Interrupted: SIGINT or SIGTERM came. All that was done is saved.
        InputError: there is nothing to resume, or it has other settings; the folder can't be written; or a loss is
            not finite.
    """
    _Loop(task, training, run).train()


class _Loop:
    def __init__(self, task: Task, training: Training, run: Run) -> None:
        self.task, self.training, self.run = task, training, run
        self.optimizer = make_optimizer(task.model, training)
        self.num_samples, self.device = len(task.data[0]), task.data[0].device
        self.low_precision = training.mixed_precision and multiplies_bfloat16(self.device)
        self.epoch_steps = math.ceil(self.num_samples / training.batch_size)
        self.total_steps = self.epoch_steps * training.num_epochs
        self.resume_file = run.folder / "resume.pt"
        self.step, self.best, self.averager = 0, math.inf, MetricAverager()
        self.saved_report = self.load() if run.resume else {}
        self.last_losses: dict[str, float] = {}
        self.saved_step, self.saved_s = self.step, time.monotonic()
        self.log = RunLog(run.folder, self.step)
        self.bar = progress(self.total_steps, "step", initial=self.step)

    def train(self) -> None:
        with self.log, self.bar, catch_signals() as request:
            self.publish(self.saved_report)  # the log has dropped it, or the run was killed before it was logged
            for epoch in range(self.step // self.epoch_steps, self.training.num_epochs):
                self.bar.set_description(f"epoch {epoch + 1}/{self.training.num_epochs}", refresh=False)
                first_step, started_s = self.step, time.perf_counter()
                self.train_epoch(epoch, request)
                fraction = (self.step - first_step) / self.epoch_steps
                samples_per_s = fraction * self.num_samples / (time.perf_counter() - started_s)
                self.finish_epoch(epoch, samples_per_s)
                (stop,) = any_rank(request.signal is not None)
                if stop and epoch + 1 < self.training.num_epochs:
                    raise Interrupted(request.signal or SIGTERM, self.step)
        barrier()  # the best weights are on disk

    def train_epoch(self, epoch: int, request: StopRequest) -> None:
        """Take the epoch's remaining steps. Between them: read the losses, save, then log."""
        self.task.model.train()
        generator = torch.Generator().manual_seed(derive_seed(self.run.seed, "order", epoch))
        order = torch.randperm(self.num_samples, generator=generator).to(self.device)
        end = (epoch + 1) * self.epoch_steps
        while self.step < end:
            self.take_step(order)
            self.bar.update()
            if self.step == end:
                return
            stop, save_due = any_rank(request.signal is not None, time.monotonic() - self.saved_s > SAVE_EVERY_S)
            report = {}
            if self.step % LOG_EVERY == 0:
                losses = self.read_losses()
                report = {f"{name}/train_step": value for name, value in losses.items()} | {"lr": self.last_rate()}
            if stop or save_due:
                self.read_losses()
                self.save(report)
            if report:
                self.bar.set_postfix_str(f"loss {next(iter(report.values())):.4f}", refresh=False)
            self.publish(report)
            if stop:
                raise Interrupted(request.signal or SIGTERM, self.step)

    def take_step(self, order: Tensor) -> None:
        """Take one step on the next batch of the epoch's order."""
        i, batch_size = self.step, self.training.batch_size
        seed_globally(derive_seed(self.run.seed, "step", i))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.training, i / self.total_steps)
        start = (i % self.epoch_steps) * batch_size
        rows = order[start : start + batch_size]
        batch = self.task.prepare(*(tensor[rows] for tensor in self.task.data))
        if rank() > 0:
            seed_globally(derive_seed(self.run.seed, "step", i, rank()))  # each process has dropout of its own
        share = batch_shard(len(rows))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.low_precision):
            losses = self.task.loss(*(tensor[share] for tensor in batch))
        self.optimizer.zero_grad()
        next(iter(losses.values())).backward()
        num = share.stop - share.start
        sum_gradients(self.task.model, num / len(rows))
        self.optimizer.step()
        self.averager.add(losses, num)
        self.step += 1

    def finish_epoch(self, epoch: int, samples_per_s: float) -> None:
        """Evaluate, save, and only then log, print and draw."""
        self.read_losses()
        figures, best_by = self.task.evaluate(), self.task.best_by
        if not math.isfinite(figures[best_by]):
            raise self.diverged(f"{best_by} on validation, found {figures[best_by]} after epoch {epoch + 1}")
        self.require_finite_weights()
        report = {f"{name}/train": value for name, value in self.averager.averages().items()}
        report |= {f"{name}/validation": value for name, value in figures.items()}
        report |= {"lr": self.last_rate(), f"{self.task.unit}_per_s": samples_per_s, "epoch": epoch + 1}
        if figures[best_by] < self.best:
            self.best = figures[best_by]
            self.task.save_best(figures)
        self.averager = MetricAverager()
        self.save(report)
        line = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self.publish(report, f"epoch {epoch + 1}: {line}")

    def publish(self, report: dict[str, float], line: str = "") -> None:
        """Log the scalars of the current step, print a line, and draw at the end of an epoch. All is saved by then."""
        if report:
            self.log.scalars(report, self.step)
        if line:
            say(line)
        if "epoch" in report:
            self.task.show(self.log, int(report["epoch"]), self.step)

    def last_rate(self) -> float:
        """The learning rate of the last step."""
        return learning_rate(self.training, (self.step - 1) / self.total_steps)

    def read_losses(self) -> dict[str, float]:
        """Read the losses of the steps since the last reading, and return the last step's.

        Raises:
            InputError: a loss is not finite.
        """
        rows = self.averager.flush()
        for step, row in enumerate(rows, start=self.step - len(rows) + 1):
            if not all(map(math.isfinite, row.values())):
                found, before = (
                    ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
                    for losses in (row, self.last_losses)
                )
                raise self.diverged(f"losses, found {found} at step {step}, after {before or 'none'}")
            self.last_losses = row
        return self.last_losses

    def save(self, report: dict[str, float]) -> None:
        """Save all that resuming needs.

        Args:
            report: what is published for this step after the save. It is saved too, so a kill in between loses none.
        """
        self.require_finite_weights()
        self.log.flush()  # the log may be ahead of the saved weights, which resuming mends, but never behind them
        state = {
            "model": self.task.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "averages": self.averager.gather(),
            "best": self.best,
            "report": report,
            "settings": dict(self.run.settings),
        }
        checkpoint.save_resume_state(self.resume_file, state)
        self.saved_step, self.saved_s = self.step, time.monotonic()

    def require_finite_weights(self) -> None:
        if not all(bool(tensor.isfinite().all()) for tensor in self.task.model.state_dict().values()):
            raise self.diverged(f"weights, found others after step {self.step}")

    def load(self) -> dict[str, float]:
        """Take over what `save` saved, and return its report."""
        file = self.resume_file
        state = checkpoint.load_resume_state(file)
        if not {"model", "optimizer", "step", "averages", "best", "report", "settings"} <= state.keys():
            raise InputError(f"expected resume state in {file}, found other data; start anew with `overwrite=True`")
        _require_same(state["settings"], self.run.settings)
        try:
            self.task.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
            raise InputError(
                f"expected this run's state in {file}, found another's; start anew with `overwrite=True`"
            ) from None
        self.step, self.best = state["step"], state["best"]
        self.averager = MetricAverager(state["averages"] if is_main() else None)
        return state["report"]

    def diverged(self, what: str) -> InputError:
        saved = "nothing is saved yet"
        if self.saved_step > 0:
            saved = f"the last good save, of step {self.saved_step}, is {self.resume_file}"
        return InputError(f"expected finite {what}; {saved}; start anew with a smaller `lr`")


def _require_same(saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    for name in sorted({*saved, *given} - {"num_epochs"}):
        if saved.get(name) != given.get(name):
            raise InputError(
                f"expected the settings that the run was started with, {name} = {saved.get(name)!r}, found "
                f"{name} = {given.get(name)!r}; resume with the first, or start anew with `overwrite=True`"
            )
