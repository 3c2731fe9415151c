import re
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prior.codes import extract
from prior.evaluation import classifier, figures, measure, memorisation, metrics, report, sets
from prior.evaluation.classifier_training import ClassifierTraining
from prior.independent import baselines, nats_by_position, unigram
from prior.likelihood import label_log_joint, mixture_nats_per_map, nats_of_codes
from prior.sampling import GUIDANCE
from prior.train import evaluate_prior
from tests import helpers
from tests.helpers import make_info, make_prior, make_split, mnist
from tests.prior.evaluation.test_classifier import make_classifier
from tests.prior.evaluation.test_comparison import SHAPES
from tests.prior.evaluation.test_sets import seeded
from vqvae.data.dataset import DatasetInfo, Split
from vqvae.errors import InputError
from vqvae.loss import VQVAETraining, evaluate_vqvae
from vqvae.quantizer import count_codes

DIGITS = mnist().validation.first(30)
BLENDS = DIGITS.images // 2 + DIGITS.images.roll(1, 0) // 2


def test_a_sets_figures_are_those_of_its_features_and_of_what_each_image_is_taken_for() -> None:
    def measured(labels: Tensor | None, num_classes: int) -> dict[str, Any]:
        image_set = sets.ImageSet("name", "A title", BLENDS, None, labels)
        return figures.measure_set(image_set, model, real, make_info(num_classes=num_classes), seed=5)

    model, _ = classifier.load_classifier(helpers.SHIPPED / "classifier.safetensors", helpers.CPU)
    real, others, features = (
        classifier.extract_features(model, images)[0] for images in (mnist().train.images[:30], DIGITS.images, BLENDS)
    )
    p, generator = model.head(features).softmax(dim=1), seeded(5, "subsets")  # the same subsets for every set
    expected = dict(zip(("kid", "kid_std"), metrics.kid(real, features, generator), strict=True))
    expected |= {"name": "name", "title": "A title", "fid": metrics.frechet_distance(real, features)}
    expected |= {"fid_infinity": None, "fid_infinity_error": None}  # 30 images are too few
    expected["confident"] = pytest.approx(sum(row.max() >= 0.99 for row in p).item() / 30)
    expected |= metrics.prdc(real, features)._asdict()
    assert expected["fid"] > 2 * metrics.frechet_distance(real, others)
    assert measured(None, num_classes=0) == expected
    taken_for, labels = p.argmax(dim=1).tolist(), DIGITS.labels % 9  # none is of the last class
    agrees = [[guess == n for guess, label in zip(taken_for, labels, strict=True) if label == n] for n in range(9)]
    expected["predicted"] = [taken_for.count(label) for label in range(10)]
    assert measured(None, num_classes=10) == expected  # no agreement where there are no labels
    expected["agreement"] = pytest.approx(sum(map(sum, agrees)) / 30)
    expected["agreement_by_class"] = [*(pytest.approx(np.mean(shares)) for shares in agrees), None]
    assert measured(labels, num_classes=10) == expected


def test_structural_similarity_is_1_for_equals_and_the_mean_of_its_closed_form_for_even_images() -> None:
    shades = torch.tensor([51, 102, 204, 255], dtype=torch.uint8)[:, None, None, None].expand(4, 1, 28, 28)
    expected = [(2 * a * b + 1e-4) / (a * a + b * b + 1e-4) for a, b in ((0.2, 0.8), (0.4, 1.0))]
    assert figures.structural_similarity(shades[:2], shades[2:]) == pytest.approx(np.mean(expected), abs=1e-4)
    assert figures.structural_similarity(BLENDS, BLENDS) == pytest.approx(1, abs=1e-5)
    assert figures.structural_similarity(BLENDS, DIGITS.images) < 0.9


