"""The evaluation of both stages: every figure recomputed from the sets of images, and a prior that copies caught."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import prior.evaluate as evaluation
import pytest
import torch
from prior.evaluate import Evaluation, ImageSet, classification_accuracy_score, evaluate
from prior.unigram import baselines, draw_independently, unigram
from torch import Tensor
from vqvae.common import fidelity
from vqvae.common.classifier import Classifier, ClassifierConfig, ClassifierTraining, look, objective
from vqvae.common.data import Split, load_test, load_train_and_validation, to_model_range
from vqvae.common.engine import derive_seed
from vqvae.common.errors import UserError

import prior.train
from prior.codes import Codes, extract
from prior.model import GatedPixelCNN, PriorConfig
from prior.sampling import sample
from vqvae.gaussian import gaussian_images, gaussian_latents
from vqvae.model import VQVAE, VQVAEConfig
from vqvae.train import VQVAETraining
from vqvae.train import evaluate as evaluate_vqvae
from vqvae.train import objective as vqvae_objective

FIXTURE = Path(__file__).parent / "fixture"
CPU = torch.device("cpu")
NUM = 100
K = 16
GUIDANCE = 2.5
NAMES = [
    "real",
    "reconstructions",
    "pixelcnn_guided",
    "pixelcnn_labelled",
    "pixelcnn",
    "unigram",
    "uniform",
    "gaussian_latent",
    "gaussian_image",
]
DRAWN = NAMES[2:]
LABELLED = NAMES[:4]
FIGURES = {
    "name",
    "title",
    "fid",
    "fid_infinity",
    "kid",
    "kid_std",
    "precision",
    "recall",
    "density",
    "coverage",
    "sure",
    "digits",
}


class Measured(NamedTuple):
    """What was measured with what, and what came of it."""

    vqvae: VQVAE
    prior: GatedPixelCNN
    classifier: Classifier
    splits: dict[str, Split]
    found: Evaluation

    def again(self, splits: dict[str, Split] | None = None, num_samples: int = NUM, **options: object) -> Evaluation:
        arguments = {"num_samples": num_samples, "seed": 0, "guidance": GUIDANCE, **options}
        return evaluate(self.vqvae, self.prior, self.classifier, splits or self.splits, **arguments)


def teach(model: torch.nn.Module, parts: tuple[Tensor, ...], objective: object, num_epochs: int, lr: float) -> None:
    """A few epochs of the fixture, of batches in order."""
    optimizer = torch.optim.Adam(model.train().parameters(), lr=lr)
    for _ in range(num_epochs):
        for batch in zip(*(part.split(40) for part in parts), strict=True):
            loss = next(iter(objective(*batch).values()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()


@pytest.fixture(scope="module")
def measured() -> Measured:
    """Small models, each taught the fixture for a second, and their evaluation."""
    train, validation = load_train_and_validation(FIXTURE, download=False)
    splits = {"train": train, "validation": validation, "test": load_test(FIXTURE, download=False)}
    torch.manual_seed(0)
    config = VQVAEConfig(hidden_size=4, k=K, width=8, num_encoder_blocks=0, num_decoder_blocks=1)
    vqvae = VQVAE(VQVAEConfig(**{**vars(config), "codebook_learning": "ema", "ema_decay": 0.9}))
    teach(vqvae, (train.images,), lambda x: vqvae_objective(vqvae, x, VQVAETraining())[0], 6, 5e-3)
    network = GatedPixelCNN(PriorConfig(width=8), K, vqvae.map_shape)
    teach(network, extract(vqvae, train), lambda m, labels: prior.train.objective(network, m, labels), 2, 1e-2)
    classifier = Classifier(ClassifierConfig(width=8))
    teach(classifier, tuple(train), lambda x, labels: objective(classifier, x, labels), 6, 1e-2)
    found = evaluate(vqvae, network, classifier, splits, num_samples=NUM, seed=0, guidance=GUIDANCE)
    return Measured(vqvae, network, classifier, splits, found)


@pytest.fixture(scope="module")
def rows(measured: Measured) -> dict[str, dict]:
    """The figures of each set by its name."""
    return {row["name"]: row for row in measured.found.figures["rows"]}


@pytest.fixture(scope="module")
def sets(measured: Measured) -> dict[str, ImageSet]:
    return {image_set.name: image_set for image_set in measured.found.sets}


# The sets


def test_the_rows_and_the_sets_stand_in_one_order_from_real_digits_to_noise(measured: Measured) -> None:
    found = measured.found.figures["rows"]
    assert [row["name"] for row in found] == [image_set.name for image_set in measured.found.sets] == NAMES
    assert [row["title"] for row in found] == [image_set.title for image_set in measured.found.sets]
    assert len({row["title"] for row in found}) == len(NAMES)


def test_every_set_has_as_many_images_and_codes_where_codes_were_drawn(sets: dict[str, ImageSet]) -> None:
    for name, image_set in sets.items():
        assert (image_set.images.shape, image_set.images.dtype) == ((NUM, 1, 28, 28), torch.uint8)
        assert (image_set.indices is None) == (name == "real")
        assert (image_set.labels is None) == (name not in LABELLED)


def test_real_digits_are_the_first_held_out_ones_and_all_other_images_are_decoded_codes(
    measured: Measured, sets: dict[str, ImageSet]
) -> None:
    test = measured.splits["test"]
    assert torch.equal(sets["real"].images, test.images[:NUM])
    for name in NAMES[1:]:
        maps = sets[name].indices
        assert (maps.shape, maps.dtype) == ((NUM, 7, 7), torch.int64)
        assert 0 <= maps.min() <= maps.max() < K
        with torch.no_grad():
            decoded = (measured.vqvae.decode_indices(maps).double() + 1).div(2).clamp(0, 1).mul(255)
        assert (sets[name].images.double() - decoded).abs().max() < 0.501  # the nearest byte
    with torch.no_grad():
        assert torch.equal(sets["reconstructions"].indices, measured.vqvae.encode(to_model_range(test.images[:NUM])))
    assert len({sets[name].indices.numpy().tobytes() for name in NAMES[1:]}) == len(NAMES) - 1


def test_each_set_is_drawn_in_its_own_way_and_labels_are_those_of_the_digits_it_is_compared_with(
    measured: Measured, sets: dict[str, ImageSet]
) -> None:
    labels = measured.splits["train"].labels[:NUM]
    for name in ("pixelcnn_guided", "pixelcnn_labelled"):
        assert torch.equal(sets[name].labels, labels)
    for name in ("real", "reconstructions"):
        assert torch.equal(sets[name].labels, measured.splits["test"].labels[:NUM])
    vqvae, network = measured.vqvae, measured.prior
    frequencies = unigram(extract(vqvae, measured.splits["train"]), K)
    ways = {
        "pixelcnn_guided": lambda g: sample(network, NUM, g, labels=labels, guidance=GUIDANCE),
        "pixelcnn_labelled": lambda g: sample(network, NUM, g, labels=labels),
        "pixelcnn": lambda g: sample(network, NUM, g),
        "unigram": lambda g: draw_independently(frequencies, NUM, g),
        "uniform": lambda g: draw_independently(torch.full((7, 7, K), 1 / K, dtype=torch.float64), NUM, g),
        "gaussian_latent": lambda g: gaussian_latents(vqvae, NUM, g),
        "gaussian_image": lambda g: gaussian_images(vqvae, NUM, g),
    }
    assert list(ways) == DRAWN
    for name, way in ways.items():
        with torch.no_grad():
            drawn = way(torch.Generator().manual_seed(derive_seed(0, name)))
        assert torch.equal(sets[name].indices, drawn)


# The figures of each set


def test_every_figure_is_there_and_within_its_range(rows: dict[str, dict]) -> None:
    for name, row in rows.items():
        assert set(row) == FIGURES | ({"agreement", "agreement_by_digit"} if name in LABELLED else set())
        assert all(0 <= row[figure] <= 1 for figure in ("precision", "recall", "coverage", "sure"))
        assert all(math.isfinite(row[figure]) for figure in ("fid_infinity", "kid"))
        assert row["fid"] > 0
        assert row["density"] >= 0
        assert 0 <= row["kid_std"] < 1e-6  # 100 samples make one subset
        assert len(row["digits"]) == 10
        assert sum(row["digits"]) == NUM


def test_real_digits_are_the_best_and_gaussian_images_worse_than_reconstructions(rows: dict[str, dict]) -> None:
    for figure in ("fid", "fid_infinity", "kid"):
        assert min(NAMES, key=lambda name: rows[name][figure]) == "real"
        assert rows["reconstructions"][figure] < rows["gaussian_image"][figure]
    assert max(NAMES, key=lambda name: rows[name]["coverage"]) == "real"
    # High, but not the highest: a set that keeps to a few likely shapes may have more of it than real digits do.
    assert rows["real"]["precision"] > 0.85
    assert rows["real"]["agreement"] > 0.4  # 0.1 by chance


@pytest.mark.parametrize("name", NAMES)
def test_distances_are_those_of_the_features_to_as_many_training_digits(
    name: str, measured: Measured, rows: dict[str, dict], sets: dict[str, ImageSet]
) -> None:
    real, _ = look(measured.classifier, measured.splits["train"].images[:NUM])
    features, _ = look(measured.classifier, sets[name].images)
    row = rows[name]
    assert row["fid"] == pytest.approx(fidelity.frechet_distance(real, features), rel=1e-6)
    generator = torch.Generator().manual_seed(0)  # any: 100 samples make one subset
    assert row["kid"] == pytest.approx(fidelity.kernel_distance(real, features, generator)[0], rel=1e-6, abs=1e-9)
    found = [row[figure] for figure in ("precision", "recall", "density", "coverage")]
    assert found == pytest.approx(fidelity.neighbourhoods(real, features), abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_what_the_classifier_takes_images_for_is_counted_image_by_image(
    name: str, measured: Measured, rows: dict[str, dict], sets: dict[str, ImageSet]
) -> None:
    with torch.no_grad():
        logits = measured.classifier(sets[name].images.float() / 127.5 - 1).double()
    taken_for = [row.index(max(row)) for row in logits.tolist()]
    assert rows[name]["digits"] == [taken_for.count(digit) for digit in range(10)]
    probabilities = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(axis=1, keepdims=True)
    assert rows[name]["sure"] == pytest.approx(np.mean(probabilities.max(axis=1) >= 0.99), abs=1e-6)
    if name not in LABELLED:
        return
    labels = sets[name].labels.tolist()
    agrees = [digit == label for digit, label in zip(taken_for, labels, strict=True)]
    assert rows[name]["agreement"] == pytest.approx(sum(agrees) / NUM, abs=1e-6)
    for digit in range(10):
        share = np.mean([agree for agree, label in zip(agrees, labels, strict=True) if label == digit])
        assert rows[name]["agreement_by_digit"][digit] == pytest.approx(share, abs=1e-6)


def test_a_classifier_that_is_always_sure_is_counted_as_sure(measured: Measured, sets: dict[str, ImageSet]) -> None:
    sure = Classifier(ClassifierConfig(width=8)).eval()
    sure.load_state_dict(measured.classifier.state_dict())
    with torch.no_grad():
        sure.head.bias[3] += 1000
    real, _ = look(sure, measured.splits["train"].images[:NUM])
    row = evaluation._row(sets["real"], sure, real, 0)
    assert row["sure"] == 1
    assert row["digits"] == [0, 0, 0, NUM, 0, 0, 0, 0, 0, 0]
    assert row["agreement_by_digit"] == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    assert row["agreement"] == pytest.approx(sets["real"].labels.tolist().count(3) / NUM)


# Likelihood, stage one, memorisation


def test_the_likelihood_of_each_split_is_that_of_stage_twos_own_evaluation(measured: Measured) -> None:
    codes = {name: extract(measured.vqvae, split) for name, split in measured.splits.items()}
    likelihood = measured.found.figures["likelihood"]
    assert list(likelihood) == ["train", "validation", "test"]
    for name, split in codes.items():
        part = Codes(*(tensor[:120] for tensor in split))  # as many training maps as there are test maps
        counted = baselines(codes["train"], part, K)  # over all of them
        assert likelihood[name] == pytest.approx({**prior.train.evaluate(measured.prior, part), **counted})


def test_likelihood_by_position_has_the_mean_of_the_whole_map(measured: Measured) -> None:
    test = measured.found.figures["likelihood"]["test"]
    for nats, figure in ((measured.found.nats, "nats_per_code"), (measured.found.unigram_nats, "unigram")):
        assert nats.shape == (7, 7)
        assert nats.mean().item() == pytest.approx(test[figure], rel=1e-5)
        assert nats.min() < nats.mean() < nats.max()


def test_codes_are_counted_over_the_measured_split(measured: Measured) -> None:
    maps = extract(measured.vqvae, measured.splits["test"]).indices.flatten().tolist()
    assert measured.found.code_counts.tolist() == [maps.count(code) for code in range(K)]
    assert sum(measured.found.code_counts.tolist()) == 120 * 49


def test_stage_ones_figures_are_those_of_its_own_evaluation_of_the_measured_split(measured: Measured) -> None:
    expected = evaluate_vqvae(measured.vqvae, measured.splits["test"], VQVAETraining())
    found = measured.found.figures["stage_one"]
    assert {name: value for name, value in found.items() if name != "ssim"} == pytest.approx(expected)
    assert 0 < found["ssim"] < 1


def test_structural_similarity_is_1_for_equals_less_with_noise_and_about_0_for_strangers(measured: Measured) -> None:
    digits = measured.splits["test"].images[:60]
    noise = torch.randint(-40, 41, digits.shape, generator=torch.Generator().manual_seed(0))
    noisy = (digits.int() + noise).clamp(0, 255).to(torch.uint8)
    assert evaluation._ssim(digits, digits) == pytest.approx(1, abs=1e-5)
    similar, strange = evaluation._ssim(digits, noisy), evaluation._ssim(digits, digits.flip(0))
    assert 0.1 < similar < 0.95
    assert strange < similar
    one_by_one = [evaluation._ssim(digits[n : n + 1], noisy[n : n + 1]) for n in range(10)]
    assert evaluation._ssim(digits[:10], noisy[:10]) == pytest.approx(np.mean(one_by_one), abs=1e-5)


def distances_by_hand(images: Tensor, train: Split) -> np.ndarray:
    """(N, M), root mean square over pixels in 0..1."""
    a, b = (part.double().flatten(1).numpy() / 255 for part in (images, train.images))
    return np.stack([np.sqrt(np.mean((b - image) ** 2, axis=1)) for image in a])


def test_distances_to_the_nearest_training_digit_are_those_of_all_pairs(
    measured: Measured, sets: dict[str, ImageSet]
) -> None:
    found = measured.found.figures["memorisation"]
    compared = {"real": "real", "reconstructions": "reconstructions", "samples": "pixelcnn_guided"}
    nearest = {
        key: distances_by_hand(sets[name].images, measured.splits["train"]).min(axis=1)
        for key, name in compared.items()
    }
    assert found["distance"] == pytest.approx({key: values.mean() for key, values in nearest.items()}, abs=1e-4)
    for figure, a, b in (
        ("p_closer_than_real", "samples", "real"),
        ("p_closer_than_reconstructions", "samples", "reconstructions"),
        ("p_reconstructions_closer_than_real", "reconstructions", "real"),
    ):
        p = fidelity.closer(torch.from_numpy(nearest[a]), torch.from_numpy(nearest[b]))
        assert found[figure] == pytest.approx(p, abs=1e-3)


def test_repeated_maps_are_counted_one_by_one(measured: Measured, sets: dict[str, ImageSet]) -> None:
    known = extract(measured.vqvae, measured.splits["train"]).indices.tolist()
    found = measured.found.figures["memorisation"]
    for figure, name in (("copied_maps", "pixelcnn_guided"), ("copied_maps_real", "real")):
        maps = sets[name].indices
        if maps is None:
            maps = extract(measured.vqvae, measured.splits["test"]).indices[:NUM]
        assert found[figure] == sum(indices in known for indices in maps.tolist())
    train = extract(measured.vqvae, measured.splits["train"])  # held out, they would all be repeated; as many count
    figures, _ = evaluation._memorisation(sets, measured.found.judged, measured.splits["train"], train, train)
    assert figures["copied_maps_real"] == NUM


def test_the_closest_pairs_are_samples_beside_their_nearest_training_digits_closest_first(
    measured: Measured, sets: dict[str, ImageSet]
) -> None:
    distances = distances_by_hand(sets["pixelcnn_guided"].images, measured.splits["train"])
    pairs = measured.found.closest
    assert (pairs.shape, pairs.dtype) == ((2 * evaluation.NUM_PAIRS, 1, 28, 28), torch.uint8)
    shown = np.array([math.sqrt(((a.double() - b.double()) / 255).square().mean()) for a, b in pairs.split(2)])
    np.testing.assert_allclose(shown, np.sort(distances.min(axis=1))[: len(shown)], atol=1e-4)
    samples = {image.numpy().tobytes() for image in sets["pixelcnn_guided"].images}
    digits = {image.numpy().tobytes() for image in measured.splits["train"].images}
    assert {image.numpy().tobytes() for image in pairs[0::2]} <= samples
    assert {image.numpy().tobytes() for image in pairs[1::2]} <= digits


def memorisation_of(indices: Tensor, images: Tensor, measured: Measured, sets: dict[str, ImageSet]) -> dict:
    """The figures of a prior whose samples these are."""
    codes = {name: extract(measured.vqvae, split) for name, split in measured.splits.items()}
    samples = measured.found.judged._replace(indices=indices, images=images)
    figures, pairs = evaluation._memorisation(sets, samples, measured.splits["train"], codes["train"], codes["test"])
    assert len(pairs) == 2 * evaluation.NUM_PAIRS
    return figures


def test_a_prior_that_hands_out_training_maps_is_found_out(measured: Measured, sets: dict[str, ImageSet]) -> None:
    codes = extract(measured.vqvae, measured.splits["train"])
    with torch.no_grad():
        decoded = (measured.vqvae.decode_indices(codes.indices[:NUM]) + 1).mul(127.5).clamp(0, 255).to(torch.uint8)
    found = memorisation_of(codes.indices[:NUM], decoded, measured, sets)
    assert found["copied_maps"] == NUM
    found = memorisation_of(codes.indices[:NUM], measured.splits["train"].images[:NUM], measured, sets)
    assert found["distance"]["samples"] < 1e-3
    assert found["p_closer_than_real"] < 1e-6
    assert found["p_closer_than_reconstructions"] < 1e-6


def test_a_prior_that_draws_new_digits_is_not_accused(measured: Measured, sets: dict[str, ImageSet]) -> None:
    own = extract(measured.vqvae, measured.splits["train"]).indices
    apart = (own[:NUM] + 1) % K  # no training map has a neighbour's code everywhere
    real, through_the_model = sets["real"].images, sets["reconstructions"].images
    found = memorisation_of(apart, real, measured, sets)
    assert found["copied_maps"] == 0
    assert found["p_closer_than_real"] == pytest.approx(0.5, abs=0.01)
    assert memorisation_of(apart, through_the_model, measured, sets)["p_closer_than_reconstructions"] > 0.4


# Which split, which seed, how many


def test_the_last_split_is_the_one_measured(measured: Measured) -> None:
    train = measured.splits["train"]
    splits = {"train": Split(*(part[:320] for part in train)), "validation": Split(*(part[320:] for part in train))}
    found = measured.again(splits, num_samples=110)
    assert torch.equal(found.sets[0].images, train.images[320:430])
    assert list(found.figures["likelihood"]) == ["train", "validation"]
    assert found.code_counts.sum() == 120 * 49
    expected = evaluate_vqvae(measured.vqvae, splits["validation"], VQVAETraining())
    assert found.figures["stage_one"]["squared_error"] == pytest.approx(expected["squared_error"])


def test_the_same_seed_gives_the_same_figures_and_another_seed_changes_what_is_drawn_alone(measured: Measured) -> None:
    assert json.dumps(measured.again().figures) == json.dumps(measured.found.figures)
    other = measured.again(seed=1)
    for before, after in zip(measured.found.sets, other.sets, strict=True):
        assert torch.equal(before.images, after.images) != (before.name in DRAWN)
    for figure in ("stage_one", "likelihood"):
        assert other.figures[figure] == measured.found.figures[figure]
    assert other.figures["rows"][0]["fid"] == measured.found.figures["rows"][0]["fid"]


def test_guided_samples_are_measured_beside_the_unguided_and_are_the_ones_judged(measured: Measured) -> None:
    assert measured.found.judged is measured.found.sets[2]
    assert [image_set.title for image_set in measured.found.sets if "guid" in image_set.title] == [
        "pixelcnn, guidance 2.5"
    ]
    other = measured.again(guidance=0.5)
    for before, after in zip(measured.found.sets, other.sets, strict=True):
        assert torch.equal(before.images, after.images) != (before.name == "pixelcnn_guided")
    assert other.figures["rows"][3:] == measured.found.figures["rows"][3:]


def test_without_guidance_there_is_no_row_for_it_and_the_labelled_samples_are_judged(measured: Measured) -> None:
    found = measured.again(guidance=1.0)
    assert [row["name"] for row in found.figures["rows"]] == [name for name in NAMES if name != "pixelcnn_guided"]
    assert found.judged is found.sets[2]
    assert found.judged.name == "pixelcnn_labelled"
    nearest = distances_by_hand(found.judged.images, measured.splits["train"]).min(axis=1)
    assert found.figures["memorisation"]["distance"]["samples"] == pytest.approx(nearest.mean(), abs=1e-4)
    for row in found.figures["rows"]:
        assert row in measured.found.figures["rows"]


def test_the_global_random_state_and_the_models_modes_are_left_alone(measured: Measured) -> None:
    models = measured.vqvae, measured.prior, measured.classifier
    before = torch.get_rng_state()
    for model in models:
        model.train()
    try:
        again = measured.again()
        assert all(model.training for model in models)
    finally:
        for model in models:
            model.eval()
    assert torch.equal(torch.get_rng_state(), before)
    assert json.dumps(again.figures) == json.dumps(measured.found.figures)


@pytest.mark.parametrize("num_samples", [-1, 0, 99, 121])
def test_too_few_samples_or_more_than_digits_are_refused_by_the_flag(num_samples: int, measured: Measured) -> None:
    message = f"expected --num-samples between 100 and 120, .*, found {num_samples}; type --num-samples 120"
    with pytest.raises(UserError, match=message):
        measured.again(num_samples=num_samples)


# Classification accuracy score


def test_the_score_of_real_digits_is_that_of_real_digits_and_of_wrong_labels_nothing(
    measured: Measured, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vqvae.common.classifier.ClassifierConfig", lambda: ClassifierConfig(width=8))
    monkeypatch.setattr(evaluation, "ClassifierTraining", lambda: ClassifierTraining(batch_size=40, num_epochs=4))
    train, test = measured.splits["train"], measured.splits["test"]
    samples = ImageSet("pixelcnn_labelled", "", train.images, None, train.labels)
    scores = classification_accuracy_score(samples, train, test, 0, CPU)
    assert scores["samples"] == scores["real"] > 0.3  # 0.1 by chance
    wrong = samples._replace(labels=(train.labels + 1) % 10)
    assert classification_accuracy_score(wrong, train, test, 0, CPU)["samples"] < 0.15
    assert "training a classifier on 440 samples\n" in capsys.readouterr().out


def test_the_score_takes_as_many_real_digits_as_there_are_samples(
    measured: Measured, sets: dict[str, ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def record(source: Split, test: Split, training: ClassifierTraining, seed: int) -> float:
        asked.append((source, test, training, seed))
        return float(len(asked))

    monkeypatch.setattr(evaluation, "accuracy_after_training_on", record)
    samples, train, test = sets["pixelcnn_labelled"], measured.splits["train"], measured.splits["test"]
    assert classification_accuracy_score(samples, train, test, 7, CPU) == {"samples": 1.0, "real": 2.0}
    (first, *_), (second, *_) = asked
    for found, expected in ((first, samples), (second, Split(train.images[:NUM], train.labels[:NUM]))):
        assert torch.equal(found.images, expected.images)
        assert torch.equal(found.labels, expected.labels)
    for _, held_out, training, seed in asked:
        assert torch.equal(held_out.images, test.images)
        assert (training, seed) == (ClassifierTraining(), 7)
