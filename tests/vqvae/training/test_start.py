"""Both stages begin from the weights of another run: what is taken over, and what is refused."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from prior.model import GatedPixelCNN, PriorConfig
from prior.train import PriorTask, PriorTraining, train_prior
from tests.helpers import CPU, make_dataset, make_info, make_prior, make_vqvae, save_model
from vqvae.errors import InputError
from vqvae.loss import VQVAETraining, evaluate_vqvae
from vqvae.model import VQVAE, load_vqvae
from vqvae.storage import checkpoint
from vqvae.train import VQVAETask, train_vqvae

DATA = make_dataset(60, (1, 16, 16), 3)
PRIOR = PriorConfig(width=8, num_layers=4)
HARDLY = {"lr": 1e-8, "num_epochs": 1, "batch_size": 40}  # a run that changes next to nothing
Patch = pytest.MonkeyPatch


def save_vqvae(path: Path, image_shape: tuple[int, int, int] = (1, 16, 16), **config: Any) -> VQVAE:
    """A model that has been trained for long in batches of one image, which its averages show."""
    model = make_vqvae(image_shape, seed=5, **config)
    if model.config.codebook_learning == "ema":
        model.quantizer.scale_averages(16)
    save_model(path, model, "vqvae", make_info(image_shape, 3))
    return model


def save_prior(path: Path, num_classes: int = 3, image_shape: tuple[int, int, int] = (1, 16, 16), **shape: Any) -> None:
    network = make_prior((4, 4), num_classes=num_classes, seed=5, **{"num_layers": 4, **shape})
    save_model(path, network, "prior", make_info(image_shape, num_classes), "the fingerprint of another VQ-VAE")


@pytest.fixture
def train(tmp_path: Path, monkeypatch: Patch) -> dict[str, Any]:
    """Both stages' training on made images, by name. Each writes below `run`."""
    for task in (VQVAETask, PriorTask):
        monkeypatch.setattr(task, "show", lambda *_: None)
    monkeypatch.setattr("vqvae.train.load_dataset", lambda *_, **__: DATA)
    monkeypatch.setattr("prior.train.load_like", lambda *_, **__: DATA)
    config = save_vqvae(tmp_path / "first").config
    common: dict[str, Any] = {"data_folder": tmp_path, "output_folder": tmp_path / "run", "device": "cpu"}
    vqvae = partial(train_vqvae, replace(config, ema_decay=0.99999), VQVAETraining(**HARDLY), **common)
    return {
        "vqvae": vqvae,
        "prior": partial(train_prior, PRIOR, PriorTraining(**HARDLY), vqvae_path=tmp_path / "first", **common),
    }


@pytest.mark.parametrize("learning", ["ema", "gradient"])
def test_stage_one_begins_with_the_weights_and_the_codebook_of_the_file(
    learning: str, train: dict[str, Any], tmp_path: Path
) -> None:
    start = save_vqvae(tmp_path / "start", codebook_learning=learning)
    config = replace(start.config, ema_decay=0.99999)
    run = partial(train_vqvae, config, *train["vqvae"].args[1:], **train["vqvae"].keywords)
    run(start_from=tmp_path / "start")
    found, header = load_vqvae(tmp_path / "run" / "vqvae.safetensors", CPU)
    averages = ("quantizer.counts", "quantizer.sums")  # which belong to a size of batches
    state = {name: tensor for name, tensor in found.state_dict().items() if name not in averages}
    assert_close(state, {name: start.state_dict()[name] for name in state}, rtol=0, atol=1e-3)
    assert header.recipe["start_from"] == checkpoint.read_header(tmp_path / "start", "vqvae").fingerprint


