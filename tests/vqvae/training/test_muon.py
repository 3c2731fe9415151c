"""Muon, held against the singular value decomposition."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from vqvae.training.muon import MOMENTUM, NEWTON_SCHULZ, NUM_STEPS, ROWS, Muon, orthogonalise
from vqvae.training.settings import Training, make_optimizer


def expected_of(matrix: Tensor) -> Tensor:
    """The Newton-Schulz polynomial, applied to each singular value of a matrix (R, C)."""
    u, values, v = torch.linalg.svd(matrix / matrix.norm(), full_matrices=False)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NUM_STEPS):
        values = a * values + b * values**3 + c * values**5
    return u @ torch.diag(values) @ v * math.sqrt(max(matrix.shape))


def test_singular_vectors_stay_and_singular_values_go_through_the_polynomial_whatever_the_shapes() -> None:
    torch.manual_seed(0)
    shapes = [(1, 65, 66), (1, 5, 9), (2, 5, 5), (3, 9, 5), (1, 1, 7), (1, 7, 1), (2, 5, 6)]
    stacks = [torch.randn(shape, dtype=torch.float64) * 10**i for i, shape in enumerate(shapes)]
    for stack, found in zip(stacks, orthogonalise(stacks), strict=True):
        torch.testing.assert_close(found, torch.stack([expected_of(matrix) for matrix in stack]))


def test_singular_values_from_a_twentieth_of_the_largest_come_near_to_each_other() -> None:
    values = torch.linspace(0.05, 1, 16, dtype=torch.float64)
    (found,) = orthogonalise([torch.diag(values)[None]])
    assert found[0].diagonal().min() > found[0].diagonal().max() / 2


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_matrices_take_muons_step_and_all_else_adamws(weight_decay: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 3 * ROWS // 2, (2, 3)), nn.Linear(4, 3), nn.Embedding(5, 4), nn.LayerNorm(3)
    ).double()
    plain = copy.deepcopy(model)
    weights = {"0.weight": 2, "1.weight": 1}  # and the number of parts that each is taken in
    others = [parameter for name, parameter in plain.named_parameters() if name not in weights]
    training = Training(lr=0.02, optimizer="muon", weight_decay=weight_decay)
    optimizer, adamw = (
        make_optimizer(model, training),
        torch.optim.AdamW(others, lr=0.02, betas=(0.9, 0.99), weight_decay=0),
    )
    momenta = dict.fromkeys(weights, 0.0)
    for _ in range(4):
        for own, other in zip(model.parameters(), plain.parameters(), strict=True):
            own.grad = torch.randn_like(own)
            other.grad = own.grad.clone()
        for name, num_parts in weights.items():
            parameter = plain.get_parameter(name)
            momenta[name] = MOMENTUM * momenta[name] + (1 - MOMENTUM) * parameter.grad
            ahead = (MOMENTUM * momenta[name] + (1 - MOMENTUM) * parameter.grad).flatten(1)
            update = torch.cat([expected_of(part) for part in ahead.chunk(num_parts)])
            with torch.no_grad():
                parameter *= 1 - 0.02 * weight_decay
                parameter -= 0.02 * 0.2 * update.view_as(parameter)
        adamw.step()
        optimizer.step()
        torch.testing.assert_close(model.state_dict(), plain.state_dict())


def test_a_gradient_of_zero_leaves_a_matrix_where_it_is() -> None:
    layer = nn.Linear(3, 4)
    before, optimizer = layer.weight.clone(), Muon([{"params": [layer.weight], "orthogonal": True}], 0.1)
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    assert torch.equal(layer.weight, before * (1 - 0.1 * 0.01))  # AdamW's own weight decay
