import math

import numpy as np
import pytest
from torch import nn

from tests.helpers import make_prior, make_vqvae
from vqvae.predictor import CausalPredictor
from vqvae.training.settings import Training, learning_rate, make_optimizer

PROGRESS = np.linspace(0, 1, 1001)


@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.2])
def test_a_constant_rate_stays_and_a_one_cycle_rate_rises_in_a_line_to_its_peak_and_falls_by_half_a_cosine_to_zero(
    warmup: float,
) -> None:
    training = Training(lr=0.3, schedule="one-cycle", warmup=warmup)
    assert {learning_rate(Training(lr=0.3, warmup=warmup), progress) for progress in PROGRESS} == {0.3}
    falling = 0.3 * (1 + np.cos(math.pi * (PROGRESS - warmup) / (1 - warmup))) / 2
    expected = np.where(PROGRESS < warmup, 0.3 * PROGRESS / max(warmup, 1e-9), falling)
    assert [learning_rate(training, progress) for progress in PROGRESS] == pytest.approx(expected)


def decays(model: nn.Module) -> dict[str, float]:
    """Each parameter's weight decay in the optimiser, which has no others."""
    groups = make_optimizer(model, Training(weight_decay=0.1)).param_groups
    decay_of = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    return {name: decay_of[id(p)] for name, p in model.named_parameters()}


def test_the_weights_of_convolutions_and_linear_layers_decay_and_no_codebook_or_anything_else() -> None:
    learned, averaged, prior = make_vqvae(codebook_learning="gradient"), make_vqvae(), make_prior()
    layers = nn.ModuleDict({"l": nn.Linear(2, 3), "e": nn.Embedding(5, 2), "n": nn.LayerNorm(2)})
    for model in (learned, averaged, prior, CausalPredictor(4, (7, 7)), layers):
        modules = dict(model.named_modules())
        for name, decay in decays(model).items():
            owner, _, kind = name.rpartition(".")
            assert decay == (0.1 if kind == "weight" and isinstance(modules[owner], nn.Conv2d | nn.Linear) else 0.0)
    assert decays(learned)["quantizer.codebook"] == decays(prior)["embedding.weight"] == 0.0
    assert decays(prior)["layers.0.vertical.weight"] == decays(prior)["head.3.weight"] == 0.1
    assert "quantizer.codebook" in dict(averaged.named_buffers())
    assert "quantizer.codebook" not in decays(averaged)
