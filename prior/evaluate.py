"""Both stages measured: every way to come by images held against real digits; likelihood; memorisation.

maps of codes --decoder--> sets of images --classifier--> features --fidelity--> a row of figures for each set
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure
from tqdm import tqdm

from prior.codes import Codes, extract
from prior.model import GatedPixelCNN
from prior.sampling import sample
from prior.train import evaluate as evaluate_prior
from prior.train import nats_by_position
from prior.unigram import baselines, draw_independently, uniform, unigram
from prior.unigram import nats_by_position as unigram_nats_by_position
from vqvae.common.classifier import Classifier, ClassifierTraining, accuracy_after_training_on, look
from vqvae.common.data import NUM_CLASSES, Split, to_bytes, to_model_range, to_unit_range
from vqvae.common.distributed import is_main
from vqvae.common.engine import derive_seed
from vqvae.common.errors import UserError
from vqvae.common.fidelity import (
    closer,
    frechet_distance,
    frechet_distance_at_infinity,
    kernel_distance,
    nearest,
    neighbourhoods,
)
from vqvae.common.metrics import count_codes
from vqvae.gaussian import gaussian_images, gaussian_latents
from vqvae.model import VQVAE
from vqvae.train import VQVAETraining, decode, reconstruct
from vqvae.train import evaluate as evaluate_vqvae

SURE = 0.99  # the classifier's probability from which it counts as sure
NUM_PAIRS = 50
FEWEST = 100  # samples that a figure is worth printing for


class ImageSet(NamedTuple):
    """One way to come by images, and what it gave."""

    name: str  # for files
    title: str  # for people
    images: Tensor  # (N, 1, S, S) uint8
    indices: Tensor | None = None  # (N, H, W) int64, where codes were drawn
    labels: Tensor | None = None  # (N,) int64, the digits asked for


class Evaluation(NamedTuple):
    """What was measured."""

    figures: dict[str, Any]  # plain numbers and text, for metrics.json
    sets: list[ImageSet]
    judged: ImageSet  # the labelled samples: those whose memorisation is measured
    closest: Tensor  # (2 * NUM_PAIRS, 1, S, S) uint8: samples, each followed by its nearest training digit
    nats: Tensor  # (H, W), the prior's by position
    unigram_nats: Tensor  # (H, W), the unigram's
    code_counts: Tensor  # (K,) in the measured split's maps


def evaluate(
    vqvae: VQVAE,
    prior: GatedPixelCNN,
    classifier: Classifier,
    splits: dict[str, Split],
    *,
    num_samples: int,
    seed: int,
    guidance: float = 1.0,
) -> Evaluation:
    """Measure a pair of stages.

    Args:
        splits: `train`, whose digits every set is compared with, and others by name; the last one is held out to be
            measured: validation for choices, test for what is reported.
        num_samples: images in every set.
        guidance: of labelled samples; unless it is 1, they are measured without it too.
    Raises:
        UserError: more samples than digits to hold them against, or too few for the figures.
    """
    train, measured = splits["train"], list(splits.values())[-1]
    most = len(measured.labels)
    if most < FEWEST:
        raise UserError(f"expected at least {FEWEST} digits to compare with, found {most}; measure with all of MNIST")
    if not FEWEST <= num_samples <= most:
        raise UserError(
            f"expected --num-samples between {FEWEST} and {most}, the number of digits to compare with, found "
            f"{num_samples}; type --num-samples {most}"
        )
    k = vqvae.config.k
    reference, held_out = _first(train, num_samples), _first(measured, num_samples)
    print("extracting the code maps", flush=True)
    codes = {name: extract(vqvae, split) for name, split in splits.items()}
    train_codes, measured_codes = codes["train"], list(codes.values())[-1]
    frequencies = unigram(train_codes, k)
    ways = _ways(vqvae, prior, held_out, reference.labels, frequencies, guidance)
    with tqdm(total=2 * len(ways) + 2, unit="step", dynamic_ncols=True, disable=not is_main()) as bar:

        def step(what: str) -> None:
            bar.set_description(what)
            bar.update()

        sets = {}
        for name, title, labels, draw in ways:
            step(f"drawing: {title}")
            with torch.inference_mode():
                drawn = draw(torch.Generator().manual_seed(derive_seed(seed, name)))
            indices = None if drawn.dtype == torch.uint8 else drawn.to(vqvae.device)
            images = drawn if indices is None else to_bytes(decode(vqvae, indices))
            sets[name] = ImageSet(name, title, images, indices, labels)
        judged = sets.get("pixelcnn_guided", sets["pixelcnn_labelled"])
        features, _ = look(classifier, reference.images)
        rows = []
        for image_set in sets.values():
            step(f"measuring: {image_set.title}")
            rows.append(_row(image_set, classifier, features, seed))
        step("nearest training digits")
        memorisation, closest = _memorisation(sets, judged, train, train_codes, measured_codes)
        step("likelihood")
        codes["train"] = Codes(*(part[: len(measured_codes.labels)] for part in train_codes))  # enough of them
        likelihood = {
            name: {**evaluate_prior(prior, split), **baselines(train_codes, split, k)} for name, split in codes.items()
        }
        stage_one = evaluate_vqvae(vqvae, measured.to(vqvae.device), VQVAETraining())
        ssim = _ssim(held_out.images, sets["reconstructions"].images)
        figures = {
            "rows": rows,
            "stage_one": {**stage_one, "ssim": ssim},
            "likelihood": likelihood,
            "memorisation": memorisation,
        }
        return Evaluation(
            figures,
            list(sets.values()),
            judged,
            closest,
            nats_by_position(prior, measured_codes).cpu(),
            unigram_nats_by_position(frequencies, measured_codes.indices).cpu(),
            count_codes(measured_codes.indices, k).cpu(),
        )


def classification_accuracy_score(
    samples: ImageSet, train: Split, measured: Split, seed: int, device: torch.device
) -> dict[str, float]:
    """The share of held-out digits that a classifier gets right which was trained on labelled samples alone, and that
    of one trained on as many real digits (arXiv:1905.10887)."""
    assert samples.labels is not None
    num = len(samples.images)
    sources = {"samples": Split(samples.images, samples.labels), "real": _first(train, num)}
    scores = {}
    for name, source in sources.items():
        print(f"training a classifier on {num} {name}", flush=True)
        scores[name] = accuracy_after_training_on(source.to(device), measured.to(device), ClassifierTraining(), seed)
    return scores


# A name, a title, the labels asked for, and a function that draws: codes int64 or, where none were drawn, images uint8.
Way = tuple[str, str, Tensor | None, Callable[[torch.Generator], Tensor]]


def _ways(
    vqvae: VQVAE, prior: GatedPixelCNN, held_out: Split, labels: Tensor, frequencies: Tensor, guidance: float
) -> list[Way]:
    n = len(labels)
    even = uniform(vqvae.map_shape, vqvae.config.k)
    ways: list[Way] = [
        ("real", "held-out digits", held_out.labels, lambda _: held_out.images),
        (
            "reconstructions",
            "their reconstructions",
            held_out.labels,
            lambda _: reconstruct(vqvae, held_out.images.to(vqvae.device))[0],
        ),
        ("pixelcnn_labelled", "pixelcnn, labels", labels, lambda g: sample(prior, n, g, labels=labels)),
        ("pixelcnn", "pixelcnn, no labels", None, lambda g: sample(prior, n, g)),
        ("unigram", "per-position unigram", None, lambda g: draw_independently(frequencies, n, g)),
        ("uniform", "uniform code", None, lambda g: draw_independently(even, n, g)),
        ("gaussian_latent", "gaussian latents", None, lambda g: gaussian_latents(vqvae, n, g)),
        ("gaussian_image", "gaussian images", None, lambda g: gaussian_images(vqvae, n, g)),
    ]
    if guidance != 1:
        title = f"pixelcnn, guidance {guidance:g}"
        ways.insert(
            2, ("pixelcnn_guided", title, labels, lambda g: sample(prior, n, g, labels=labels, guidance=guidance))
        )
    return ways


def _row(image_set: ImageSet, classifier: Classifier, real: Tensor, seed: int) -> dict[str, Any]:
    """The figures of one set against the real digits' features."""
    features, probabilities = look(classifier, image_set.images)
    sureness, digits = probabilities.max(dim=1)
    generator = torch.Generator().manual_seed(derive_seed(seed, "subsets"))  # the same subsets in every row
    kid, kid_std = kernel_distance(real, features, generator)
    figures = {
        "name": image_set.name,
        "title": image_set.title,
        "fid": frechet_distance(real, features),
        "fid_infinity": frechet_distance_at_infinity(real, features, generator),
        "kid": kid,
        "kid_std": kid_std,
        **neighbourhoods(real, features)._asdict(),
        "sure": (sureness >= SURE).float().mean().item(),
        "digits": torch.bincount(digits, minlength=NUM_CLASSES).tolist(),
    }
    if image_set.labels is not None:
        agrees = (digits == image_set.labels).float()
        figures["agreement"] = agrees.mean().item()
        by_digit = [agrees[image_set.labels == digit] for digit in range(NUM_CLASSES)]
        figures["agreement_by_digit"] = [of_digit.mean().item() if len(of_digit) else None for of_digit in by_digit]
    return figures


