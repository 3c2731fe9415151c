import shutil
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import vqvae
from prior.codes import extract
from prior.model import PriorConfig
from prior.train import PriorTask, PriorTraining
from tests.helpers import CPU, FIXTURE, SHIPPED, make_dataset, mnist
from tests.ranks import rows
from tests.vqvae.test_loss import CONFIG, DIGITS, SETTINGS, TERMS, make_model
from vqvae import quantizer, train
from vqvae.data.dataset import Split, digest
from vqvae.errors import InputError
from vqvae.loss import VQVAETraining, evaluate_vqvae
from vqvae.model import VQVAE, VQVAEConfig, load_vqvae
from vqvae.storage import checkpoint
from vqvae.storage.recipe import resolve
from vqvae.train import VQVAETask, train_vqvae
from vqvae.training import loop
from vqvae.training.loop import Run, fit

STEPS = 7  # of an epoch: 440 digits in batches of 64
Patch = pytest.MonkeyPatch
Finished = tuple[Path, dict[str, float]]


def run(folder: Path, num_epochs: int = 3, resume: bool = False, **changes: Any) -> dict[str, float]:
    """A run in which codes die within a few steps, so that restarts take part, and losses are logged often."""
    options = {"data_folder": FIXTURE, "device": "cpu", "download": False, "seed": 3, "resume": resume}
    training = replace(SETTINGS, num_epochs=num_epochs, **changes)
    with patch.object(quantizer, "RESTART_BELOW", 0.8), patch.object(loop, "LOG_EVERY", 5):
        return train_vqvae(CONFIG, training, output_folder=folder, overwrite=bool(changes), **options)


def resume_state(folder: Path) -> dict[str, Any]:
    return checkpoint.load_resume_state(folder / "vqvae" / "resume.pt")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The folder of a run of three epochs with all terms, and the figures that it returned."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, run(folder)


def test_training_lowers_the_error_and_writes_what_it_was(finished: Finished) -> None:
    folder, _ = finished
    names = sorted(path.name[:9] for path in folder.rglob("*.*"))
    assert names == [".lock", "events.ou", "events.ou", "metrics.j", "resume.pt", "vqvae.saf"]
    assert [row["step"] for row in rows(folder / "vqvae")] == [5, 7, 10, 14, 15, 20, 21]
    first, _, last = (row for row in rows(folder / "vqvae") if "epoch" in row)
    assert last["squared_error/validation"] < 0.9 * first["squared_error/validation"]
    assert last["prediction/train"] < 0.95 * first["prediction/train"]
    model, header = load_vqvae(folder / "vqvae.safetensors", CPU)
    assert (model.config, header.data["class_counts"]) == (CONFIG, list(mnist().info.class_counts))
    expected = {"prediction_weight": 0.5, "num_codes": 8, "seed": 3, "data": digest(mnist().train)}
    assert header.recipe.items() >= expected.items()
    # The checkpoint is without the predictor, which only resuming needs.
    assert model.state_dict().keys() == VQVAE(CONFIG, (1, 28, 28)).state_dict().keys()
    assert any(name.startswith("1.above") for name in resume_state(folder)["model"])


@pytest.mark.parametrize("schedule", ["constant", "one-cycle"])
def test_codes_average_over_more_batches_as_the_learning_rate_declines(
    tmp_path: Path, monkeypatch: Patch, schedule: Any
) -> None:
    shares, update = [], quantizer.VectorQuantizer._update

    def watched(layer: quantizer.VectorQuantizer, *arguments: Any) -> None:
        shares.append((1 - layer.decay) / (1 - CONFIG.ema_decay))
        update(layer, *arguments)

    monkeypatch.setattr(quantizer.VectorQuantizer, "_update", watched)
    run(tmp_path, num_epochs=1, schedule=schedule, warmup=2 / STEPS, slowest_codes=0.2)
    fallen = [0.5 * (1 + np.cos(np.pi * i / 5)) for i in range(5)]  # in the five steps that follow the warm-up
    expected = [1, 1, *np.maximum(fallen, 0.2)] if schedule == "one-cycle" else [1] * STEPS
    assert shares == pytest.approx(expected)


