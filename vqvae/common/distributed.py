"""Processes that work as one, each on its share of a batch, started by torchrun. Alone, nothing here does anything.

`python cli.py ...` is a world of one; under `torchrun --nproc-per-node N cli.py ...` every process runs the same
program, and these functions are where they meet: each must be called by all of them, in the same order.
"""

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from itertools import islice
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vqvae.common.errors import UserError

T = TypeVar("T")


@contextmanager
def joined() -> Iterator[None]:
    """Inside, the processes that torchrun started know each other (gloo for what lies on the CPU, NCCL on CUDA), and
    only the main one prints."""
    # Imported later (by the first optimiser), this module would keep the group in its functions' default arguments,
    # and a worker thread of it, alive at the interpreter's end, may abort a process that had finished.
    import torch.distributed.nn.functional

    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        with nullcontext() if is_main() else redirect_stdout(io.StringIO()):
            yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def require_alone(what: str) -> None:
    """
    Raises:
        UserError: there are several processes.
    """
    if world_size() > 1:
        raise UserError(f"expected one process for {what}, found {world_size()}; type python instead of torchrun")


@contextmanager
def main_first() -> Iterator[None]:
    """The main process goes through the block alone, the others after it: what it leaves on disk, they find."""
    if not is_main():
        dist.barrier()
    yield
    if is_main() and world_size() > 1:
        dist.barrier()


def wait_for_all() -> None:
    """Go on when every process has come here."""
    if world_size() > 1:
        dist.barrier()


def share(items: Iterable[T]) -> Iterator[T]:
    """Every world_size-th item, from this process's own on."""
    return islice(items, rank(), None, world_size())


def share_of_batch(num: int) -> slice:
    """This process's part of `num` samples, one of nearly equal parts in order.

    Raises:
        UserError: fewer samples than processes.
    """
    if num < world_size():
        raise UserError(
            f"expected at least one sample of every batch for each of {world_size()} processes, found a batch of "
            f"{num}; type another --batch-size, or a smaller --nproc-per-node"
        )
    return slice(num * rank() // world_size(), num * (rank() + 1) // world_size())


def summed(tensor: Tensor) -> Tensor:
    """The sum over all processes, without a gradient."""
    if world_size() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def agreed(*wishes: bool) -> list[bool]:
    """Of each wish whether any process has it, so that all do the same after the same step."""
    return summed(torch.tensor(wishes, dtype=torch.int64)).bool().tolist()


def averaged(mean: Tensor, num: int) -> Tensor:
    """The mean over everybody's samples from this process's mean over its `num`; its gradient is its own mean's, which
    makes `sum_gradients` come to the whole's."""
    if world_size() == 1:
        return mean
    total = summed(torch.cat([mean.flatten() * num, mean.new_tensor([num])]))
    return mean + ((total[:-1] / total[-1]).view_as(mean) - mean).detach()


def gathered(value: T) -> list[T]:
    """What each process has, in the order of their numbers."""
    if world_size() == 1:
        return [value]
    values: list[T | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def from_main(tensor: Tensor) -> Tensor:
    """The main process's tensor, on all of them."""
    if world_size() > 1:
        dist.broadcast(tensor, src=0)
    return tensor


def sum_gradients(model: nn.Module, weight: float) -> None:
    """Replace every gradient by the sum over the processes, each weighted: by its share of the samples, for a mean."""
    if world_size() == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = summed(torch.cat([gradient.flatten() for gradient in gradients]) * weight)
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
