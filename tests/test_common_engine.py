import json
import math
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from vqvae.common import engine
from vqvae.common.checkpoint import load_resume_state, save_resume_state
from vqvae.common.engine import (
    Means,
    Training,
    derive_seed,
    evaluating,
    fit,
    in_batches,
    learning_rate,
    make_optimizer,
    pick_device,
)
from vqvae.common.errors import Interrupted, UserError

NUM = 23  # samples of the toy data: no multiple of its batch size
BATCH = 4
STEPS = 6


@dataclass
class Toy:
    """A regression with dropout, fitted by the engine, and a diary of what the engine did to it."""

    folder: Path
    figures: list[float] = field(default_factory=lambda: [9.0, 8.0, 7.0, 6.0])  # of each epoch, by its number
    batches: list[list[int]] = field(default_factory=list)  # the samples of each step
    modes: list[bool] = field(default_factory=list)
    precisions: list[torch.dtype] = field(default_factory=list)  # that the model's products come in
    kept: list[float] = field(default_factory=list)  # figures of the epochs that were kept as the best
    fail_at: int | None = None  # step of this fit in which it breaks off
    signal_at: int | None = None  # step of this fit in which a SIGTERM arrives

    def fit(self, num_epochs: int, resume: bool = False, **changes: Any) -> nn.Module:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        x = torch.randn(NUM, 3)
        epochs = iter(self.figures[load_resume_state(self.folder / "resume.pt")["step"] // STEPS if resume else 0 :])
        self.batches.clear()

        def loss(rows: Tensor, x: Tensor) -> dict[str, Tensor]:
            if len(self.batches) == self.fail_at:
                raise KeyboardInterrupt
            if len(self.batches) == self.signal_at:
                signal.raise_signal(signal.SIGTERM)
            self.batches.append(rows.tolist())
            self.modes.append(model.training)
            out = model(x)
            self.precisions.append(out.dtype)
            error = (out - x.sum(1, keepdim=True)).square().mean()
            return {"error": error, "row": rows.double().mean()}

        def evaluate() -> dict[str, float]:
            model.eval()  # an evaluation that forgets to restore the mode must not matter
            return {"figure": next(epochs), "other": 0.0}

        fit(
            model,
            (torch.arange(NUM), x),
            loss,
            evaluate,
            lambda figures: self.kept.append(figures["figure"]),
            best_by="figure",
            training=Training(**{"batch_size": BATCH, "num_epochs": num_epochs, "lr": 0.01, **changes}),
            seed=changes.get("seed", 5),
            folder=self.folder,
            unit="things",
            settings={"lr": 0.01},
            after_epoch=lambda log, epoch, step: None,
            resume=resume,
        )
        return model


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- Device, precision, seeds, batches, averages


def test_cuda_without_a_device_is_an_error_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="expected a CUDA device for --device cuda, found none; type --device cpu"):
        pick_device("cuda")
    assert pick_device("auto") == torch.device("cpu")
    assert pick_device("cpu") == torch.device("cpu")


def test_auto_takes_cuda_where_there_is_one_and_each_process_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert pick_device("auto") == torch.device("cuda", 0)
    assert pick_device("cpu").type == "cpu"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device("cuda") == torch.device("cuda", 1)
    assert current == [torch.device("cuda", 0), torch.device("cuda", 1)]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="expected a CUDA device for each process, found 2; type --nproc-per-node 2"):
        pick_device("cuda")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "CPU"])
def test_another_device_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"expected --device auto, cpu or cuda, found '{name}'"):
        pick_device(name)


