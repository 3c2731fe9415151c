"""How many threads compute, and how they wait for each other, so that other work on the machine costs no more than its
share.

Threads meet after every product, and the first to come spins until the last is there. If another program has the last
one's core, all wait for their turn: on 2 cores one busy program made a step 4 times slower. So the threads of the
command line spin for a short time only, and there are fewer of them where cores are busy. A program that uses this
package as a library sets its own threads.
"""

import os
import time
from collections.abc import Callable

SPIN_COUNT = 10_000  # turns of a waiting thread before it sleeps, some 0.2 ms; OpenMP's own 300,000 take some ms
FIXED_BY = "OMP_NUM_THREADS"  # the variable by which the user, or torchrun, fixes the number
TURNS = 2  # for each number that is tried
ALL_TURNS_S = 0.14
CLEARLY = 1.1  # a number must be so many times as fast in every turn


def spin_briefly() -> None:
    """From now on, threads that wait go to sleep soon, unless the environment says how they wait. OpenMP reads this
    when torch is imported, so it comes before."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))


def choose_threads(device: str) -> str:
    """Measure with how many threads this machine computes fastest now, and compute with that many.

    Nothing is done where the user has fixed the number, and for work on CUDA.

    Args:
        device: auto, cpu or cuda.
    Returns:
        the same, as the command line wants it.
    """
    if FIXED_BY in os.environ or device == "cuda":
        return device
    import torch

    from vqvae.console import remark

    if device == "auto" and torch.cuda.is_available():
        return device
    most = torch.get_num_threads()
    num = fastest(most, _speed)
    torch.set_num_threads(num)
    if num < most:
        remark(
            f"other programs keep this machine busy, so {num} of {most} threads compute, which is faster now; the "
            f"environment variable {FIXED_BY} fixes their number"
        )
    return device


def fastest(most: int, speed: Callable[[int, float], float]) -> int:
    """The number of threads that computes fastest: all, all but one, or half. Fewer than all must be clearly faster.

    Args:
        most: all of them.
        speed: tells how fast so many threads are, from a trial of so many seconds.
    """
    fewer = sorted({most - 1, most // 2} - {0, most}, reverse=True)
    if not fewer:
        return most
    seconds = ALL_TURNS_S / TURNS / (1 + len(fewer))
    turns = [{num: speed(num, seconds) for num in (most, *fewer)} for _ in range(TURNS)]
    gains = {num: min(turn[num] / turn[most] for turn in turns) for num in fewer}
    best = max(fewer, key=lambda num: gains[num])
    return best if gains[best] > CLEARLY else most


def go_on_with_threads(num: int) -> None:
    """Compute with as many threads as a run had before, so that it goes on to the same digits.

    Nothing is done where the user has fixed the number, where there are several processes, and where this machine has
    fewer cores than that.
    """
    import torch

    from vqvae.console import remark
    from vqvae.distributed import world_size

    free = FIXED_BY not in os.environ and world_size() == 1 and num <= (os.cpu_count() or 1)
    if free and num != torch.get_num_threads():
        remark(f"the run goes on with {num} threads, as it began, so that its digits stay the same")
        torch.set_num_threads(num)


def _speed(num: int, seconds: float) -> float:
    """Matrix products a second of a training's size, with so many threads."""
    import torch

    torch.set_num_threads(num)
    x, weights = torch.ones(3136, 64), torch.ones(64, 64)
    for _ in range(3):  # threads start
        torch.mm(x, weights)
    start, done = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < seconds:
        torch.mm(x, weights)
        done += 1
    return done / spent
