from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu
from torch import Tensor

from prior.evaluation import memorisation, metrics
from prior.evaluation.memorisation import ClosestPairs, measure_memorisation
from prior.evaluation.sets import ImageSet
from tests.helpers import make_prior, make_split, random_maps
from tests.prior.evaluation.test_metrics import all_distances

TRAIN, REAL, SAMPLES = (make_split(num, (3, 4, 5), seed=seed).images for seed, num in enumerate((90, 60, 70)))
SMOOTH = REAL // 2 + 64  # closer to everything, as reconstructions are
MAPS = random_maps(90, make_prior((2, 3)))


def measure(
    samples: Tensor, indices: Tensor = MAPS, labels: Tensor | None = None
) -> tuple[dict[str, Any], list[ClosestPairs]]:
    return measure_memorisation(REAL, SMOOTH, ImageSet("s", "s", samples, indices, labels), TRAIN, MAPS, MAPS[:7])


def test_distances_p_values_and_the_closest_pairs_are_those_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "ROWS_AT_ONCE", 9)
    monkeypatch.setattr(metrics, "REFERENCE_AT_ONCE", 40)
    monkeypatch.setattr(memorisation, "AT_ONCE", 40)
    found, [pairs] = measure(SAMPLES)
    sets = {"real": REAL, "reconstructions": SMOOTH, "samples": SAMPLES}
    distances = {name: all_distances(images, TRAIN) / 255 / 60**0.5 for name, images in sets.items()}  # rms in 0..1
    least = {name: values.min(axis=1) for name, values in distances.items()}
    assert found["distance"] == pytest.approx({name: values.mean() for name, values in least.items()}, abs=1e-5)
    for closer, other in (("samples", "real"), ("samples", "reconstructions"), ("reconstructions", "real")):
        p = mannwhitneyu(least[closer], least[other], alternative="less").pvalue
        name = f"{closer}_closer_than_{other}".replace("samples_", "")
        assert found[f"p_{name}"] == pytest.approx(p, rel=0.02, abs=1e-12)
        share = (least[closer][:, None] < least[other][None]).mean()
        assert found[name][0] == pytest.approx(share, abs=1e-3)
    assert found["num_images"] == 70
    order = least["samples"].argsort()[:50]  # the closest first
    nearest = TRAIN[distances["samples"].argmin(axis=1)]
    assert torch.equal(pairs.images[:, 0], SAMPLES[order])
    assert torch.equal(pairs.images[:, 1], nearest[order])
    assert pairs.label is None
    np.testing.assert_allclose(pairs.distances, least["samples"][order], atol=1e-5)
    labels = torch.arange(70) % 3 * 2  # there are none of class 1 and 3, and of class 5 there are three
    labels[:3] = 5
    of_each_class = measure(SAMPLES, labels=labels)[1]
    assert [(pairs.label, len(pairs.distances)) for pairs in of_each_class] == [(0, 5), (2, 5), (4, 5), (5, 3)]
    for pairs in of_each_class:
        closest = [n for n in least["samples"].argsort() if labels[n] == pairs.label][:5]
        assert torch.equal(pairs.images, torch.stack([SAMPLES[closest], nearest[closest]], dim=1))


def test_copied_images_and_maps_are_found_out_and_held_out_images_are_not_accused() -> None:
    maps = torch.cat([MAPS[[3, 3, 39]], (MAPS[:9] + 1) % 16, MAPS[:9].flip(2)])
    repeated = sum(code_map in MAPS.tolist() for code_map in maps.tolist())
    copied, honest = (measure(samples, maps)[0] for samples in (TRAIN, REAL))
    assert 3 <= repeated == copied["copied_maps"] < 9
    assert copied["copied_maps_real"] == 7
    assert max(copied["p_closer_than_real"], copied["p_closer_than_reconstructions"]) < 1e-6
    assert honest["p_closer_than_real"] == pytest.approx(0.5, abs=0.01)


def test_of_the_training_images_a_few_are_converted_at_once_and_equal_ones_give_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metrics, "REFERENCE_AT_ONCE", 40)
    sizes: list[int] = []
    reference = torch.cat([TRAIN, TRAIN])
    found = metrics.nearest(TRAIN.flatten(1).float(), reference, lambda x: sizes.append(len(x)) or x.flatten(1).float())
    assert torch.equal(found[1], torch.arange(90))
    assert (max(sizes), sum(sizes)) == (40, 180)
