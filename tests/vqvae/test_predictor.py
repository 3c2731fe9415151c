import numpy as np
import pytest
import torch
from torch.testing import assert_close

from tests.helpers import make_split, make_vqvae
from vqvae.loss import VQVAETraining, loss_terms
from vqvae.predictor import CausalPredictor


def make_predictor(map_shape: tuple[int, int] = (7, 7)) -> CausalPredictor:
    """A predictor in float64, for which no position is like another."""
    torch.manual_seed(0)
    predictor = CausalPredictor(4, map_shape).double()
    torch.nn.init.normal_(predictor.position_embedding)
    return predictor


def random_vectors(num: int, map_shape: tuple[int, int] = (7, 7), seed: int = 1) -> torch.Tensor:
    return torch.randn(num, 4, *map_shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("map_shape", [(7, 7), (3, 5), (1, 4), (4, 1), (1, 1)])
@torch.no_grad()
def test_a_prediction_depends_on_every_code_of_its_window_and_on_no_other(map_shape: tuple[int, int]) -> None:
    predictor, z_q = make_predictor(map_shape), random_vectors(4, map_shape)
    prediction = predictor(z_q)
    assert_close(predictor(z_q[1:2])[0], prediction[1], rtol=0, atol=1e-12)  # in any batch
    for row, column in np.ndindex(map_shape):
        changed = z_q.clone()
        changed[:, :, row, column] = random_vectors(4, map_shape, seed=2)[:, :, row, column]
        moved = (predictor(changed) - prediction).abs().amax(dim=(0, 1))
        for i, j in np.ndindex(map_shape):
            # It sees two rows above it, up to two columns to each side, and two positions to its left.
            is_seen = (i - row in (1, 2) and abs(j - column) <= 2) or (i == row and j - column in (1, 2))
            assert (moved[i, j] > 1e-4) == (moved[i, j] > 1e-12) == is_seen, (row, column, i, j)


@pytest.mark.parametrize("training", [True, False])
def test_the_unexplained_fraction_equals_counting_by_hand(training: bool) -> None:
    predictor = make_predictor().train(training)
    z_e, z_q = random_vectors(6) + random_vectors(1, seed=3), random_vectors(6, seed=2)
    values, predictions = z_e.numpy(), predictor(z_q).detach().numpy()
    expected = ((predictions - values) ** 2).sum() / ((values - values.mean(axis=0)) ** 2).sum()
    assert predictor.fraction_unexplained(z_e, z_q).item() == pytest.approx(expected, rel=1e-9)
    twice = predictor.fraction_unexplained(z_e.repeat(2, 1, 1, 1), z_q.repeat(2, 1, 1, 1))
    assert twice.item() == pytest.approx(expected, rel=1e-9)  # it does not grow with the batch


def test_a_batch_of_one_has_a_finite_fraction_and_gradient() -> None:
    predictor, z_e, z_q = make_predictor(), random_vectors(1).requires_grad_(), random_vectors(1, seed=2)
    fraction = predictor.fraction_unexplained(z_e, z_q)
    fraction.backward()
    assert fraction.item() == pytest.approx((predictor(z_q) - z_e).square().mean().item() / 1e-3)  # nothing varies
    gradients = [z_e.grad, *(parameter.grad for parameter in predictor.parameters())]
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


def test_the_term_has_its_weight_and_leaves_the_other_terms_codebook_and_decoder_alone() -> None:
    model, images, predictor = make_vqvae(codebook_learning="gradient"), make_split(9).images, make_predictor().float()
    out, training = model(images / 127.5 - 1), VQVAETraining(prediction_weight=2.0)
    expected = 2 * predictor.fraction_unexplained(out.z_e, out.z_q).item()
    without, terms = loss_terms(model, images, training)[0], loss_terms(model, images, training, predictor)[0]
    assert list(terms) == [*without, "prediction"]
    assert terms["prediction"].item() == pytest.approx(expected, rel=1e-5)
    assert terms["total"].item() == pytest.approx(without["total"].item() + expected, rel=1e-5)
    assert all(torch.equal(terms[name], without[name]) for name in without if name != "total")
    # The encoder is trained through z_e, which is predicted, and straight through the codes, which predict.
    apart = [part.detach().requires_grad_() for part in (out.z_e, out.z_q)]
    parts = torch.autograd.grad(predictor.fraction_unexplained(*apart), apart)
    (whole,) = torch.autograd.grad(predictor.fraction_unexplained(out.z_e, out.z_q), out.z_e)
    assert_close(whole, sum(parts))
    assert all(part.any() for part in parts)
    terms["prediction"].backward()
    assert all(parameter.grad.any() for parameter in (*model.encoder[-1].parameters(), *predictor.parameters()))
    for parameter in (model.quantizer.codebook, *model.decoder.parameters()):
        assert parameter.grad is None or not parameter.grad.any()
