"""Ancestral sampling from a table of logits, held against a loop in NumPy that draws one code after another."""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor

import prior.sampling
from prior.sampling import (
    GUIDANCE,
    LogitsAt,
    adjust,
    check_options,
    draw_labels,
    guided,
    invert_cumulative,
    sample_codes,
)
from vqvae.errors import InputError

NUM_CODES, NO_LABEL = 6, 4


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_table(map_shape: tuple[int, int]) -> Callable[[Tensor], LogitsAt]:
    """Logits that sum a table's entries: one for the label, and one for each code before the position."""
    num, random = math.prod(map_shape), seeded(0)
    starts = 2 * torch.randn(NO_LABEL + 1, num, NUM_CODES, generator=random, dtype=torch.float64)
    links = torch.randn(num, NUM_CODES, num, NUM_CODES, generator=random, dtype=torch.float64)

    def logits_for(labels: Tensor) -> LogitsAt:
        def logits_at(indices: Tensor, i: int, j: int) -> Tensor:
            place = i * map_shape[1] + j
            logits = starts[labels, place]
            for earlier, codes in enumerate(indices.flatten(1).T[:place]):
                logits = logits + links[earlier, codes, place]
            return logits

        return logits_at

    return logits_for


def sample(num: int, map_shape: tuple[int, int] = (3, 4), *, seed: int = 5, **options: Any) -> Tensor:
    """`sample_codes` from the table, by default with every label, and none, in turn."""
    uniforms = torch.rand(num, *map_shape, generator=seeded(seed), dtype=torch.float64)
    labels = options.pop("labels", torch.arange(num) % (NO_LABEL + 1))
    return sample_codes(make_table(map_shape), uniforms, labels, no_label=NO_LABEL, **options)


def sample_by_hand(map_shape: tuple[int, int], options: dict[str, Any]) -> np.ndarray:
    """`sample` of ten maps, one map at a time, one code at a time, over maps that start as garbage."""
    uniforms = torch.rand(10, *map_shape, generator=seeded(5), dtype=torch.float64).numpy()
    maps = np.random.default_rng(99).integers(NUM_CODES, size=uniforms.shape)
    for n, i, j in np.ndindex(maps.shape):
        both = make_table(map_shape)(torch.tensor([n % (NO_LABEL + 1), NO_LABEL]))
        with_label, without = both(torch.from_numpy(maps[[n, n]]), i, j).numpy()
        logits = without + options.get("guidance", 1) * (with_label - without)
        weights = np.exp((logits - logits.max()) / options.get("temperature", 1))
        likeliest = sorted(range(NUM_CODES), key=lambda code: -weights[code])[: options.get("top_k")]
        kept, mass = [], 0.0
        for code in likeliest:
            if mass >= options.get("top_p", 1):
                break
            kept.append(code)
            mass += weights[code] / weights[likeliest].sum()
        below = 0.0
        for code in sorted(kept):
            below += weights[code] / weights[kept].sum()
            if uniforms[n, i, j] < below:
                break
        known = options["known_codes"][n, i, j] if "known_codes" in options else -1
        maps[n, i, j] = known if known >= 0 else code
    return maps


KNOWN = torch.randint(-NUM_CODES, NUM_CODES, (10, 3, 4), generator=seeded(23)).clamp(min=-1)
ALL = {"guidance": 2.0, "temperature": 1.5, "top_k": 4, "top_p": 0.8}


@pytest.mark.parametrize(
    ("map_shape", "options"),
    [
        ((3, 4), {}),
        ((3, 4), {"temperature": 0.4}),
        ((3, 4), {"top_k": 2}),
        ((3, 4), {"top_p": 0.6}),
        ((3, 4), {"guidance": 0.0}),
        ((3, 4), {"guidance": 0.5}),
        ((3, 4), {"guidance": 100.0}),
        ((3, 4), {"known_codes": KNOWN}),
        ((3, 4), {"known_codes": KNOWN, **ALL}),
        ((1, 7), ALL),
    ],
    ids=lambda value: "-".join(map(str, value)),
)
def test_the_codes_are_those_of_the_loop_by_hand(map_shape: tuple[int, int], options: dict[str, Any]) -> None:
    drawn = sample(10, map_shape, **options)
    assert drawn.dtype == torch.int64
    assert np.array_equal(drawn.numpy(), sample_by_hand(map_shape, options))
    assert torch.equal(drawn, sample(10, map_shape)) == (options == {})  # every option matters


