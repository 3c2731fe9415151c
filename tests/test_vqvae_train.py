import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from vqvae import quantizer
from vqvae import train as stage
from vqvae.common import checkpoint, engine
from vqvae.common.data import Split, load_test, load_train_and_validation
from vqvae.common.errors import UserError
from vqvae.model import VQVAE, Forward, VQVAEConfig, load_vqvae
from vqvae.train import VQVAETraining, decode, evaluate, objective, reconstruct, train_vqvae

CPU = torch.device("cpu")
FIXTURE = Path(__file__).parent / "fixture"
STEPS = 7  # of an epoch: 440 training digits in batches of 64


def tiny_config(learning: str = "ema") -> VQVAEConfig:
    return VQVAEConfig(
        hidden_size=4,
        k=8,
        width=8,
        num_encoder_blocks=1,
        num_decoder_blocks=1,
        codebook_learning=learning,
        ema_decay=0.9,
    )


def tiny(learning: str = "ema") -> VQVAE:
    """A model whose codes lie where its latents do, so that images get different maps."""
    torch.manual_seed(0)
    model = VQVAE(tiny_config(learning))
    latents = model.latents(torch.rand(16, 1, 28, 28) * 2 - 1).detach().permute(0, 2, 3, 1).reshape(-1, 4)
    with torch.no_grad():
        model.quantizer.codebook.copy_(latents[torch.randperm(len(latents))[:8]])
    if learning == "ema":
        model.quantizer.sums.copy_(model.quantizer.codebook)
        model.quantizer.initialised.fill_(True)
    return model


def some_digits(num: int = 40) -> Split:
    split = load_test(FIXTURE, download=False)
    return Split(split.images[:num], split.labels[:num])


def doubled(split: Split) -> Split:
    return Split(torch.cat([split.images, split.images]), torch.cat([split.labels, split.labels]))


def run(folder: Path, num_epochs: int, learning: str = "ema", resume: bool = False, **changes: Any) -> dict[str, float]:
    training = VQVAETraining(**{"batch_size": 64, "num_epochs": num_epochs, "lr": 2e-3, **changes})
    return train_vqvae(
        tiny_config(learning),
        training,
        seed=3,
        data_folder=FIXTURE,
        output_folder=folder,
        device=CPU,
        resume=resume,
        download=False,
    )