def test_only_the_best_weights_see_the_test_split_and_only_at_the_end(tmp_path: Path, monkeypatch: Patch) -> None:
    evaluate, errors, test, loads = VQVAETask.evaluate, iter([0.3, 0.1, 0.2]), mnist().load_test(), []
    monkeypatch.setattr(VQVAETask, "evaluate", lambda task: {**evaluate(task), "squared_error": next(errors)})
    dataset = replace(mnist(), load_test=lambda: loads.append(resume_state(tmp_path)["step"]) or test)
    monkeypatch.setattr(train, "load_dataset", lambda *given, **options: loads.append((given, options)) or dataset)
    with patch.object(train, "fit", wraps=fit) as fitted:
        figures = run(tmp_path)
    assert fitted.call_args.args[2].seed == 3
    assert loads == [(("mnist", FIXTURE), {"image_size": None, "download": False}), 3 * STEPS]
    best, header = load_vqvae(tmp_path / "vqvae.safetensors", CPU)
    last = make_model("ema")
    last.load_state_dict({k[2:]: v for k, v in resume_state(tmp_path)["model"].items() if k.startswith("0.")})
    assert header.metrics["squared_error"] == 0.1
    assert header.metrics["psnr_db"] == pytest.approx(evaluate_vqvae(best, mnist().validation, SETTINGS)["psnr_db"])
    assert figures == pytest.approx(evaluate_vqvae(best, test, SETTINGS))
    assert figures != pytest.approx(evaluate_vqvae(last, test, SETTINGS))


def test_a_run_is_not_resumed_with_other_data(tmp_path: Path, monkeypatch: Patch, finished: Finished) -> None:
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    other = replace(mnist(), train=Split(mnist().train.images.flip(0), mnist().train.labels))
    monkeypatch.setattr(train, "load_dataset", lambda *_, **options: other)
    with pytest.raises(InputError, match="expected the data that the run was started with, found other data; "):
        run(tmp_path, 4, resume=True)
    run(tmp_path, 1, prediction_weight=0.0)  # overwrites
    assert not any("prediction" in name for row in rows(tmp_path / "vqvae") for name in row)
    assert len(resume_state(tmp_path)["model"]) == len(VQVAE(CONFIG, (1, 28, 28)).state_dict())


@pytest.mark.parametrize(("image_shape", "num_classes"), [((3, 32, 32), 3), ((1, 20, 36), 0)])
def test_any_images_and_classes_can_be_trained_on(tmp_path: Path, image_shape: Any, num_classes: int) -> None:
    dataset, path, training = make_dataset(40, image_shape, num_classes), tmp_path / "a", replace(SETTINGS, lr=1e-3)
    task, other = (VQVAETask(CONFIG, training, dataset, path, CPU, seed) for seed in (0, 1))
    assert not torch.equal(task.vqvae.encoder[0].weight, other.vqvae.encoder[0].weight)
    fit(task, training, Run(tmp_path / "vqvae", 0, task.settings))
    model, header = load_vqvae(path, CPU)
    assert (model.image_shape, len(header.data["class_names"])) == (image_shape, num_classes)
    expected = evaluate_vqvae(model, dataset.validation, training)["squared_error"]
    assert header.metrics["squared_error"] == pytest.approx(expected)


SPREAD = {  # the ends of each setting's range as far as they are quick, and values between
    "code_dim": [1, 3, 64],
    "num_codes": [2, 3, 500],
    "width": [4, 5, 7],
    "num_encoder_blocks": [0, 1],
    "num_decoder_blocks": [0, 2],
    "codebook_learning": ["gradient", "ema"],
    "ema_decay": [0.0, 0.5, 0.99999],
    "batch_size": [3, 7, 65536],
    "num_epochs": [1],
    "lr": [1e-8, 1e-3, 1.0],
    **{"schedule": ["constant", "one-cycle"], "warmup": [0.0, 0.05, 0.9]},
    **{"weight_decay": [0.0, 1.0], "mixed_precision": [False, True]},
    "beta": [0.1, 2.0],
    "clipped_loss": [False, True],
    "prediction_weight": [0.0, 10.0],
    "slowest_codes": [0.0, 1.0],
}
OF_PRIOR = {"width": [1, 2, 5], "num_layers": [None, 1, 6], "dropout": [0.0, 0.9], "label_dropout": [0.0, 0.5, 1.0]}


