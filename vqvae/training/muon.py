"""The optimiser Muon (kellerjordan.github.io/posts/muon): a matrix moves along its momentum, made orthogonal.

    M <- mu M + (1 - mu) G       the momentum of the gradients G; the rows of a convolution's matrix are its filters
    U <- mu M + (1 - mu) G       the momentum, moved by the gradient once more
    W <- W - lr 0.2 sqrt(max(R, C)) (U U^T)^(-1/2) U                       for a matrix of R rows and C columns

All singular values of such a step are near 1, so rare directions are learned as fast as frequent ones. Its elements are
about as large as those of AdamW's steps (arXiv:2502.16982, section 2.2), so one learning rate serves both optimisers.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

MOMENTUM = 0.95
BETAS = (0.9, 0.99)  # of AdamW; the matrices change fast, and older gradients say little
LIKE_ADAMW = 0.2
ROWS = 64  # at most, that are made orthogonal together
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # lifts singular values fast, and leaves them between 0.7 and 1.2
NUM_STEPS = 3  # the singular values that stay small are mostly noise


class Muon(torch.optim.AdamW):
    """Muon for the groups of parameters that are marked `orthogonal`, and AdamW for the others."""

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, lr=lr, betas=BETAS, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        for group in self.param_groups:
            if group.get("orthogonal", False):
                self._step_orthogonally(group)
        return super().step(closure)

    def _step_orthogonally(self, group: dict[str, Any]) -> None:
        by_shape = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape[parameter.flatten(1).shape].append(parameter)
        stacks = [torch.stack([self._update_momentum(p) for p in same]) for same in by_shape.values()]
        for same, updates in zip(by_shape.values(), orthogonalise(stacks), strict=True):
            for parameter, update in zip(same, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.view_as(parameter), alpha=-group["lr"] * LIKE_ADAMW)
                parameter.grad = None  # it is used up, and AdamW passes over what has none

    def _update_momentum(self, parameter: Tensor) -> Tensor:
        """U (R, C) of a parameter."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state |= {"step": torch.tensor(0.0), "momentum": torch.zeros_like(parameter)}  # AdamW counts steps, too
        state["step"] += 1
        state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(state["momentum"], MOMENTUM).flatten(1)


def orthogonalise(stacks: list[Tensor]) -> list[Tensor]:
    """About (X X^T)^(-1/2) X, times the root of its larger side, for each matrix X of stacks (N, R, C).

    More than 64 rows are taken in equal parts, if there are such: the time for a matrix grows with its rows squared.

    A Newton-Schulz step is X <- (a + b X X^T + c (X X^T)^2) X. What stands before X is a polynomial of the first X X^T.
    So the steps are made with these small matrices alone, together for all of one size.
    """
    parts = [_in_parts(stack) for stack in stacks]
    wide = [part if part.shape[1] <= part.shape[2] else part.mT for part in parts]
    wide = [x / (torch.linalg.matrix_norm(x, keepdim=True) + torch.finfo(x.dtype).tiny) for x in wide]
    by_size = defaultdict(list)
    for i, x in enumerate(wide):
        by_size[x.shape[1]].append(i)
    for same in by_size.values():
        factors = _newton_schulz(torch.cat([wide[i] @ wide[i].mT for i in same]))
        for i, factor in zip(same, factors.split([len(wide[i]) for i in same]), strict=True):
            wide[i] = factor @ wide[i] * math.sqrt(wide[i].shape[2])
    found = [x if x.shape == part.shape else x.mT for x, part in zip(wide, parts, strict=True)]
    return [x.reshape(stack.shape) for x, stack in zip(found, stacks, strict=True)]


def _in_parts(stack: Tensor) -> Tensor:
    """Matrices (N, R, C) as (N P, R/P, C), for as few parts P as have at most 64 rows, or as one part."""
    _, num_rows, num_columns = stack.shape
    num_parts = math.ceil(num_rows / ROWS)
    return stack.reshape(-1, num_rows // num_parts, num_columns) if num_rows % num_parts == 0 else stack


def _newton_schulz(squares: Tensor) -> Tensor:
    """What the steps multiply X by, for each A = X X^T (N, R, R) of a matrix whose singular values are at most 1."""
    product = factor = _polynomial(squares)
    for _ in range(NUM_STEPS - 1):
        squares = factor @ factor @ squares  # in any order: polynomials of one matrix commute
        factor = _polynomial(squares)
        product = factor @ product
    return product


def _polynomial(squares: Tensor) -> Tensor:
    a, b, c = NEWTON_SCHULZ
    found = torch.baddbmm(squares, squares, squares, beta=b, alpha=c)
    found.diagonal(dim1=1, dim2=2).add_(a)
    return found