def rows(folder: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, without the speed: the one figure that two equal runs don't share."""
    lines = (folder / "vqvae" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "images_per_s"} for line in lines]


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key in value:
            yield from leaves(value[key], f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from leaves(item, f"{name}.{i}")
    else:
        yield name, value


def assert_same_run(a: Path, b: Path) -> None:
    """Weights of the moment, codebook averages, optimizer state and best weights, bit for bit; and the log."""
    first = dict(leaves(checkpoint.load_resume_state(a / "vqvae" / "resume.pt")))
    second = dict(leaves(checkpoint.load_resume_state(b / "vqvae" / "resume.pt")))
    assert first.keys() == second.keys()
    assert any("exp_avg_sq" in name for name in first)
    for name, value in first.items():
        same = torch.equal(value, second[name]) if isinstance(value, Tensor) else value == second[name]
        assert same, name
    header, other = (checkpoint.read_header(folder / "vqvae.safetensors", "vqvae") for folder in (a, b))
    assert header.fingerprint == other.fingerprint
    assert header.metrics == other.metrics
    assert rows(a) == rows(b)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """The folder of one small run of three epochs, and the figures that it returned."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "LOG_EVERY", 5)
        return folder, run(folder, 3)


# --- The objective


@pytest.mark.parametrize("learning", ["gradient", "ema"])
def test_the_terms_are_those_of_the_paper(learning: str) -> None:
    model, images = tiny(learning).eval(), some_digits().images
    terms, x_hat, indices = objective(model, images, VQVAETraining(beta=0.25))
    x = images.double().numpy() / 127.5 - 1
    z_e = model.latents(torch.from_numpy(x).float()).detach().double().numpy()
    codes = model.quantizer.codebook.detach().double().numpy()
    z_q = codes[indices.numpy()].transpose(0, 3, 1, 2)
    raw = model.decode_indices(indices).detach().double().numpy()
    assert terms["reconstruction"].item() == pytest.approx(((x - raw) ** 2).mean(), rel=1e-5)
    assert terms["codebook"].item() == pytest.approx(((z_e - z_q) ** 2).mean(), rel=1e-5)
    assert terms["commitment"].item() == pytest.approx(0.25 * ((z_e - z_q) ** 2).mean(), rel=1e-5)
    parts = sum(value.item() for name, value in terms.items() if name != "total")
    assert terms["total"].item() == pytest.approx(parts, rel=1e-6)
    np.testing.assert_allclose(x_hat.detach().numpy(), np.clip((raw + 1) / 2, 0, 1), atol=1e-6)


def gradients(beta: float) -> dict[str, Tensor]:
    model = tiny("gradient").train()
    objective(model, some_digits().images, VQVAETraining(beta=beta))[0]["total"].backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_beta_scales_the_commitment_term_alone() -> None:
    model, images = tiny("gradient").eval(), some_digits().images
    low = objective(model, images, VQVAETraining(beta=0.5))[0]
    high = objective(model, images, VQVAETraining(beta=2.0))[0]
    assert high["commitment"].item() == pytest.approx(4 * low["commitment"].item(), rel=1e-6)
    assert torch.equal(high["reconstruction"], low["reconstruction"])
    assert torch.equal(high["codebook"], low["codebook"])
    # So is it with gradients: codebook and decoder don't feel beta, the encoder does, and in proportion.
    a, b, c = gradients(0.5), gradients(1.0), gradients(2.0)
    for name in a:
        if name.startswith("encoder"):
            torch.testing.assert_close(c[name] - b[name], 2 * (b[name] - a[name]), rtol=1e-3, atol=1e-6)
        else:
            assert torch.equal(a[name], c[name]), name
    last = [name for name in a if name.startswith("encoder")][-1]
    assert not torch.equal(a[last], c[last])


@pytest.mark.parametrize("beta", [0.09, 2.1, -1.0])
def test_beta_out_of_range_is_refused(beta: float) -> None:
    with pytest.raises(UserError, match=r"expected beta between 0.1 and 2, found"):
        VQVAETraining(beta=beta)


@pytest.mark.parametrize("learning", ["gradient", "ema"])
def test_no_term_grows_with_the_batch(learning: str) -> None:
    split, training = some_digits(), VQVAETraining(free_overshoot=True)
    # In training mode, as fit() logs it; a fresh copy each time, since an averaged codebook takes its step.
    one = objective(tiny(learning).train(), split.images, training)[0]
    two = objective(tiny(learning).train(), doubled(split).images, training)[0]
    for name in one:
        assert two[name].item() == pytest.approx(one[name].item(), rel=1e-5), name
    model = tiny(learning)
    assert evaluate(model, doubled(split), training) == pytest.approx(evaluate(model, split, training), rel=1e-5)


class Painter(nn.Module):
    """Stands in for a model: draws the same given picture whatever it sees."""

    def __init__(self, picture: Tensor) -> None:
        super().__init__()
        self.picture = nn.Parameter(picture)

    def forward(self, x: Tensor) -> Forward:
        zero, latents = torch.zeros(()), torch.zeros(1, 4, 7, 7)
        return Forward(self.picture, latents, latents, torch.zeros(1, 7, 7, dtype=torch.int64), zero, zero)


def test_free_overshoot_forgives_what_clipping_undoes_and_nothing_else() -> None:
    images = torch.tensor([0, 0, 255, 255, 128, 0], dtype=torch.uint8).reshape(1, 1, 1, 6)
    drawn = [-1.5, 1.5, 1.25, -3.0, 1.5, -0.75]
    target = [-1, -1, 1, 1, 128 / 127.5 - 1, -1]
    errors = [(d - t) ** 2 for d, t in zip(drawn, target, strict=True)]
    forgiven = [0, 2]  # purer paper than paper, purer ink than ink
    for free, gone in ((True, forgiven), (False, [])):
        model = Painter(torch.tensor(drawn).reshape(1, 1, 1, 6))
        terms, x_hat, _ = objective(model, images, VQVAETraining(free_overshoot=free))
        left = [0.0 if i in gone else error for i, error in enumerate(errors)]
        assert terms["reconstruction"].item() == pytest.approx(sum(left) / 6, rel=1e-5)
        terms["total"].backward()
        felt = model.picture.grad.flatten() != 0
        assert felt.tolist() == [i not in gone for i in range(6)]
        assert x_hat.flatten()[:4].tolist() == [0, 1, 1, 0]


# --- Evaluation


@pytest.mark.parametrize("batch", [1, 7, 40, 500])
def test_figures_of_a_split_do_not_depend_on_the_batch_size(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    model, split, training = tiny().eval(), some_digits(), VQVAETraining()
    monkeypatch.setattr(stage, "EVALUATION_BATCH", batch)
    figures = evaluate(model, split, training)
    # All of it by hand, over the split at once.
    x = split.images.double().numpy() / 255
    indices = model.encode(torch.from_numpy(x).float() * 2 - 1)
    x_hat = np.clip((model.decode_indices(indices).detach().double().numpy() + 1) / 2, 0, 1)
    errors = ((x_hat - x) ** 2).mean(axis=(1, 2, 3))
    share = np.bincount(indices.flatten().numpy()) / indices.numel()
    share = share[share > 0]
    assert len(share) > 1
    assert figures["squared_error"] == pytest.approx(errors.mean(), rel=1e-5)
    assert figures["psnr_db"] == pytest.approx(np.mean(10 * np.log10(1 / errors)), rel=1e-5)
    assert figures["perplexity"] == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-6)
    assert figures["codes_used"] == len(share)


@pytest.mark.parametrize("call", ["evaluate", "reconstruct", "decode"])
def test_the_mode_of_every_module_is_restored_and_no_average_moves(call: str) -> None:
    model, split = tiny().train(), some_digits()
    model.decoder.eval()  # a mixture, as when part of a model is frozen
    modes = {name: module.training for name, module in model.named_modules()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls = {
        "evaluate": lambda: evaluate(model, split, VQVAETraining()),
        "reconstruct": lambda: reconstruct(model, split.images),
        "decode": lambda: decode(model, torch.zeros(3, 7, 7, dtype=torch.int64)),
    }
    calls[call]()
    assert {name: module.training for name, module in model.named_modules()} == modes
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_reconstructions_are_the_decoded_codes_in_the_unit_range(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = tiny().eval(), some_digits(10).images
    monkeypatch.setattr(stage, "EVALUATION_BATCH", 3)
    indices, x_hat = reconstruct(model, images)
    x = images.float() / 127.5 - 1
    assert torch.equal(indices, model.encode(x))
    torch.testing.assert_close(x_hat, ((model(x).x_hat + 1) / 2).clamp(0, 1), rtol=0, atol=1e-5)
    torch.testing.assert_close(decode(model, indices), x_hat, rtol=0, atol=1e-6)


# --- A run


def test_a_run_writes_these_files_and_no_others(finished: tuple[Path, dict[str, float]]) -> None:
    folder, _ = finished
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    events = [name for name in names if name.startswith("vqvae/events.out.tfevents.")]
    assert len(events) == 1
    assert names == sorted(["vqvae.safetensors", "vqvae/metrics.jsonl", "vqvae/resume.pt", *events])


def test_training_lowers_the_error(finished: tuple[Path, dict[str, float]]) -> None:
    errors = [row["squared_error/validation"] for row in rows(finished[0]) if "epoch" in row]
    assert len(errors) == 3
    assert errors[-1] < 0.9 * errors[0]


def test_the_kept_weights_are_the_best_on_validation_and_the_figures_are_theirs_on_the_test_split(
    finished: tuple[Path, dict[str, float]],
) -> None:
    folder, figures = finished
    model, header = load_vqvae(folder / "vqvae.safetensors", CPU)
    _, validation = load_train_and_validation(FIXTURE, download=False)
    training = VQVAETraining()
    assert header.metrics == pytest.approx(evaluate(model, validation, training))
    logged = [row["squared_error/validation"] for row in rows(folder) if "epoch" in row]
    assert header.metrics["squared_error"] == min(logged)
    assert figures == pytest.approx(evaluate(model, load_test(FIXTURE, download=False), training))
    assert header.recipe["seed"] == 3
    assert header.recipe["batch_size"] == 64


def test_figures_are_those_of_the_best_epoch_when_a_later_one_is_worse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, by_epoch = evaluate, iter([0.3, 0.1, 0.2])

    def scripted(model: VQVAE, split: Split, *others: Any) -> dict[str, float]:
        figures = whole(model, split, *others)
        return {**figures, "squared_error": next(by_epoch)} if len(split.labels) == 40 else figures

    monkeypatch.setattr(stage, "evaluate", scripted)
    figures = run(tmp_path, 3)
    best, header = load_vqvae(tmp_path / "vqvae.safetensors", CPU)
    last = tiny()
    nn.ModuleList([last]).load_state_dict(checkpoint.load_resume_state(tmp_path / "vqvae" / "resume.pt")["model"])
    test = load_test(FIXTURE, download=False)
    assert header.metrics["squared_error"] == 0.1
    assert figures == pytest.approx(whole(best, test, VQVAETraining()))
    assert figures != pytest.approx(whole(last, test, VQVAETraining()))


class LastSplitRead(Exception):
    pass


def test_the_test_split_is_read_once_and_only_when_training_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path, download: bool = True) -> Split:
        raise LastSplitRead

    monkeypatch.setattr(stage, "load_test", refuse)
    with pytest.raises(LastSplitRead):
        run(tmp_path, 2)
    # Everything that training leaves behind was there by then, without a look at a test digit.
    assert checkpoint.load_resume_state(tmp_path / "vqvae" / "resume.pt")["step"] == 2 * STEPS
    assert (tmp_path / "vqvae.safetensors").exists()
    assert [row["epoch"] for row in rows(tmp_path) if "epoch" in row] == [1, 2]


def test_the_same_seed_gives_the_same_run(tmp_path: Path, finished: tuple[Path, dict[str, float]]) -> None:
    torch.manual_seed(12345)  # what a program did before must not matter
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "LOG_EVERY", 5)
        assert run(tmp_path, 3) == finished[1]
    assert_same_run(tmp_path, finished[0])


@pytest.mark.parametrize("learning", ["ema", "gradient"])
def test_a_run_that_stopped_and_went_on_equals_one_that_did_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learning: str
) -> None:
    draws: list[int] = []
    draw = quantizer._draw
    monkeypatch.setattr(quantizer, "_draw", lambda vectors, num: draws.append(num) or draw(vectors, num))
    monkeypatch.setattr(quantizer, "RESTART_BELOW", 0.8)  # codes die within a few steps, so that restarts take part
    monkeypatch.setattr(engine, "LOG_EVERY", 5)
    straight = run(tmp_path / "straight", 3, learning)
    run(tmp_path / "parts", 1, learning)
    draws.clear()
    torch.manual_seed(12345)
    resumed = run(tmp_path / "parts", 3, learning, resume=True)
    assert (len(draws) > 0) == (learning == "ema")
    assert resumed == straight
    assert_same_run(tmp_path / "straight", tmp_path / "parts")


class PowerCut(BaseException):
    """Not an Exception, so that no handler for errors can make light of it."""


def cut_power(monkeypatch: pytest.MonkeyPatch, at_step: int) -> None:
    """The objective breaks off in the given training step, counted from 0."""
    steps = 0
    whole = stage.objective

    def breaking(model: VQVAE, *others: Any) -> Any:
        nonlocal steps
        if model.training:
            if steps == at_step:
                raise PowerCut
            steps += 1
        return whole(model, *others)

    monkeypatch.setattr(stage, "objective", breaking)


def test_a_run_cut_off_in_an_epoch_and_resumed_equals_one_that_was_not(tmp_path: Path) -> None:
    changes = {"schedule": "one-cycle", "weight_decay": 0.01}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "LOG_EVERY", 2)
        patch.setattr(quantizer, "RESTART_BELOW", 0.8)
        straight = run(tmp_path / "straight", 3, **changes)
        with pytest.MonkeyPatch.context() as cut:
            cut_power(cut, 2 * STEPS + 5)  # in the third epoch, after two of its steps were logged
            with pytest.raises(PowerCut):
                run(tmp_path / "parts", 3, **changes)
        logged = [row["step"] for row in rows(tmp_path / "parts")]
        assert max(logged) > 2 * STEPS
        assert run(tmp_path / "parts", 3, resume=True, **changes) == straight
    assert_same_run(tmp_path / "straight", tmp_path / "parts")
    # The steps that were repeated stand there once, in both logs.
    written = [(row["step"], name) for row in rows(tmp_path / "parts") for name in row if name not in ("step", "lr")]
    assert len(written) == len(set(written))
    events = EventAccumulator(str(tmp_path / "parts" / "vqvae")).Reload()
    for tag in set(events.Tags()["scalars"]) - {"lr"}:
        steps = [event.step for event in events.Scalars(tag)]
        assert steps == sorted(set(steps)), tag


@pytest.mark.parametrize("victim", ["resume.pt", "vqvae.safetensors"])
def test_a_write_cut_short_leaves_the_last_good_file(tmp_path: Path, victim: str) -> None:
    straight = run(tmp_path / "straight", 2)
    run(tmp_path / "parts", 1)
    path = tmp_path / "parts" / ("vqvae/resume.pt" if victim == "resume.pt" else victim)
    before = path.read_bytes()
    replace = Path.replace

    def cut(self: Path, target: Path) -> Path:
        if self.name.startswith(f".{victim}"):
            raise PowerCut
        return replace(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", cut)
        with pytest.raises(PowerCut):
            run(tmp_path / "parts", 2, resume=True)
    assert path.read_bytes() == before
    load_vqvae(tmp_path / "parts" / "vqvae.safetensors", CPU)
    assert run(tmp_path / "parts", 2, resume=True) == straight
    assert_same_run(tmp_path / "straight", tmp_path / "parts")


def test_a_run_that_diverges_does_not_pass_older_weights_off_as_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, 1)
    whole = stage.evaluate
    monkeypatch.setattr(
        stage, "evaluate", lambda *args: {**whole(*args), "squared_error": math.nan, "reconstruction": math.nan}
    )
    with pytest.raises(UserError, match="lr"):  # what to try instead
        run(tmp_path, 1, lr=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 32}, "batch_size = 64, found batch_size = 32"),
        ({"learning": "gradient"}, "codebook_learning = 'ema', found codebook_learning = 'gradient'"),
        ({"beta": 0.5}, "beta = 1.0, found beta = 0.5"),
        ({"predictability": 0.1}, "predictability = 0.0, found predictability = 0.1"),
    ],
)
def test_a_run_is_not_resumed_under_other_settings(
    tmp_path: Path, finished: tuple[Path, dict[str, float]], changes: dict[str, Any], message: str
) -> None:
    state = tmp_path / "vqvae" / "resume.pt"
    state.parent.mkdir()
    state.write_bytes((finished[0] / "vqvae" / "resume.pt").read_bytes())
    with pytest.raises(UserError, match=message):
        run(tmp_path, 4, resume=True, **changes)


# --- What TensorBoard shows of it


def test_tensorboard_has_scalars_pictures_and_the_graph(finished: tuple[Path, dict[str, float]]) -> None:
    folder, _ = finished
    events = EventAccumulator(str(folder / "vqvae"), size_guidance={"images": 0}).Reload()
    tags = events.Tags()
    terms = ["total", "reconstruction", "codebook", "commitment"]
    expected = {f"{term}/{where}" for term in terms for where in ("train_step", "train", "validation")}
    expected |= {f"{figure}/validation" for figure in ("squared_error", "psnr_db", "perplexity", "codes_used")}
    assert expected | {"lr", "images_per_s", "epoch"} <= set(tags["scalars"])
    assert tags["graph"]
    assert {"original", "reconstruction"} <= set(tags["images"])
    # One tag for all steps of a kind: that is what gives a curve and a slider.
    ends = [STEPS, 2 * STEPS, 3 * STEPS]
    assert [event.step for event in events.Scalars("reconstruction/validation")] == ends
    assert [event.step for event in events.Images("reconstruction")] == ends
    assert [event.step for event in events.Scalars("total/train_step")] == [5, 10, 15, 20]
    by_step = {row["step"]: row for row in rows(folder) if "epoch" in row}
    for event in events.Scalars("squared_error/validation"):
        assert event.value == pytest.approx(by_step[event.step]["squared_error/validation"], rel=1e-6)


def test_the_log_has_one_row_for_a_step(finished: tuple[Path, dict[str, float]]) -> None:
    steps = [row["step"] for row in rows(finished[0])]
    assert steps == [5, 7, 10, 14, 15, 20, 21]
    assert all(math.isfinite(value) for row in rows(finished[0]) for value in row.values())


def test_training_figures_are_weighted_by_the_number_of_samples(tmp_path: Path) -> None:
    # At the smallest rate the weights hardly move, so that an epoch's mean is that of the split as a whole;
    # a batch of 430 leaves one of 10, whose mean must count for 10 of 440.
    run(tmp_path, 1, "gradient", batch_size=430, lr=1e-8)
    torch.manual_seed(3)
    fresh = VQVAE(tiny_config("gradient"))
    train, _ = load_train_and_validation(FIXTURE, download=False)
    expected = evaluate(fresh, train, VQVAETraining())
    found = next(row for row in rows(tmp_path) if "epoch" in row)
    assert found["reconstruction/train"] == pytest.approx(expected["reconstruction"], rel=2e-6)
