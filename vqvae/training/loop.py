"""The training loop of every network here. It knows neither codes nor pixels.

A task says what is trained: a model, data, a loss, an evaluation and what to show. A run says where and how: a folder,
a seed, and whether to resume. Under torchrun every process has all the data and takes its share of each batch.

Everything random in a step is a function of (seed, epoch, step), and dropout also of the process's rank. The batch
order comes from a generator of its own. The global one (dropout, label dropout, codebook restarts) is seeded anew
before every step. So resuming needs the step count, weights, optimiser, averages so far and number of threads.

Within an epoch the order is: train, evaluate, save the state, save the weights if they are the best, and only then log,
print and draw. What was computed is on disk before anything that could fail for the sake of showing it. A run that was
killed between the two saves makes up for the second when it is resumed. Before its first save a run writes nothing.
"""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import SIGTERM
from typing import Any

import torch
from torch import Tensor, nn

from vqvae.compute import derive_seed, memory_for, multiplies_bfloat16, seed_globally, to_device
from vqvae.console import progress, say
from vqvae.distributed import any_rank, backward, barrier, batch_shard, data_parallel, is_main, rank
from vqvae.errors import InputError, Interrupted
from vqvae.storage import checkpoint
from vqvae.storage.tensors import expect_random_reads
from vqvae.training.averages import MetricAverager
from vqvae.training.logs import RunLog
from vqvae.training.settings import Training, learning_rate, make_optimizer
from vqvae.training.signals import StopRequest, catch_signals
from vqvae.training.state import load_state, require_same_losses

LOG_EVERY = 50  # steps between readings of the losses; each reading waits for the device
SAVE_EVERY_S = 60.0  # the most work that a kill may cost


class Task:
    """What is trained."""

    model: nn.Module  # everything that the optimiser changes
    data: tuple[Tensor, ...]  # tensors of one length on the CPU, perhaps mapped from disk; a batch is rows of each
    unit: str  # what a sample is: "images" or "maps"; the log names the speed by it
    best_by: str  # the validation figure whose lowest value is the best

    def before_step(self, progress: float) -> None:
        """Called before each step, with the share of the run that is done, in 0..1."""

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
        """Keep the weights. Called after every epoch that is the best so far, and once more if resumed right there."""

    def show(self, log: RunLog, epoch: int, step: int) -> None:
        """Log pictures. Called with the numbers of finished epochs and steps, when everything is saved."""


@dataclass(frozen=True)
class Run:
    """Where and how a task is trained."""

    folder: Path | None  # gets `resume.pt`, TensorBoard's events and `metrics.jsonl`; None: nothing is saved or logged
    seed: int
    settings: Mapping[str, Any]  # all that the result depends on; a resumed run must have the same, but for num_epochs
    resume: bool = False  # go on from `resume.pt`; the result equals that of a run never stopped


def fit(task: Task, training: Training, run: Run) -> None:
    """Train, and evaluate after every epoch. The run is saved after every epoch, every minute, and when a signal comes.

    Raises:
        Interrupted: SIGINT or SIGTERM came. All that was done is saved.
        InputError: there is nothing to resume, or it has other settings; the folder can't be written; memory runs out;
            or a loss is not finite. The last good save is intact.
    """
    with memory_for("batch_size"):
        _Loop(task, training, run).train()


