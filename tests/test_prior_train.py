"""Stage two's objective, evaluation and run: known values, what resuming gives, which weights are kept."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import prior.train
from prior.codes import Codes, extract
from prior.model import NO_LABEL, GatedPixelCNN, PriorConfig, load_prior
from prior.train import PriorTraining, drop_labels, evaluate, nats_by_position, objective, train_prior
from prior.unigram import baselines
from vqvae.common import checkpoint
from vqvae.common.data import load_test, load_train_and_validation
from vqvae.common.errors import UserError
from vqvae.common.logs import RunLog
from vqvae.model import VQVAE, VQVAEConfig, load_vqvae

CPU = torch.device("cpu")
CONFIG = PriorConfig(width=4, dropout=0.1)
STEPS = 4  # of an epoch: 440 maps in batches of 128


def make_prior(map_shape: tuple[int, int] = (2, 3), num_codes: int = 5, width: int = 8) -> GatedPixelCNN:
    torch.manual_seed(0)
    return GatedPixelCNN(PriorConfig(width=width, dropout=0.3), num_codes, map_shape)


def make_codes(num: int, map_shape: tuple[int, int] = (2, 3), num_codes: int = 5, seed: int = 0) -> Codes:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(num_codes, (num, *map_shape), generator=generator)
    return Codes(indices, torch.randint(10, (num,), generator=generator))


# Objective, evaluation


def test_the_objective_of_constant_logits_has_its_known_value() -> None:
    network = make_prior().eval()
    p = [0.5, 0.25, 0.125, 0.0625, 0.0625]
    with torch.no_grad():
        network.head[-1].weight.zero_()
        network.head[-1].bias.copy_(torch.tensor(p).log() + 7)
    indices = torch.tensor([[[0, 0, 0], [1, 1, 2]]])  # 1 + 1 + 1 + 2 + 2 + 3 bits
    nats = objective(network, indices, torch.tensor([4]))["nats_per_code"].item()
    assert nats == pytest.approx(10 / 6 * math.log(2), abs=1e-6)


def test_the_objective_pairs_each_position_with_its_own_logits_and_label() -> None:
    network, codes = make_prior().eval(), make_codes(7)
    with torch.no_grad():
        network.head[-1].weight.mul_(20)
        found = objective(network, codes.indices, codes.labels)["nats_per_code"].item()
        logits = network(codes.indices, codes.labels).double().numpy()
    nats = []
    for n, i, j in np.ndindex(7, 2, 3):
        column = logits[n, :, i, j]
        nats.append(np.log(np.exp(column).sum()) - column[codes.indices[n, i, j]])
    assert found == pytest.approx(np.mean(nats), abs=1e-5)


def test_a_fresh_network_is_near_log_k() -> None:
    torch.manual_seed(0)
    network = GatedPixelCNN(PriorConfig(), 512, (7, 7)).eval()
    codes = make_codes(8, (7, 7), 512)
    with torch.no_grad():
        nats = objective(network, codes.indices, codes.labels)["nats_per_code"].item()
    assert nats == pytest.approx(math.log(512), rel=0.02)


def test_labels_are_dropped_in_the_asked_share_and_otherwise_kept() -> None:
    labels = torch.arange(20_000) % 10
    assert torch.equal(drop_labels(labels, 0.0), labels)
    assert (drop_labels(labels, 1.0) == NO_LABEL).all()
    torch.manual_seed(0)
    some = drop_labels(labels, 0.3)
    dropped = some == NO_LABEL
    assert torch.equal(some[~dropped], labels[~dropped])
    assert dropped.double().mean().item() == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / 20_000))
    for digit in range(10):
        assert dropped[labels == digit].double().mean().item() == pytest.approx(0.3, abs=0.05)


def test_evaluation_weighs_every_map_the_same_whatever_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    network, codes = make_prior().train(), make_codes(23)
    figures = []
    for batch in (1, 4, 22, 1000):
        monkeypatch.setattr(prior.train, "EVALUATION_BATCH", batch)
        figures.append(evaluate(network, codes))
    assert network.training
    network.eval()
    with torch.no_grad():
        with_label = objective(network, codes.indices, codes.labels)["nats_per_code"].item()
        without = objective(network, codes.indices, torch.full((23,), NO_LABEL))["nats_per_code"].item()
    assert with_label != pytest.approx(without, abs=1e-4)
    for found in figures:
        assert found["nats_per_code"] == pytest.approx(with_label, abs=1e-6)
        assert found["nats_per_code_unlabelled"] == pytest.approx(without, abs=1e-6)
        assert found["bits_per_image"] == pytest.approx(with_label * 6 / math.log(2), abs=1e-5)


def test_the_likelihood_of_each_position_is_its_own_and_their_mean_that_of_the_evaluation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network, codes = make_prior().eval(), make_codes(23)
    with torch.no_grad():
        network.head[-1].weight.mul_(20)
        logits = network(codes.indices, codes.labels).double().numpy()
    expected = np.zeros((2, 3))
    for n, i, j in np.ndindex(23, 2, 3):
        column = logits[n, :, i, j]
        expected[i, j] += (np.log(np.exp(column).sum()) - column[codes.indices[n, i, j]]) / 23
    assert np.ptp(expected) > 0.05
    network.train()
    for batch in (1, 4, 1000):
        monkeypatch.setattr(prior.train, "EVALUATION_BATCH", batch)
        found = nats_by_position(network, codes)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
        assert found.mean().item() == pytest.approx(evaluate(network, codes)["nats_per_code"], abs=1e-6)
    assert network.training


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_label_dropout_out_of_its_range_is_refused(share: float) -> None:
    with pytest.raises(UserError, match=f"label_dropout between 0 and 1, found {share}"):
        PriorTraining(label_dropout=share)


# The run


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples and the graph, for TensorBoard, take most of such a short run's time."""
    monkeypatch.setattr(RunLog, "graph", lambda *_: None)
    monkeypatch.setattr(prior.train, "sample", lambda network, num, *_, **__: torch.zeros(num, 7, 7, dtype=torch.int64))


