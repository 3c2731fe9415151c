"""Ancestral sampling, held against a loop in NumPy that draws one code after another from whole forward passes."""

import math
import random
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import prior.sampling
from prior.incremental import IncrementalLogits
from prior.model import NO_LABEL, GatedPixelCNN, PriorConfig
from prior.sampling import adjust, draw, guided, plain_logits, sample
from vqvae.common.errors import UserError


def make_prior(map_shape: tuple[int, int], num_codes: int = 6, seed: int = 0, dropout: float = 0.0) -> GatedPixelCNN:
    """A network whose softmaxes are far from even."""
    torch.manual_seed(seed)
    network = GatedPixelCNN(
        PriorConfig(width=8, num_layers=max(map_shape), dropout=dropout), num_codes, map_shape
    ).eval()
    with torch.no_grad():
        network.embedding.weight.mul_(2)
        network.head[-1].weight.mul_(12)
    return network


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def sample_by_hand(
    network: GatedPixelCNN,
    uniforms: np.ndarray,
    labels: list[int],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    guidance: float = 1.0,
    given: Tensor | None = None,
) -> np.ndarray:
    """One map at a time, one code at a time, over maps that start as garbage."""
    rng = np.random.default_rng(99)
    maps = rng.integers(network.num_codes, size=uniforms.shape)
    for n, label in enumerate(labels):
        for i, j in np.ndindex(uniforms.shape[1:]):
            if given is not None and given[n, i, j] >= 0:
                maps[n, i, j] = given[n, i, j]
                continue
            twice = torch.from_numpy(maps[[n, n]])
            with_label, without = network(twice, torch.tensor([label, NO_LABEL]))[:, :, i, j].double().numpy()
            logits = without + guidance * (with_label - without)
            weights = np.exp((logits - logits.max()) / temperature)
            likeliest = sorted(range(network.num_codes), key=lambda code: -weights[code])[:top_k]
            kept, mass = [], 0.0
            for code in likeliest:
                if mass >= top_p:
                    break
                kept.append(code)
                mass += weights[code] / weights[likeliest].sum()
            below = 0.0
            for code in sorted(kept):
                below += weights[code] / weights[kept].sum()
                if uniforms[n, i, j] < below:
                    break
            maps[n, i, j] = code
    return maps


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.4},
        {"temperature": 2.5},
        {"top_k": 2},
        {"top_p": 0.6},
        {"temperature": 1.5, "top_k": 4, "top_p": 0.8},
    ],
)
@pytest.mark.parametrize("map_shape", [(3, 4), (1, 7), (7, 1)])
def test_sampling_equals_the_loop_by_hand(map_shape: tuple[int, int], options: dict[str, float]) -> None:
    network = make_prior(map_shape)
    labels = [NO_LABEL] * 6
    drawn = sample(network, 6, seeded(5), **options)
    uniforms = torch.rand(6, *map_shape, generator=seeded(5), dtype=torch.float64).numpy()
    assert drawn.dtype == torch.int64
    assert np.array_equal(drawn.numpy(), sample_by_hand(network, uniforms, labels, **options))


def test_sampling_every_label_equals_the_loop_by_hand() -> None:
    network = make_prior((4, 3))
    labels = torch.arange(10)
    uniforms = torch.rand(10, 4, 3, generator=seeded(6), dtype=torch.float64)
    drawn = sample(network, 10, seeded(6), labels=labels)
    assert np.array_equal(drawn.numpy(), sample_by_hand(network, uniforms.numpy(), labels.tolist()))
    assert not torch.equal(drawn, sample(network, 10, seeded(6), labels=labels.roll(1)))