def test_the_likelihood_is_that_of_the_maps_and_without_a_label_the_mixtures() -> None:
    prior, info = make_prior((2, 3), num_codes=5, num_classes=3), make_info(num_classes=3)
    prior.head[-1].weight.data.mul_(5)
    sizes = {"train": 50, "validation": 15, "test": 20}
    splits = {name: helpers.make_codes(num, prior, num) for name, num in sizes.items()}
    train = helpers.make_codes(90, prior, 90)
    likelihood, nats = figures.measure_likelihood(prior, splits, train)
    for name, codes in splits.items():  # beside the unigram of all training maps
        expected = evaluate_prior(prior, codes) | baselines(train, codes, 5) | {"num_maps": sizes[name]}
        assert likelihood.pop(name) == pytest.approx(expected)
        assert torch.equal(nats[name], nats_of_codes(prior, *codes))
    assert not likelihood
    maps, labels = splits["train"]
    right = label_log_joint(prior, maps, info.class_frequencies).argmax(dim=1) == labels  # by Bayes' rule
    mixture = mixture_nats_per_map(prior, maps, info.class_frequencies).mean().item() / 6
    expected = {"num_maps": 50, "nats_per_code": pytest.approx(mixture), "accuracy": right.double().mean().item()}
    assert figures.measure_without_label(prior, splits["train"], nats["train"], info) == expected


def setting(num_classes: int) -> tuple[list[nn.Module], DatasetInfo, dict[str, Split]]:
    """A VQ-VAE, a prior and a classifier, all small, and random data."""
    shape, vqvae = SHAPES.get(num_classes, SHAPES[3]), helpers.make_vqvae(SHAPES.get(num_classes, SHAPES[3]))
    models = [vqvae, make_prior(vqvae.map_shape, num_classes=num_classes), make_classifier(shape, num_classes or 2)]
    sizes = {"train": 130, "validation": 105, "test": 110}
    splits = {name: make_split(num, shape, num_classes, num) for name, num in sizes.items()}
    return models, make_info(shape, num_classes), splits


class Bar:
    """A progress bar that counts."""

    bars: ClassVar[list["Bar"]] = []

    def __init__(self, total: int, unit: str, *, doing: str | None = None) -> None:
        self.total, self.moves, self.n = total, 0, 0
        self.bars.append(self)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def set_description(self, text: str, refresh: bool) -> None:
        assert not refresh  # it would be a line of its own where there is no terminal

    def update(self, num: int = 1) -> None:
        self.n, self.moves = self.n + num, self.moves + (num > 0)


