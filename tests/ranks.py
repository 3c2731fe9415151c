"""What each of several processes does in tests/vqvae/test_distributed.py, and small tasks of both stages.

`ranks.py FOLDER` starts 2 processes, then 3, then 4. Process R of N writes what it found to FOLDER/N/R.pt.
"""

import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes

from prior.codes import extract
from prior.maps import draw_maps
from prior.model import PriorConfig
from prior.train import PriorTask, PriorTraining, evaluate_prior
from tests.helpers import CPU, log_rows, make_dataset, make_prior, make_split, make_vqvae
from vqvae.compute import pick_device
from vqvae.data.dataset import Dataset
from vqvae.distributed import (
    all_gather,
    backward,
    barrier,
    batch_shard,
    data_parallel,
    is_main,
    main_first,
    process_group,
    rank,
    world_size,
)
from vqvae.errors import InputError, Interrupted
from vqvae.loss import VQVAETraining, evaluate_vqvae
from vqvae.model import VQVAEConfig
from vqvae.predictor import CausalPredictor
from vqvae.quantizer import VectorQuantizer
from vqvae.storage.checkpoint import Header
from vqvae.train import VQVAETask
from vqvae.training.averages import MetricAverager
from vqvae.training.loop import Run, Task, fit
from vqvae.training.settings import Training


def make_task(stage: str, dataset: Dataset, path: Path, device: torch.device = CPU, **training: Any) -> Any:
    """A small task of a stage. Whatever the loss can depend on, it depends on."""
    if stage == "vqvae":
        config, settings = VQVAEConfig(4, 16, 8, 1, 1, "ema", 0.5), {"prediction_weight": 0.1, "clipped_loss": True}
        return VQVAETask(config, VQVAETraining(**settings, **training), dataset, path, device, seed=0)
    vqvae, config = make_vqvae().to(device), PriorConfig(width=8, dropout=training.pop("dropout", 0.1))
    header = Header("vqvae", config={}, data={}, recipe={}, metrics={}, fingerprint="stage one")
    codes = (extract(vqvae, split) for split in (dataset.train, dataset.validation))
    return PriorTask(config, PriorTraining(**training), dataset, *codes, vqvae, header, path, seed=0)


def rows(folder: Path) -> list[dict[str, float]]:
    return [{name: row[name] for name in row if "_per_s" not in name} for row in log_rows(folder)]


class Line(Task):
    """A regression in float64, in batches of 7, 7 and 1. The last process asks for the end in a step."""

    unit, best_by = "things", "figure"

    def __init__(self, stops_in: int = 0) -> None:
        torch.manual_seed(1)
        self.model, self.data = nn.Linear(3, 1).double(), (torch.randn(15, 3, dtype=torch.float64),)
        self.stops_in, self.drawn = stops_in, []

    def prepare(self, *batch: Tensor) -> tuple[Tensor, ...]:
        return (batch[0] + torch.rand(len(batch[0]), 1),)

    def loss(self, *batch: Tensor) -> dict[str, Tensor]:
        self.drawn.append(torch.rand(1).item())
        if len(self.drawn) == self.stops_in and rank() == world_size() - 1:
            signal.raise_signal(signal.SIGTERM)
        return {"error": (self.model(batch[0]) - batch[0].prod(dim=1, keepdim=True)).square().mean()}

    def evaluate(self) -> dict[str, float]:
        return {"figure": 1.0}

    def run(self, folder: Path, num_epochs: int, resume: bool = False) -> None:
        fit(self, Training(batch_size=7, num_epochs=num_epochs, lr=0.1), Run(folder, 0, {}, resume))


def train_everything(folder: Path) -> dict[str, Any]:
    """A line, stopped and gone on with, and both stages, in batches of 12, 12, 12 and 1."""
    line, resumed, own = Line(stops_in=2), Line(), folder / f"rank{rank()}"
    with suppress(Interrupted):
        line.run(folder / "line", 2)
    barrier()  # the main process has saved
    resumed.run(folder / "line", 2, resume=True)
    for stage, options in (("vqvae", {}), ("prior", {"dropout": 0.0})):
        options |= {"batch_size": 12, "num_epochs": 1, "lr": 1e-4}
        with patch("vqvae.training.logs.RunLog.graph"):  # half a second each
            task = make_task(stage, make_dataset(37), own / f"{stage}.safetensors", **options)
            fit(task, task.training, Run(own / stage, 0, task.settings))
    files = sorted(str(path.relative_to(own)) for path in own.rglob("*") if "events" not in path.name)
    return {"weights": resumed.model.state_dict(), "drawn": (line.drawn, resumed.drawn), "files": files}