def test_the_batch_size_changes_nothing_and_fewer_maps_are_the_first_of_more() -> None:
    expected = sample(10, known_codes=KNOWN, **ALL)
    assert not torch.equal(sample(10, seed=6, known_codes=KNOWN, **ALL), expected)
    for batch_size in (1, 3, 10, 100):
        done: list[int] = []
        again = sample(10, known_codes=KNOWN, batch_size=batch_size, progress=done.append, **ALL)
        assert torch.equal(again, expected)
        assert sum(done) == 10
    for num in (1, 2, 9):
        assert torch.equal(sample(num, known_codes=KNOWN[:num], batch_size=4, **ALL), expected[:num])


def test_several_processes_draw_the_maps_of_one_each_its_own_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts, done = sample(10), [], []
    monkeypatch.setattr(prior.sampling, "world_size", lambda: 3)
    monkeypatch.setattr(prior.sampling, "all_reduce_sum", lambda maps: maps)
    for number in range(3):
        monkeypatch.setattr(prior.sampling, "rank", lambda number=number: number)
        parts.append(sample(10, batch_size=2, progress=done.append))
    assert torch.equal(sum(parts), whole)
    assert done == [2] * 5


def test_a_guidance_of_1_is_the_prior_itself_at_no_further_cost() -> None:
    assert GUIDANCE == 1.15  # the default was chosen on validation
    logits_for, labels = Mock(), torch.arange(5)
    assert guided(logits_for, labels, NO_LABEL, 1.0) is logits_for.return_value
    logits_for.assert_called_once_with(labels)


def test_the_coldest_sampling_takes_the_likeliest_code_everywhere() -> None:
    greedy, logits_at = torch.zeros(5, 3, 4, dtype=torch.int64), make_table((3, 4))(torch.arange(5))
    for i, j in np.ndindex(3, 4):
        greedy[:, i, j] = logits_at(greedy, i, j).argmax(dim=1)
    for options in ({"top_k": 1}, {"temperature": 1e-6}, {"temperature": 5e-324}, {"top_p": 5e-324}):
        assert torch.equal(sample(5, **options), greedy)


def test_the_hottest_sampling_takes_every_code_as_often_as_any_other() -> None:
    for temperature in (1e300, 10**300):
        assert torch.equal(sample(20, temperature=temperature), sample(20, temperature=1e200))


def test_a_top_p_of_1_and_a_top_k_of_all_codes_are_plain_sampling() -> None:
    plain = sample(20)
    for options in ({"top_p": 1.0}, {"top_k": 6}, {"top_k": 100}, {"temperature": None, "top_k": 6, "top_p": None}):
        assert torch.equal(sample(20, **options), plain)


@pytest.mark.parametrize(
    ("top_k", "top_p", "expected"),
    [
        (2, 1.0, [[0, 4 / 7, 0, 3 / 7], [0.5, 0.5, 0, 0]]),  # ties go to the lower codes
        (None, 0.69, [[0, 4 / 7, 0, 3 / 7], [1 / 3, 1 / 3, 1 / 3, 0]]),
        (None, 0.71, [[0, 4 / 9, 2 / 9, 3 / 9], [1 / 3, 1 / 3, 1 / 3, 0]]),
        (3, 0.5, [[0, 4 / 7, 0, 3 / 7], [0.5, 0.5, 0, 0]]),  # 0.4 of 0.9 doesn't reach a half
        (2, 0.45, [[0, 1, 0, 0], [1, 0, 0, 0]]),  # but 0.4 of 0.7 does
    ],
)
def test_top_k_and_then_top_p_keep_the_codes_that_they_name(top_k: int | None, top_p: float, expected: Any) -> None:
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]]).log()
    found = adjust(logits, 1.0, top_k, top_p)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_kept", [1, 128, 384])
