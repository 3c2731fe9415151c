from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests.helpers import both_ways, mnist
from vqvae import loss
from vqvae.data.dataset import Split
from vqvae.loss import VQVAETraining, evaluate_vqvae, loss_terms
from vqvae.model import VQVAE, VQVAEConfig, VQVAEOutput
from vqvae.predictor import CausalPredictor
from vqvae.train import summarise

CONFIG = VQVAEConfig(4, 8, 8, 1, 1, "ema", ema_decay=0.9)
SETTINGS = VQVAETraining(batch_size=64, num_epochs=3, lr=5e-3, prediction_weight=0.5)
TERMS = ["total", "reconstruction", "codebook", "commitment"]
DIGITS = mnist().load_test().first(40)
Patch = pytest.MonkeyPatch


def make_model(learning: str = "gradient") -> VQVAE:
    """A model in eval mode whose codes lie where the latents of digits do, so that digits have different maps."""
    torch.manual_seed(0)
    model = VQVAE(replace(CONFIG, codebook_learning=learning), (1, 28, 28)).eval()
    model.quantizer.codebook.data.copy_(model.encode_continuous(DIGITS.images[:8] / 127.5 - 1)[:, :, 3, 3])
    if learning == "ema":
        model.quantizer.initialised.fill_(True)
    return model


@both_ways
def test_the_terms_are_those_of_the_paper_and_beta_scales_one(learning: str) -> None:
    model = make_model(learning)
    terms, x_hat, indices = loss_terms(model, DIGITS.images, VQVAETraining(beta=0.25))
    x = DIGITS.images.double() / 127.5 - 1
    z_e, z_q = model.encode_continuous(x.float()), model.quantizer.lookup(indices)
    distance, raw = (z_e - z_q).square().mean().item(), model.decode_indices(indices)
    expected = [(x - raw).square().mean().item(), distance, 0.25 * distance]
    assert list(terms) == TERMS
    assert [term.item() for term in terms.values()] == pytest.approx([sum(expected), *expected], rel=1e-5)
    assert_close(x_hat, ((raw + 1) / 2).clamp(0, 1), rtol=0, atol=1e-6)


@both_ways
def test_no_term_grows_with_the_batch(learning: str) -> None:
    training, doubled = VQVAETraining(clipped_loss=True), Split(*(torch.cat([part, part]) for part in DIGITS))
    once, twice = (loss_terms(make_model(learning).train(), s.images, training)[0] for s in (DIGITS, doubled))
    assert_close(dict(twice), dict(once), rtol=1e-5, atol=0)
    once, twice = (evaluate_vqvae(make_model(learning), split, training) for split in (DIGITS, doubled))
    assert twice == pytest.approx(once, rel=1e-5)


# Only what is darker than black or brighter than white is forgiven.
@pytest.mark.parametrize(("clipped", "forgiven"), [(True, [0, 2]), (False, [])])
def test_the_clipped_loss_forgives_what_clipping_undoes_and_nothing_else(clipped: bool, forgiven: list[int]) -> None:
    images = torch.tensor([0, 0, 255, 255, 128, 0], dtype=torch.uint8)
    drawn, target = torch.tensor([-1.5, 1.5, 1.25, -3.0, 1.5, -0.75], requires_grad=True), images / 127.5 - 1
    output = VQVAEOutput(drawn, *[torch.zeros(())] * 5)
    terms, x_hat, _ = loss_terms(lambda x: output, images, VQVAETraining(clipped_loss=clipped))
    felt = torch.tensor([i not in forgiven for i in range(6)])
    assert terms["reconstruction"].item() == pytest.approx(((drawn - target).square() * felt).mean().item(), rel=1e-5)
    terms["total"].backward()
    assert torch.equal(drawn.grad != 0, felt)
    assert x_hat[:4].tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("batch", [1, 7, 500])
def test_figures_of_a_split_do_not_depend_on_the_batch_size(monkeypatch: Patch, batch: int) -> None:
    monkeypatch.setattr(loss, "EVALUATION_BATCH", batch)
    model = make_model()
    figures = evaluate_vqvae(model, DIGITS, VQVAETraining())
    out = model(DIGITS.images / 127.5 - 1)  # and now all of it by hand, over the split at once
    x_hat = ((out.x_hat.detach() + 1) / 2).clamp(0, 1)
    errors = (x_hat - DIGITS.images / 255).double().square().mean((1, 2, 3)).numpy()
    share = np.unique(out.indices, return_counts=True)[1] / out.indices.numel()
    assert len(share) > 3
    expected = {"squared_error": errors.mean(), "psnr_db": np.mean(10 * np.log10(1 / errors))}
    expected |= {"perplexity": np.exp(-(share * np.log(share)).sum()), "codes_used": len(share)}
    assert {name: figures[name] for name in figures if name not in TERMS} == pytest.approx(expected, rel=1e-5)
    psnr, perplexity = f"{expected['psnr_db']:.2f}", f"{expected['perplexity']:.0f}"
    text = f"squared error {errors.mean():.5f}, PSNR {psnr} dB, {len(share)} of 8 codes used, perplexity {perplexity}"
    assert summarise(figures, 8) == text


def test_evaluation_restores_the_mode_of_every_module_and_moves_no_average(monkeypatch: Patch) -> None:
    networks = nn.ModuleList([make_model("ema").train(), CausalPredictor(4, (7, 7))])
    networks[0].decoder.eval()  # a mixture, as when a part of a model is frozen
    networks[1].out.eval()
    modes, before, seen = [module.training for module in networks.modules()], deepcopy(networks.state_dict()), []
    networks[1].register_forward_pre_hook(lambda predictor, _: seen.append(predictor.training))
    assert evaluate_vqvae(networks[0], DIGITS, SETTINGS, networks[1])["prediction"] > 0
    assert seen == [False]
    assert [module.training for module in networks.modules()] == modes
    assert_close(networks.state_dict(), before, rtol=0, atol=0)
    perfect = {}, DIGITS.images / 255, torch.zeros(40, 7, 7, dtype=torch.int64)
    monkeypatch.setattr(loss, "loss_terms", lambda *_: perfect)
    assert evaluate_vqvae(networks[0], DIGITS, SETTINGS)["psnr_db"] == pytest.approx(100)  # and not infinite