@pytest.mark.parametrize("learning", ["ema", "gradient"])
def test_a_new_decoder_learns_from_codes_that_stay(learning: str, train: dict[str, Any], tmp_path: Path) -> None:
    start = save_vqvae(tmp_path / "start", codebook_learning=learning)
    config = replace(start.config, num_decoder_blocks=2, decoder_width=12)
    training = VQVAETraining(batch_size=40, num_epochs=1, lr=1e-2, weight_decay=0.1, decoder_only=True)
    run = partial(train_vqvae, config, **train["vqvae"].keywords)
    with pytest.raises(InputError, match=r"weights to start from with `decoder_only`, found none; .* `start_from`$"):
        run(training)
    run(training, start_from=tmp_path / "start")
    run(replace(training, num_epochs=3), start_from=tmp_path / "start", resume=True)
    found, _ = load_vqvae(tmp_path / "run" / "vqvae.safetensors", CPU)
    for part in ("encoder", "quantizer"):
        assert_close(getattr(found, part).state_dict(), getattr(start, part).state_dict(), rtol=0, atol=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        untrained = VQVAE(config, DATA.info.image_shape)
    errors = [evaluate_vqvae(model, DATA.train, training)["squared_error"] for model in (found, untrained)]
    assert errors[0] < errors[1]


def test_stage_two_begins_with_the_weights_of_the_file_whosever_codes_it_learned(
    train: dict[str, Any], tmp_path: Path
) -> None:
    save_prior(tmp_path / "start")
    train["prior"](start_from=tmp_path / "start")
    network = make_prior((4, 4), num_classes=3, seed=5, num_layers=4)
    found, header = checkpoint.load(
        tmp_path / "run" / "prior.safetensors", "prior", lambda _: GatedPixelCNN(PRIOR, 16, (4, 4), 3)
    )
    assert_close(found.state_dict(), network.state_dict(), rtol=0, atol=1e-6)
    assert header.recipe["start_from"] == checkpoint.read_header(tmp_path / "start", "prior").fingerprint


@pytest.mark.parametrize("stage", ["vqvae", "prior"])
def test_a_run_goes_on_with_the_same_start_and_with_no_other(stage: str, train: dict[str, Any], tmp_path: Path) -> None:
    save, (config, training) = {"vqvae": save_vqvae, "prior": save_prior}[stage], train[stage].args
    longer = partial(train[stage].func, config, replace(training, num_epochs=2), **train[stage].keywords)
    save(tmp_path / "start")
    train[stage](start_from=tmp_path / "start")
    for other in (None, tmp_path / "run" / f"{stage}.safetensors"):
        with pytest.raises(InputError, match="start_from"):
            longer(resume=True, start_from=other)
    longer(resume=True, start_from=tmp_path / "start")
    with pytest.raises(InputError, match=r"expected no .* run"):
        train[stage](start_from=tmp_path / "start")
    with pytest.raises(InputError, match=r"another file than the one that this run writes, found .*`output_folder`$"):
        train[stage](start_from=tmp_path / "run" / f"{stage}.safetensors", overwrite=True)


OTHERS: list[tuple[str, str, dict[str, Any]]] = [
    ("vqvae", "code_dim = 4, found code_dim = 5", {"code_dim": 5}),
    ("vqvae", "num_codes = 16, found num_codes = 17", {"num_codes": 17}),
    ("vqvae", "width = 8, found width = 12", {"width": 12}),
    ("vqvae", "num_encoder_blocks = 1, found num_encoder_blocks = 2", {"num_encoder_blocks": 2}),
    ("vqvae", "codebook_learning = ema, found codebook_learning = gradient", {"codebook_learning": "gradient"}),
    ("vqvae", "downsampling = 4, found downsampling = 8", {"downsampling": 8}),
    ("vqvae", r"image_shape = \(1, 16, 16\), found image_shape = \(1, 16, 20\)", {"image_shape": (1, 16, 20)}),
    ("prior", "width = 8, found width = 6", {"width": 6}),
    ("prior", "deformed = False, found deformed = True", {"deformed_share": 0.5}),
    ("prior", "num_layers = 4, found num_layers = 5", {"num_layers": 5}),
    ("prior", "num_codes = 16, found num_codes = 17", {"num_codes": 17}),
    ("prior", "num_classes = 3, found num_classes = 0", {"num_classes": 0}),
    ("prior", r"image_shape = \(1, 16, 16\), found image_shape = \(3, 16, 16\)", {"image_shape": (3, 16, 16)}),
]


@pytest.mark.parametrize(("stage", "message", "changes"), OTHERS, ids=[f"{s} {m.split()[0]}" for s, m, _ in OTHERS])
def test_another_network_is_refused_by_the_name_of_what_differs_before_anything_is_written(
    stage: str, message: str, changes: dict[str, Any], train: dict[str, Any], tmp_path: Path
) -> None:
    {"vqvae": save_vqvae, "prior": save_prior}[stage](tmp_path / "start", **changes)
    with pytest.raises(InputError, match=f"of the network that is to be trained, with {message} in .*`start_from`$"):
        train[stage](start_from=tmp_path / "start")
    with pytest.raises(InputError, match="of stage"):
        train[stage](
            start_from=tmp_path / "first" if stage == "prior" else save_prior(tmp_path / "p") or tmp_path / "p"
        )
    with pytest.raises(InputError, match="found none"):
        train[stage](start_from=tmp_path / "missing")
    assert not (tmp_path / "run").exists()


def test_a_codebook_of_averages_of_small_batches_is_not_taken_for_dead_in_large_ones(tmp_path: Path) -> None:
    start = save_vqvae(tmp_path / "start")
    config, training = replace(start.config, ema_decay=0.99999), VQVAETraining(batch_size=60)
    task = VQVAETask(config, training, DATA, tmp_path / "new", CPU, 0, (start, "fingerprint"))
    task.model.train()
    task.loss(DATA.train.images)
    assert_close(task.vqvae.quantizer.codebook, start.quantizer.codebook, rtol=0, atol=1e-3)
    assert torch.equal(task.vqvae.quantizer.initialised, torch.tensor(True))