class _Loop:
    def __init__(self, task: Task, training: Training, run: Run) -> None:
        self.task, self.training, self.run = task, training, run
        self.optimizer = make_optimizer(task.model, training)
        self.num_samples, self.device = len(task.data[0]), next(task.model.parameters()).device
        self.low_precision = training.mixed_precision and multiplies_bfloat16(self.device)
        self.epoch_steps = math.ceil(self.num_samples / training.batch_size)
        self.total_steps = self.epoch_steps * training.num_epochs
        self.resume_file = (run.folder or Path()) / "resume.pt"
        self.step, self.best, self.averager = 0, math.inf, MetricAverager()
        self.figures: dict[str, float] = {}  # of the last epoch, if it is the best
        self.log: RunLog | None = None  # opened after the first save
        self.closing = ExitStack()  # closes it
        self.log_from = 0  # what the log on disk has of this step and later is dropped; 0: all of it
        self.unlogged: list[tuple[int, dict[str, float]]] = []  # steps and their scalars, saved before they are logged
        if run.resume:
            state = load_state(self.resume_file, run.settings, training, task.model, self.optimizer, self.num_samples)
            self.step, self.best, self.figures = state["step"], state["best"], state["figures"]
            self.log_from, self.unlogged = state["log_from"], state["unlogged"]
            self.averager = MetricAverager(state["averages"] if is_main() else None)
        self.loss = data_parallel(task.model, task.loss)
        self.last_losses: dict[str, float] = {}
        self.saved_step, self.saved_s = self.step, time.monotonic()
        for tensor in task.data:
            expect_random_reads(tensor)
        self.bar = progress(self.total_steps, "step", initial=self.step)

    def train(self) -> None:
        with self.closing, self.bar, catch_signals() as request:
            self.make_up()
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

    def make_up(self) -> None:
        """Do what was still to be done in the step that the run goes on from, if it ended an epoch."""
        if self.step > 0 and self.step % self.epoch_steps == 0:
            self.save_best()
            self.publish()
        if self.step == self.total_steps:
            say(f"nothing is left to do: all {self.training.num_epochs} epochs are done")

    def train_epoch(self, epoch: int, request: StopRequest) -> None:
        """Take the epoch's remaining steps. Between them: read the losses, save, then log."""
        self.task.model.train()
        generator = torch.Generator().manual_seed(derive_seed(self.run.seed, "order", epoch))
        order = torch.randperm(self.num_samples, generator=generator)
        end = (epoch + 1) * self.epoch_steps
        while self.step < end:
            self.take_step(order)
            self.bar.update()
            if self.step == end:
                return
            stop, save_due = any_rank(request.signal is not None, time.monotonic() - self.saved_s > SAVE_EVERY_S)
            if self.step % LOG_EVERY == 0:
                losses = self.read_losses()
                scalars = {f"{name}/train_step": value for name, value in losses.items()} | {"lr": self.last_rate()}
                self.unlogged.append((self.step, scalars))
                self.bar.set_postfix_str(f"loss {next(iter(scalars.values())):.4f}", refresh=False)
            if stop or save_due:
                self.read_losses()
                self.save()
            self.publish()
            if stop:
                raise Interrupted(request.signal or SIGTERM, self.step)

    def take_step(self, order: Tensor) -> None:
        """Take one step on the next batch of the epoch's order."""
        i, batch_size, done = self.step, self.training.batch_size, self.step / self.total_steps
        seed_globally(derive_seed(self.run.seed, "step", i))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.training, done)
        self.task.before_step(done)
        rows = order[i % self.epoch_steps * batch_size :][:batch_size]
        batch = self.task.prepare(*(to_device(tensor[rows], self.device) for tensor in self.task.data))
        if rank() > 0:
            seed_globally(derive_seed(self.run.seed, "step", i, rank()))  # each process has dropout of its own
        share = batch_shard(len(rows))
        num = share.stop - share.start
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.low_precision):
            losses = self.loss(*(tensor[share] for tensor in batch))
        require_same_losses(self.averager.state, losses, self.resume_file)
        self.optimizer.zero_grad()
        backward(next(iter(losses.values())), self.task.model, num / len(rows))
        if num > 0:  # an empty share has no loss
            self.averager.add(losses, num)
        self.optimizer.step()
        self.step += 1

    def finish_epoch(self, epoch: int, samples_per_s: float) -> None:
        """Evaluate, save, and only then log, print and draw."""
        self.read_losses()
        figures, best_by = self.task.evaluate(), self.task.best_by
        for name in (best_by, *figures):
            if not math.isfinite(figures[name]):
                raise self.diverged(f"{name} on validation, found {figures[name]} after epoch {epoch + 1}")
        self.require_finite_weights()
        report = {f"{name}/train": value for name, value in self.averager.averages().items()}
        report |= {f"{name}/validation": value for name, value in figures.items()}
        report |= {"lr": self.last_rate(), f"{self.task.unit}_per_s": samples_per_s, "epoch": epoch + 1}
        self.unlogged.append((self.step, report))
        self.figures = figures if figures[best_by] < self.best else {}
        self.best = min(self.best, figures[best_by])
        self.averager = MetricAverager()
        self.save()
        self.save_best()
        self.publish(f"epoch {epoch + 1}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))

    def publish(self, line: str = "") -> None:
        """Log what waits for it, print a line, and draw at the end of an epoch. Before the first save all waits."""
        if self.saved_step == 0:
            return
        with self.writing():
            self.log = self.log or self.closing.enter_context(RunLog(self.run.folder, self.log_from, self.run.settings))
            for step, scalars in self.unlogged:
                self.log.scalars(scalars, step)
        if line:
            say(line)
        if any("epoch" in scalars for _, scalars in self.unlogged):
            with self.writing():
                self.task.show(self.log, self.step // self.epoch_steps, self.step)
        self.unlogged.clear()

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

    def save(self) -> None:
        """Save all that resuming needs."""
        self.require_finite_weights()
        if self.log is not None:
            self.log_from = self.unlogged[0][0] if self.unlogged else self.step
        state = {
            "model": self.task.model.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],
            "step": self.step,
            "averages": self.averager.gather(),
            "best": self.best,
            "figures": self.figures if self.step % self.epoch_steps == 0 else {},
            "log_from": self.log_from,
            "unlogged": self.unlogged,
            "settings": dict(self.run.settings),
            "threads": torch.get_num_threads(),
        }
        if self.run.folder is not None:
            with self.writing():
                checkpoint.save_resume_state(self.resume_file, state)
        self.saved_step, self.saved_s = self.step, time.monotonic()

    def save_best(self) -> None:
        """Save the weights, if the epoch that has just ended is the best."""
        if self.figures:
            with self.writing():
                self.task.save_best(self.figures)

    def require_finite_weights(self) -> None:
        if not all(bool(tensor.isfinite().all()) for tensor in self.task.model.state_dict().values()):
            raise self.diverged(f"weights, found others after step {self.step}")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Inside, what cannot be written ends in one sentence that names the last good save."""
        try:
            yield
        except (InputError, OSError) as error:
            found = str(error)
            if not isinstance(error, InputError):
                found = f"expected to write to {error.filename or self.run.folder}: {error.strerror or error}"
            again = "; once that is mended, go on with `resume=True`" if self.is_saved() else ""
            raise InputError(f"{found}; {self.last_save()}{again}") from None

    def diverged(self, what: str) -> InputError:
        return InputError(f"expected finite {what}; {self.last_save()}; start anew with a smaller `lr`")

    def last_save(self) -> str:
        if not self.is_saved():
            return "nothing is saved yet"
        return f"the last good save, of step {self.saved_step}, is {self.resume_file}"

    def is_saved(self) -> bool:
        return self.run.folder is not None and self.saved_step > 0 and self.resume_file.exists()