@pytest.mark.parametrize("guidance", [0.0, 0.5, 2.0, 7.0])
def test_guided_sampling_equals_the_loop_by_hand(guidance: float) -> None:
    network, labels = make_prior((4, 3)), torch.arange(10)
    uniforms = torch.rand(10, 4, 3, generator=seeded(20), dtype=torch.float64)
    drawn = sample(network, 10, seeded(20), labels=labels, guidance=guidance)
    expected = sample_by_hand(network, uniforms.numpy(), labels.tolist(), guidance=guidance)
    assert np.array_equal(drawn.numpy(), expected)
    assert not torch.equal(drawn, sample(network, 10, seeded(20), labels=labels))


@pytest.mark.parametrize("logits_from", [IncrementalLogits, plain_logits])
@torch.no_grad()
def test_guided_logits_go_from_those_without_the_label_to_those_with_it_and_beyond(logits_from: Any) -> None:
    network, labels = make_prior((2, 3)), torch.arange(10)
    maps = torch.randint(6, (10, 2, 3), generator=seeded(21))
    with_label, without = network(maps, labels), network(maps)
    assert (with_label - without).abs().amax(dim=(1, 2, 3)).min() > 0.1
    for guidance, expected in (
        (0.0, without),
        (0.25, 0.75 * without + 0.25 * with_label),
        (1.0, with_label),
        (3.0, 3 * with_label - 2 * without),
    ):
        logits_at = guided(network, labels, guidance, logits_from)
        for i, j in np.ndindex(2, 3):
            torch.testing.assert_close(logits_at(maps, i, j), expected[:, :, i, j], rtol=0, atol=1e-5)


def test_a_guidance_of_1_is_the_prior_itself_and_one_of_0_the_prior_without_labels() -> None:
    network, labels = make_prior((3, 4)).double(), torch.arange(10)
    labelled, unlabelled = sample(network, 10, seeded(22), labels=labels), sample(network, 10, seeded(22))
    assert not torch.equal(labelled, unlabelled)
    assert torch.equal(sample(network, 10, seeded(22), labels=labels, guidance=1.0), labelled)
    assert torch.equal(sample(network, 10, seeded(22), guidance=1.0), unlabelled)
    assert torch.equal(sample(network, 10, seeded(22), labels=labels, guidance=0.0), unlabelled)


@pytest.mark.parametrize("options", [{}, {"guidance": 2.0, "temperature": 0.8, "top_k": 5, "top_p": 0.9}])
def test_codes_that_are_given_are_kept_and_the_others_are_those_of_the_loop_by_hand(options: dict[str, float]) -> None:
    network, labels = make_prior((3, 4)), torch.arange(10)
    codes = torch.randint(6, (10, 3, 4), generator=seeded(23))
    given = codes.where(torch.rand(codes.shape, generator=seeded(24)) < 0.5, -1)
    drawn = sample(network, 10, seeded(25), labels=labels, given=given, **options)
    assert torch.equal(drawn[given >= 0], given[given >= 0])
    uniforms = torch.rand(10, 3, 4, generator=seeded(25), dtype=torch.float64)
    expected = sample_by_hand(network, uniforms.numpy(), labels.tolist(), given=given, **options)
    assert np.array_equal(drawn.numpy(), expected)


def test_a_draw_heeds_the_given_codes_before_it_and_none_after() -> None:
    network = make_prior((3, 4))
    for place in range(12):
        zero, five = torch.full((2, 60, 12), -1)
        zero[:, place], five[:, place] = 0, 5
        one, other = (sample(network, 60, seeded(26), given=g.view(60, 3, 4)).flatten(1) for g in (zero, five))
        assert torch.equal(one[:, :place], other[:, :place])
        assert (one[:, place + 1 :] != other[:, place + 1 :]).any() == (place < 11)