@pytest.mark.parametrize(
    ("num_classes", "last", "guidance", "with_classifier"),
    [(3, "test", 2, True), (3, "test", 2, False), (0, "test", 2, False), (26, "validation", 1, True)],
)
def test_every_part_is_measured_on_what_it_is_about_in_the_last_split(
    num_classes: int, last: str, guidance: float, with_classifier: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (vqvae, prior, model), info, splits = setting(num_classes)
    splits = {name: splits[name] for name in ("train", "validation", last)}
    models, state, seed = nn.ModuleList([vqvae, prior, model]), torch.get_rng_state(), num_classes
    models.train()
    monkeypatch.setattr("prior.likelihood.BATCH", 40)
    with monkeypatch.context() as watched:
        watched.setattr(measure, "progress", Bar)
        watched.setattr(figures, "progress", Bar)
        watched.setattr(figures, "AT_ONCE", 40)
        watched.setattr("prior.codes.AT_ONCE", 40)
        watched.setattr(metrics, "ROWS_AT_ONCE", 40)
        Bar.bars.clear()
        given = model if with_classifier else None
        found = measure.evaluate(vqvae, prior, given, info, splits, num_samples=101, guidance=guidance, seed=seed)
    assert [bar.n for bar in Bar.bars] == [bar.total for bar in Bar.bars]
    assert min(bar.moves for bar in Bar.bars) >= 2  # each long part moves its own
    assert len(Bar.bars) == 4 + (num_classes > 0) + with_classifier
    assert all(module.training for module in models.modules())
    assert torch.equal(torch.get_rng_state(), state)
    models.eval()
    most, all_codes = len(splits[last].labels), extract(vqvae, splits["train"])
    of_first = {**splits, "train": splits["train"].first(most)}  # as many as the measured split has
    chosen = {name: sets.choose(split, 101, seed) for name, split in of_first.items()}
    codes = {name: extract(vqvae, split) for name, split in chosen.items()}
    train, test, maps = chosen["train"], chosen[last], codes[last].indices
    frequencies = unigram(all_codes, 16)
    samplers = sets.make_samplers(vqvae, prior, info, test, train.labels, frequencies, seed=seed, guidance=guidance)
    expected_sets = [sets.real_images(test, info), *(sets.decoded_images(s, vqvae, seed) for s in samplers)]
    assert all(torch.equal(s.images, other.images) for s, other in zip(found.sets, expected_sets, strict=True))
    assert found.labelled_samples is found.sets[2]
    features, _ = classifier.extract_features(model, train.images)
    compared = (test.images, found.sets[1].images)
    known = (splits["train"].images, all_codes.indices)
    copies, pairs = memorisation.measure_memorisation(*compared, found.sets[2], *known, maps)
    likelihood, nats = figures.measure_likelihood(prior, codes, all_codes)
    expected = {
        "origin": {"split": last, "num_samples": 101, "seed": seed, "guidance": guidance},
        "class_names": list(info.class_names),
        "rows": [figures.measure_set(s, model, features, info, seed) for s in expected_sets if with_classifier],
        "stage_one": evaluate_vqvae(vqvae, test, VQVAETraining()) | {"num_images": 101},
        "likelihood": likelihood,
        "memorisation": copies,
    }
    expected["stage_one"]["ssim"] = figures.structural_similarity(*compared)
    if num_classes > 0:
        expected["without_label"] = figures.measure_without_label(prior, codes[last], nats[last], info)
    assert found.figures == expected
    for closest, other in zip(found.closest, pairs, strict=True):
        assert torch.equal(closest.images, other.images)
    assert torch.equal(found.nats, nats[last].mean(dim=0))
    assert torch.equal(found.unigram_nats, nats_by_position(frequencies, maps))
    assert torch.equal(found.code_counts, count_codes(maps, 16))


@pytest.mark.parametrize(("equal", "num_classes"), [("images", 3), ("images", 0), ("codes", 1), ("labels", 3)])
def test_data_that_is_all_the_same_gives_a_whole_report_without_a_warning(
    equal: str, num_classes: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (vqvae, prior, _), info, splits = setting(num_classes)
    model = make_classifier(info.image_shape, num_classes) if num_classes else None
    if equal == "images":
        splits = {name: Split(split.images * 0 + 7, split.labels) for name, split in splits.items()}
    if equal == "labels":
        splits = {name: Split(split.images, split.labels * 0) for name, split in splits.items()}
    if equal == "codes":  # a codebook that has collapsed
        vqvae.quantizer.codebook[1:] += 100
    found = measure.evaluate(vqvae, prior, model, info, splits, num_samples=100, seed=0)
    found.figures["origin"] |= {"classifier": "0" * 64} if num_classes else {}
    report.write_report(found, tmp_path)
    text = report.tables_as_text(found)
    assert not re.search(r"\bnan\b|\binf\b|± 0\.0+\b", text)
    assert (tmp_path / "report.html").exists()
    assert capfd.readouterr() == ("", "")


def test_arguments_out_of_range_and_a_classifier_of_other_images_are_refused() -> None:
    (vqvae, prior, model), info, splits = setting(3)
    common = {"vqvae": vqvae, "prior": prior, "classifier": model, "splits": splits, "num_samples": 100, "seed": 0}
    few = {name: split.first(99) for name, split in splits.items()}
    broken = make_classifier(SHAPES[3], 3)
    broken.trunk[0].weight.data.fill_(torch.inf)
    for options, message in (
        ({"num_samples": 99}, "`num_samples` between 100 and 110, found 99; try `num_samples=110`, the number of"),
        ({"num_samples": 111}, "`num_samples` between 100 and 110, found 111"),
        ({"splits": few, "num_samples": 99}, "at least 100 images in each split, found 99"),
        ({"classifier": broken}, "finite features"),
    ):
        with pytest.raises(InputError, match=message):
            measure.evaluate(info=info, **{**common, **options})


def test_the_test_split_is_not_read_for_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def recorded(*arguments: Any, **options: Any) -> measure.Evaluation:
        calls.append((list(arguments[4]), options))
        return measure.Evaluation({"origin": {}}, [], samples, [], *[torch.zeros(0)] * 3)

    (calls, scored), pair, file = ([], []), helpers.save_pair(tmp_path), tmp_path / "c.safetensors"
    samples, data = sets.ImageSet("", "", **make_split(100)._asdict()), replace(mnist(), info=pair.info)
    unread = replace(data, load_test=lambda: pytest.fail("read the test split"))
    header = helpers.save_model(file, make_classifier(), "classifier", pair.info)
    monkeypatch.setattr(measure, "evaluate", recorded)
    monkeypatch.setattr(measure, "accuracy_after_training_on", lambda *given: scored.append(given) or len(scored))
    saved: list[int] = []  # how many classifiers were trained before the other figures were saved
    options = {"seed": 5, "save": lambda evaluation: saved.append(len(scored))}
    result = measure.evaluate_pair(pair, file, lambda info: data, accuracy_score=True, **options).figures
    prints = {"vqvae": pair.vqvae_header, "prior": pair.prior_header, "classifier": header}
    others = {"dataset": "made", "torch": torch.__version__}
    assert result["origin"] == {**others, **{stage: part.fingerprint for stage, part in prints.items()}}
    assert (result["classification_accuracy_score"], saved) == ({"samples": 1, "real": 2}, [0])
    for source, (split, measured, _, *rest) in zip((make_split(100), data.train), scored, strict=True):
        assert all(map(torch.equal, split, source.first(100)))  # as many of both
        assert (len(measured.labels), *rest) == (120, ClassifierTraining(), data.deformation, 5, helpers.CPU)
    result = measure.evaluate_pair(pair, None, lambda info: data, seed=5).figures
    assert result["origin"].keys() == {"vqvae", "prior", "dataset", "torch"}
    del calls[1]
    measure.evaluate_pair(pair, file, lambda info: unread, split="validation", num_samples=107, guidance=3, seed=2)
    assert calls == [
        (["train", "validation", "test"], {"num_samples": 120, "seed": 5, "guidance": GUIDANCE}),
        (["train", "validation"], {"num_samples": 107, "seed": 2, "guidance": 3}),
    ]
    other = replace(unread, info=make_info(num_classes=0))
    with pytest.raises(InputError, match="like those of made"):
        measure.evaluate_pair(pair, file, lambda info: other)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"split": "train"}, "validation or test"),
        ({"guidance": float("nan")}, "`guidance` to be a finite number"),
        ({"num_samples": 99}, "`num_samples` of at least 100, found 99"),
        ({"classifier_file": "missing"}, "missing, found none"),
        ({"classifier_file": "vqvae.safetensors"}, "of stage 'vqvae'"),
        (
            {"classifier_file": "other.safetensors"},
            "10 classes of made, found .* 3 classes of made; .*`train_classifier",
        ),
        (
            {"classifier_file": "renamed.safetensors"},
            "10 classes of made, found .* 10 classes of renamed; train one on",
        ),
        ({"pair": 0}, "no `classifier` for the images of made, which have no classes"),
        ({"classifier_file": "wide.safetensors"}, "a classifier of images .*with `train_classifier"),
        ({"accuracy_score": True, "pair": 0}, "at least 2 classes"),
        ({"folder": "file"}, "expected to write .*metrics.json"),
        ({"folder": "file/below"}, "expected to write .*metrics.json"),
        ({"folder": "taken"}, "expected to write .*report.html"),
    ],
)
def test_whatever_can_be_refused_is_refused_before_data_is_loaded_or_a_folder_made(
    mistake: dict[str, Any], message: str, tmp_path: Path
) -> None:
    pairs = {num: helpers.save_pair(tmp_path, num_classes=num) for num in (0, 10)}
    for name, shape, num in (("c", SHAPES[10], 10), ("other", SHAPES[10], 3), ("wide", SHAPES[26], 10)):
        model = make_classifier(shape, num)
        helpers.save_model(tmp_path / f"{name}.safetensors", model, "classifier", make_info(shape, num))
    renamed = replace(make_info(), name="renamed", class_names=tuple("abcdefghij"))  # as many classes, but others
    helpers.save_model(tmp_path / "renamed.safetensors", make_classifier(), "classifier", renamed)
    (tmp_path / "file").touch()
    (tmp_path / "taken" / "report.html").mkdir(parents=True)
    given = {"pair": 10, "classifier_file": "c.safetensors", "folder": "new/folder"} | mistake
    pair, files = pairs[given.pop("pair")], sorted(tmp_path.rglob("*"))
    paths = {name: tmp_path / given.pop(name) for name in ("classifier_file", "folder")}
    with pytest.raises(InputError, match=message):
        report.evaluate_and_report(pair, load_dataset=lambda: pytest.fail("loaded"), **paths, **given)
    assert sorted(tmp_path.rglob("*")) == files
