"""No step of training waits for the device: what is read of it is read between steps, however many there are."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prior.codes import extract
from prior.model import PriorConfig
from prior.train import PriorTraining
from tests.ours import Side, stage_one_run, stage_two_run
from vqvae import quantizer
from vqvae.common.data import Split, load_train_and_validation
from vqvae.common.engine import LOG_EVERY
from vqvae.model import VQVAE, VQVAEConfig
from vqvae.train import VQVAETraining

NUM_STEPS = (3, 9)
BATCH = 16
WAITING = ("_local_scalar_dense", "bincount", "equal", "is_nonzero", "masked_select", "nonzero", "repeat_interleave")


class Waits(TorchDispatchMode):
    """Counts the operations that a program on a GPU stops for: a number read, or a shape that hangs on values."""

    def __init__(self) -> None:
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put_") else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        self.num += name in WAITING or by_mask
        return function(*args, **(kwargs or {}))


def stage_one(train: Split) -> Side:
    config = VQVAEConfig(hidden_size=4, k=16, width=8, codebook_learning="ema")
    settings = VQVAETraining(batch_size=BATCH, num_epochs=1, predictability=0.1, free_overshoot=True)
    return stage_one_run(config, settings, train.images)[1]


def stage_two(train: Split) -> Side:
    codes = extract(VQVAE(VQVAEConfig(hidden_size=4, k=16, width=8)).to(train.images.device), train)
    return stage_two_run(
        PriorConfig(width=8, dropout=0.1), PriorTraining(batch_size=BATCH, num_epochs=1), codes, num_codes=16
    )


def digits(folder: Path, num: int) -> Split:
    train, _ = load_train_and_validation(folder, download=False)
    return Split(train.images[:num], train.labels[:num])


@pytest.mark.parametrize("stage", [stage_one, stage_two])
def test_no_step_of_training_reads_from_the_device(
    stage: Callable[[Split], Side], fixture_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantizer, "_is_cheap_to_read", lambda tensor: False)  # as on a GPU
    assert max(NUM_STEPS) < LOG_EVERY
    nums = []
    for num_steps in NUM_STEPS:
        run = stage(digits(fixture_folder, num_steps * BATCH))
        with Waits() as waits:
            run()
        nums.append(waits.num)
    assert nums[0] == nums[1]
    assert nums[0] > 0  # those of the end of the epoch


@pytest.mark.parametrize(
    "waiting",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.bincount(x.long()),
    ],
)
def test_waiting_is_noticed(waiting: Callable[[Tensor], object]) -> None:
    with Waits() as waits:
        waiting(torch.ones(3))
    assert waits.num > 0
    with Waits() as waits:
        torch.ones(3).cumsum(0)[torch.tensor([0, 1])]
    assert waits.num == 0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("stage", [stage_one, stage_two])
def test_no_step_of_training_waits_for_a_gpu(stage: Callable[[Split], Side], fixture_folder: Path) -> None:
    nums = []
    for num_steps in NUM_STEPS:
        run = stage(digits(fixture_folder, num_steps * BATCH).to(torch.device("cuda")))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        nums.append(len(caught))
    assert nums[0] == nums[1]
