"""Both stages measured: sets of images compared with training images, likelihood, and memorisation.

code maps --decoder--> sets of images --classifier--> features --metrics--> a row of figures for each set
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prior.codes import extract
from prior.evaluation.classifier import Classifier, extract_features, load_classifier
from prior.evaluation.classifier_training import ClassifierTraining, accuracy_after_training_on, require_trainable
from prior.evaluation.figures import measure_likelihood, measure_set, measure_without_label, structural_similarity
from prior.evaluation.memorisation import ClosestPairs, measure_memorisation
from prior.evaluation.sets import (
    ImageSet,
    Sampler,
    choose,
    decoded_images,
    make_samplers,
    real_images,
)
from prior.independent import nats_by_position, unigram
from prior.model import GatedPixelCNN
from prior.pair import Pair
from prior.sampling import GUIDANCE, check_options, guidance_for
from vqvae.compute import require_whole
from vqvae.console import progress, say
from vqvae.data.dataset import Dataset, DatasetInfo, Split, require_same_kind
from vqvae.distributed import main_first
from vqvae.errors import InputError
from vqvae.loss import VQVAETraining, evaluate_vqvae
from vqvae.model import VQVAE
from vqvae.quantizer import count_codes
from vqvae.storage.checkpoint import Header
from vqvae.storage.recipe import from_dict

FEWEST_IMAGES = 100  # with fewer, the figures say nothing


class Evaluation(NamedTuple):
    """What was measured."""

    figures: dict[str, Any]  # plain numbers and text for metrics.json; `origin` says what was measured, and with what
    sets: list[ImageSet]
    labelled_samples: ImageSet  # the set whose memorisation was measured; without classes it has no labels
    closest: list[ClosestPairs]  # of each class
    nats: Tensor  # (h, w), the prior's by position
    unigram_nats: Tensor  # (h, w), the unigram's
    code_counts: Tensor  # (K,) int64, in the maps of the measured split


def evaluate_pair(
    pair: Pair,
    classifier_file: Path | None,
    load_dataset: Callable[[DatasetInfo], Dataset],
    *,
    split: str = "test",
    num_samples: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    accuracy_score: bool = False,
    save: Callable[[Evaluation], object] = lambda evaluation: None,
) -> Evaluation:
    """Measure a VQ-VAE and its prior on a dataset.

    Args:
        classifier_file: weights of the classifier whose features the metrics are taken in. None leaves out the figures
            that need one.
        load_dataset: the pair's dataset, or another of the same kind, by the facts of the former. It is called after
            everything else has been checked, because it may fetch the data.
        split: "validation" to choose by, or "test" to report.
        num_samples: images in each set, at least 100. None takes as many as the split has.
        guidance: of samples with labels. None stands for `sampling.GUIDANCE`.
        accuracy_score: also measure the classification accuracy score, which trains two classifiers.
        save: called with all other figures before these classifiers are trained.
    Raises:
        InputError: an argument is out of range, the classifier's file is missing or damaged or it has learned other
            images or classes, or the dataset is not of the kind that the models have learned.
    """
    if split not in ("validation", "test"):
        raise InputError(f"expected `split` to be validation or test, found {split!r}; try `split=test`")
    check_options(guidance)
    guidance = guidance_for(pair.info.num_classes, guidance)
    if num_samples is not None:
        require_whole("num_samples", num_samples, FEWEST_IMAGES, remedy=f"try `num_samples={FEWEST_IMAGES}`")
    if accuracy_score:
        require_trainable(pair.info)
    headers, classifier = {"vqvae": pair.vqvae_header, "prior": pair.prior_header}, None
    if classifier_file is not None:
        classifier, headers["classifier"] = load_classifier(classifier_file, pair.vqvae.device)
        require_fitting(headers["classifier"], pair.info)
    with main_first():
        dataset = load_dataset(pair.info)
    require_same_kind(pair.info, dataset.info)
    splits = {"train": dataset.train, "validation": dataset.validation}
    if split == "test":
        splits["test"] = dataset.load_test()
    evaluation = evaluate(
        pair.vqvae,
        pair.prior,
        classifier,
        pair.info,
        splits,
        num_samples=len(splits[split].images) if num_samples is None else num_samples,
        seed=seed,
        guidance=guidance,
    )
    fingerprints = {stage: header.fingerprint for stage, header in headers.items()}
    evaluation.figures["origin"] |= {"dataset": dataset.info.name, **fingerprints, "torch": str(torch.__version__)}
    if accuracy_score:
        save(evaluation)
        samples = evaluation.labelled_samples
        scores = classification_accuracy_score(samples, dataset, splits[split], pair.info, seed, pair.vqvae.device)
        evaluation.figures["classification_accuracy_score"] = scores
    return evaluation


def evaluate(
    vqvae: VQVAE,
    prior: GatedPixelCNN,
    classifier: Classifier | None,
    info: DatasetInfo,
    splits: dict[str, Split],
    *,
    num_samples: int,
    seed: int,
    guidance: float = GUIDANCE,
) -> Evaluation:
    """Measure a pair of stages.

    Args:
        classifier: None leaves out the figures that need one.
        info: what the images are; labels that are not asked for are drawn from its class frequencies.
        splits: the training images as `train`, which every set is compared with, and others by name. The last one is
            measured: validation to choose by, test to report.
        num_samples: images in each set, between 100 and the number of images in the measured split. Every figure is
            taken on as many images. Only nearest images, copies and the unigram are looked for in all training images.
        seed: of what is drawn: the samples, and the images that are measured where there are more.
        guidance: of samples with labels. If it is not 1, samples of guidance 1 are measured too.
    Raises:
        InputError: `num_samples` is out of range, a split is too small, or features are not finite.
    """
    train, (measured_name, measured) = splits["train"], list(splits.items())[-1]
    most = min(len(train.images), len(measured.images))
    if most < FEWEST_IMAGES:
        raise InputError(
            f"expected at least {FEWEST_IMAGES} images in each split, found {most}; measure with a larger dataset"
        )
    remedy = f"try `num_samples={most}`, the number of images to compare with"
    require_whole("num_samples", num_samples, FEWEST_IMAGES, most, remedy)
    # The sets are compared with the first training images, as many as there are to measure.
    chosen = {name: choose(split, num_samples, seed) for name, split in {**splits, "train": train.first(most)}.items()}
    reference, held_out = chosen["train"], chosen[measured_name]
    measure = None if classifier is None else _comparing_with(reference.images, classifier, info, seed)
    with progress(len(train.labels), "image", doing="code maps") as bar:
        train_codes = extract(vqvae, train, bar.update)
    codes = {name: extract(vqvae, split) for name, split in chosen.items()}
    frequencies = unigram(train_codes, vqvae.config.num_codes)

    samplers = make_samplers(vqvae, prior, info, held_out, reference.labels, frequencies, seed=seed, guidance=guidance)
    image_sets = [real_images(held_out, info), *_draw(samplers, vqvae, num_samples, seed)]
    rows = [] if measure is None else _measure(image_sets, measure)
    sets = {image_set.name: image_set for image_set in image_sets}
    labelled_samples = sets.get("pixelcnn_guided") or sets.get("pixelcnn_labelled") or sets["pixelcnn"]
    with progress(3 * num_samples, "image", doing="nearest training images") as bar:
        memorisation, closest = measure_memorisation(
            sets["real"].images,
            sets["reconstructions"].images,
            labelled_samples,
            train.images,
            train_codes.indices,
            codes[measured_name].indices,
            bar.update,
        )
    likelihood, nats = measure_likelihood(prior, codes, train_codes)
    figures = {
        "origin": {"split": measured_name, "num_samples": num_samples, "seed": seed, "guidance": guidance},
        "class_names": list(info.class_names),
        "rows": rows,
        "stage_one": {
            "num_images": num_samples,
            **evaluate_vqvae(vqvae, held_out, VQVAETraining()),
            "ssim": structural_similarity(held_out.images, sets["reconstructions"].images),
        },
        "likelihood": likelihood,
        "memorisation": memorisation,
    }
    if info.class_names:
        figures["without_label"] = measure_without_label(prior, codes[measured_name], nats[measured_name], info)
    return Evaluation(
        figures,
        image_sets,
        labelled_samples,
        closest,
        nats[measured_name].mean(dim=0),
        nats_by_position(frequencies, codes[measured_name].indices).cpu(),
        count_codes(codes[measured_name].indices, vqvae.config.num_codes).cpu(),
    )


def classification_accuracy_score(
    samples: ImageSet, dataset: Dataset, measured: Split, info: DatasetInfo, seed: int, device: torch.device
) -> dict[str, float]:
    """The accuracy on held-out images of a classifier that was trained on labelled samples alone (arXiv:1905.10887).

    Returns:
        `samples`, and beside it `real`: the accuracy of a classifier that was trained on as many real images.
    Raises:
        InputError: there are fewer than two classes, or several processes.
    """
    assert samples.labels is not None
    num = len(samples.images)
    sources = {"samples": Split(samples.images, samples.labels), "real": dataset.train.first(num)}
    scores = {}
    for name, source in sources.items():
        say(f"training a classifier on {num} {'real images' if name == 'real' else name}")
        scores[name] = accuracy_after_training_on(
            source, measured, info, ClassifierTraining(), dataset.deformation, seed, device
        )
    return scores


def fits(classifier: Header, info: DatasetInfo) -> bool:
    """Whether a classifier can measure images: it has learned images of their shape, and their classes."""
    learned = [classifier.data.get(name) for name in ("image_shape", "class_names")]
    return bool(info.class_names) and learned == [list(info.image_shape), list(info.class_names)]


def require_fitting(classifier: Header, info: DatasetInfo) -> None:
    """Refuse a classifier of other images than these.

    Raises:
        InputError: it has learned images of another shape or other classes, or these images have no classes.
    """
    if not info.class_names:
        raise InputError(
            f"expected no `classifier` for the images of {info.name}, which have no classes, found one; leave it out"
        )
    if not fits(classifier, info):
        learned = from_dict(DatasetInfo, classifier.data)
        raise InputError(
            f"expected a classifier of images {info.image_shape} in the {info.num_classes} classes of {info.name}, "
            f"found one of images {learned.image_shape} in the {learned.num_classes} classes of {learned.name}; train "
            f"one on {info.name} with `train_classifier()`"
        )


def _comparing_with(
    reference: Tensor, classifier: Classifier, info: DatasetInfo, seed: int
) -> Callable[[ImageSet], dict[str, Any]]:
    """`measure_set` of sets to be compared with reference images (N, C, H, W) uint8.

    Raises:
        InputError: their features are not finite.
    """
    features, _ = extract_features(classifier, reference)
    if not features.isfinite().all():
        raise InputError("expected a classifier of finite features, found others; train one with `train_classifier()`")
    return partial(measure_set, classifier=classifier, real_features=features, info=info, seed=seed)


def _measure(image_sets: list[ImageSet], measure: Callable[[ImageSet], dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures of each set."""
    rows = []
    with progress(len(image_sets), "set") as bar:
        for image_set in image_sets:
            bar.set_description(f"measuring: {image_set.title}", refresh=False)
            rows.append(measure(image_set))
            bar.update()
    return rows


def _draw(samplers: list[Sampler], vqvae: VQVAE, num: int, seed: int) -> list[ImageSet]:
    """A set of `num` images from each sampler."""
    drawn: list[ImageSet] = []
    with progress(num * len(samplers), "map") as bar:
        for sampler in samplers:
            bar.set_description(f"drawing: {sampler.title}", refresh=False)
            drawn.append(decoded_images(sampler, vqvae, seed, bar.update))
            bar.update(num * len(drawn) - bar.n)  # not every sampler tells, and of several processes each its share
    return drawn