@pytest.mark.parametrize(("wanted", "there"), [(True, True), (True, False), (False, True)])
def test_losses_are_worked_out_in_bfloat16_where_it_is_wanted_and_the_device_multiplies_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: bool, there: bool
) -> None:
    monkeypatch.setattr(engine, "multiplies_bfloat16", lambda device: there)
    toy = Toy(tmp_path)
    model = toy.fit(1, mixed_precision=wanted)
    assert set(toy.precisions) == {torch.bfloat16 if wanted and there else torch.float32}
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_this_processor_multiplies_bfloat16_only_if_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for capabilities, expected in (
        ({"avx2": True, "avx512_bf16": False}, False),
        ({"amx_bf16": True}, True),
        ({}, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda capabilities=capabilities: capabilities)
        assert engine.multiplies_bfloat16(torch.device("cpu")) is expected


def test_seeds_differ_by_every_key_and_suit_a_generator() -> None:
    seeds = [derive_seed(seed, use, i) for seed in range(3) for use in ("order", "step") for i in range(50)]
    assert len(set(seeds)) == len(seeds)
    assert derive_seed(1, "order", 2) == derive_seed(1, "order", 2)
    for seed in seeds:
        torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("num", "batch"), [(10, 3), (9, 3), (2, 5), (1, 1), (0, 4)])
def test_batches_cover_everything_once_and_in_order(num: int, batch: int) -> None:
    parts = [list(range(num))[rows] for rows in in_batches(num, batch)]
    assert list(chain(*parts)) == list(range(num))
    assert all(0 < len(part) <= batch for part in parts)
    assert all(len(part) == batch for part in parts[:-1])


def test_averages_are_weighted_by_the_number_of_samples() -> None:
    values = torch.randn(23, generator=torch.Generator().manual_seed(0))
    means = Means()
    for part in values.split(10):
        means.add({"x": part.mean(), "twice": 2 * part.mean()}, len(part))
    expected = values.double().mean().item()
    assert means.read() == pytest.approx({"x": expected, "twice": 2 * expected}, rel=1e-6)
    plain = np.mean([part.mean().item() for part in values.split(10)])
    assert abs(plain - expected) > 1e-3  # which an average of averages would not have met


# --- Modes


def test_modes_are_restored_however_they_were_mixed() -> None:
    model, other = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.Linear(2, 2))), nn.Dropout()
    model.train()
    model[1].eval()
    other.eval()
    modes = [module.training for module in [*model.modules(), other]]
    with evaluating(model, other):
        assert not any(module.training for module in [*model.modules(), other])
        assert torch.is_inference_mode_enabled()
    assert [module.training for module in [*model.modules(), other]] == modes
    assert not torch.is_inference_mode_enabled()


def test_modes_are_restored_after_an_error_too() -> None:
    model = nn.Sequential(nn.Dropout()).train()
    with pytest.raises(KeyboardInterrupt), evaluating(model):
        raise KeyboardInterrupt
    assert all(module.training for module in model.modules())


# --- Schedule, settings and optimizer


def test_a_constant_rate_is_constant() -> None:
    assert {learning_rate(Training(lr=0.3), i / 10) for i in range(11)} == {0.3}


@pytest.mark.parametrize("warmup", [0.05, 0.2])
def test_a_one_cycle_rate_rises_from_zero_to_its_peak_and_falls_to_zero(warmup: float) -> None:
    training = Training(lr=0.3, schedule="one-cycle", warmup=warmup)
    progress = np.linspace(0, 1, 1001)
    rates = np.array([learning_rate(training, p) for p in progress])
    peak = rates.argmax()
    assert rates[0] == 0
    assert rates[peak] == pytest.approx(0.3, rel=1e-3)
    assert progress[peak] == pytest.approx(warmup)
    assert (np.diff(rates[: peak + 1]) > 0).all()
    assert (np.diff(rates[peak:]) < 0).all()
    assert rates[-1] == pytest.approx(0, abs=1e-9)
    assert np.abs(np.diff(rates)).max() < 0.01  # no jump
    middle = (progress[peak] + 1) / 2
    assert learning_rate(training, middle) == pytest.approx(0.15, rel=1e-2)  # half a cosine


