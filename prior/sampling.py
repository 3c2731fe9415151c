"""Ancestral sampling: a map is drawn code by code in raster order, each from the softmax over the codes before it.

The sampler needs logits, not a network. Every code takes one uniform number, and map n takes row n of them. So a map
does not depend on the batch in which it is drawn, and two ways to compute the logits can be compared index by index.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vqvae.compute import in_batches, require_whole
from vqvae.distributed import all_reduce_sum, rank, world_size
from vqvae.errors import InputError, plain

GUIDANCE = 1.15  # the default; chosen on validation (configs/README.md)
MAX_GUIDANCE = 100

# logits_at(indices, i, j): logits (B, K) at (i, j), given the codes before it in indices (B, H, W).
LogitsAt = Callable[[Tensor, int, int], Tensor]


def plain_logits(prior: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], LogitsAt]:
    """`logits_for` of `sample_codes` by one full pass over the map for each position.

    This is the plain form of `IncrementalLogits`, which is tested against it.
    """
    return lambda labels: lambda indices, i, j: prior(indices, labels)[:, :, i, j]


def sample_codes(
    logits_for: Callable[[Tensor], LogitsAt],
    uniforms: Tensor,
    labels: Tensor,
    *,
    no_label: int,
    known_codes: Tensor | None = None,
    guidance: float = 1.0,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    batch_size: int = 100,
    progress: Callable[[int], object] = lambda num_done: None,
) -> Tensor:
    """Draw code maps (N, H, W) int64, on the CPU. Of several processes each draws its share of the batches.

    Args:
        logits_for: labels (B,) of a batch to its `LogitsAt`, which is asked for positions in raster order.
        uniforms: (N, H, W) float64 in [0, 1), one for each code.
        labels: (N,) int64, on the device where the maps are to be drawn.
        no_label: the label that stands for none. Guidance moves away from its logits.
        known_codes: (N, H, W) int64, codes to keep, and -1 where one is to be drawn. A draw depends only on codes
            before it.
        guidance: see `guided`; 1 is the prior itself.
        temperature: over 0; logits are divided by it. None stands for 1.
        top_k: draw among the k most likely codes, at least 1. None stands for all.
        top_p: draw among the most likely codes that together reach this probability, in (0, 1]. None stands for 1.
        batch_size: maps drawn at once. The result does not depend on it.
        progress: called with the number of maps that were finished since the last call.
    Raises:
        InputError: an option out of its range.
    """
    check_options(guidance, temperature, top_k, top_p)
    temperature, top_p = (1.0 if option is None else option for option in (temperature, top_p))
    batch_size = require_whole("batch_size", batch_size, 1)
    num, height, width = uniforms.shape
    device = labels.device
    maps = torch.zeros(num, height, width, dtype=torch.int64, device=device)
    for number, rows in enumerate(in_batches(num, batch_size)):
        if number % world_size() != rank():
            continue  # another process draws it
        indices, batch_uniforms = maps[rows], uniforms[rows].to(device)
        known = None if known_codes is None else known_codes[rows].to(device)
        logits_at = guided(logits_for, labels[rows], no_label, guidance)
        for i in range(height):
            for j in range(width):
                probabilities = adjust(logits_at(indices, i, j), temperature, top_k, top_p)
                codes = invert_cumulative(probabilities, batch_uniforms[:, i, j])
                if known is not None:
                    codes = torch.where(known[:, i, j] >= 0, known[:, i, j], codes)
                indices[:, i, j] = codes
        progress(len(indices))
    return all_reduce_sum(maps).cpu()  # a map that another process drew is zero here


def guidance_for(num_classes: int, guidance: float | None) -> float:
    """The guidance that was asked for, or else the default, which is 1 where there are no classes to guide by.

    Raises:
        InputError: another one was asked for there.
    """
    if guidance is None:
        return GUIDANCE if num_classes > 0 else 1.0
    if num_classes == 0 and guidance != 1:
        raise InputError(
            f"expected no `guidance`, because the prior has no classes to guide by, found {plain(guidance)}; leave it "
            f"out"
        )
    return guidance


def check_options(
    guidance: float | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
) -> None:
    """Check the options of a draw, without a model. None stands for an option that is not given.

    Raises:
        InputError: an option out of its range, or no number.
    """
    for name, value in {"guidance": guidance, "temperature": temperature, "top_p": top_p}.items():
        if value is not None and not _is_finite(value):
            raise InputError(f"expected `{name}` to be a finite number, found {value!r:.80}; leave it out")
    if guidance is not None and not 0 <= guidance <= MAX_GUIDANCE:
        found = plain(guidance)
        raise InputError(f"expected `guidance` between 0 and {MAX_GUIDANCE}, found {found}; use `guidance=1` for none")
    likeliest = "use `top_k=1` for the most likely codes"
    if temperature is not None and temperature <= 0:
        raise InputError(f"expected `temperature` over 0, found {plain(temperature)}; {likeliest}")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"expected `top_p` over 0 and at most 1, found {plain(top_p)}; use `top_p=1` for all codes")
    if top_k is not None:
        require_whole("top_k", top_k, 1, remedy=likeliest)


def _is_finite(value: object) -> bool:
    try:
        return not isinstance(value, bool) and math.isfinite(value)  # type: ignore[arg-type]  # this is the check
    except (OverflowError, TypeError, ValueError):  # a whole number too large for a float, or no number
        return False


def guided(logits_for: Callable[[Tensor], LogitsAt], labels: Tensor, no_label: int, guidance: float) -> LogitsAt:
    """Classifier-free guidance (arXiv:2207.12598): u + guidance (l - u).

    l are the logits with the label and u those without. At 0 the label is ignored, at 1 the logits are the prior's own,
    and above 1 they move past l, away from u.
    """
    if guidance == 1:
        return logits_for(labels)
    both = logits_for(torch.cat([labels, torch.full_like(labels, no_label)]))

    def logits_at(indices: Tensor, i: int, j: int) -> Tensor:
        labelled, unlabelled = both(indices.repeat(2, 1, 1), i, j).chunk(2)
        return unlabelled + guidance * (labelled - unlabelled)

    return logits_at


def adjust(logits: Tensor, temperature: float, top_k: int | None, top_p: float) -> Tensor:
    """Probabilities (B, K) float64 of logits (B, K), after temperature, then top-k, then top-p.

    Ties at the edge of top-k and top-p go to the lower index.
    """
    if temperature != 1:  # the largest is subtracted first, or the quotient would overflow at low temperatures
        logits = logits.double()
        logits = (logits - logits.amax(dim=1, keepdim=True)) / float(temperature)  # torch takes no long int
    probabilities = logits.softmax(dim=1, dtype=torch.float64)
    if (top_k is None or top_k >= logits.shape[1]) and top_p == 1:
        return probabilities
    ordered, order = probabilities.sort(dim=1, descending=True, stable=True)
    if top_k is not None:
        ordered[:, top_k:] = 0
        ordered /= ordered.sum(dim=1, keepdim=True)
    before = ordered.cumsum(dim=1) - ordered
    ordered[before >= top_p] = 0  # the code that reaches top_p is kept, and the first code always is
    return torch.zeros_like(probabilities).scatter(1, order, ordered / ordered.sum(dim=1, keepdim=True))


def invert_cumulative(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The index (B,) at which the cumulative sum of probabilities (B, K) passes uniforms (B,) in [0, 1)."""
    cumulative = probabilities.cumsum(dim=1)
    scaled = uniforms[:, None] * cumulative[:, -1:]  # the last sum is 1 only up to rounding
    return torch.searchsorted(cumulative, scaled, right=True).squeeze(1)


def draw_labels(frequencies: Tensor, num: int, generator: torch.Generator) -> Tensor:
    """Draw labels (num,) int64 from class frequencies (num_classes,), one uniform number for each.

    Where there are no classes every label is 0, which stands for no label there.
    """
    uniforms = torch.rand(num, generator=generator, dtype=torch.float64)
    if len(frequencies) == 0:
        return torch.zeros(num, dtype=torch.int64)
    return invert_cumulative(frequencies.double().expand(num, -1).contiguous(), uniforms)
