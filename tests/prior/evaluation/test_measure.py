"""The evaluation and its figures: each is recomputed, and measured on what it is about."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prior.codes import Codes, extract
from prior.evaluation import classifier, figures, measure, memorisation, metrics, sets
from prior.evaluation.classifier_training import ClassifierTraining
from prior.independent import nats_by_position, unigram
from prior.sampling import GUIDANCE
from tests import helpers
from tests.helpers import make_info, make_prior, make_split, mnist
from tests.prior.evaluation.test_classifier import make_classifier
from vqvae.compute import derive_seed
from vqvae.data.dataset import DatasetInfo, Split
from vqvae.errors import InputError
from vqvae.quantizer import count_codes
from vqvae.train import VQVAETraining, evaluate_vqvae

DIGITS = mnist().validation.first(30)
BLENDS = DIGITS.images // 2 + DIGITS.images.roll(1, 0) // 2


def measure_blends(labels: Tensor | None, num_classes: int = 10) -> tuple[dict[str, Any], Tensor, Tensor, Tensor]:
    """The figures of blended digits, the features of real digits, and the features and probabilities of the blends."""
    model, _ = classifier.load_classifier(helpers.SHIPPED / "classifier.safetensors", helpers.CPU)
    real, _ = classifier.extract_features(model, mnist().train.images[:30])
    image_set = sets.ImageSet("name", "A title", BLENDS, None, labels)
    found = figures.measure_set(image_set, model, real, make_info(num_classes=num_classes), seed=5)
    assert found["fid"] > 2 * metrics.frechet_distance(real, classifier.extract_features(model, DIGITS.images)[0])
    return found, real, *classifier.extract_features(model, BLENDS)


def test_what_the_classifier_takes_images_for_is_counted_image_by_image() -> None:
    labels = DIGITS.labels % 9  # none is of the last class
    found, *_, p = measure_blends(labels)
    taken_for = p.argmax(dim=1).tolist()
    agrees = [[guess == n for guess, label in zip(taken_for, labels, strict=True) if label == n] for n in range(9)]
    assert found["predicted"] == [taken_for.count(label) for label in range(10)]
    assert found["confident"] == pytest.approx(sum(row.max() >= 0.99 for row in p).item() / 30)
    assert found["agreement"] == pytest.approx(sum(map(sum, agrees)) / 30)
    assert found["agreement_by_class"] == [*(pytest.approx(np.mean(shares)) for shares in agrees), None]


def test_distances_are_those_of_the_features_with_the_same_subsets_for_every_set_of_a_seed() -> None:
    found, real, features, _ = measure_blends(None, num_classes=0)
    generator = torch.Generator().manual_seed(derive_seed(5, "subsets"))
    expected = dict(zip(("kid", "kid_std"), metrics.kid(real, features, generator), strict=True))
    expected |= {"name": "name", "title": "A title", "fid": metrics.frechet_distance(real, features)}
    expected["fid_infinity"] = metrics.frechet_distance_at_infinity(real, features, generator)
    assert found == expected | metrics.prdc(real, features)._asdict() | {"confident": found["confident"]}
    assert measure_blends(None)[0].keys() - found.keys() == {"predicted"}  # no agreement where there are no labels


def test_structural_similarity_is_1_for_equals_and_the_mean_of_its_closed_form_for_even_images() -> None:
    shades = torch.tensor([51, 102, 204, 255], dtype=torch.uint8)[:, None, None, None].expand(4, 1, 28, 28)
    expected = [(2 * a * b + 1e-4) / (a * a + b * b + 1e-4) for a, b in ((0.2, 0.8), (0.4, 1.0))]
    assert figures.structural_similarity(shades[:2], shades[2:]) == pytest.approx(np.mean(expected), abs=1e-4)
    assert figures.structural_similarity(BLENDS, BLENDS) == pytest.approx(1, abs=1e-5)
    assert figures.structural_similarity(BLENDS, DIGITS.images) < 0.9


@torch.no_grad()
def test_the_likelihood_without_a_label_is_the_mixtures_and_the_label_is_found_by_bayes_rule() -> None:
    prior, info = make_prior((2, 3), num_codes=5, num_classes=3), make_info(num_classes=3)
    prior.head[-1].weight.mul_(5)
    codes = helpers.make_codes(40, prior)
    joint = np.zeros((40, 3))  # p(label) p(map | label), with p(label) of 1, 2 and 3 sixths
    for label in range(3):
        p = prior(codes.indices, torch.full((40,), label)).double().softmax(dim=1)
        joint[:, label] = (label + 1) / 6 * p.gather(1, codes.indices[:, None]).flatten(1).prod(dim=1).numpy()
    assert (joint.argmax(axis=1) != (joint / [1, 2, 3]).argmax(axis=1)).any()  # the frequencies matter
    assert figures.measure_without_label(prior, codes, info) == {
        "num_maps": 40,
        "nats_per_code": pytest.approx(-np.log(joint.sum(axis=1)).mean() / 6, abs=1e-5),
        "accuracy": np.mean(joint.argmax(axis=1) == codes.labels.numpy()),
    }


@torch.no_grad()
def test_the_likelihood_of_each_split_stands_beside_the_unigram_of_all_training_maps() -> None:
    prior, sizes = make_prior((2, 3), num_codes=5, num_classes=3), {"train": 50, "validation": 15, "test": 20}
    splits = {name: helpers.make_codes(num, prior, num) for name, num in sizes.items()}
    for found, codes in zip(figures.measure_likelihood(prior, splits).values(), splits.values(), strict=True):
        maps, labels = codes.indices[:20], codes.labels[:20]  # as many as the last split has
        nats = -prior(maps, labels).double().log_softmax(dim=1).gather(1, maps[:, None]).mean().item()
        counts = (splits["train"].indices[:, None] == maps).sum(dim=0)  # of each code at its position in training
        baselines = {"unigram": -((counts + 1) / 55).log().mean().item(), "uniform": np.log(5)}
        expected = {"nats_per_code": nats, "bits_per_image": 6 * nats / np.log(2), **baselines}
        assert found == pytest.approx(expected, abs=1e-5)


KINDS = {3: (3, 32, 32), 0: (3, 24, 16), 26: (1, 20, 36)}


@cache
def setting(num_classes: int) -> tuple[list[nn.Module], DatasetInfo, dict[str, Split]]:
    """A VQ-VAE, a prior and a classifier, all small, and random data."""
    shape, vqvae = KINDS[num_classes], helpers.make_vqvae(KINDS[num_classes])
    models = [vqvae, make_prior(vqvae.map_shape, num_classes=num_classes), make_classifier(shape, num_classes or 2)]
    sizes = {"train": 130, "validation": 105, "test": 110}
    splits = {name: make_split(num, shape, num_classes, num) for name, num in sizes.items()}
    return models, make_info(shape, num_classes), splits


def evaluate(num_classes: int = 3, **options: Any) -> measure.Evaluation:
    models, info, splits = setting(num_classes)
    return measure.evaluate(*models, info, **{"splits": splits, "num_samples": 100, "seed": 0, **options})


@pytest.mark.parametrize("num_classes", KINDS)
def test_every_part_is_measured_on_what_it_is_about_whatever_the_data(num_classes: int) -> None:
    (vqvae, prior, model), info, splits = setting(num_classes)
    found, codes = evaluate(num_classes), {name: extract(vqvae, split) for name, split in splits.items()}
    train, test, maps = splits["train"].first(100), splits["test"].first(100), codes["test"].indices
    frequencies = unigram(codes["train"], 16)
    samplers = sets.make_samplers(vqvae, prior, info, test, train.labels, frequencies, seed=0, guidance=GUIDANCE)
    expected_sets = [sets.real_images(test, info), *(sets.decoded_images(s, vqvae, 0) for s in samplers)]
    assert all(torch.equal(s.images, other.images) for s, other in zip(found.sets, expected_sets, strict=True))
    assert found.labelled_samples is found.sets[2]
    features, _ = classifier.extract_features(model, train.images)
    compared = (test.images, found.sets[1].images)
    known = (splits["train"].images, codes["train"].indices)
    copies, pairs = memorisation.measure_memorisation(*compared, found.sets[2], *known, maps[:100])
    expected = {
        "origin": {"split": "test", "num_samples": 100, "seed": 0, "guidance": GUIDANCE},
        "class_names": list(info.class_names),
        "rows": [figures.measure_set(s, model, features, info, 0) for s in expected_sets],
        "stage_one": evaluate_vqvae(vqvae, splits["test"], VQVAETraining()),
        "likelihood": figures.measure_likelihood(prior, codes),
        "memorisation": copies,
    }
    expected["stage_one"]["ssim"] = figures.structural_similarity(*compared)
    if num_classes > 0:
        expected["without_label"] = figures.measure_without_label(prior, Codes(maps[:100], test.labels), info)
    assert found.figures == expected
    assert torch.equal(found.closest, pairs)
    assert found.nats.mean().item() == pytest.approx(expected["likelihood"]["test"]["nats_per_code"], rel=1e-5)
    assert torch.equal(found.unigram_nats, nats_by_position(frequencies, maps))
    assert torch.equal(found.code_counts, count_codes(maps, 16))


def test_the_last_split_is_measured_and_without_guidance_there_is_no_row_for_it() -> None:
    splits = {name: setting(3)[2][name] for name in ("train", "validation")}
    found = evaluate(splits=splits, num_samples=101, guidance=1.0)
    assert torch.equal(found.sets[0].images, splits["validation"].images[:101])
    assert (len(found.sets), found.labelled_samples.name) == (9, "pixelcnn_labelled")
    assert found.figures["origin"] == {"split": "validation", "num_samples": 101, "seed": 0, "guidance": 1.0}


def test_the_seed_decides_what_is_drawn_and_modes_and_the_global_random_state_stay() -> None:
    models, found, state = nn.ModuleList(setting(3)[0]), evaluate(), torch.get_rng_state()
    models.train()
    again = evaluate()
    assert all(module.training for module in models.modules())
    models.eval()
    assert torch.equal(torch.get_rng_state(), state)
    assert json.dumps(again.figures) == json.dumps(found.figures)
    pairs = zip(found.sets, evaluate(seed=1).sets, strict=True)
    assert [torch.equal(a.images, b.images) for a, b in pairs][:-1] == [True] * 2 + [False] * 7  # the last is noise


def test_arguments_out_of_range_are_refused() -> None:
    few = {name: split.first(99) for name, split in setting(3)[2].items()}
    for options, message in (
        ({"num_samples": 99}, "`num_samples` between 100 and 110, .*, found 99; try `num_samples=110`"),
        ({"num_samples": 111}, "`num_samples` between 100 and 110, .*, found 111"),
        ({"splits": few, "num_samples": 99}, "at least 100 images in each split, found 99"),
        ({"guidance": -1}, "`guidance`"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(**options)


def test_the_test_split_is_not_read_for_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def recorded(*arguments: Any, **options: Any) -> measure.Evaluation:
        calls.append((list(arguments[4]), options))
        return measure.Evaluation({"origin": {}}, [], samples, *[torch.zeros(0)] * 4)

    (calls, scored), pair, file = ([], []), helpers.save_pair(tmp_path), tmp_path / "c.safetensors"
    samples, data = sets.ImageSet("", "", **make_split(100)._asdict()), replace(mnist(), info=pair.info)
    unread = replace(data, load_test=lambda: pytest.fail("read the test split"))
    for shape, num_classes, wrong in (((1, 20, 28), 10, "images"), ((1, 28, 28), 9, "10 classes, found one of 9")):
        helpers.save_model(file, make_classifier(shape, num_classes), "classifier", make_info(shape, num_classes))
        with pytest.raises(InputError, match=rf"a classifier of {wrong}.*with `train_classifier\(\)`"):
            measure.evaluate_pair(pair, file, data)
    header = helpers.save_model(file, make_classifier(), "classifier", pair.info)
    monkeypatch.setattr(measure, "evaluate", recorded)
    monkeypatch.setattr(measure, "accuracy_after_training_on", lambda *given: scored.append(given) or len(scored))
    saved: list[int] = []  # how many classifiers were trained before the other figures were saved
    options = {"seed": 5, "save": lambda evaluation: saved.append(len(scored))}
    result = measure.evaluate_pair(pair, file, data, accuracy_score=True, **options).figures
    prints = {"vqvae": pair.vqvae_header, "prior": pair.prior_header, "classifier": header}
    assert result["origin"] == {stage: part.fingerprint for stage, part in prints.items()}
    assert (result["classification_accuracy_score"], saved) == ({"samples": 1, "real": 2}, [0])
    for source, (split, measured, _, *rest) in zip((make_split(100), data.train), scored, strict=True):
        assert all(map(torch.equal, split, source.first(100)))  # as many of both
        assert (len(measured.labels), *rest) == (120, ClassifierTraining(), 5)
    measure.evaluate_pair(pair, file, unread, split="validation", num_samples=7, guidance=3, seed=2)
    assert calls == [
        (["train", "validation", "test"], {"num_samples": 120, "seed": 5, "guidance": GUIDANCE}),
        (["train", "validation"], {"num_samples": 7, "seed": 2, "guidance": 3}),
    ]
    other = replace(unread, info=make_info(num_classes=0))
    for data, split, message in ((unread, "train", "validation or test"), (other, "test", "like those of made")):
        with pytest.raises(InputError, match=message):
            measure.evaluate_pair(pair, file, data, split=split)