@pytest.mark.parametrize("constant", [None, 0, 128, 255])
@settings(max_examples=3, deadline=None, database=None, derandomize=True)
@given(st.data())
def test_whatever_is_in_range_trains_both_stages_or_ends_in_one_sentence(constant: int | None, data: Any) -> None:
    chosen = {name: data.draw(st.sampled_from(values)) for name, values in SPREAD.items()}
    of_prior = {name: data.draw(st.sampled_from(values)) for name, values in OF_PRIOR.items()}
    shared = {name: chosen[name] for name in chosen if name in loop.Training.__dataclass_fields__}
    dataset = make_dataset(10)
    if constant is not None:  # all images are one grey
        train, validation = (Split(s.images * 0 + constant, s.labels) for s in (dataset.train, dataset.validation))
        dataset = replace(dataset, train=train, validation=validation)
    no_pictures = patch.object(VQVAETask, "show"), patch.object(PriorTask, "show")
    with tempfile.TemporaryDirectory() as name, suppress(InputError), no_pictures[0], no_pictures[1]:
        folder = Path(name)
        task: Any = VQVAETask(*resolve((VQVAEConfig, VQVAETraining), chosen, {}), dataset, folder / "vqvae", CPU, 0)
        fit(task, task.training, Run(folder / "1", 0, task.settings))
        model, header = load_vqvae(folder / "vqvae", CPU)
        codes = [extract(model, split) for split in (dataset.train, dataset.validation)]
        config, training = resolve((PriorConfig, PriorTraining), {**shared, **of_prior}, {})
        task = PriorTask(config, training, dataset, *codes, model, header, folder / "prior", 0)
        fit(task, training, Run(folder / "2", 0, task.settings))


def test_codes_that_are_hardly_used_are_remarked_on_with_what_to_change() -> None:
    def advice(learning: str, num_codes: int, perplexity: float) -> str | None:
        config = replace(CONFIG, codebook_learning=learning, num_codes=num_codes)
        return train.advice_on_codebook({"perplexity": perplexity, "codes_used": 7.0}, config)

    remedy = 'try codebook_learning = "ema" in the recipe, more epochs, or fewer codes'
    used = "7 of 512 codes, as unevenly as 14.0 codes used evenly;"
    assert advice("gradient", 512, 14.0) == f"the codebook is hardly used: {used} {remedy}"
    assert advice("ema", 8, 1.4).endswith("try a smaller lr, more epochs, or fewer codes")
    assert advice("gradient", 512, 30.0) is advice("ema", 8, 1.6) is advice("ema", 2, 1.9) is None


def test_a_run_whose_codebook_collapsed_ends_with_the_remark(tmp_path: Path, capsys: Any) -> None:
    options: Any = {"data_folder": FIXTURE, "device": "cpu", "download": False}
    training = VQVAETraining(batch_size=32, num_epochs=1, lr=2e-4)
    figures = train_vqvae(replace(CONFIG, codebook_learning="gradient"), training, output_folder=tmp_path, **options)
    assert figures["perplexity"] < 1.5
    assert "the codebook is hardly used: " in capsys.readouterr().err


def test_what_cannot_be_trained_or_evaluated_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    options: Any = {"data_folder": FIXTURE, "device": "cpu", "download": False, "output_folder": tmp_path / "new"}
    with pytest.raises(InputError, match="expected `seed` of at least 0, found -1"):
        train_vqvae(CONFIG, SETTINGS, seed=-1, **options)
    with patch("os.sysconf", lambda name: 2**10), pytest.raises(InputError, match="expected `width` for which 0 GiB"):
        train_vqvae(replace(CONFIG, width=2048), SETTINGS, **options)
    assert not (tmp_path / "new").exists()
    with pytest.raises(InputError, match="expected at least one image to evaluate, found none"):
        evaluate_vqvae(make_model(), DIGITS.first(0), SETTINGS)


def test_tensorboard_has_scalars_pictures_and_the_graph(finished: Finished) -> None:
    events = EventAccumulator(str(finished[0] / "vqvae"), size_guidance={"images": 0}).Reload()
    terms, validation = {*TERMS, "prediction"}, EventAccumulator(str(finished[0] / "vqvae" / "validation")).Reload()
    assert {*terms, *(f"{term}/train_step" for term in terms), "images_per_s"} <= set(events.Tags()["scalars"])
    assert {*terms, "squared_error"} <= set(validation.Tags()["scalars"])
    original, pictures = events.Images("original")[2], events.Images("reconstruction")
    assert [event.step for event in pictures] == [STEPS, 2 * STEPS, 3 * STEPS]  # one tag, so a slider
    assert len({event.encoded_image_string for event in [original, *pictures]}) == 4
    assert (original.width, original.height, events.Tags()["graph"]) == (604, 244, True)  # forty digits


def test_load_gives_a_trained_model(finished: Finished, monkeypatch: Patch) -> None:
    monkeypatch.chdir(finished[0])  # where there are no runs of the user's
    shipped, own = vqvae.load(), vqvae.load("vqvae.safetensors", device="cpu")
    assert (shipped.config, own.config) == (load_vqvae(SHIPPED / "vqvae.safetensors", CPU)[0].config, CONFIG)
    assert not any(module.training for module in own.modules())
    with pytest.raises(InputError, match="`device` to be auto, cpu or cuda"):
        vqvae.load(device="tpu")