def test_to_give_no_code_is_plain_sampling_and_to_give_all_gives_them_back() -> None:
    network = make_prior((3, 4))
    plain = sample(network, 9, seeded(27))
    assert torch.equal(sample(network, 9, seeded(27), given=torch.full((9, 3, 4), -1)), plain)
    assert torch.equal(sample(network, 9, seeded(28), given=plain), plain)
    assert not torch.equal(sample(network, 9, seeded(28)), plain)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.full((2, 2, 2), 6), "expected given codes below 6, found 6"),
        (torch.zeros(1, 2, 2, dtype=torch.int64), "int64 of shape (2, 2, 2), found torch.int64 of (1, 2, 2)"),
        (torch.zeros(0, 2, 2, dtype=torch.int64), "int64 of shape (2, 2, 2), found torch.int64 of (0, 2, 2)"),
        (torch.full((2, 2, 3), -1), "int64 of shape (2, 2, 2), found torch.int64 of (2, 2, 3)"),
        (torch.full((2, 2, 2), 2.7), "int64 of shape (2, 2, 2), found torch.float32 of (2, 2, 2)"),
    ],
)
def test_given_codes_that_there_are_none_of_or_of_another_shape_are_refused(given: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        sample(make_prior((2, 2)), 2, seeded(0), given=given)


def test_the_logits_of_each_step_are_those_of_one_pass_over_the_finished_map(monkeypatch: pytest.MonkeyPatch) -> None:
    network = make_prior((7, 7))
    used: list[Tensor] = []

    def recording(logits: Tensor, *options: object) -> Tensor:
        used.append(logits.clone())
        return adjust(logits, *options)

    monkeypatch.setattr(prior.sampling, "adjust", recording)
    labels = torch.tensor([0, 4, 9])
    maps = sample(network, 3, seeded(7), labels=labels)
    with torch.no_grad():
        whole = network(maps, labels).flatten(2)
    assert len(used) == 49
    for position, logits in enumerate(used):
        assert torch.allclose(logits, whole[:, :, position], atol=1e-5)


@pytest.mark.parametrize("label", [None, 7])
def test_frequencies_follow_the_softmax(label: int | None) -> None:
    """Of the first code, and of the first two together."""
    network, num = make_prior((1, 2), num_codes=4), 6000
    labels = None if label is None else torch.full((num,), label)
    drawn = sample(network, num, seeded(8), labels=labels, batch_size=num)
    with torch.no_grad():
        maps = torch.tensor([[[a, b]] for a in range(4) for b in range(4)])
        told = None if label is None else torch.full((16,), label)
        p = network(maps, told).double().softmax(dim=1)
    first = p[0, :, 0, 0]
    pair = (first[:, None] * p[::4, :, 0, 1]).flatten()
    assert first.max() - first.min() > 0.2  # a uniform source would hide mistakes
    assert chi_square(drawn[:, 0, 0], first) < 16.27  # 3 degrees of freedom, once in a thousand
    assert chi_square(drawn[:, 0, 0] * 4 + drawn[:, 0, 1], pair) < 37.70  # 15 degrees of freedom
    assert chi_square(drawn[:, 0, 0], first.flip(0)) > 100


def chi_square(values: Tensor, p: Tensor) -> float:
    expected = p * len(values)
    return ((torch.bincount(values, minlength=len(p)) - expected).square() / expected).sum().item()


@pytest.mark.parametrize(
    "options", [{"top_k": 1}, {"temperature": 1e-6}, {"temperature": 5e-324}, {"top_p": 1e-9}, {"top_p": 5e-324}]
)
def test_the_coldest_sampling_takes_the_likeliest_code_everywhere(options: dict[str, float]) -> None:
    network = make_prior((3, 4))
    greedy = torch.zeros(1, 3, 4, dtype=torch.int64)
    with torch.no_grad():
        for i, j in np.ndindex(3, 4):
            greedy[0, i, j] = network(greedy)[0, :, i, j].argmax()
    assert greedy.unique().numel() > 1
    assert torch.equal(sample(network, 5, seeded(9), **options), greedy.expand(5, -1, -1))


def test_a_top_p_of_1_and_a_top_k_of_all_codes_are_plain_sampling() -> None:
    network = make_prior((3, 4))
    plain = sample(network, 20, seeded(10))
    for options in ({"top_p": 1.0}, {"top_k": 6}, {"top_k": 100}, {"temperature": 1.0, "top_k": 6, "top_p": 1.0}):
        assert torch.equal(sample(network, 20, seeded(10), **options), plain)


def test_top_k_and_top_p_keep_the_codes_that_they_name() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]]).log()
    expected = {
        (2, 1.0): [[0, 4 / 7, 0, 3 / 7], [0.5, 0.5, 0, 0]],  # ties go to the lower codes
        (None, 0.69): [[0, 4 / 7, 0, 3 / 7], [1 / 3, 1 / 3, 1 / 3, 0]],
        (None, 0.71): [[0, 4 / 9, 2 / 9, 3 / 9], [1 / 3, 1 / 3, 1 / 3, 0]],
        (3, 0.5): [[0, 4 / 7, 0, 3 / 7], [0.5, 0.5, 0, 0]],  # 0.4 of 0.9 doesn't reach a half
        (2, 0.45): [[0, 1, 0, 0], [1, 0, 0, 0]],  # but 0.4 of 0.7 does
        (1, 0.1): [[0, 1, 0, 0], [1, 0, 0, 0]],
    }
    for (top_k, top_p), probabilities in expected.items():
        found = adjust(logits, 1.0, top_k, top_p)
        assert torch.allclose(found, torch.tensor(probabilities, dtype=torch.float64), atol=1e-6), (top_k, top_p)


