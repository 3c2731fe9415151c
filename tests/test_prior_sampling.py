"""Ancestral sampling, held against a loop in NumPy that draws one code after another from whole forward passes."""

import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor

import prior.sampling
from prior.model import NO_LABEL, GatedPixelCNN, PriorConfig
from prior.sampling import adjust, draw, sample
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
) -> np.ndarray:
    """One map at a time, one code at a time, over maps that start as garbage."""
    rng = np.random.default_rng(99)
    maps = rng.integers(network.num_codes, size=uniforms.shape)
    for n, label in enumerate(labels):
        for i, j in np.ndindex(uniforms.shape[1:]):
            logits = network(torch.from_numpy(maps[n : n + 1]), torch.tensor([label]))[0, :, i, j].double().numpy()
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "--temperature over 0, found 0"),
        ({"temperature": -1.0}, "--temperature over 0, found -1"),
        ({"temperature": math.nan}, "--temperature over 0, found nan"),
        ({"top_k": 0}, "--top-k of at least 1, found 0"),
        ({"top_k": -3}, "--top-k of at least 1, found -3"),
        ({"top_p": 0.0}, r"--top-p over 0 and at most 1, found 0"),
        ({"top_p": 1.01}, r"--top-p over 0 and at most 1, found 1.01"),
        ({"top_p": -0.5}, r"--top-p over 0 and at most 1, found -0.5"),
        ({"top_p": math.nan}, r"--top-p over 0 and at most 1, found nan"),
        ({"labels": torch.tensor([0, 10])}, r"2 labels in 0..9, found \[0, 10\]"),
        ({"labels": torch.tensor([-1, 0])}, r"2 labels in 0..9, found \[-1, 0\]"),
        ({"labels": torch.tensor([0, 1, 2])}, r"2 labels in 0..9, found \[0, 1, 2\]"),
    ],
)
def test_an_option_out_of_its_range_is_an_error_that_names_it(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sample(make_prior((2, 2)), 2, seeded(0), **options)


@pytest.mark.parametrize("num_samples", [0, -1])
def test_fewer_than_one_sample_is_an_error(num_samples: int) -> None:
    with pytest.raises(UserError, match=f"--num-samples of at least 1, found {num_samples}"):
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
