"""The figures of each part of an evaluation: of a set of images, of reconstructions, of likelihoods."""

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from prior.codes import Codes
from prior.evaluation.classifier import Classifier, extract_features
from prior.evaluation.metrics import frechet_distance, frechet_distance_at_infinity, kid, prdc
from prior.evaluation.sets import ImageSet
from prior.independent import baselines
from prior.likelihood import nats_of_codes, nats_per_map
from prior.model import GatedPixelCNN
from vqvae.compute import derive_seed, in_batches
from vqvae.console import progress
from vqvae.data.dataset import DatasetInfo
from vqvae.data.pixels import unit_images

AT_ONCE = 1000  # images or maps between two moves of a progress bar
CONFIDENT = 0.99  # the probability from which on the classifier counts as confident


def measure_set(
    image_set: ImageSet, classifier: Classifier, real_features: Tensor, info: DatasetInfo, seed: int
) -> dict[str, Any]:
    """The figures of one set, compared with the features (N, F) of real images."""
    features, probabilities = extract_features(classifier, image_set.images)
    confidence, predicted = probabilities.max(dim=1)
    generator = torch.Generator().manual_seed(derive_seed(seed, "subsets"))  # the same subsets for every set
    kid_mean, kid_std = kid(real_features, features, generator)
    at_infinity = frechet_distance_at_infinity(real_features, features, generator)
    figures: dict[str, Any] = {
        "name": image_set.name,
        "title": image_set.title,
        "fid": frechet_distance(real_features, features),
        "fid_infinity": at_infinity and at_infinity.value,  # None where there are too few images
        "fid_infinity_error": at_infinity and at_infinity.error,
        "kid": kid_mean,
        "kid_std": kid_std,
        **prdc(real_features, features)._asdict(),
        "confident": (confidence >= CONFIDENT).float().mean().item(),
    }
    if info.class_names:
        figures["predicted"] = torch.bincount(predicted, minlength=info.num_classes).tolist()
    if image_set.labels is not None:
        agrees = (predicted == image_set.labels).float()
        by_class = [agrees[image_set.labels == label] for label in range(info.num_classes)]
        figures["agreement"] = agrees.mean().item()
        figures["agreement_by_class"] = [of_class.mean().item() if len(of_class) else None for of_class in by_class]
    return figures


def measure_likelihood(
    prior: GatedPixelCNN, codes: dict[str, Codes], train: Codes
) -> tuple[dict[str, dict[str, float]], dict[str, Tensor]]:
    """The likelihood of maps of each split with their labels, beside that of the priors without neighbours.

    Args:
        codes: the maps to measure, by the name of their split.
        train: all training maps, for the unigram.
    Returns:
        the figures, and the nats (N, h, w) of each code, both by the name of the split.
    """
    figures, nats = {}, {}
    with progress(sum(len(some.labels) for some in codes.values()), "map", doing="likelihood") as bar:
        for name, some in codes.items():
            nats[name] = nats_of_codes(prior, *some, bar.update)
            mean = nats[name].mean().item()
            likelihood = {"nats_per_code": mean, "bits_per_image": mean / math.log(2) * some.indices[0].numel()}
            baseline = baselines(train, some, prior.num_codes)
            figures[name] = {"num_maps": len(some.labels), **likelihood, **baseline}
    return figures, nats


def measure_without_label(prior: GatedPixelCNN, codes: Codes, nats: Tensor, info: DatasetInfo) -> dict[str, float]:
    """What the prior makes of maps whose labels it is not told.

    Their likelihood is that of the mixture, log sum over labels of p(label) p(map | label). By Bayes' rule,
    p(label | map) is proportional to p(label) p(map | label), so the prior is a classifier too.

    Args:
        nats: (N, h, w) of each code under its map's own label. Only the other labels are computed.
    Returns:
        `num_maps`; `nats_per_code` of the mixture; `accuracy`, the share of maps whose label is the most likely one.
    """
    labels, log_p = codes.labels.cpu(), info.class_frequencies.double().log()
    log_joint = log_p - nats.sum(dim=(1, 2))[:, None]
    with progress(len(labels) * info.num_classes, "map", doing="each label") as bar:
        for label in range(info.num_classes):
            others = codes.indices[labels != label]
            nats_of_others = nats_per_map(prior, others, torch.full((len(others),), label))
            log_joint[labels != label, label] = log_p[label] - nats_of_others
            bar.update(len(labels))
    height, width = prior.map_shape
    return {
        "num_maps": len(log_joint),
        "nats_per_code": -log_joint.logsumexp(dim=1).mean().item() / (height * width),
        "accuracy": (log_joint.argmax(dim=1) == labels).double().mean().item(),
    }


def structural_similarity(originals: Tensor, reconstructions: Tensor) -> float:
    """SSIM, mean over images: at most 1, which equal images have. Both are (N, C, H, W) uint8."""
    total = 0.0
    for rows in in_batches(len(originals), AT_ONCE):
        target, found = unit_images(originals[rows]), unit_images(reconstructions[rows])
        of_each = structural_similarity_index_measure(found, target, data_range=1.0, reduction="none")
        total += torch.as_tensor(of_each).double().sum().item()
    return total / len(originals)
