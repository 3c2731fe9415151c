"""The one training loop of both stages; it knows nothing of codes or pixels.

Everything random in a step is a pure function of (seed, epoch, step): the batch order comes from a
generator of its own, and the global generator (dropout, label dropout, codebook restarts) is seeded
anew before every step. So resuming needs a step count, weights and optimiser state, nothing else.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vqvae.common import checkpoint
from vqvae.common.config import require_range
from vqvae.common.errors import UserError
from vqvae.common.logs import RunLog

LOG_EVERY = 50  # steps between readings of the losses; each reading waits for the device
WARMUP = 0.05  # share of a one-cycle run in which the rate rises


@dataclass(frozen=True)
class Training:
    """How a stage is optimised; the defaults are the documented recipe's."""

    batch_size: int = 128
    num_epochs: int = 10
    lr: float = 2e-4
    schedule: Literal["constant", "one-cycle"] = "constant"
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        require_range("batch_size", self.batch_size, 1, 65536)
        require_range("num_epochs", self.num_epochs, 1, 100_000)
        require_range("lr", self.lr, 1e-8, 1)
        require_range("weight_decay", self.weight_decay, 0, 1)


def pick_device(name: str) -> torch.device:
    """`auto` (CUDA where there is one), `cpu` or `cuda`.

    Raises:
        UserError: another name, or CUDA where there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise UserError(f"expected --device auto, cpu or cuda, found {name!r}; type one of the three")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("expected a CUDA device for --device cuda, found none; type --device cpu, or --device auto")
    return torch.device(name)


def derive_seed(*keys: int | str) -> int:
    """An independent seed for each combination of keys."""
    digest = hashlib.sha256("/".join(map(str, keys)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; the mode of every submodule is restored after."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def in_batches(num: int, batch_size: int) -> Iterator[slice]:
    """Slices that cover range(num) in order."""
    for start in range(0, num, batch_size):
        yield slice(start, min(start + batch_size, num))


class Means:
    """Averages of named scalars weighted by the number of samples, kept on their device until read."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.num = 0

    def add(self, values: Mapping[str, Tensor], num: int) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().double() * num
        self.num += num

    def read(self) -> dict[str, float]:
        return {name: total.item() / self.num for name, total in self.sums.items()}


def learning_rate(training: Training, progress: float) -> float:
    """The rate at `progress` in 0..1 of the run: constant, or a linear rise and then a half cosine to 0."""
    if training.schedule == "constant":
        return training.lr
    if progress < WARMUP:
        return training.lr * progress / WARMUP
    return training.lr * 0.5 * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP)))


def make_optimizer(model: nn.Module, training: Training) -> torch.optim.Optimizer:
    """AdamW; weight decay on the weights of convolutions and linear layers and on nothing else."""
    decayed = {id(module.weight) for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    groups = [
        {
            "params": [p for p in model.parameters() if id(p) in decayed],
            "weight_decay": training.weight_decay,
        },
        {"params": [p for p in model.parameters() if id(p) not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=training.lr, fused=True)


def fit(
    model: nn.Module,
    data: tuple[Tensor, ...],
    loss_fn: Callable[..., dict[str, Tensor]],
    evaluate: Callable[[], dict[str, float]],
    save_best: Callable[[dict[str, float]], Any],
    *,
    best_by: str,
    training: Training,
    seed: int,
    folder: Path,
    unit: str,
    settings: Mapping[str, Any],
    after_epoch: Callable[[RunLog, int, int], None],
    resume: bool = False,
) -> None:
    """Train, validating and saving after every epoch.

    Args:
        model: on its device, where the data is too.
        data: tensors of one length; a batch is the same rows of each.
        loss_fn: batch tensors to named scalar means over the batch; the first is minimised.
        evaluate: figures of the validation split.
        best_by: the figure whose lowest value is the best.
        save_best: called with the figures of every epoch that is the best so far.
        folder: gets `resume.pt`, TensorBoard's events and `metrics.jsonl`.
        unit: what a sample is, for the speed shown and logged: "images", "maps".
        settings: all that the result depends on besides the number of epochs; a resumed run must have the same.
        resume: go on from `resume.pt`; the result equals that of a run never stopped.
        after_epoch: called with the log, the number of finished epochs and of finished steps, for pictures.
    Raises:
        UserError: resuming where there is nothing to resume or under other settings, or a folder that
            can't be written.
    """
    optimizer = make_optimizer(model, training)
    resume_file = folder / "resume.pt"
    first_epoch, best = 0, math.inf
    if resume:
        state = checkpoint.load_resume_state(resume_file)
        if not {"model", "optimizer", "epoch", "best", "settings"} <= state.keys():
            raise UserError(f"expected resume state in {resume_file}, found other data; start anew with --overwrite")
        _require_same(state["settings"], settings)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first_epoch, best = state["epoch"], state["best"]
    num = len(data[0])
    steps = math.ceil(num / training.batch_size)
    total_steps = steps * training.num_epochs
    log = RunLog(folder, first_epoch * steps)
    bar = tqdm(total=total_steps, initial=first_epoch * steps, unit="step", dynamic_ncols=True)
    with log, bar:
        for epoch in range(first_epoch, training.num_epochs):
            bar.set_description(f"epoch {epoch + 1}/{training.num_epochs}")
            model.train()
            generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
            order = torch.randperm(num, generator=generator).to(data[0].device)
            means, started_s = Means(), time.perf_counter()
            for i, rows in enumerate(in_batches(num, training.batch_size), start=epoch * steps):
                torch.manual_seed(derive_seed(seed, "step", i))
                rate = learning_rate(training, i / total_steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                batch = [tensor[order[rows]] for tensor in data]
                losses = loss_fn(*batch)
                optimizer.zero_grad()
                loss = next(iter(losses.values()))
                loss.backward()
                optimizer.step()
                means.add(losses, len(batch[0]))
                bar.update()
                if (i + 1) % LOG_EVERY == 0 and i + 1 < (epoch + 1) * steps:
                    bar.set_postfix_str(f"loss {loss.item():.4f}")
                    log.scalars({f"{k}/train_step": v.item() for k, v in losses.items()} | {"lr": rate}, i + 1)
            step = (epoch + 1) * steps
            per_s = num / (time.perf_counter() - started_s)
            figures = evaluate()
            if not math.isfinite(figures[best_by]):
                raise UserError(
                    f"expected a finite {best_by}, found {figures[best_by]} after epoch {epoch + 1}: the run diverged; "
                    f"start anew with a smaller --lr"
                )
            log.scalars(
                {f"{k}/train": v for k, v in means.read().items()}
                | {f"{k}/validation": v for k, v in figures.items()}
                | {"lr": rate, f"{unit}_per_s": per_s, "epoch": epoch + 1},
                step,
            )
            bar.write(f"epoch {epoch + 1}: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()))
            after_epoch(log, epoch + 1, step)
            if figures[best_by] < best:
                best = figures[best_by]
                save_best(figures)
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "epoch": epoch + 1,
                "best": best,
                "settings": dict(settings),
            }
            checkpoint.save_resume_state(resume_file, state)


def _require_same(saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    for name in sorted({*saved, *given} - {"num_epochs"}):
        if saved.get(name) != given.get(name):
            raise UserError(
                f"expected the settings that the run was started with, {name} = {saved.get(name)!r}, found "
                f"{name} = {given.get(name)!r}; type the first, or start anew with --overwrite"
            )
