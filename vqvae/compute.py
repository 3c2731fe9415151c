"""What every computation here needs: the device, memory, checked whole numbers, a seed, batches, and eval mode."""

import hashlib
import math
import operator
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vqvae.errors import InputError, is_out_of_memory

MOST_VALUES = 2**22  # of images at once; they take 16 MB in float32, and each layer of a network some times as much


def pick_device(name: str | torch.device) -> torch.device:
    """The device of a name. Each process on a machine takes a CUDA device of its own.

    Args:
        name: "cpu", "cuda", or "auto" for CUDA where there is a device. A torch.device stands for itself.
    Raises:
        InputError: another name, or fewer CUDA devices than processes.
    """
    if isinstance(name, torch.device):
        if name.type != "cuda" or torch.cuda.is_available():
            return name
        name = name.type
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise InputError(f"expected `device` to be auto, cpu or cuda, found {name!r}; try `device=auto`")
    if name == "cpu":
        return torch.device(name)
    if not torch.cuda.is_available():
        raise InputError("expected a CUDA device for `device=cuda`, found none; use `device=cpu`, or `device=auto`")
    device, num = torch.device(name, int(os.environ.get("LOCAL_RANK", 0))), torch.cuda.device_count()
    if device.index >= num:
        raise InputError(f"expected a CUDA device for each process, found {num}; start at most {num} on this machine")
    torch.cuda.set_device(device)  # for seeds and barriers, which go to the current device
    return device


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions that multiply bfloat16. Without them bfloat16 is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return processor_has("avx512_bf16", "amx_bf16")


def processor_has(*instructions: str) -> bool:
    """Whether the CPU has any of these instruction sets. False where torch is too old to tell."""
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in instructions)


@contextmanager
def memory_for(argument: str) -> Iterator[None]:
    """Inside, memory that runs out raises an `InputError` that names the argument to lower.

    The operating system may also end the process without asking. `require_memory` refuses what can be known before.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError, of CUDA, is a RuntimeError
        if not is_out_of_memory(error):
            raise
        raise InputError(
            f"expected enough memory for this `{argument}`, found too little; choose a smaller `{argument}`"
        ) from None


def require_memory(num_bytes: int, argument: str, value: int) -> None:
    """Refuse what cannot fit into this machine's memory, by arithmetic.

    Args:
        num_bytes: what will be needed for this value of the argument, at least.
    Raises:
        InputError: it is more than the machine has.
    """
    try:
        most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows does not tell; the allocator will
        return
    if num_bytes > most:
        raise InputError(
            f"expected `{argument}` for which {most // 2**30} GiB of memory are enough, found {value}, which needs "
            f"{math.ceil(num_bytes / 2**30)}; choose a smaller `{argument}`"
        )


def require_memory_to_train(build: Callable[[], nn.Module], width: int) -> None:
    """Refuse a network that does not fit into memory with its gradients and the optimiser's two averages.

    Args:
        build: makes the network, here without memory.
        width: of its layers, which the message names.
    Raises:
        InputError: it does not fit.
    """
    with torch.device("meta"):
        num_weights = sum(parameter.numel() for parameter in build().parameters())
    require_memory(4 * 4 * num_weights, "width", width)


def require_whole(argument: str, value: object, low: int, high: int | None = None, remedy: str | None = None) -> int:
    """The value of an argument as an int, checked.

    Args:
        value: a whole number of any type but bool.
        low, high: the least and the largest that is allowed; None stands for the largest of 64 bits.
        remedy: what to do instead.
    Raises:
        InputError: the value is something else.
    """
    remedy = remedy or "choose another"
    try:
        whole = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]  # the check itself
    except TypeError:
        whole = None
    if whole is None:
        raise InputError(f"expected `{argument}` to be a whole number, found {value!r:.80}; {remedy}")
    if abs(whole) >= 2**63:
        raise InputError(f"expected `{argument}` to be a number of at most 64 bits, found a longer one; {remedy}")
    if whole < low or (high is not None and whole > high):
        expected = f"of at least {low}" if high is None else f"between {low} and {high}"
        raise InputError(f"expected `{argument}` {expected}, found {whole}; {remedy}")
    return whole


def require_samples(num_samples: int, floats_each: int) -> int:
    """The number of samples, checked.

    Args:
        floats_each: the memory that each sample takes at least, in numbers of float32.
    Raises:
        InputError: it is no whole number of at least 1, or so many samples do not fit into memory.
    """
    num = require_whole("num_samples", num_samples, 1, remedy="try `num_samples=100`")
    require_memory(4 * floats_each * num, "num_samples", num)
    return num


def seeded(seed: int) -> torch.Generator:
    """A generator on the CPU.

    Raises:
        InputError: the seed is no whole number in 0..2**63 - 1.
    """
    return torch.Generator().manual_seed(require_whole("seed", seed, 0))


def derive_seed(*keys: int | str) -> int:
    """A seed for a combination of keys, independent of the seeds of other combinations."""
    digest = hashlib.sha256("/".join(map(str, keys)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_globally(seed: int) -> None:
    """Seed torch's global generators, at the cost of a few microseconds. torch.manual_seed formats the call stack for
    every kind of device that torch knows of, which takes 0.3 ms."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Inside, the models are in eval mode and nothing records gradients. Every submodule's mode is restored after."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device. Nothing waits for the copy, as it would without pinned memory."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def images_at_once(most: int, image_shape: tuple[int, int, int]) -> int:
    """How many images to pass at once: `most`, or fewer if they are large, so that the memory they take is bounded."""
    return max(min(most, MOST_VALUES // math.prod(image_shape)), 1)


def in_batches(num: int, batch_size: int) -> Iterator[slice]:
    """Slices of at most `batch_size` that cover range(num) in order."""
    for start in range(0, num, batch_size):
        yield slice(start, min(start + batch_size, num))
