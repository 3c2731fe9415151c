"""The one training loop of both stages; it knows nothing of codes or pixels.

Everything random in a step is a pure function of (seed, epoch, step): the batch order comes from a generator of its
own, and the global generator (dropout, label dropout, codebook restarts) is seeded anew before every step. So resuming
needs a step count, weights, optimiser state and the epoch's averages so far, nothing else.

Under torchrun every process holds all the data and takes its share of each batch (vqvae/common/distributed.py).
"""

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import SIGTERM
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vqvae.common import checkpoint
from vqvae.common.config import require_range
from vqvae.common.distributed import agreed, gathered, is_main, rank, share_of_batch, sum_gradients, wait_for_all
from vqvae.common.errors import Interrupted, UserError
from vqvae.common.interrupts import listening
from vqvae.common.logs import RunLog

LOG_EVERY = 50  # steps between readings of the losses; each reading waits for the device
SAVE_EVERY_S = 60.0  # what a kill may cost


@dataclass(frozen=True)
class Training:
    """How a stage is optimised; the defaults are the documented recipe's."""

    batch_size: int = 128
    num_epochs: int = 10
    lr: float = 2e-4
    schedule: Literal["constant", "one-cycle"] = "constant"
    warmup: float = 0.05  # share of a one-cycle run in which the rate rises
    weight_decay: float = 0.0
    mixed_precision: bool = False  # products in bfloat16, where the device multiplies it faster than float32

    def __post_init__(self) -> None:
        require_range("batch_size", self.batch_size, 1, 65536)
        require_range("num_epochs", self.num_epochs, 1, 100_000)
        require_range("lr", self.lr, 1e-8, 1)
        require_range("warmup", self.warmup, 0, 0.9)
        require_range("weight_decay", self.weight_decay, 0, 1)


def pick_device(name: str) -> torch.device:
    """`auto` (CUDA where there is one), `cpu` or `cuda`, of which each process of a machine takes its own.

    Raises:
        UserError: another name, or fewer CUDA devices than processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise UserError(f"expected --device auto, cpu or cuda, found {name!r}; type one of the three")
    if name == "cpu":
        return torch.device(name)
    if not torch.cuda.is_available():
        raise UserError("expected a CUDA device for --device cuda, found none; type --device cpu, or --device auto")
    device, num = torch.device(name, int(os.environ.get("LOCAL_RANK", 0))), torch.cuda.device_count()
    if device.index >= num:
        raise UserError(f"expected a CUDA device for each process, found {num}; type --nproc-per-node {num}")
    torch.cuda.set_device(device)  # which seeding and barriers go by
    return device


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for products of bfloat16; without them they are slower than float32's."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return processor_has("avx512_bf16", "amx_bf16")


def processor_has(*instructions: str) -> bool:
    """Whether the CPU has any of these kinds of instructions."""
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch can't tell
    return any(capabilities.get(name, False) for name in instructions)


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
    """Averages of named scalars over samples. Values stay on their device until they are read.

    The sums are exact (math.fsum), so that they are the same however the samples were split among processes.
    """

    def __init__(self, state: Mapping[str, list[float]] | None = None) -> None:
        self.state = {name: list(values) for name, values in (state or {}).items()}  # and how many samples, as "num"
        self.unread: list[dict[str, Tensor]] = []

    def add(self, values: Mapping[str, Tensor], num: int) -> None:
        """Values that are means over `num` samples."""
        self.unread.append({name: value.detach() for name, value in values.items()})
        self.state.setdefault("num", []).append(num)

    def catch_up(self) -> list[dict[str, float]]:
        """Read what was added since the last time, which waits for the device."""
        if not self.unread:
            return []
        columns = {name: torch.stack([row[name] for row in self.unread]).tolist() for name in self.unread[0]}
        for name, column in columns.items():
            self.state.setdefault(name, []).extend(column)
        rows = [{name: column[i] for name, column in columns.items()} for i in range(len(self.unread))]
        self.unread.clear()
        return rows

    def of_all(self) -> dict[str, list[float]]:
        """The state of all processes' together; each of them must ask."""
        self.catch_up()
        states = gathered(self.state)
        return {name: [value for state in states for value in state.get(name, [])] for name in states[0]}

    def read(self) -> dict[str, float]:
        """The averages over all processes' samples; each of them must ask."""
        values = self.of_all()
        nums = values.pop("num")
        return {
            name: math.fsum(value * num for value, num in zip(column, nums, strict=True)) / sum(nums)
            for name, column in values.items()
        }


