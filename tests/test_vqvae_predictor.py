"""The prediction term: what each guess may see, its value by hand, whom it trains, and a run with it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vqvae.common import checkpoint, engine
from vqvae.common.data import Split, load_test
from vqvae.model import VQVAE, VQVAEConfig, load_vqvae
from vqvae.predictor import CausalPredictor
from vqvae.train import VQVAETraining, evaluate, objective, train_vqvae

CPU = torch.device("cpu")
FIXTURE = Path(__file__).parent / "fixture"
CONFIG = VQVAEConfig(hidden_size=4, k=8, width=8, num_encoder_blocks=1, num_decoder_blocks=1, codebook_learning="ema")


def make_predictor(map_shape: tuple[int, int] = (7, 7), hidden_size: int = 3) -> CausalPredictor:
    """One in float64, in which no place is like another."""
    torch.manual_seed(0)
    predictor = CausalPredictor(hidden_size, map_shape).double().eval()
    torch.nn.init.normal_(predictor.place)
    return predictor


def random_maps(num: int, map_shape: tuple[int, int] = (7, 7), seed: int = 1, hidden_size: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, hidden_size, *map_shape, generator=generator, dtype=torch.float64)


def is_in_window(seen: tuple[int, int], place: tuple[int, int]) -> bool:
    """Whether the place's guess is made from the code at `seen`: of the two rows above or the two places left."""
    rows_up, columns_left = place[0] - seen[0], place[1] - seen[1]
    return (rows_up in (1, 2) and abs(columns_left) <= 2) or (rows_up == 0 and columns_left in (1, 2))


# --- What a guess is made from


@pytest.mark.parametrize("map_shape", [(7, 7), (3, 5), (1, 4), (4, 1), (1, 1)])
@torch.no_grad()
def test_a_guess_depends_on_every_code_of_its_window_and_on_no_other(map_shape: tuple[int, int]) -> None:
    predictor, maps = make_predictor(map_shape), random_maps(4, map_shape)
    guess = predictor(maps)
    assert guess.shape == maps.shape
    for seen in np.ndindex(map_shape):
        changed = maps.clone()
        changed[:, :, *seen] = random_maps(4, map_shape, seed=2)[:, :, *seen]
        moved = (predictor(changed) - guess).abs().amax(dim=(0, 1))
        for place in np.ndindex(map_shape):
            if is_in_window(seen, place):
                assert seen < place  # so comes before it in raster order
                assert moved[place] > 1e-4, (seen, place)
            else:
                assert moved[place] < 1e-12, (seen, place)


def test_no_gradient_goes_from_a_guess_to_a_code_at_it_or_later() -> None:
    predictor, maps = make_predictor(), random_maps(4).requires_grad_()
    guess = predictor(maps)
    for i, j in np.ndindex(7, 7):
        (gradient,) = torch.autograd.grad(guess[:, :, i, j].sum(), maps, retain_graph=True)
        felt = gradient.abs().amax(dim=(0, 1)) > 0
        assert felt.tolist() == [[is_in_window((row, column), (i, j)) for column in range(7)] for row in range(7)]


@torch.no_grad()
def test_a_map_alone_gets_the_guess_that_it_gets_in_any_batch() -> None:
    predictor, maps = make_predictor(), random_maps(5)
    together = predictor(maps)
    for n in range(5):
        torch.testing.assert_close(predictor(maps[n : n + 1]), together[n : n + 1], rtol=0, atol=1e-12)


# --- The share that is left unexplained


@pytest.mark.parametrize("training", [True, False])
def test_the_unexplained_share_equals_counting_by_hand(training: bool) -> None:
    predictor = make_predictor().train(training)
    z_e, z_q = random_maps(6) + random_maps(1, seed=3), random_maps(6, seed=2)
    guess, values = predictor(z_q).detach().numpy(), z_e.numpy()
    errors, spreads = [], []
    for n, d, i, j in np.ndindex(values.shape):
        errors.append((guess[n, d, i, j] - values[n, d, i, j]) ** 2)
        spreads.append((values[n, d, i, j] - sum(values[m, d, i, j] for m in range(6)) / 6) ** 2)
    assert predictor.unexplained(z_e, z_q).item() == pytest.approx(sum(errors) / sum(spreads), rel=1e-9)


