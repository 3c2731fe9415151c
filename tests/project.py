"""The project's side of the benchmarks: the training of both stages."""

import io
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prior.codes import Codes
from prior.likelihood import nats_per_code
from prior.model import GatedPixelCNN, PriorConfig
from prior.train import PriorTraining, drop_labels
from vqvae.loss import VQVAETraining, loss_terms
from vqvae.model import VQVAE, VQVAEConfig
from vqvae.predictor import CausalPredictor
from vqvae.storage.recipe import read_recipe, resolve
from vqvae.train import slow_down_codes
from vqvae.training.loop import Run, Task, fit
from vqvae.training.settings import Training

CPU = torch.device("cpu")
IMAGE_SHAPE = (1, 28, 28)
NUM_CODES, MAP_SHAPE, NUM_CLASSES = 512, (7, 7), 10
Side = Callable[[], object]


class StageOne(Task):
    """Stage one's training, without validation and without pictures."""

    unit, best_by = "images", "none"

    def __init__(
        self,
        config: VQVAEConfig,
        training: VQVAETraining,
        images: Tensor,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        self.training, self.data = training, (images,)
        self.vqvae = VQVAE(config, IMAGE_SHAPE).to(memory_format=torch.channels_last)
        self.predictor: CausalPredictor | None = None
        if training.prediction_weight > 0:
            self.predictor = CausalPredictor(config.code_dim, self.vqvae.map_shape)
        self.model = nn.ModuleList([m for m in (self.vqvae, self.predictor) if m is not None])

    def before_step(self, progress: float) -> None:
        slow_down_codes(self.vqvae, self.training, progress)

    def loss(self, *batch: Tensor) -> dict[str, Tensor]:
        return loss_terms(self.vqvae, batch[0], self.training, self.predictor)[0]

    def evaluate(self) -> dict[str, float]:
        return {"none": 0.0}


class StageTwo(Task):
    """Stage two's training, without validation and without pictures."""

    unit, best_by = "maps", "none"

    def __init__(self, config: PriorConfig, training: PriorTraining, codes: Codes) -> None:
        torch.manual_seed(0)
        self.training, self.data = training, tuple(codes)
        self.model = GatedPixelCNN(config, NUM_CODES, MAP_SHAPE, NUM_CLASSES)

    def prepare(self, *batch: Tensor) -> tuple[Tensor, ...]:
        return batch[0].long(), drop_labels(batch[1], self.training.label_dropout, NUM_CLASSES)

    def loss(self, *batch: Tensor) -> dict[str, Tensor]:
        return {"nats_per_code": nats_per_code(self.model, *batch)}

    def evaluate(self) -> dict[str, float]:
        return {"none": 0.0}


def recipe_of(name: str, stage: str) -> tuple[Any, Any]:
    """A stage's network and its training, of a recipe in configs/."""
    kinds = {"vqvae": (VQVAEConfig, VQVAETraining), "prior": (PriorConfig, PriorTraining)}
    config, settings = resolve(kinds[stage], read_recipe(Path("configs") / f"{name}.toml", stage), {})
    return config, settings


def whole_run(task: Task, training: Training, seed: int = 0) -> Side:
    """A run of training by the project's own loop."""

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
            fit(task, training, Run(Path(folder), seed, settings={}))

    return run