def test_top_p_stops_where_the_mass_is_reached_exactly_and_ties_go_to_lower_codes(num_kept: int) -> None:
    found = adjust(torch.zeros(1, 512), 1.0, None, num_kept / 512)  # these shares add up exactly
    assert found.tolist() == [[1 / num_kept] * num_kept + [0.0] * (512 - num_kept)]


def test_drawing_inverts_the_cumulative_distribution_and_never_takes_an_impossible_code() -> None:
    p = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]], dtype=torch.float64)
    just_below_1 = 1 - 2**-53
    for uniform, code in ((0.0, 1), (0.2499, 1), (0.25, 3), (0.9, 3), (just_below_1, 3)):
        assert invert_cumulative(p, torch.tensor([uniform], dtype=torch.float64)).tolist() == [code]
    sevenths = torch.full((1, 7), 1 / 7, dtype=torch.float64) * (1 - 1e-15)  # their sum isn't 1 to the last bit
    assert invert_cumulative(sevenths, torch.tensor([just_below_1], dtype=torch.float64)).tolist() == [6]


LIKELIEST = "use `top_k=1` for the most likely codes"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, f"expected `temperature` over 0, found 0; {LIKELIEST}"),
        ({"temperature": 10**400}, f"expected `temperature` to be a finite number, found {10**79}; leave it out"),
        ({"top_k": 0}, f"expected `top_k` of at least 1, found 0; {LIKELIEST}"),
        ({"top_k": 2.5}, f"expected `top_k` to be a whole number, found 2.5; {LIKELIEST}"),
        ({"top_p": 0.0}, "expected `top_p` over 0 and at most 1, found 0; use `top_p=1` for all codes"),
        ({"top_p": 1.0000001}, "expected `top_p` over 0 and at most 1, found 1.0000001; use `top_p=1` for all codes"),
        ({"guidance": -0.5}, "expected `guidance` between 0 and 100, found -0.5; use `guidance=1` for none"),
        ({"guidance": 100.001}, "expected `guidance` between 0 and 100, found 100.001; use `guidance=1` for none"),
        *(
            ({name: value}, f"expected `{name}` to be a finite number, found {value!r}; leave it out")
            for name in ("temperature", "top_p", "guidance")
            for value in (math.nan, math.inf, -math.inf, "1", True, torch.ones(2))
        ),
    ],
    ids=str,
)
def test_an_option_out_of_its_range_is_an_error_that_names_it(options: dict[str, Any], message: str) -> None:
    for draw in (partial(sample, 2, (2, 2)), check_options):  # the second needs no model
        with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
            draw(**options)


def test_labels_are_drawn_by_their_frequencies() -> None:
    frequencies, num = torch.tensor([0.5, 0.2, 0.3, 0.0]), 5000
    labels = draw_labels(frequencies, num, seeded(1))
    assert labels.dtype == torch.int64
    expected = num * frequencies[:3]
    chi_square = ((torch.bincount(labels, minlength=3) - expected).square() / expected).sum()
    assert chi_square < 13.8  # 2 degrees of freedom; a label of frequency 0 is never drawn
    assert torch.equal(labels[:70], draw_labels(frequencies, 70, seeded(1)))
    assert not torch.equal(labels[:70], draw_labels(frequencies, 70, seeded(2)))


def test_without_classes_every_label_is_0_and_as_many_random_numbers_are_taken() -> None:
    one, other = seeded(1), seeded(1)
    assert draw_labels(torch.zeros(0), 4, one).tolist() == [0] * 4
    draw_labels(torch.ones(3) / 3, 4, other)
    assert torch.equal(one.get_state(), other.get_state())