def figures_and_samples() -> dict[str, Any]:
    """Figures of a split in batches, and maps in batches, of which no two processes have as many."""
    vqvae, prior, split, averager = make_vqvae(), make_prior(), make_split(100), MetricAverager()
    for value in [1e16, 1, -1e16, 1, 1e16, 1, -1e16][batch_shard(7)]:
        averager.add({"x": torch.tensor(value, dtype=torch.float64)}, 1)
    with patch("vqvae.loss.EVALUATION_BATCH", 30), patch("prior.likelihood.BATCH", 30):
        figures = evaluate_vqvae(vqvae, split, VQVAETraining()), evaluate_prior(prior, extract(vqvae, split))
    generator, labels = torch.Generator().manual_seed(1), torch.arange(13) % 10
    torch.manual_seed(2)
    maps = draw_maps(prior, 13, generator, labels=labels, guidance=1.5, batch_size=3)
    following = torch.cat([torch.rand(2, generator=generator), torch.rand(2)])
    return {"figures": (*figures, averager.averages()), "maps": maps, "following": following}


def codebook_and_gradient() -> dict[str, Any]:
    """A codebook that starts from, follows and restarts from batches that are shared out among the processes, and the
    gradient of the prediction term with respect to such a batch."""
    torch.manual_seed(0)
    quantizer, predictor = VectorQuantizer(24, 3, "ema", decay=0.5), CausalPredictor(3, (2, 2))
    batches, own = torch.Generator().manual_seed(1), batch_shard(7)
    for step in range(6):
        z_e = torch.randn(7, 3, 2, 2, generator=batches) * (1 + step)  # codes fall out of use as it grows
        torch.manual_seed(step)
        quantizer(z_e[own])
    z_e.requires_grad_()
    (predictor.fraction_unexplained(z_e[own], z_e[own].detach()) * (own.stop - own.start) / 7).backward()
    return {"codebook": quantizer.state_dict(), "gradient": torch.stack(all_gather(z_e.grad)).sum(dim=0)}


def everything(folder: Path) -> dict[str, Any]:
    with main_first():
        if is_main():
            time.sleep(0.3)
            folder.joinpath("first").mkdir(parents=True)
        found = {"waited": folder.joinpath("first").exists()}
    return found | train_everything(folder) | figures_and_samples() | codebook_and_gradient()


def one_step(device_name: str) -> None:
    """A sum, a gradient and a step of training on devices of a kind. A process alone is connected too."""
    with process_group():
        device = pick_device(device_name)
        torch.distributed.all_reduce(total := torch.ones(3, device=device))
        assert total.tolist() == [world_size()] * 3
        options = {"dropout": 0.0, "batch_size": 5, "num_epochs": 1}
        task = make_task("prior", make_dataset(5), Path("none"), device, **options)
        batch, own, weights = (
            [tensor.to(device).long() for tensor in task.data],
            batch_shard(5),
            task.model.parameters(),
        )
        (whole,) = task.loss(*batch).values()
        expected = torch.autograd.grad(whole, [*weights])
        with patch("vqvae.distributed.world_size", return_value=2):  # a process alone would do without
            loss = data_parallel(task.model, task.loss)
        (mean,) = loss(*(tensor[own] for tensor in batch)).values()
        backward(mean, task.model, (own.stop - own.start) / 5)
        gradients = [weight.grad for weight in task.model.parameters()]
        torch.testing.assert_close(gradients, [*expected], rtol=1e-3, atol=1e-5)
        task.save_best = task.show = lambda *arguments: None
        fit(task, task.training, Run(None, 0, {}))


def other_threads() -> int:  # that Python does not know
    return max(0, len(list(Path("/proc/self/task").glob("*"))) - threading.active_count())


def ending(port: str, ends: Exception | None) -> Any:
    """How this process ends: by what it tells, or in silence with a status."""
    try:
        with patch.dict(os.environ, MASTER_PORT=port), process_group():
            barrier()  # nobody leaves while another is still connecting
            if ends is not None:
                raise ends
            barrier()
    except (InputError, Interrupted) as told:
        return str(told)
    except SystemExit as end:
        return end.code


def endings(number: int, num: int) -> list[Any]:
    """How this process ends when all, the last or the first meet a mistake, and when all get a signal."""
    mistake, ports = InputError("a mistake"), os.environ["PORTS"].split()
    cases = [(mistake, True), (mistake, number == num - 1), (mistake, number == 0), (Interrupted(15, 7), True)]
    return [ending(port, error if meets else None) for port, (error, meets) in zip(ports, cases, strict=True)]


def one_rank(number: int, folder: Path) -> None:
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number)}
    with folder.joinpath(f"{number}.txt").open("w") as sys.stdout, process_group():
        found = everything(folder) | {"inside": other_threads()}
    found |= {"after": other_threads(), "endings": endings(number, int(os.environ["WORLD_SIZE"]))}
    torch.save(found, folder / f"{number}.pt")


if __name__ == "__main__":
    import torch._dynamo  # the optimiser does it, and it would take each process seconds

    torch.set_num_threads(1)
    for num in (2, 3, 4):
        servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(5)]
        port, *others = [str(server.getsockname()[1]) for server in servers]
        for server in servers:
            server.close()
        os.environ |= {"WORLD_SIZE": str(num), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ["PORTS"] = " ".join(others)
        (folder := Path(sys.argv[1]) / str(num)).mkdir()
        start_processes(one_rank, (folder,), nprocs=num, start_method="fork")