def learning_rate(training: Training, progress: float) -> float:
    """The rate at `progress` in 0..1 of the run: constant, or a linear rise and then a half cosine to 0."""
    if training.schedule == "constant":
        return training.lr
    if progress < training.warmup:
        return training.lr * progress / training.warmup
    return training.lr * 0.5 * (1 + math.cos(math.pi * (progress - training.warmup) / (1 - training.warmup)))


def make_optimizer(model: nn.Module, training: Training) -> torch.optim.Optimizer:
    """AdamW; weight decay on the weights of convolutions and linear layers and on nothing else."""
    weights = {id(module.weight) for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    decayed = weights if training.weight_decay > 0 else set()  # one group is faster than two
    groups = [
        {
            "params": [p for p in model.parameters() if id(p) in decayed],
            "weight_decay": training.weight_decay,
        },
        {"params": [p for p in model.parameters() if id(p) not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=training.lr, fused=True)


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
    prepare: Callable[..., tuple[Tensor, ...]] = lambda *batch: batch,
    resume: bool = False,
) -> None:
    """Train, validating after every epoch; saving then, once a minute and when a signal asks for the end.

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
        after_epoch: called with the log, the number of finished epochs and of finished steps, for pictures.
        prepare: what happens to a whole batch before it is shared out among processes.
        resume: go on from `resume.pt`; the result equals that of a run never stopped.
    Raises:
        Interrupted: SIGINT or SIGTERM came; all that was done is saved.
        UserError: resuming where there is nothing to resume or under other settings, a folder that can't be written,
            or a loss that is not finite.
    """
    optimizer = make_optimizer(model, training)
    resume_file = folder / "resume.pt"
    first_step, best, means = 0, math.inf, Means()
    if resume:
        state = checkpoint.load_resume_state(resume_file)
        if not {"model", "optimizer", "step", "means", "best", "settings"} <= state.keys():
            raise UserError(f"expected resume state in {resume_file}, found other data; start anew with --overwrite")
        _require_same(state["settings"], settings)
        try:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
            raise UserError(
                f"expected this run's state in {resume_file}, found another's; start anew with --overwrite"
            ) from None
        first_step, best = state["step"], state["best"]
        means = Means(state["means"] if is_main() else None)
    num, device = len(data[0]), data[0].device
    low_precision = training.mixed_precision and multiplies_bfloat16(device)
    steps = math.ceil(num / training.batch_size)  # of an epoch
    total_steps = steps * training.num_epochs
    log = RunLog(folder, first_step)
    bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, disable=not is_main())
    last: dict[str, float] = {}  # the losses that were read last
    saved_step, saved_s = first_step, time.monotonic()

    def take_step(i: int, order: Tensor) -> tuple[dict[str, Tensor], int]:
        """Step i of the run; the losses of this process's part of the batch, and how many samples that has."""
        _seed_globally(derive_seed(seed, "step", i))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(training, i / total_steps)
        rows = order[i % steps * training.batch_size :][: training.batch_size]
        batch = prepare(*(tensor[rows] for tensor in data))
        if rank() > 0:
            _seed_globally(derive_seed(seed, "step", i, rank()))  # a dropout of its own
        mine = share_of_batch(len(rows))
        with torch.autocast(device.type, torch.bfloat16, enabled=low_precision):
            losses = loss_fn(*(tensor[mine] for tensor in batch))
        optimizer.zero_grad()
        next(iter(losses.values())).backward()
        num_mine = mine.stop - mine.start
        sum_gradients(model, num_mine / len(rows))
        optimizer.step()
        return losses, num_mine

    def catch_up(step: int) -> dict[str, float]:
        """The losses of the last of `step` steps, all read and found finite."""
        nonlocal last
        rows = means.catch_up()
        for i, row in enumerate(rows, start=step - len(rows) + 1):
            if not all(map(math.isfinite, row.values())):
                found, before = (", ".join(f"{k} {v:.4g}" for k, v in losses.items()) for losses in (row, last))
                raise diverged(f"losses, found {found} at step {i}, after {before or 'none'}")
            last = row
        return last

    def save(step: int) -> None:
        """All that resuming needs, if it is worth resuming."""
        nonlocal saved_step, saved_s
        if not all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values()):
            raise diverged(f"weights, found others after step {step}")
        log.flush()  # curves may go further than the weights, which resuming mends, but must not lag behind
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "means": means.of_all(),
            "best": best,
            "settings": dict(settings),
        }
        checkpoint.save_resume_state(resume_file, state)
        saved_step, saved_s = step, time.monotonic()

    def diverged(what: str) -> UserError:
        saved = f"the last good save, of step {saved_step}, is {resume_file}" if saved_step else "nothing is saved yet"
        return UserError(f"expected finite {what}; {saved}; start anew with a smaller --lr")

    with log, bar, listening() as request:
        for epoch in range(first_step // steps, training.num_epochs):
            bar.set_description(f"epoch {epoch + 1}/{training.num_epochs}")
            model.train()
            generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
            order = torch.randperm(num, generator=generator).to(device)
            start, end = max(first_step, epoch * steps), (epoch + 1) * steps
            started_s = time.perf_counter()
            for i in range(start, end - 1):
                means.add(*take_step(i, order))
                bar.update()
                if (i + 1) % LOG_EVERY == 0:
                    losses = catch_up(i + 1)
                    bar.set_postfix_str(f"loss {next(iter(losses.values())):.4f}")
                    rate = learning_rate(training, i / total_steps)
                    log.scalars({f"{k}/train_step": v for k, v in losses.items()} | {"lr": rate}, i + 1)
                stop, due = agreed(request.signal is not None, time.monotonic() - saved_s > SAVE_EVERY_S)
                if stop or due:
                    catch_up(i + 1)
                    save(i + 1)
                if stop:
                    raise Interrupted(request.signal or SIGTERM, i + 1)
            means.add(*take_step(end - 1, order))
            bar.update()
            catch_up(end)
            per_s = (end - start) / steps * num / (time.perf_counter() - started_s)
            figures = evaluate()
            if not math.isfinite(figures[best_by]):
                raise diverged(f"{best_by} on validation, found {figures[best_by]} after epoch {epoch + 1}")
            log.scalars(
                {f"{k}/train": v for k, v in means.read().items()}
                | {f"{k}/validation": v for k, v in figures.items()}
                | {"lr": learning_rate(training, (end - 1) / total_steps), f"{unit}_per_s": per_s, "epoch": epoch + 1},
                end,
            )
            bar.write(f"epoch {epoch + 1}: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()))
            after_epoch(log, epoch + 1, end)
            if figures[best_by] < best:
                best = figures[best_by]
                save_best(figures)
            means = Means()
            save(end)
            (stop,) = agreed(request.signal is not None)
            if stop and epoch + 1 < training.num_epochs:
                raise Interrupted(request.signal or SIGTERM, end)
    wait_for_all()  # the best weights are on disk


def _seed_globally(seed: int) -> None:
    """torch.manual_seed, which would format the call stack for every kind of device that is there but not in use."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


def _require_same(saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    for name in sorted({*saved, *given} - {"num_epochs"}):
        if saved.get(name) != given.get(name):
            raise UserError(
                f"expected the settings that the run was started with, {name} = {saved.get(name)!r}, found "
                f"{name} = {given.get(name)!r}; type the first, or start anew with --overwrite"
            )
