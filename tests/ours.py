"""The side that the benchmark measures: both stages' training as the project does it, whole runs and single steps."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prior.codes import Codes
from prior.model import GatedPixelCNN
from prior.train import PriorTraining, drop_labels
from prior.train import objective as prior_objective
from vqvae.common.data import Split
from vqvae.common.engine import fit
from vqvae.model import VQVAE, VQVAEConfig
from vqvae.predictor import CausalPredictor
from vqvae.train import VQVAETraining
from vqvae.train import objective as vqvae_objective

Side = Callable[[], object]


def our_training(
    model: nn.Module, data: tuple[Tensor, ...], loss_fn: Callable[..., dict[str, Tensor]], training: Any, seed: int = 0
) -> Side:
    """A run of training on the project's own engine, without validation."""

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            fit(
                model,
                data,
                loss_fn,
                lambda: {"none": 0.0},
                lambda figures: None,
                best_by="none",
                training=training,
                seed=seed,
                folder=Path(folder),
                unit="samples",
                settings={},
                after_epoch=lambda log, epoch, step: None,
            )

    return run


def stage_one_run(
    config: VQVAEConfig, settings: VQVAETraining, train: Split, num: int, seed: int = 0
) -> tuple[VQVAE, Side]:
    """A model, and its training on `num` images."""
    torch.manual_seed(seed)
    model = VQVAE(config).to(memory_format=torch.channels_last)
    predictor = CausalPredictor(config.hidden_size, model.map_shape) if settings.predictability > 0 else None
    trained = nn.ModuleList(network for network in (model, predictor) if network is not None)
    return model, our_training(
        trained,
        (train.images[:num],),
        lambda images: vqvae_objective(model, images, settings, predictor)[0],
        settings,
        seed,
    )


def stage_two_run(prior: GatedPixelCNN, settings: PriorTraining, codes: Codes) -> Side:
    """The training of a prior such as this one."""
    model = GatedPixelCNN(prior.config, prior.num_codes, prior.map_shape)
    return our_training(
        model,
        (codes.indices, codes.labels),
        lambda indices, labels: prior_objective(model, indices, drop_labels(labels, settings.label_dropout)),
        settings,
    )


def one_step(
    model: nn.Module, loss_fn: Callable[[], Tensor], fused: bool = True, compiled: bool = False, mixed: bool = False
) -> Side:
    """One step of training on a fixed batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=fused)
    loss_fn = torch.compile(loss_fn) if compiled else loss_fn

    def run() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = loss_fn()
        loss.backward()
        optimizer.step()

    return run


def stage_one_step(config: VQVAEConfig, batch: int, channels_last: bool = True, **options: bool) -> Side:
    model = VQVAE(config).train()
    model = model.to(memory_format=torch.channels_last) if channels_last else model
    images = torch.randint(256, (batch, 1, config.image_size, config.image_size), dtype=torch.uint8)
    settings = VQVAETraining()
    return one_step(model, lambda: vqvae_objective(model, images, settings)[0]["total"], **options)


def stage_two_step(prior: GatedPixelCNN, batch: int, **options: bool) -> Side:
    model = GatedPixelCNN(prior.config, prior.num_codes, prior.map_shape)
    maps, labels = torch.randint(prior.num_codes, (batch, *prior.map_shape)), torch.arange(batch) % 10
    return one_step(model, lambda: prior_objective(model, maps, labels)["nats_per_code"], **options)