def test_without_warmup_a_one_cycle_rate_starts_at_its_peak() -> None:
    assert learning_rate(Training(lr=0.3, schedule="one-cycle", warmup=0), 0) == 0.3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "expected batch_size between 1 and 65536, found 0"),
        ({"num_epochs": 0}, "expected num_epochs between 1 and 100000, found 0"),
        ({"lr": 0.0}, "expected lr between 1e-08 and 1, found 0"),
        ({"lr": float("nan")}, "expected lr between 1e-08 and 1, found nan"),
        ({"warmup": 1.0}, "expected warmup between 0 and 0.9, found 1"),
        ({"weight_decay": -0.1}, "expected weight_decay between 0 and 1, found -0.1"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(changes: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Training(**changes)


def test_weights_of_convolutions_and_linear_layers_decay_and_nothing_else() -> None:
    model = nn.ModuleDict(
        {"c": nn.Conv2d(1, 2, 3), "l": nn.Linear(2, 3), "e": nn.Embedding(5, 2), "n": nn.LayerNorm(2)}
    )
    model.register_parameter("codebook", nn.Parameter(torch.zeros(4, 2)))
    optimizer = make_optimizer(model, Training(weight_decay=0.1, lr=0.3))
    decay_of = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    num = sum(len(group["params"]) for group in optimizer.param_groups)
    assert num == len(decay_of) == len(list(model.parameters()))
    decayed = [name for name, p in model.named_parameters() if decay_of[id(p)] == 0.1]
    assert sorted(decayed) == ["c.weight", "l.weight"]
    assert {decay_of[id(p)] for name, p in model.named_parameters() if name not in decayed} == {0.0}


# --- The loop


def test_an_epoch_shows_every_sample_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    toy = Toy(tmp_path)
    toy.fit(3)
    epochs = [toy.batches[start : start + STEPS] for start in range(0, len(toy.batches), STEPS)]
    assert [len(epoch) for epoch in epochs] == [STEPS] * 3
    orders = [list(chain(*epoch)) for epoch in epochs]
    assert all(sorted(order) == list(range(NUM)) for order in orders)
    assert len({tuple(order) for order in [*orders, list(range(NUM))]}) == 4
    assert all(toy.modes)


def test_the_order_depends_on_seed_and_epoch_and_nothing_else(tmp_path: Path) -> None:
    first = Toy(tmp_path / "first")
    first.fit(2)
    second = Toy(tmp_path / "second")
    second.fit(1)
    second.fit(2, resume=True)
    assert second.batches == first.batches[STEPS:]


def test_the_first_loss_is_minimised_and_the_rate_follows_the_schedule(tmp_path: Path) -> None:
    toy = Toy(tmp_path / "a", figures=[1.0] * 40)
    before, after = toy.fit(1, lr=1e-8), Toy(tmp_path / "b", figures=[1.0] * 40).fit(40, schedule="one-cycle")
    torch.manual_seed(2)
    x = torch.randn(200, 3)
    errors = [(model.eval()(x) - x.sum(1, keepdim=True)).square().mean() for model in (before, after)]
    assert errors[1] < 0.5 * errors[0]
    ends = [row["lr"] for row in rows(tmp_path / "b") if "epoch" in row]
    training = Training(lr=0.01, schedule="one-cycle")
    last_steps = [epoch * STEPS - 1 for epoch in range(1, 41)]
    assert ends == pytest.approx([learning_rate(training, step / (40 * STEPS)) for step in last_steps])


def test_figures_of_an_epoch_are_weighted_by_the_number_of_samples(tmp_path: Path) -> None:
    Toy(tmp_path).fit(1)
    row = next(row for row in rows(tmp_path) if "epoch" in row)
    assert row["row/train"] == pytest.approx((NUM - 1) / 2, rel=1e-9)
    assert row["figure/validation"] == 9.0
    assert row["things_per_s"] > 0
    assert row["step"] == STEPS


def test_an_epoch_is_kept_only_if_its_figure_is_the_lowest_so_far(tmp_path: Path) -> None:
    toy = Toy(tmp_path, figures=[5.0, 6.0, 5.0, 4.0, 4.5, 3.5, 4.0])
    toy.fit(7)
    assert toy.kept == [5.0, 4.0, 3.5]


def test_the_best_so_far_is_remembered_across_a_stop(tmp_path: Path) -> None:
    toy = Toy(tmp_path, figures=[5.0, 3.0, 4.0, 2.0])
    toy.fit(2)
    toy.fit(4, resume=True)
    assert toy.kept == [5.0, 3.0, 2.0]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def end_by_a_signal_in_the_third_epoch(toy: Toy) -> None:
    toy.signal_at = 2 * STEPS + 3
    with pytest.raises(Interrupted) as interrupted:
        toy.fit(4)
    toy.signal_at = None
    assert (interrupted.value.signal, interrupted.value.step) == (signal.SIGTERM, 2 * STEPS + 4)
    assert len(toy.batches) == 2 * STEPS + 4  # the step in which it came was finished, and none was begun
    assert load_resume_state(toy.folder / "resume.pt")["step"] == 2 * STEPS + 4


def end_by_a_signal_in_the_last_step_of_the_third_epoch(toy: Toy) -> None:
    toy.signal_at = 3 * STEPS - 1
    with pytest.raises(Interrupted):
        toy.fit(4)
    toy.signal_at = None
    assert load_resume_state(toy.folder / "resume.pt")["step"] == 3 * STEPS


def be_killed_when_each_step_was_saved(toy: Toy) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "SAVE_EVERY_S", 0)
        break_off_in_the_third_epoch(toy)
    assert load_resume_state(toy.folder / "resume.pt")["step"] == 2 * STEPS + 3


def stop_after_two_epochs(toy: Toy) -> None:
    toy.fit(2)


def break_off_in_the_third_epoch(toy: Toy) -> None:
    toy.fail_at = 2 * STEPS + 3
    with pytest.raises(KeyboardInterrupt):
        toy.fit(4)
    toy.fail_at = None


def break_off_while_saving_the_third_epoch(toy: Toy) -> None:
    calls = 0

    def save(path: Path, state: dict[str, Any]) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        save_resume_state(path, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.checkpoint, "save_resume_state", save)
        with pytest.raises(KeyboardInterrupt):
            toy.fit(4)


@pytest.mark.parametrize(
    "stop",
    [
        stop_after_two_epochs,
        break_off_in_the_third_epoch,
        break_off_while_saving_the_third_epoch,
        be_killed_when_each_step_was_saved,
        end_by_a_signal_in_the_third_epoch,
        end_by_a_signal_in_the_last_step_of_the_third_epoch,
    ],
)
def test_a_run_that_was_stopped_and_resumed_equals_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: Callable[[Toy], None]
) -> None:
    monkeypatch.setattr(engine, "LOG_EVERY", 5)
    straight, parts = Toy(tmp_path / "straight"), Toy(tmp_path / "parts")
    straight.fit(4)
    stop(parts)
    torch.manual_seed(999)  # the dropout that follows must not hang on what happened in between
    parts.fit(4, resume=True)
    states = [load_resume_state(toy.folder / "resume.pt") for toy in (straight, parts)]
    assert states[0]["step"] == 4 * STEPS
    assert same(states[0], states[1])
    logs = [
        [{k: v for k, v in row.items() if k != "things_per_s"} for row in rows(t.folder)] for t in (straight, parts)
    ]
    assert logs[0] == logs[1]
    steps = [row["step"] for row in logs[0]]
    assert steps == sorted(set(steps))


