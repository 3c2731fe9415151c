"""The side that the benchmark measures: both stages' training as the project does it, whole runs and single steps."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prior.codes import Codes
from prior.model import GatedPixelCNN, PriorConfig
from prior.train import PriorTraining, drop_labels
from prior.train import objective as prior_objective
from vqvae.common.engine import Training, fit, make_optimizer
from vqvae.model import VQVAE, VQVAEConfig
from vqvae.train import VQVAETraining, networks
from vqvae.train import objective as vqvae_objective

CPU = torch.device("cpu")
Side = Callable[[], object]


def our_training(
    model: nn.Module,
    data: tuple[Tensor, ...],
    loss_fn: Callable[..., dict[str, Tensor]],
    training: Training,
    seed: int = 0,
    **options: Any,
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
                **options,
            )

    return run


def stage_one_run(config: VQVAEConfig, settings: VQVAETraining, images: Tensor, seed: int = 0) -> tuple[VQVAE, Side]:
    """A new model, and its training on uint8 images (N, 1, S, S)."""
    torch.manual_seed(seed)
    model, predictor, both = networks(config, settings, images.device)
    return model, our_training(
        both, (images,), lambda images: vqvae_objective(model, images, settings, predictor)[0], settings, seed
    )


def stage_two_run(config: PriorConfig, settings: PriorTraining, codes: Codes, num_codes: int) -> Side:
    """The training of a new prior."""
    prior = GatedPixelCNN(config, num_codes, tuple(codes.indices.shape[1:])).to(codes.indices.device)
    return our_training(
        prior,
        (codes.indices, codes.labels),
        lambda indices, labels: prior_objective(prior, indices, labels),
        settings,
        prepare=lambda indices, labels: (indices, drop_labels(labels, settings.label_dropout)),
    )


def one_step(
    model: nn.Module,
    settings: Training,
    loss_fn: Callable[[], Tensor],
    fused: bool = True,
    compiled: bool = False,
    mixed: bool = False,
) -> Side:
    """One step of training on a fixed batch."""
    model.train()
    optimizer = make_optimizer(model, settings)
    for group in optimizer.param_groups:
        group["fused"] = fused
    loss_fn = torch.compile(loss_fn) if compiled else loss_fn

    def run() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = loss_fn()
        loss.backward()
        optimizer.step()

    return run


def stage_one_step(
    config: VQVAEConfig, settings: VQVAETraining, batch: int, channels_last: bool = True, **options: bool
) -> Side:
    model, predictor, both = networks(config, settings, CPU)
    if not channels_last:
        both.to(memory_format=torch.contiguous_format)
    images = torch.randint(256, (batch, 1, config.image_size, config.image_size), dtype=torch.uint8)
    return one_step(both, settings, lambda: vqvae_objective(model, images, settings, predictor)[0]["total"], **options)


def stage_two_step(config: PriorConfig, settings: PriorTraining, batch: int, **options: bool) -> Side:
    num_codes, map_shape = 512, (7, 7)
    prior = GatedPixelCNN(config, num_codes, map_shape)
    maps, labels = torch.randint(num_codes, (batch, *map_shape)), torch.arange(batch) % 10
    return one_step(prior, settings, lambda: prior_objective(prior, maps, labels)["nats_per_code"], **options)
