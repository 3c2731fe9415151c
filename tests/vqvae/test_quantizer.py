import re
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.helpers import both_ways, devices
from vqvae import quantizer
from vqvae.errors import InputError
from vqvae.quantizer import VectorQuantizer, codes_used, count_codes, perplexity


def random_latents(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_layer(learning: str, codes: Tensor | None = None, decay: float = 0.9) -> VectorQuantizer:
    """A layer with these codes, by default 16 of 4 dimensions, and with averages that agree with them."""
    codes = random_latents(16, 4, seed=1000) if codes is None else codes
    layer = VectorQuantizer(*codes.shape, learning, decay)
    averages = {"counts": torch.ones(len(codes)), "sums": codes, "initialised": torch.tensor(True)}
    layer.load_state_dict({"codebook": codes, **(averages if learning == "ema" else {})})
    return layer


def to_rows(z: Tensor) -> np.ndarray:
    """(B, D, H, W) as (B H W, D) in float64."""
    return np.moveaxis(z.detach().double().numpy(), 1, -1).reshape(-1, z.shape[1])


def by_hand(layer: VectorQuantizer, z_e: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The vectors (N, D), the codes (K, D), the nearest code of each vector, and how much farther the second one is."""
    rows, codes = to_rows(z_e), layer.codebook.detach().double().numpy().copy()
    distances = ((rows[:, None] - codes) ** 2).sum(-1)
    two_least = np.sort(distances, axis=1)[:, :2]
    return rows, codes, distances.argmin(1), two_least[:, 1] - two_least[:, 0]


@both_ways
@pytest.mark.parametrize(("k", "d", "scale"), [(16, 4, 1.0), (512, 40, 1.0), (512, 2, 0.01)])
def test_z_q_is_the_code_that_is_nearest_in_float64(learning: str, k: int, d: int, scale: float) -> None:
    layer, z_e = make_layer(learning, random_latents(k, d, seed=1) * scale).eval(), random_latents(3, d, 7, 5) * scale
    _, codes, expected, gap = by_hand(layer, z_e)
    out = layer(z_e)
    assert (out.indices.shape, out.indices.dtype) == ((3, 7, 5), torch.int64)
    clear = gap > 1e-5 * scale**2  # float32 cannot tell apart two codes that are nearer to each other than that
    assert clear.mean() > 0.95
    np.testing.assert_array_equal(out.indices.flatten().numpy()[clear], expected[clear])
    np.testing.assert_array_equal(to_rows(layer.lookup(out.indices)), codes[out.indices.flatten()])
    assert torch.equal(out.z_q, layer.lookup(out.indices))  # to the last bit, though z_e took part
    assert layer.nearest(z_e[1:2, :, 4:5, 3:4]).item() == out.indices[1, 4, 3]  # alone


def test_a_vector_between_codes_takes_the_lowest_index() -> None:
    # Whole numbers, so that equal distances are equal in float32 too. Codes 1 and 4 are equal.
    layer = make_layer("gradient", torch.tensor([[9.0, 9], [2, 0], [-2, 0], [0, 2], [2, 0], [0, -2]]))
    z_e = torch.tensor([[0.0, 0], [2, 0], [1, 1], [-1, -1]]).T.reshape(1, 2, 1, 4)
    assert layer.nearest(z_e).flatten().tolist() == [1, 1, 1, 2]


@both_ways
@pytest.mark.parametrize("positions", [(), (9,), (7, 5), (2, 3, 4), (0,)])
def test_any_number_of_positions_is_quantised_vector_by_vector_with_channels_where_they_are_said_to_be(
    learning: str, positions: tuple[int, ...]
) -> None:
    first, last, z_e = make_layer(learning), make_layer(learning), random_latents(4, 4, *positions)  # N may equal D
    last.channel_axis = VectorQuantizer(16, 4, channel_last=True).channel_axis
    _, codes, expected, _ = by_hand(first, z_e)
    torch.manual_seed(0)  # for restarts
    out, _ = first(z_e), torch.manual_seed(0)
    moved = last(z_e.movedim(1, -1))
    assert out.indices.shape == (4, *positions)
    np.testing.assert_array_equal(out.indices.flatten().numpy(), expected)
    np.testing.assert_array_equal(to_rows(out.z_q), codes[expected])
    assert torch.equal(moved.indices, out.indices)
    assert torch.equal(moved.z_q, out.z_q.movedim(1, -1))
    assert_close(first.state_dict(), last.state_dict(), rtol=0, atol=0)  # after an update


@pytest.mark.parametrize("shape", [(2, 5, 7, 7), (8, 9, 4), (4,), (8, 4, 9)])
def test_latents_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    last = shape == (8, 4, 9)  # which is right where the channels come first
    layer, expected = VectorQuantizer(8, 4, channel_last=last), "(B, ..., 4)" if last else "(B, 4, ...)"
    for method in (layer.forward, layer.nearest):
        with pytest.raises(ValueError, match=re.escape(f"expected z_e of shape {expected}, found {shape}")):
            method(torch.zeros(shape))


@pytest.mark.parametrize("offset", [0.0, 1.0, -1e2, 1e3, 1e4])
@pytest.mark.parametrize(("k", "d"), [(512, 16), (64, 2), (33, 1)])
def test_far_from_the_origin_the_codes_are_those_of_float64(offset: float, k: int, d: int) -> None:
    layer, z_e = make_layer("gradient", random_latents(k, d, seed=1) + offset), random_latents(4, d, 9, 9) + offset
    _, _, expected, gap = by_hand(layer, z_e)
    wrong = layer.nearest(z_e).flatten().numpy() != expected
    assert gap[wrong].max(initial=0) < 1e-5  # a tie, but for rounding


def test_no_more_distances_are_in_memory_than_a_few_megabytes_take(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, z_e, sizes, addmm = make_layer("gradient"), random_latents(10, 4, 9, 9), [], torch.addmm
    expected = layer.nearest(z_e)
    monkeypatch.setattr(torch, "addmm", lambda *a, **b: sizes.append((out := addmm(*a, **b)).numel()) or out)
    for most in (1, 100, 1000):
        monkeypatch.setattr(quantizer, "MOST_DISTANCES", most)
        sizes.clear()
        assert torch.equal(layer.nearest(z_e), expected)
        assert max(sizes) <= max(most, 16)  # one vector at a time at least


@both_ways
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_layer_starts_and_trains_in_every_type(learning: str, dtype: torch.dtype) -> None:
    layer, z_e = VectorQuantizer(16, 4, learning, 0.9).to(dtype), random_latents(8, 4, 5, 5).to(dtype).requires_grad_()
    for _ in range(3):
        out = layer(z_e)
        sum(out[2:], out.z_q.mean()).backward()
    assert {part.dtype for part in (out.z_q, *out[2:], z_e.grad)} == {dtype}
    assert all(tensor.isfinite().all() for tensor in (out.z_q, *out[2:], z_e.grad, *layer.state_dict().values()))
    _, _, expected, gap = by_hand(layer, z_e)
    assert gap[layer.nearest(z_e).flatten().numpy() != expected].max(initial=0) < 1e-5


def test_nothing_to_quantise_changes_no_code_and_does_not_start_the_codebook() -> None:
    layer, nothing = VectorQuantizer(16, 4, "ema"), torch.zeros(0, 4, 7, 7)
    assert [part.shape for part in layer(nothing)[:2]] == [(0, 4, 7, 7), (0, 7, 7)]
    assert not layer.initialised
    layer(random_latents(2, 4, 7, 7))
    before = layer.codebook.clone()
    layer(nothing)
    assert layer.initialised
    assert torch.equal(layer.codebook, before)


@pytest.mark.parametrize("settings", [(8, 4, "EMA"), (0, 4), (8, 0), (8, 4, "ema", 1.1)])
def test_a_layer_that_cannot_be_is_refused(settings: tuple[Any, ...]) -> None:
    with pytest.raises(InputError, match="choose"):
        VectorQuantizer(*settings)


@both_ways
@devices
def test_indices_under_autocast_equal_those_without_it(learning: str, device: str) -> None:
    layer, z_e = make_layer(learning, random_latents(512, 40, seed=1)).eval(), random_latents(4, 40, 7, 7)
    half = z_e.bfloat16()  # what an encoder under autocast hands over
    plain, plain_half = layer(z_e).indices, layer.nearest(half.float())
    # The case is not too easy: distances that are themselves rounded to bfloat16 give other indices.
    rows, codes = half.permute(0, 2, 3, 1).reshape(-1, 40), layer.codebook.detach().bfloat16()
    assert not torch.equal((codes.pow(2).sum(1) - 2 * rows @ codes.T).argmin(1), plain_half.flatten())
    layer.to(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(layer(z_e.to(device)).indices.cpu(), plain)
        assert torch.equal(layer(half.to(device)).indices.cpu(), plain_half)
        assert layer(half.to(device)).z_q.dtype == torch.bfloat16


def test_the_codebook_term_moves_the_codebook_only_and_the_commitment_term_the_encoder_only() -> None:
    layer, z_e = make_layer("gradient"), random_latents(2, 4, 3, 5).requires_grad_()
    rows, codes, chosen, _ = by_hand(layer, z_e)
    slope, pull = 2 * (rows - codes[chosen]) / rows.size, np.zeros_like(codes)
    np.add.at(pull, chosen, -slope)
    _, _, *losses = layer(z_e)
    assert [loss.item() for loss in losses] == pytest.approx([((rows - codes[chosen]) ** 2).mean()] * 2, rel=1e-5)
    for loss, at_codebook, at_z_e in zip(losses, (pull, 0 * pull), (0 * slope, slope), strict=True):
        found = torch.autograd.grad(loss, (layer.codebook, z_e), retain_graph=True, materialize_grads=True)
        np.testing.assert_allclose(found[0].detach().numpy(), at_codebook, atol=1e-6)
        np.testing.assert_allclose(to_rows(found[1]), at_z_e, atol=1e-6)
        assert [part.any() for part in found] == [at_codebook.any(), at_z_e.any()]  # zero exactly


def test_a_learned_codebook_is_a_parameter_and_an_averaged_one_is_a_buffer() -> None:
    torch.manual_seed(0)
    learned, averaged = VectorQuantizer(100, 4), VectorQuantizer(100, 4, "ema")
    assert [name for name, _ in learned.named_parameters()] == list(learned.state_dict()) == ["codebook"]
    assert 0.0098 < learned.codebook.abs().max() <= 0.01  # uniform in -1/K..1/K
    assert (list(averaged.parameters()), averaged.decay) == ([], 0.99)
    assert list(averaged.state_dict()) == ["codebook", "counts", "sums", "initialised"]


@pytest.mark.parametrize("decay", [0.5, 0.99])
def test_averages_are_analytic_and_an_unused_code_stays(monkeypatch: pytest.MonkeyPatch, decay: float) -> None:
    monkeypatch.setattr(quantizer, "RESTART_BELOW", 0.0)
    layer = make_layer("ema", torch.cat([random_latents(15, 4, seed=1), torch.full((1, 4), 60.0)]), decay)
    counts, sums = layer.counts.double().numpy(), layer.sums.double().numpy()
    for step in range(200):  # so many that an unused code's count fades to nothing: half to the power of 200
        z_e = random_latents(2, 4, 3, 3, seed=step)
        rows, before, chosen, _ = by_hand(layer, z_e)
        out = layer(z_e)
        # What is returned comes from the codebook that chose it, not from the one updated in this step.
        np.testing.assert_array_equal(out.indices.flatten().numpy(), chosen)
        np.testing.assert_allclose(to_rows(out.z_q), before[chosen], atol=1e-6)
        assert out.codebook_loss.item() == pytest.approx(((before[chosen] - rows) ** 2).mean(), rel=1e-5)
        one_hot = np.eye(16)[chosen]
        counts = decay * counts + (1 - decay) * one_hot.sum(0)
        sums = decay * sums + (1 - decay) * one_hot.T @ rows
    np.testing.assert_allclose(layer.counts.numpy(), counts, rtol=1e-4, atol=1e-30)
    np.testing.assert_allclose(layer.sums.numpy(), sums, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer.codebook.numpy(), sums / counts[:, None], rtol=1e-3, atol=1e-4)
    assert layer.codebook[15].tolist() == [60] * 4


def test_the_codebook_starts_once_from_k_means_on_the_first_batch() -> None:
    torch.manual_seed(0)
    layer, z_e = VectorQuantizer(8, 2, "ema", decay=1.0), random_latents(200, 2, 1, 1)
    layer(z_e)  # a decay of 1 forgets nothing, so that the first step changes nothing
    rows, codes, chosen, _ = by_hand(layer, z_e)
    np.testing.assert_allclose(codes, [rows[chosen == k].mean(0) for k in range(8)], atol=0.05)
    assert (layer.initialised.item(), layer.counts.tolist()) == (True, [200 / 8] * 8)
    assert_close(layer.sums, layer.codebook * 25)
    layer(10 + z_e)  # far off: a second k-means would leap there
    np.testing.assert_allclose(layer.codebook.numpy(), codes, atol=1e-6)


@pytest.mark.parametrize(("num_vectors", "decay"), [(1, 0.5), (2, 0.99), (5, 0.5), (31, 0.5)])
def test_few_vectors_give_different_codes_none_longer_than_a_vector(num_vectors: int, decay: float) -> None:
    torch.manual_seed(0)
    layer, longest = VectorQuantizer(32, 4, "ema", decay), 0.0
    for step in range(12):  # with a decay of 0.5, codes die and restart within a few steps
        z_e = random_latents(num_vectors, 4, 1, 1, seed=step)
        longest = max(longest, z_e.norm(dim=1).max().item())
        layer(z_e)
        assert all(torch.isfinite(tensor).all() for tensor in (layer.codebook, layer.counts, layer.sums))
        assert len(layer.codebook.unique(dim=0)) == 32
        assert layer.codebook.norm(dim=1).max() < 1.01 * longest


def test_no_more_dead_codes_restart_in_a_step_than_there_are_vectors() -> None:
    layer = make_layer("ema", random_latents(32, 4, seed=1), decay=1.0)  # which forgets nothing
    share, z_e = 5 / 32, 20 + 5 * random_latents(5, 4, 1, 1)  # an even share of five vectors
    layer.counts[:12], layer.counts[12:] = 0.16 * share, 0.14 * share  # a code is dead below 0.15 of it
    layer.sums.copy_(layer.codebook * layer.counts[:, None])
    before = layer.codebook.clone()
    torch.manual_seed(0)
    layer(z_e)
    # Of the dead ones the first five restart, each from another vector, with an even share of the counts and its sum.
    fresh, others = slice(12, 17), [*range(12), *range(17, 32)]
    distances, nearest = torch.cdist(layer.codebook[fresh], z_e.flatten(1)).min(dim=1)
    assert distances.max() < 0.1
    assert sorted(nearest.tolist()) == [0, 1, 2, 3, 4]
    assert layer.counts[fresh].tolist() == pytest.approx([share] * 5)
    assert_close(layer.sums[fresh], layer.codebook[fresh] * share)
    assert_close(layer.codebook[others], before[others])


@pytest.mark.parametrize("num_vectors", [5, 100])
def test_restarts_are_the_same_where_nothing_is_read_first(num_vectors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    states, draws, draw = [], [], quantizer._draw_rows
    monkeypatch.setattr(quantizer, "_draw_rows", lambda *args: draws.append(waits) or draw(*args))
    for waits in (False, True):
        monkeypatch.setattr(quantizer, "_reading_waits", lambda tensor, waits=waits: waits)
        layer = VectorQuantizer(32, 4, "ema", 0.8)
        for step in range(12):
            torch.manual_seed(step)
            layer(random_latents(num_vectors, 4, 1, 1, seed=step))
        states.append(layer.state_dict())
    assert 1 < draws.count(False) < 13 == draws.count(True)  # the first draw is the start's
    assert_close(*states, rtol=0, atol=0)


def test_a_layer_that_was_saved_and_loaded_goes_on_as_if_it_had_not_been_and_eval_mode_changes_nothing() -> None:
    layer, loaded = VectorQuantizer(16, 4, "ema", 0.5), VectorQuantizer(16, 4, "ema", 0.5)
    for step in range(7):
        before = deepcopy(layer.state_dict())
        layer.eval()(random_latents(4, 4, 3, 3, seed=99))
        assert_close(layer.state_dict(), before, rtol=0, atol=0)
        for each in (layer, loaded)[: 1 + (step > 0)]:
            torch.manual_seed(step)  # restarts draw from the global generator
            each.train()(random_latents(4, 4, 3, 3, seed=step))
        if step == 0:
            loaded.load_state_dict(deepcopy(layer.state_dict()))
        assert_close(loaded.state_dict(), layer.state_dict(), rtol=0, atol=0)


def test_counts_add_up_over_batches_and_perplexity_is_that_of_the_sum() -> None:
    indices = (torch.rand(10, 7, 7, generator=torch.Generator().manual_seed(0)).square() * 20).long()
    counts = count_codes(indices, 32)
    assert counts.tolist() == [int((indices == code).sum()) for code in range(32)]
    assert torch.equal(sum(count_codes(part, 32) for part in indices.split(3)), counts)
    p = np.array([5, 1, 10, 4]) / 20
    assert perplexity(torch.tensor([5, 0, 1, 10, 4])) == pytest.approx(2 ** -(p * np.log2(p)).sum(), rel=1e-12)
    for even, expected in (([7] * 512, 512), ([0, 1, 0], 1), ([3, 0, 3, 0], 2)):
        assert perplexity(torch.tensor(even)) == pytest.approx(expected, rel=1e-12)
        assert codes_used(torch.tensor(even)) == expected