def _memorisation(
    sets: dict[str, ImageSet], judged: ImageSet, train: Split, train_codes: Codes, codes: Codes
) -> tuple[dict[str, Any], Tensor]:
    """Whether labelled samples lie closer to training digits than held-out digits do, or their reconstructions, which
    are as smooth as samples; and whether they repeat training maps more often. With the closest pairs."""
    reference = to_unit_range(to_model_range(train.images)).flatten(1)
    found = {}
    for name, image_set in {
        "real": sets["real"],
        "reconstructions": sets["reconstructions"],
        "samples": judged,
    }.items():
        vectors = to_unit_range(to_model_range(image_set.images)).flatten(1)
        found[name] = nearest(vectors, reference)
    distances = {name: distance / reference.shape[1] ** 0.5 for name, (distance, _) in found.items()}
    known = {m.tobytes() for m in train_codes.indices.cpu().numpy()}

    def repeated(indices: Tensor) -> int:
        return sum(m.tobytes() in known for m in indices.cpu().numpy())

    assert judged.indices is not None
    order = distances["samples"].argsort()[:NUM_PAIRS]
    pairs = torch.stack([judged.images[order], train.images[found["samples"][1][order]]], dim=1)
    figures = {
        "distance": {name: distance.mean().item() for name, distance in distances.items()},
        "p_closer_than_real": closer(distances["samples"], distances["real"]),
        "p_closer_than_reconstructions": closer(distances["samples"], distances["reconstructions"]),
        "p_reconstructions_closer_than_real": closer(distances["reconstructions"], distances["real"]),
        "copied_maps": repeated(judged.indices),
        "copied_maps_real": repeated(codes.indices[: len(judged.images)]),
    }
    return figures, pairs.flatten(0, 1)


def _ssim(originals: Tensor, reconstructions: Tensor) -> float:
    """Mean structural similarity of two sets of images (N, 1, S, S) uint8."""
    a, b = (to_unit_range(to_model_range(images)) for images in (originals, reconstructions))
    return torch.as_tensor(structural_similarity_index_measure(b, a, data_range=1.0)).item()


def _first(split: Split, num: int) -> Split:
    return Split(split.images[:num], split.labels[:num])
