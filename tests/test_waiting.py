"""No step of training waits for the device: what is read of it is read between steps, however many there are."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import make_dataset
from tests.ranks import make_task
from vqvae import quantizer
from vqvae.training.loop import LOG_EVERY, Run, fit

BATCH, NUM_STEPS = 16, (3, 9)
WAITING = ("_local_scalar_dense", "bincount", "equal", "is_nonzero", "masked_select", "nonzero", "repeat_interleave")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class Waits(TorchDispatchMode):
    """Counts the operations that a program on a GPU stops for: a number is read, or a shape depends on values."""

    num = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put_") else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        self.num += name in WAITING or by_mask
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, needs_cuda])])
@pytest.mark.parametrize("stage", ["vqvae", "prior"])
def test_no_step_of_training_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, device: str) -> None:
    monkeypatch.setattr(quantizer, "_reading_waits", lambda tensor: True)  # as on a GPU
    monkeypatch.setattr(quantizer, "COMPARED_AGAIN", ())
    assert max(NUM_STEPS) < LOG_EVERY
    nums = []
    for num_steps in NUM_STEPS:
        settings = {"device": torch.device(device), "batch_size": BATCH, "num_epochs": 1}
        task = make_task(stage, make_dataset(num_steps * BATCH), tmp_path / "best.safetensors", **settings)
        task.show = lambda log, epoch, step: None
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        with Waits() as waits, warnings.catch_warnings(record=True, action="always") as caught:
            fit(task, task.training, Run(tmp_path / str(num_steps), 0, task.settings))
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        nums.append((waits.num, len(caught)))
    assert nums[0] == nums[1]
    assert nums[0][0] > 0  # those of the end of the epoch


def test_waiting_is_noticed() -> None:
    x = torch.ones(3)
    for waiting in (x.sum().item, x.any().__bool__, x.nonzero, lambda: x[x > 0], lambda: torch.bincount(x.long())):
        with Waits() as waits:
            waiting()
        assert waits.num > 0
    with Waits() as waits:
        x.cumsum(0)[torch.tensor([0, 1])]
    assert waits.num == 0
