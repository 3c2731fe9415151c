"""Several processes that work as one, started by torchrun. With a single process nothing here does anything.

`python cli.py ...` runs one process. Under `torchrun --nproc-per-node N cli.py ...` every process runs the same
program on its share of the work. The functions here are where the processes meet, so all of them must call each
function, in the same order.
"""

import io
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vqvae.errors import InputError, Interrupted

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

T = TypeVar("T")
Losses = dict[str, Tensor]


class PeerLost(Exception):
    """Another process ended while this one waited for it."""


@contextmanager
def process_group() -> Iterator[None]:
    """Inside, torchrun's processes are connected, by gloo for tensors on the CPU and by NCCL on CUDA.

    Only the main process prints. What ends the work is raised in one process, the first that meets it. The others end
    without a word, with the same exit status.

    Raises:
        InputError: a process raised it, or one ended without a word of its own.
        Interrupted: a process raised it.
    """
    # The first optimiser would import this module later. It would then keep the group in its functions' default
    # arguments until the interpreter ends, where a worker thread of the group may abort a process that had finished.
    import torch.distributed.nn.functional
    from torch.distributed.rendezvous import rendezvous

    store: Store | None = None
    try:
        with _meeting():
            store, number, num_processes = next(rendezvous("env://"))
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=store, rank=number, world_size=num_processes)
        with _silence() if not is_main() else nullcontext():
            yield
    except (InputError, Interrupted, SystemExit) as error:
        if (status := _status(error)) in (0, None) or _is_first(store):
            raise
        raise SystemExit(status) from None
    except PeerLost as lost:
        if not _is_first(store):
            raise SystemExit(1) from None
        raise InputError(
            f"expected all processes to go on, found that one has ended ({lost}); what was saved stays, and training "
            f"goes on from there with `resume=True`"
        ) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def _meeting() -> Iterator[None]:
    """Inside, this process waits for the others.

    Raises:
        PeerLost: one of them has ended.
    """
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error).lower()):  # gloo's have no type of their own
            raise
        first_line = str(error).partition("\n")[0][:200]
        raise PeerLost(re.sub(r"\[[^]]*\] ?", "", first_line)) from None  # without places in gloo's source


@contextmanager
def _silence() -> Iterator[None]:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def _is_first(store: "Store | None") -> bool:
    """Whether this process is the first of all to ask. Where nobody can tell, it is the main one."""
    own = str(os.getpid())
    try:
        if store is not None:
            return bool(store.compare_set("first", "", own) == own.encode())
    except RuntimeError:  # the process that held the store has ended
        pass
    return os.environ.get("RANK") == "0"


def _status(error: InputError | Interrupted | SystemExit) -> int | str | None:
    """The exit status of a process that ends by an error."""
    if isinstance(error, SystemExit):
        return error.code
    return 128 + error.signal if isinstance(error, Interrupted) else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


def require_one_process(task: str) -> None:
    """Refuse to do a task with several processes.

    Raises:
        InputError: there are several.
    """
    if world_size() > 1:
        raise InputError(f"expected one process for {task}, found {world_size()}; start it with python, not torchrun")


@contextmanager
def main_first() -> Iterator[None]:
    """The main process runs the block alone, then the others run it. They find on disk what the main one wrote."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def barrier() -> None:
    """Wait until every process has come here."""
    if world_size() > 1:
        with _meeting():
            dist.barrier()


def shard(items: Iterable[T]) -> Iterator[T]:
    """This process's share of some items: one in `world_size`, starting at its own rank."""
    return islice(items, rank(), None, world_size())


def batch_shard(num: int) -> slice:
    """This process's share of a batch of `num` samples. The shares are in order and nearly equal.

    Where there are fewer samples than processes some shares are empty, but never the main process's.
    """
    start, stop = (-(-num * number // world_size()) for number in (rank(), rank() + 1))  # rounded up
    return slice(start, stop)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum of the processes' tensors, without a gradient."""
    if world_size() == 1:
        return tensor
    total = tensor.detach().clone()
    with _meeting():
        dist.all_reduce(total)
    return total


def all_reduce_mean(mean: Tensor, num: int) -> Tensor:
    """The mean over all processes' samples, from each process's mean over its own `num` samples.

    The gradient is that of the process's own mean. `backward` then adds these up to the gradient of the whole.
    The mean of an empty share is not a number, and counts as 0.
    """
    if world_size() == 1:
        return mean
    if num == 0:
        mean = mean.nan_to_num(0.0)
    total = all_reduce_sum(torch.cat([mean.flatten() * num, mean.new_tensor([num])]))
    return mean + ((total[:-1] / total[-1]).view_as(mean) - mean).detach()


def any_rank(*flags: bool) -> list[bool]:
    """For each flag, whether it is set in any process. All processes get the same answer after the same step."""
    return all_reduce_sum(torch.tensor(flags, dtype=torch.int64)).bool().tolist()


def all_gather(value: T) -> list[T]:
    """The values of all processes, in the order of their ranks."""
    if world_size() == 1:
        return [value]
    values: list[T | None] = [None] * world_size()
    with _meeting():
        dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def broadcast(tensor: Tensor) -> Tensor:
    """The main process's tensor, in every process."""
    if world_size() > 1:
        with _meeting():
            dist.broadcast(tensor, src=0)
    return tensor


class _Loss(nn.Module):
    """A loss as the forward pass of a module, which is what `DistributedDataParallel` takes. It has a model's weights,
    but not its buffers: those would be replaced by the main process's before every pass."""

    def __init__(self, model: nn.Module, loss: Callable[..., Losses]) -> None:
        super().__init__()
        self.weights, self.loss = nn.ParameterList(model.parameters()), loss

    def forward(self, *batch: Tensor) -> Losses:
        return self.loss(*batch)


def data_parallel(model: nn.Module, loss: Callable[..., Losses]) -> Callable[..., Losses]:
    """The same loss, after which `backward` gives the model's weights the gradients of all processes together.

    They are summed in buckets, while the gradients of earlier layers are still being computed.

    Args:
        model: all of its weights have a gradient in every step.
    """
    if world_size() == 1:
        return loss
    # The strides of a 1x1 filter and of its gradient may differ where they have no effect.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    with _meeting():
        parallel = DistributedDataParallel(_Loss(model, loss))

    def parallel_loss(*batch: Tensor) -> Losses:
        with _meeting():
            return parallel(*batch)

    return parallel_loss


def backward(loss: Tensor, model: nn.Module, share: float) -> None:
    """Compute the gradients of a whole batch's mean loss.

    Args:
        loss: the mean over this process's share of the batch, by a loss from `data_parallel`.
        share: how much of the batch that is, in 0..1.
    """
    if share == 0:  # the mean of nothing is not a number, but the others wait for its gradients
        loss = torch.stack([parameter.sum() for parameter in model.parameters()]).sum()
    with _meeting():
        loss.backward(torch.full_like(loss, share * world_size()))  # what is summed is divided by the world's size