def test_no_scalar_is_logged_twice_for_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "LOG_EVERY", STEPS // 2)  # so that its step is now and then the last of an epoch
    Toy(tmp_path).fit(2)
    written = [(row["step"], name) for row in rows(tmp_path) for name in row if name != "step"]
    assert len(written) == len(set(written))


def test_a_finished_run_that_is_resumed_stays_as_it_is(tmp_path: Path) -> None:
    toy = Toy(tmp_path)
    toy.fit(2)
    before = load_resume_state(tmp_path / "resume.pt")
    toy.fit(2, resume=True)
    assert toy.batches == []
    assert same(load_resume_state(tmp_path / "resume.pt"), before)


def test_signals_are_answered_as_before_when_a_run_is_over(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    toy = Toy(tmp_path)
    end_by_a_signal_in_the_third_epoch(toy)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_signal_ends_a_run_at_once(tmp_path: Path) -> None:
    def loss(x: Tensor) -> dict[str, Tensor]:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError

    outside = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            attempt(tmp_path, loss=loss)
    finally:
        signal.signal(signal.SIGINT, outside)


@pytest.mark.parametrize(("bad_step", "before"), [(0, "none"), (7, "loss 6, other 1")])
def test_a_loss_that_is_not_finite_ends_the_run_with_its_step_the_last_finite_ones_and_the_last_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad_step: int, before: str
) -> None:
    monkeypatch.setattr(engine, "LOG_EVERY", 3)
    steps = iter(range(20))
    w = nn.Linear(1, 1)

    def loss(x: Tensor) -> dict[str, Tensor]:
        step = next(steps)
        value = math.inf if step == bad_step else step
        return {"loss": w(x).mean() * 0 + value, "other": torch.ones(())}

    with pytest.raises(UserError) as told:
        attempt(tmp_path, w, loss, num=10, training=Training(batch_size=2, num_epochs=2))
    saved = 5 if bad_step > 5 else 0
    where = f"the last good save, of step 5, is {tmp_path / 'resume.pt'}" if saved else "nothing is saved yet"
    assert str(told.value) == (
        f"expected finite losses, found loss inf, other 1 at step {bad_step + 1}, after {before}; {where}; start anew "
        f"with a smaller --lr"
    )
    assert (tmp_path / "resume.pt").exists() == (saved > 0)
    if saved:
        assert load_resume_state(tmp_path / "resume.pt")["step"] == saved


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)

    def loss(x: Tensor) -> dict[str, Tensor]:
        return {"loss": (model(x) * 0).sqrt().mean()}  # 0, and no gradient there

    with pytest.raises(UserError, match=r"expected finite weights, found others after step 1; nothing is saved yet;"):
        attempt(tmp_path, model, loss)
    assert not (tmp_path / "resume.pt").exists()