def save_vqvae(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = {"hidden_size": 4, "k": 20, "width": 8, "num_encoder_blocks": 0, "num_decoder_blocks": 0}
    vqvae = VQVAE(VQVAEConfig(**config))
    with torch.no_grad():
        vqvae.quantizer.codebook.copy_(torch.randn(20, 4) * 0.2)
    checkpoint.save(folder / "vqvae.safetensors", vqvae, stage="vqvae", config=config, recipe={}, metrics={})
    return folder / "vqvae.safetensors"


def train(vqvae: Path, data_folder: Path, folder: Path, num_epochs: int, resume: bool = False, **settings: object):
    (folder / "prior").mkdir(parents=True, exist_ok=True)
    training = PriorTraining(**{"batch_size": 128, "lr": 1e-2, "num_epochs": num_epochs, **settings})
    common = {"seed": 3, "data_folder": data_folder, "device": CPU, "download": False}
    return train_prior(CONFIG, training, vqvae_path=vqvae, output_folder=folder, resume=resume, **common)


def resume_state(folder: Path) -> dict:
    return torch.load(folder / "prior" / "resume.pt", weights_only=True)


def equal(one: object, other: object) -> bool:
    """Bit for bit, through dicts and lists."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(equal, one, other))
    return one == other


def metrics(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "prior" / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "maps_per_s"} for line in lines]


def test_two_epochs_and_one_more_equal_three_straight(tmp_path: Path, fixture_folder: Path) -> None:
    vqvae, straight, halted = save_vqvae(tmp_path), tmp_path / "straight", tmp_path / "halted"
    figures = train(vqvae, fixture_folder, straight, 3)
    train(vqvae, fixture_folder, halted, 2)
    assert not equal(resume_state(halted), resume_state(straight))
    torch.rand(17)  # whatever happens in between
    assert train(vqvae, fixture_folder, halted, 3, resume=True) == figures
    assert equal(resume_state(halted), resume_state(straight))
    moments = resume_state(halted)["optimizer"]["state"].values()
    assert all(state["exp_avg"].abs().max() > 0 for state in moments)
    assert equal(dict(load(vqvae, halted).state_dict()), dict(load(vqvae, straight).state_dict()))
    assert metrics(halted) == metrics(straight)


def test_a_run_cut_off_in_the_middle_goes_on_to_where_it_would_have_come(
    tmp_path: Path, fixture_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vqvae, straight, halted = save_vqvae(tmp_path), tmp_path / "straight", tmp_path / "halted"
    train(vqvae, fixture_folder, straight, 3, schedule="one-cycle")
    calls: list[int] = []

    def cut_off_in_the_second_epoch(*arguments: torch.Tensor) -> dict[str, torch.Tensor]:
        calls.append(1)
        if len(calls) == 6:  # 4 steps an epoch
            raise KeyboardInterrupt
        return objective(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(prior.train, "objective", cut_off_in_the_second_epoch)
        patch.setattr(prior.train, "evaluate", lambda network, codes: {"nats_per_code": 9.0})  # not to be counted
        with pytest.raises(KeyboardInterrupt):
            train(vqvae, fixture_folder, halted, 3, schedule="one-cycle")
    assert resume_state(halted)["step"] == STEPS
    train(vqvae, fixture_folder, halted, 3, resume=True, schedule="one-cycle")
    for part in ("model", "optimizer", "step", "best"):
        assert equal(resume_state(halted)[part], resume_state(straight)[part])
    assert (halted / "prior.safetensors").read_bytes() == (straight / "prior.safetensors").read_bytes()


def test_the_weights_kept_are_those_of_the_best_epoch_on_validation(
    tmp_path: Path, fixture_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vqvae, folder, two_epochs = save_vqvae(tmp_path), tmp_path / "run", tmp_path / "two epochs"
    train(vqvae, fixture_folder, two_epochs, 2)
    scripted, asked = iter([3.0, 1.0, 2.0, 0.5]), []

    def figures_by_script(network: GatedPixelCNN, codes: Codes) -> dict[str, float]:
        asked.append(codes.labels)
        return {"nats_per_code": next(scripted)}

    monkeypatch.setattr(prior.train, "evaluate", figures_by_script)
    assert train(vqvae, fixture_folder, folder, 3)["nats_per_code"] == 0.5
    _, validation = load_train_and_validation(fixture_folder, download=False)
    assert [torch.equal(labels, validation.labels) for labels in asked] == [True, True, True, False]
    assert torch.equal(asked[-1], load_test(fixture_folder, download=False).labels)
    assert checkpoint.read_header(folder / "prior.safetensors", "prior").metrics["nats_per_code"] == 1.0
    kept, second = (load(vqvae, path) for path in (folder, two_epochs))
    assert equal(dict(kept.state_dict()), resume_state(two_epochs)["model"])
    assert equal(dict(second.state_dict()), resume_state(two_epochs)["model"])  # its own best was the second too


def test_a_resumed_run_that_gets_worse_keeps_the_best_weights_from_before(
    tmp_path: Path, fixture_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vqvae, scripted = save_vqvae(tmp_path), iter([1.0, 0.5, 2.0, 0.5])  # validation, test; validation, test
    monkeypatch.setattr(prior.train, "evaluate", lambda *_: {"nats_per_code": next(scripted)})
    train(vqvae, fixture_folder, tmp_path, 1)
    before = (tmp_path / "prior.safetensors").read_bytes()
    train(vqvae, fixture_folder, tmp_path, 2, resume=True)
    assert resume_state(tmp_path)["step"] == 2 * STEPS
    assert (tmp_path / "prior.safetensors").read_bytes() == before


def load(vqvae_path: Path, folder: Path) -> GatedPixelCNN:
    vqvae, header = load_vqvae(vqvae_path, CPU)
    return load_prior(folder / "prior.safetensors", vqvae, header, CPU)[0]


def test_the_test_split_is_read_when_all_training_is_done(
    tmp_path: Path, fixture_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise LookupError("the test split was read")

    monkeypatch.setattr(prior.train, "load_test", refuse)
    with pytest.raises(LookupError):
        train(save_vqvae(tmp_path), fixture_folder, tmp_path / "run", 2)
    assert resume_state(tmp_path / "run")["step"] == 2 * STEPS
    assert (tmp_path / "run" / "prior.safetensors").exists()


def test_the_figures_written_are_those_of_the_weights_written(tmp_path: Path, fixture_folder: Path) -> None:
    vqvae_file = save_vqvae(tmp_path)
    figures = train(vqvae_file, fixture_folder, tmp_path, 2)
    (vqvae, header), network = load_vqvae(vqvae_file, CPU), load(vqvae_file, tmp_path)
    train_split, validation = load_train_and_validation(fixture_folder, download=False)
    test = load_test(fixture_folder, download=False)
    written = checkpoint.read_header(tmp_path / "prior.safetensors", "prior")
    for found, split in ((written.metrics, validation), (figures, test)):
        codes = extract(vqvae, split)
        counted = baselines(extract(vqvae, train_split), codes, 20)
        assert found == pytest.approx({**evaluate(network, codes), **counted})
    assert figures["nats_per_code"] < figures["uniform"]
    assert (written.vqvae_fingerprint, written.recipe["seed"]) == (header.fingerprint, 3)


def test_training_uses_the_codes_of_the_vqvae_it_is_given_and_not_a_stale_cache(
    tmp_path: Path, fixture_folder: Path
) -> None:
    one, other = save_vqvae(tmp_path / "one", 0), save_vqvae(tmp_path / "other", 1)
    expected = train(other, fixture_folder, tmp_path / "fresh", 1)
    train(one, fixture_folder, tmp_path / "used", 1)
    assert train(other, fixture_folder, tmp_path / "used", 1) == expected


def test_resuming_with_another_vqvae_is_refused(tmp_path: Path, fixture_folder: Path) -> None:
    one, other = save_vqvae(tmp_path / "one", 0), save_vqvae(tmp_path / "other", 1)
    train(one, fixture_folder, tmp_path / "run", 1)
    before = (tmp_path / "run" / "prior.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"VQ-VAE|vqvae.*overwrite"):
        train(other, fixture_folder, tmp_path / "run", 2, resume=True)
    assert (tmp_path / "run" / "prior.safetensors").read_bytes() == before