def test_to_guess_right_leaves_nothing_and_to_guess_each_places_mean_leaves_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    predictor, z_e = make_predictor(), random_maps(6) + random_maps(1, seed=3)
    for guess, expected in ((z_e, 0.0), (z_e.mean(dim=0).expand_as(z_e), 1.0)):
        monkeypatch.setattr(predictor, "forward", lambda z_q, guess=guess: guess)
        assert predictor.unexplained(z_e, z_e).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_an_encoder_that_shrinks_its_output_gains_nothing(scale: float) -> None:
    """Nor does one that stretches it: a predictor of the scaled vectors leaves the same share."""
    predictor, scaled = make_predictor(), make_predictor()
    with torch.no_grad():
        for convolution in (scaled.above, scaled.left):
            convolution.weight.div_(scale)
        for parameter in scaled.out[-1].parameters():
            parameter.mul_(scale)
    z_e, z_q = random_maps(6), random_maps(6, seed=2)
    expected = predictor.unexplained(z_e, z_q).item()
    assert scaled.unexplained(scale * z_e, scale * z_q).item() == pytest.approx(expected, rel=1e-9)


def test_the_share_does_not_grow_with_the_batch() -> None:
    predictor, z_e, z_q = make_predictor().train(), random_maps(6), random_maps(6, seed=2)
    twice = predictor.unexplained(z_e.repeat(2, 1, 1, 1), z_q.repeat(2, 1, 1, 1))
    assert twice.item() == pytest.approx(predictor.unexplained(z_e, z_q).item(), rel=1e-9)


def test_a_batch_of_one_has_a_finite_share_and_gradient() -> None:
    predictor, z_e, z_q = make_predictor().train(), random_maps(1).requires_grad_(), random_maps(1, seed=2)
    share = predictor.unexplained(z_e, z_q)
    share.backward()
    assert 0 < share.item() < float("inf")
    for gradient in (z_e.grad, *(parameter.grad for parameter in predictor.parameters())):
        assert gradient.isfinite().all()
        assert gradient.any()


# --- The term among the others


def tiny() -> tuple[VQVAE, CausalPredictor, Tensor]:
    """A model, a predictor for it, and some digits."""
    torch.manual_seed(0)
    model = VQVAE(VQVAEConfig(hidden_size=4, k=8, width=8))
    return model, CausalPredictor(4, model.map_shape), load_test(FIXTURE, download=False).images[:40]


def test_the_term_is_the_unexplained_share_times_its_weight_and_changes_no_other() -> None:
    model, predictor, images = tiny()
    out = model(images.float() / 127.5 - 1)
    share = predictor.unexplained(out.z_e, out.z_q).item()
    without = objective(model, images, VQVAETraining())[0]
    assert "prediction" not in without
    for weight in (0.5, 2.0):
        terms = objective(model, images, VQVAETraining(predictability=weight), predictor)[0]
        assert terms["prediction"].item() == pytest.approx(weight * share, rel=1e-5)
        assert next(iter(terms)) == "total"
        assert terms["total"].item() == pytest.approx(without["total"].item() + weight * share, rel=1e-5)
        for name in ("reconstruction", "codebook", "commitment"):
            assert torch.equal(terms[name], without[name])