def test_drawing_inverts_the_cumulative_distribution_and_never_takes_an_impossible_code() -> None:
    p = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]], dtype=torch.float64)
    just_below_1 = 1 - 2**-53
    for uniform, code in ((0.0, 1), (0.2499, 1), (0.25, 3), (0.9, 3), (just_below_1, 3)):
        assert draw(p, torch.tensor([uniform], dtype=torch.float64)).tolist() == [code]
    thirds = torch.full((1, 7), 1 / 7, dtype=torch.float64)  # their sum isn't 1 to the last bit
    assert draw(thirds * (1 - 1e-15), torch.tensor([just_below_1], dtype=torch.float64)).tolist() == [6]


LIKELIEST = "type --top-k 1 for the most likely codes"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, f"expected --temperature over 0, found 0; {LIKELIEST}"),
        ({"temperature": -1.0}, f"expected --temperature over 0, found -1; {LIKELIEST}"),
        ({"temperature": math.nan}, f"expected --temperature over 0, found nan; {LIKELIEST}"),
        ({"top_k": 0}, f"expected --top-k of at least 1, found 0; {LIKELIEST}"),
        ({"top_k": -3}, f"expected --top-k of at least 1, found -3; {LIKELIEST}"),
        ({"top_p": 0.0}, "expected --top-p over 0 and at most 1, found 0; type --top-p 1 for all codes"),
        ({"top_p": 1.01}, "expected --top-p over 0 and at most 1, found 1.01; type --top-p 1 for all codes"),
        ({"top_p": -0.5}, "expected --top-p over 0 and at most 1, found -0.5; type --top-p 1 for all codes"),
        ({"top_p": math.nan}, "expected --top-p over 0 and at most 1, found nan; type --top-p 1 for all codes"),
        ({"guidance": -0.5}, "expected --guidance between 0 and 100, found -0.5; type --guidance 1 for none"),
        ({"guidance": 100.5}, "expected --guidance between 0 and 100, found 100.5; type --guidance 1 for none"),
        ({"guidance": math.nan}, "expected --guidance between 0 and 100, found nan; type --guidance 1 for none"),
        ({"guidance": 2.0}, "expected labels with --guidance 2, found none; type --labels 0-9 too"),
        ({"guidance": 0.0}, "expected labels with --guidance 0, found none; type --labels 0-9 too"),
        ({"labels": [0, 10]}, "expected 2 labels in 0..9, found [0, 10]; type --label 7 or --labels 0-9"),
        ({"labels": [-1, 0]}, "expected 2 labels in 0..9, found [-1, 0]; type --label 7 or --labels 0-9"),
        ({"labels": [0, 1, 2]}, "expected 2 labels in 0..9, found [0, 1, 2]; type --label 7 or --labels 0-9"),
    ],
    ids=str,
)
def test_an_option_out_of_its_range_is_an_error_that_names_it(options: dict[str, Any], message: str) -> None:
    labels = {"labels": torch.tensor(options["labels"])} if "labels" in options else {}
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        sample(make_prior((2, 2)), 2, seeded(0), **{**options, **labels})


