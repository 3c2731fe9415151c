from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from vqvae import quantizer
from vqvae.quantizer import VectorQuantizer

LEARNING = ["gradient", "ema"]


def random_latents(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(learning: str, k: int = 16, d: int = 4, decay: float = 0.9, seed: int = 0) -> VectorQuantizer:
    """A quantizer whose codes are spread like unit-Gaussian vectors and whose averages agree with them."""
    torch.manual_seed(seed)
    made = VectorQuantizer(k, d, learning, decay)
    set_codebook(made, random_latents(k, d, seed=seed + 1000))
    return made


def set_codebook(module: VectorQuantizer, codes: Tensor) -> None:
    with torch.no_grad():
        module.codebook.copy_(codes)
        if module.learning == "ema":
            module.sums.copy_(codes * module.counts[:, None])
            module.initialised.fill_(True)


def without_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizer, "RESTART_BELOW", 0.0)


def to_rows(z: Tensor) -> np.ndarray:
    """(B, D, H, W) as float64 rows, position by position, written out so that no reshape can be wrong."""
    z = z.detach().double().numpy()
    b, _, h, w = z.shape
    return np.array([z[i, :, y, x] for i in range(b) for y in range(h) for x in range(w)])


def nearest_by_hand(rows: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest code of each row, and by how much the second nearest is farther."""
    distances = ((rows[:, None, :] - codes[None, :, :]) ** 2).sum(-1)
    two_least = np.sort(distances, axis=1)[:, :2]
    return distances.argmin(1), two_least[:, 1] - two_least[:, 0]


def codebook_of(module: VectorQuantizer) -> np.ndarray:
    return module.codebook.detach().double().numpy().copy()


def buffers(module: VectorQuantizer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_equal_states(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# --- The nearest code


@pytest.mark.parametrize(("k", "d", "scale"), [(16, 4, 1.0), (512, 40, 1.0), (512, 2, 0.01)])
def test_indices_are_the_nearest_codes_in_float64(k: int, d: int, scale: float) -> None:
    module = layer("gradient", k, d)
    set_codebook(module, random_latents(k, d, seed=1) * scale)
    z_e = random_latents(3, d, 7, 5, seed=2) * scale
    expected, gap = nearest_by_hand(to_rows(z_e), codebook_of(module))
    clear = gap > 1e-5 * scale**2  # float32 can't tell apart two codes that are nearer than that
    assert clear.mean() > 0.95
    np.testing.assert_array_equal(module.nearest(z_e).flatten().numpy()[clear], expected[clear])


def test_indices_are_the_nearest_codes_at_the_fresh_codebook_of_the_recipe() -> None:
    torch.manual_seed(0)
    module = VectorQuantizer(512, 40)
    z_e = random_latents(2, 40, 7, 7)
    expected, gap = nearest_by_hand(to_rows(z_e), codebook_of(module))
    clear = gap > 1e-6
    assert clear.mean() > 0.95
    np.testing.assert_array_equal(module.nearest(z_e).flatten().numpy()[clear], expected[clear])


def test_a_vector_between_codes_takes_the_lowest_index() -> None:
    module = layer("gradient", 6, 2)
    # Whole numbers, so that equal distances are equal in float32 too; codes 1 and 4 are one and the same.
    set_codebook(module, torch.tensor([[9.0, 9], [2, 0], [-2, 0], [0, 2], [2, 0], [0, -2]]))
    z_e = torch.tensor([[0.0, 0], [2, 0], [1, 1], [-1, -1]]).T.reshape(1, 2, 1, 4)
    assert module.nearest(z_e).flatten().tolist() == [1, 1, 1, 2]


def test_equal_codes_take_the_lowest_index_wherever_they_stand() -> None:
    module = layer("gradient", 64, 8)
    set_codebook(module, random_latents(16, 8, seed=3).repeat(4, 1))
    assert module.nearest(random_latents(4, 8, 7, 7)).max() < 16


@pytest.mark.parametrize("learning", LEARNING)
def test_z_q_is_the_codebook_at_the_indices(learning: str) -> None:
    module = layer(learning).eval()
    out = module(random_latents(3, 4, 5, 7))
    assert out.indices.shape == (3, 5, 7)
    assert out.indices.dtype == torch.int64
    expected = codebook_of(module)[out.indices.flatten().numpy()]
    np.testing.assert_allclose(to_rows(out.z_q), expected, atol=1e-6)
    np.testing.assert_array_equal(to_rows(module.lookup(out.indices)), expected)


def test_each_position_is_quantised_as_its_own_vector_alone_would_be() -> None:
    module = layer("gradient").eval()
    z_e = random_latents(2, 4, 3, 5)
    out = module(z_e)
    for b in range(2):
        for y in range(3):
            for x in range(5):
                alone = module(z_e[b, :, y, x].reshape(1, 4, 1, 1))
                assert alone.indices.item() == out.indices[b, y, x].item()
                torch.testing.assert_close(alone.z_q.flatten(), out.z_q[b, :, y, x], rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 5, 7, 7), (2, 7, 7, 4), (4, 7, 7), (8, 4)])
@pytest.mark.parametrize("method", ["forward", "nearest"])
def test_latents_of_another_shape_are_refused(shape: tuple[int, ...], method: str) -> None:
    call: Callable[[Tensor], object] = getattr(layer("gradient"), method)
    with pytest.raises(ValueError, match=r"expected z_e of shape \(B, 4, H, W\), found \(") as error:
        call(torch.zeros(shape))
    assert str(shape) in str(error.value)


@pytest.mark.parametrize("learning", LEARNING)
def test_indices_under_autocast_equal_those_without_it(learning: str) -> None:
    module = layer(learning, 512, 40).eval()
    z_e = random_latents(4, 40, 7, 7)
    plain = module(z_e).indices
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(z_e).indices, plain)
        assert torch.equal(module.nearest(z_e), plain)
    half = z_e.bfloat16()  # what an encoder under autocast hands over
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module.nearest(half), module.nearest(half.float()))
    # The case is not too easy: distances that are themselves rounded to bfloat16 give other indices.
    rows, codes = half.permute(0, 2, 3, 1).reshape(-1, 40), module.codebook.detach().bfloat16()
    assert not torch.equal((codes.pow(2).sum(1) - 2 * rows @ codes.T).argmin(1), module.nearest(half).flatten())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("learning", LEARNING)
def test_on_cuda_indices_under_autocast_are_those_of_the_cpu(learning: str) -> None:
    module, z_e = layer(learning, 512, 40).eval(), random_latents(4, 40, 7, 7)
    expected = module(z_e).indices
    module.cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert torch.equal(module(z_e.cuda()).indices.cpu(), expected)


# --- The two latent terms and their gradients


@pytest.mark.parametrize("learning", LEARNING)
def test_the_latent_terms_are_the_mean_squared_distance_to_the_chosen_codes(learning: str) -> None:
    module = layer(learning).eval()
    z_e = random_latents(3, 4, 5, 7)
    rows, codes = to_rows(z_e), codebook_of(module)
    chosen, _ = nearest_by_hand(rows, codes)
    expected = ((rows - codes[chosen]) ** 2).mean()
    out = module(z_e)
    assert out.codebook_loss.item() == pytest.approx(expected, rel=1e-5)
    assert out.commitment_loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_codebook_term_moves_the_codebook_only() -> None:
    module = layer("gradient")
    z_e = random_latents(2, 4, 3, 5).requires_grad_()
    rows, codes = to_rows(z_e), codebook_of(module)
    chosen, _ = nearest_by_hand(rows, codes)
    expected = np.zeros_like(codes)
    for row, k in zip(rows, chosen, strict=True):
        expected[k] += 2 * (codes[k] - row) / rows.size
    module(z_e).codebook_loss.backward()
    assert z_e.grad is None or not z_e.grad.any()
    np.testing.assert_allclose(module.codebook.grad.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("learning", LEARNING)
def test_the_commitment_term_moves_the_encoder_only(learning: str) -> None:
    module = layer(learning).eval()
    z_e = random_latents(2, 4, 3, 5).requires_grad_()
    rows, codes = to_rows(z_e), codebook_of(module)
    chosen, _ = nearest_by_hand(rows, codes)
    module(z_e).commitment_loss.backward()
    assert module.codebook.grad is None or not module.codebook.grad.any()
    np.testing.assert_allclose(to_rows(z_e.grad), 2 * (rows - codes[chosen]) / rows.size, atol=1e-6)


@pytest.mark.parametrize("learning", LEARNING)
def test_the_gradient_at_z_q_reaches_z_e_unchanged_and_the_codebook_not_at_all(learning: str) -> None:
    module = layer(learning)
    z_e = random_latents(2, 4, 3, 5).requires_grad_()
    towards = random_latents(2, 4, 3, 5, seed=9)
    module(z_e).z_q.backward(towards)
    assert torch.equal(z_e.grad, towards)
    assert module.codebook.grad is None or not module.codebook.grad.any()


# --- Learning by moving averages


def test_a_learned_codebook_is_a_parameter_and_an_averaged_one_is_a_buffer() -> None:
    assert [name for name, _ in layer("gradient").named_parameters()] == ["codebook"]
    averaged = layer("ema")
    assert list(averaged.parameters()) == []
    assert not averaged.codebook.requires_grad
    assert set(averaged.state_dict()) == {"codebook", "counts", "sums", "initialised"}


@pytest.mark.parametrize("decay", [0.5, 0.99])
def test_averages_after_many_steps_equal_the_analytic_ones(monkeypatch: pytest.MonkeyPatch, decay: float) -> None:
    without_restarts(monkeypatch)
    num_steps = 30
    module = layer("ema", k=12, d=3, decay=decay)
    first_counts, first_sums = module.counts.double().numpy().copy(), module.sums.double().numpy().copy()
    codes = codebook_of(module)
    per_step_counts, per_step_sums = [], []
    for step in range(num_steps):
        z_e = random_latents(2, 3, 3, 3, seed=step)
        rows = to_rows(z_e)
        chosen, _ = nearest_by_hand(rows, codes)
        np.testing.assert_array_equal(module(z_e).indices.flatten().numpy(), chosen)
        one_hot = np.eye(12)[chosen]
        per_step_counts.append(one_hot.sum(0))
        per_step_sums.append(one_hot.T @ rows)
        codes = codebook_of(module)
    ages = decay ** np.arange(num_steps - 1, -1, -1) * (1 - decay)
    counts = decay**num_steps * first_counts + np.tensordot(ages, np.array(per_step_counts), 1)
    sums = decay**num_steps * first_sums + np.tensordot(ages, np.array(per_step_sums), 1)
    np.testing.assert_allclose(module.counts.numpy(), counts, rtol=1e-4)
    np.testing.assert_allclose(module.sums.numpy(), sums, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(codes, sums / counts[:, None], rtol=1e-3, atol=1e-4)


def test_a_code_that_nothing_chose_keeps_its_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    without_restarts(monkeypatch)
    module = layer("ema", k=4, d=2, decay=0.5)
    set_codebook(module, torch.tensor([[1.0, 1], [-1, -1], [60, 70], [0.3, -0.1]]))
    before = module.codebook.clone()
    # Long enough for the unused code's count to fade to nothing: half to the power of 300.
    for step in range(300):
        out = module(random_latents(4, 2, 3, 3, seed=step))
        assert 2 not in out.indices
        assert torch.equal(module.codebook[2], before[2])
        assert torch.isfinite(module.codebook).all()
        assert module.codebook.norm(dim=1).max() <= before[2].norm()
    assert not torch.equal(module.codebook[0], before[0])


def test_no_norm_grows_from_a_fresh_layer_with_many_codes_unused() -> None:
    torch.manual_seed(0)
    module = VectorQuantizer(512, 8, "ema", 0.99)
    longest = 0.0
    for step in range(40):
        z_e = random_latents(2, 8, 3, 3, seed=step)
        longest = max(longest, z_e.norm(dim=1).max().item())
        module(z_e)
        # Each code is an average of vectors that were seen, so none can be longer than the longest.
        assert module.codebook.norm(dim=1).max() < 1.01 * longest


def test_z_q_comes_from_the_codebook_that_chose_it() -> None:
    module = layer("ema", decay=0.5)
    before = module.codebook.clone()
    z_e = random_latents(4, 4, 5, 5)
    out = module(z_e)
    assert (module.codebook - before).abs().max() > 0.01
    old = before[out.indices].permute(0, 3, 1, 2)
    torch.testing.assert_close(out.z_q, old, rtol=0, atol=1e-6)
    assert out.codebook_loss.item() == pytest.approx((old - z_e).square().mean().item(), rel=1e-5)


# --- Initialisation and restarts


def test_codes_start_from_the_means_of_the_first_batch() -> None:
    torch.manual_seed(0)
    module = VectorQuantizer(4, 2, "ema", 0.9)
    centres = torch.tensor([[5.0, 5], [-5, 5], [5, -5], [-5, -5]])
    z_e = (centres.repeat(50, 1) + 0.1 * random_latents(200, 2)).reshape(200, 2, 1, 1)
    module(z_e)
    rows, codes = to_rows(z_e), codebook_of(module)
    chosen, _ = nearest_by_hand(rows, codes)
    for k in range(4):
        if (chosen == k).any():
            np.testing.assert_allclose(codes[k], rows[chosen == k].mean(0), atol=0.05)
    assert module.initialised


@pytest.mark.parametrize("num_vectors", [1, 2, 5, 31])
def test_fewer_vectors_than_codes_give_different_finite_codes(num_vectors: int) -> None:
    torch.manual_seed(0)
    module = VectorQuantizer(32, 4, "ema", 0.5)  # forgets fast, so that codes die and restart within a few steps
    restarted = 0
    for step in range(12):
        before = module.codebook.clone()
        unused = torch.ones(32, dtype=torch.bool)
        unused[module(random_latents(num_vectors, 4, 1, 1, seed=step)).indices.flatten()] = False
        if step > 0:
            restarted += int((module.codebook != before).any(1)[unused].sum())
        for tensor in (module.codebook, module.counts, module.sums):
            assert torch.isfinite(tensor).all()
        assert len(module.codebook.unique(dim=0)) == 32
    assert restarted > 0


def test_equal_vectors_in_the_first_batch_give_different_codes() -> None:
    torch.manual_seed(0)
    module = VectorQuantizer(16, 4, "ema", 0.9)
    module(random_latents(2, 4, 1, 1).repeat(20, 1, 1, 1))  # forty vectors, of which two are different
    assert len(module.codebook.unique(dim=0)) == 16


def test_a_dead_code_restarts_near_a_vector_of_the_batch_with_sum_and_count() -> None:
    module = layer("ema", k=4, d=2, decay=0.5)
    set_codebook(module, torch.tensor([[1.0, 1], [-1, -1], [1, -1], [60, 70]]))
    torch.manual_seed(0)
    step, z_e = 0, random_latents(4, 2, 3, 3)
    while torch.equal(module.codebook[3], torch.tensor([60.0, 70])):
        z_e = random_latents(4, 2, 3, 3, seed=step)
        module(z_e)
        step += 1
        assert step < 10
    to_batch = torch.cdist(module.codebook[3:], z_e.permute(0, 2, 3, 1).reshape(-1, 2)).min()
    assert to_batch < 0.02
    assert module.counts[3] >= 1
    torch.testing.assert_close(module.sums[3], module.codebook[3] * module.counts[3])


def test_the_step_after_a_restart_does_not_undo_it() -> None:
    module = layer("ema", k=4, d=2, decay=0.5)
    set_codebook(module, torch.tensor([[1.0, 1], [-1, -1], [1, -1], [60, 70]]))
    module.counts[3] = 0.0
    module.sums[3] = 0.0
    torch.manual_seed(0)
    module(random_latents(4, 2, 3, 3, seed=0))
    restarted, others = module.codebook[3].clone(), module.codebook[:3].clone()
    assert restarted.norm() < 10
    # A batch on top of the other codes: nothing chooses the restarted one, and it stays where it is.
    out = module(others.reshape(3, 2, 1, 1).repeat(12, 1, 1, 1))
    assert 3 not in out.indices
    assert torch.equal(module.codebook[3], restarted)
    # One vector on top of it, and it stays there too; a stale sum would drag it off.
    before = module.codebook[3].clone()
    out = module(before.reshape(1, 2, 1, 1).repeat(4, 1, 1, 1))
    assert (out.indices == 3).all()
    torch.testing.assert_close(module.codebook[3], before, rtol=0, atol=1e-5)


# --- Eval mode, saving and loading


@pytest.mark.parametrize("initialised", [False, True])
def test_in_eval_mode_a_forward_pass_changes_nothing(initialised: bool) -> None:
    torch.manual_seed(0)
    module = VectorQuantizer(16, 4, "ema", 0.5)
    if initialised:
        module(random_latents(4, 4, 3, 3))
    module.eval()
    before = buffers(module)
    for step in range(5):
        module(random_latents(4, 4, 3, 3, seed=step))
        module.nearest(random_latents(4, 4, 3, 3, seed=step))
    assert_equal_states(buffers(module), before)
    assert bool(module.initialised) is initialised


def test_a_layer_that_was_saved_and_loaded_goes_on_as_if_it_had_not_been() -> None:
    torch.manual_seed(0)
    module = VectorQuantizer(16, 4, "ema", 0.5)
    for step in range(3):
        module(random_latents(4, 4, 3, 3, seed=step))
    torch.manual_seed(77)
    loaded = VectorQuantizer(16, 4, "ema", 0.5)
    loaded.load_state_dict(buffers(module))
    assert_equal_states(buffers(loaded), buffers(module))
    for step in range(3, 10):
        for copy in (module, loaded):
            torch.manual_seed(step)  # restarts draw from the global generator
            copy(random_latents(4, 4, 3, 3, seed=step))
    assert_equal_states(buffers(loaded), buffers(module))


@pytest.mark.parametrize("num_vectors", [5, 100])
def test_restarts_are_the_same_where_nothing_is_asked_first(num_vectors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    states, draws = [], []
    draw = quantizer._draw
    monkeypatch.setattr(quantizer, "_draw", lambda *args: draws.append(cheap) or draw(*args))
    for cheap in (True, False):
        monkeypatch.setattr(quantizer, "_is_cheap_to_read", lambda tensor, cheap=cheap: cheap)
        torch.manual_seed(0)
        module = VectorQuantizer(32, 4, "ema", 0.8)
        for step in range(12):
            torch.manual_seed(step)
            module(random_latents(num_vectors, 4, 1, 1, seed=step))
        states.append(buffers(module))
    assert 1 < draws.count(True) < 13 == draws.count(False)  # the first draw is the start's
    assert_equal_states(*states)


def test_only_the_first_batch_initialises(monkeypatch: pytest.MonkeyPatch) -> None:
    without_restarts(monkeypatch)
    torch.manual_seed(0)
    module = VectorQuantizer(8, 4, "ema", 0.999)
    module(random_latents(8, 4, 3, 3))
    before = module.codebook.clone()
    module(10 + random_latents(8, 4, 3, 3, seed=1))  # far off: a second k-means would leap there
    assert (module.codebook - before).norm(dim=1).max() < 1.5