def test_the_term_trains_encoder_and_predictor_and_leaves_codebook_and_decoder_alone() -> None:
    model, predictor, images = tiny()
    objective(model, images, VQVAETraining(predictability=0.5), predictor)[0]["prediction"].backward()
    for name, parameter in [*model.encoder[-1].named_parameters(), *predictor.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    for parameter in (model.quantizer.codebook, *model.decoder.parameters()):
        assert parameter.grad is None or not parameter.grad.any()


def test_the_encoder_is_trained_to_be_predicted_and_to_predict() -> None:
    """The gradient at z_e is that of the share by its vectors as what is guessed and, straight through the codes, as
    what the guess is made from."""
    model, predictor, images = tiny()
    x = images.float() / 127.5 - 1
    z_e = model.latents(x).detach().requires_grad_()
    predictor.unexplained(z_e, model.quantizer(z_e).z_q).backward()
    apart = [z_e.detach().clone().requires_grad_(), model.quantizer(z_e).z_q.detach().requires_grad_()]
    predictor.unexplained(*apart).backward()
    assert all(part.grad.any() for part in apart)
    torch.testing.assert_close(z_e.grad, apart[0].grad + apart[1].grad)


def test_evaluation_restores_the_mode_of_the_predictor_too() -> None:
    model, predictor, images = tiny()
    model.eval()
    predictor.train().out.eval()
    modes = [module.training for module in predictor.modules()]
    split = Split(images, torch.zeros(len(images), dtype=torch.int64))
    figures = evaluate(model, split, VQVAETraining(predictability=0.5), predictor)
    assert figures["prediction"] > 0
    assert [module.training for module in predictor.modules()] == modes


# --- A run


def run(folder: Path, num_epochs: int, resume: bool = False, **changes: Any) -> dict[str, float]:
    settings = {"batch_size": 64, "num_epochs": num_epochs, "lr": 5e-3, "predictability": 0.5, **changes}
    common = {"seed": 3, "data_folder": FIXTURE, "device": CPU, "download": False}
    return train_vqvae(CONFIG, VQVAETraining(**settings), output_folder=folder, resume=resume, **common)


def rows(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "vqvae" / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_s"} for line in lines]


def resume_state(folder: Path) -> dict[str, Any]:
    return checkpoint.load_resume_state(folder / "vqvae" / "resume.pt")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """The folder of a run of three epochs with the term, and the figures that it returned."""
    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "LOG_EVERY", 5)
        return folder, run(folder, 3)


def test_a_checkpoint_is_without_the_predictor_and_resuming_has_it(straight: tuple[Path, dict[str, float]]) -> None:
    model, header = load_vqvae(straight[0] / "vqvae.safetensors", CPU)
    assert model.state_dict().keys() == VQVAE(CONFIG).state_dict().keys()
    assert header.recipe["predictability"] == 0.5
    kept = [tensor.shape for tensor in resume_state(straight[0])["model"].values()]
    without = [tensor.shape for tensor in model.state_dict().values()]
    predictor = [tensor.shape for tensor in CausalPredictor(4, (7, 7)).state_dict().values()]
    assert sorted(kept) == sorted(without + predictor)


def test_the_logs_have_the_term_and_it_falls(straight: tuple[Path, dict[str, float]]) -> None:
    ends = [row for row in rows(straight[0]) if "epoch" in row]
    for row in ends:
        for where in ("train", "validation"):
            parts = [row[f"{term}/{where}"] for term in ("reconstruction", "codebook", "commitment", "prediction")]
            assert row[f"total/{where}"] == pytest.approx(sum(parts), rel=1e-5)
    assert ends[-1]["prediction/train"] < 0.95 * ends[0]["prediction/train"]
    assert any("prediction/train_step" in row for row in rows(straight[0]))


def test_a_run_without_the_term_has_it_nowhere(tmp_path: Path) -> None:
    run(tmp_path, 1, predictability=0.0)
    assert not any(name.startswith("prediction") for row in rows(tmp_path) for name in row)
    assert len(resume_state(tmp_path)["model"]) == len(VQVAE(CONFIG).state_dict())


def test_a_run_that_stopped_and_went_on_equals_one_that_did_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, straight: tuple[Path, dict[str, float]]
) -> None:
    folder, figures = straight
    monkeypatch.setattr(engine, "LOG_EVERY", 5)
    run(tmp_path, 1)
    assert run(tmp_path, 3, resume=True) == figures
    one, other = resume_state(folder), resume_state(tmp_path)
    assert one["model"].keys() == other["model"].keys()
    for name, tensor in one["model"].items():
        assert torch.equal(other["model"][name], tensor), name
    for number, moments in one["optimizer"]["state"].items():
        for name, tensor in moments.items():
            assert torch.equal(other["optimizer"]["state"][number][name], tensor), (number, name)
    assert (tmp_path / "vqvae.safetensors").read_bytes() == (folder / "vqvae.safetensors").read_bytes()
    assert rows(tmp_path) == rows(folder)