def attempt(
    folder: Path,
    model: nn.Module | None = None,
    loss: Callable[[Tensor], dict[str, Tensor]] | None = None,
    num: int = 1,
    **changes: Any,
) -> None:
    """A fit of next to nothing, for its errors."""
    model = model or nn.Linear(1, 1)
    call: dict[str, Any] = {"settings": {}, "resume": False, "training": Training(num_epochs=1), **changes}
    fit(
        model,
        (torch.zeros(num, 1),),
        loss or (lambda x: {"loss": model(x).mean()}),
        lambda: {"figure": 1.0},
        lambda figures: None,
        best_by="figure",
        seed=0,
        folder=folder,
        unit="things",
        after_epoch=lambda log, epoch, step: None,
        **call,
    )


def test_resuming_where_there_is_nothing_is_told_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected a run to resume at .*resume.pt, found none; .*without --resume"):
        attempt(tmp_path, resume=True)
    assert list(tmp_path.iterdir()) == []


def test_resuming_under_another_setting_is_told_in_a_sentence(tmp_path: Path) -> None:
    attempt(tmp_path, settings={"k": 8, "num_epochs": 1})
    before = (tmp_path / "resume.pt").read_bytes()
    with pytest.raises(UserError, match="k = 8, found k = 9; type the first, or start anew with --overwrite"):
        attempt(tmp_path, settings={"k": 9, "num_epochs": 1}, resume=True)
    with pytest.raises(UserError, match="beta = None, found beta = 1"):
        attempt(tmp_path, settings={"k": 8, "beta": 1}, resume=True)
    assert (tmp_path / "resume.pt").read_bytes() == before
    attempt(tmp_path, settings={"k": 8, "num_epochs": 2}, resume=True)  # more epochs are what resuming is for


def test_the_state_of_another_network_is_told_in_a_sentence(tmp_path: Path) -> None:
    attempt(tmp_path)
    with pytest.raises(UserError, match=r"expected this run's state in .*resume.pt, found another's; start anew with"):
        attempt(tmp_path, nn.Linear(1, 2), resume=True)


def test_resume_state_of_something_else_is_told_in_a_sentence(tmp_path: Path) -> None:
    save_resume_state(tmp_path / "resume.pt", {"weights": torch.zeros(3)})
    with pytest.raises(UserError, match=r"resume.pt.*--overwrite"):
        attempt(tmp_path, resume=True)


def test_a_folder_that_cannot_be_written_is_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=r"expected to write .*; name a place that can be written"):
        attempt(tmp_path / "file" / "run")