@pytest.mark.parametrize("options", [{"guidance": 0.0}, {"guidance": 100.0}, {"top_p": 1.0}, {"top_k": 1}], ids=str)
def test_the_ends_of_a_range_are_allowed(options: dict[str, float]) -> None:
    assert sample(make_prior((2, 2)), 2, seeded(0), labels=torch.tensor([0, 9]), **options).shape == (2, 2, 2)


@pytest.mark.parametrize("num_samples", [0, -1])
def test_fewer_than_one_sample_is_an_error(num_samples: int) -> None:
    message = f"expected --num-samples of at least 1, found {num_samples}; type --num-samples 100"
    with pytest.raises(UserError, match=f"^{message}$"):
        sample(make_prior((2, 2)), num_samples, seeded(0))


def test_the_same_seed_gives_the_same_bytes_whatever_the_batch_size() -> None:
    network, labels = make_prior((3, 4)), torch.arange(20) % 10
    expected = sample(network, 20, seeded(11), labels=labels)
    assert expected.shape == (20, 3, 4)
    for batch_size in (1, 3, 7, 20, 100):
        drawn = sample(network, 20, seeded(11), labels=labels, batch_size=batch_size)
        assert drawn.numpy().tobytes() == expected.numpy().tobytes()
    assert not torch.equal(sample(network, 20, seeded(12), labels=labels), expected)


@pytest.mark.parametrize("num_samples", [1, 2, 19])
def test_fewer_samples_are_the_first_of_more(num_samples: int) -> None:
    network = make_prior((3, 4))
    more = sample(network, 20, seeded(13))
    assert torch.equal(sample(network, num_samples, seeded(13), batch_size=8), more[:num_samples])


def test_sampling_leaves_every_global_random_state_alone_and_does_not_read_it() -> None:
    network = make_prior((3, 4))
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    first = sample(network, 9, seeded(14))
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    torch.manual_seed(2)
    assert torch.equal(sample(network, 9, seeded(14)), first)


def test_sampling_is_free_of_dropout_and_restores_the_mode_of_every_module() -> None:
    network = make_prior((3, 4), dropout=0.5)
    expected = sample(network, 9, seeded(15))
    network.train()
    network.layers[2].eval()
    modes = {name: module.training for name, module in network.named_modules()}
    assert torch.equal(sample(network, 9, seeded(15)), expected)
    assert {name: module.training for name, module in network.named_modules()} == modes


def test_the_mode_is_restored_after_an_error_too() -> None:
    network = make_prior((3, 4)).train()
    with pytest.raises(ZeroDivisionError):
        sample(network, 9, seeded(16), progress=lambda num: 1 // 0)
    assert network.training


def test_map_shape_and_number_of_codes_are_the_networks() -> None:
    drawn = sample(make_prior((2, 5), num_codes=9), 200, seeded(17), temperature=100.0)
    assert drawn.shape == (200, 2, 5)
    assert drawn.unique().tolist() == list(range(9))


def test_progress_hears_of_every_map_once() -> None:
    heard: list[int] = []
    sample(make_prior((2, 2)), 10, seeded(18), batch_size=4, progress=heard.append)
    assert sum(heard) == 10
