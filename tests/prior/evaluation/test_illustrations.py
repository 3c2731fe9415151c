import io

import pytest
import torch
from PIL import Image

from prior.evaluation.illustrations import draw_closest, draw_plots, draw_sets, draw_side_by_side
from prior.evaluation.memorisation import ClosestPairs
from prior.evaluation.sets import ImageSet
from tests.helpers import make_split
from tests.prior.evaluation.test_report import make_evaluation
from vqvae.pictures import grid_png


def make_set(name: str, num_classes: int, num: int = 60, seed: int = 0) -> ImageSet:
    """With labels in random order, where there are classes."""
    labels = torch.randint(num_classes, (num,), generator=torch.Generator().manual_seed(seed)) if num_classes else None
    return ImageSet(name, f"title of {name}", make_split(num, seed=seed).images, None, labels)


def test_a_set_is_shown_by_its_first_images_under_the_names_of_their_classes() -> None:
    many = ImageSet("many", "many", make_split(130, (3, 8, 16)).images)
    labelled = many._replace(name="labelled", labels=torch.arange(130) % 2)
    evaluation = make_evaluation()._replace(sets=[many, labelled])
    evaluation.figures["class_names"] = ["zero", "one"]
    drawn, first = draw_sets(evaluation), many.images[:100] / 255
    assert drawn["many"] == ("A grid of 100 images: many", "many: the first 100", grid_png(first))
    assert drawn["labelled"].png == grid_png(first, captions=["zero", "one"] * 50)


@pytest.mark.parametrize(("num_classes", "columns"), [(10, 10), (3, 9), (12, 10), (0, 10)])
def test_side_by_side_each_column_is_of_one_class_where_a_set_has_labels(num_classes: int, columns: int) -> None:
    names = ["real", "pixelcnn_labelled", "pixelcnn_unlabelled"] if num_classes else ["real", "pixelcnn"]
    sets = [make_set(name, num_classes, 300, seed) for seed, name in enumerate(names)]
    sets.insert(1, make_set("gaussian_latent", 0))
    evaluation = make_evaluation()._replace(sets=[*sets, make_set("unigram", 0)], labelled_samples=sets[2])
    evaluation.figures["class_names"] = classes = [f"c{n}" for n in range(num_classes)]
    for shown, image_set in zip(draw_side_by_side(evaluation), sets, strict=True):  # and no other set
        chosen, captions = range(2 * columns), []
        if image_set.labels is not None:
            labels = image_set.labels.tolist()
            heads = [n % num_classes for n in range(columns)]
            positions = [[n for n, label in enumerate(labels) if label == head] for head in range(num_classes)]
            chosen = [positions[head].pop(0) for _ in range(2) for head in heads]
            captions = [classes[head] for _ in range(2) for head in heads]
        expected = grid_png(image_set.images[chosen] / 255, columns, captions)
        assert shown == (f"{2 * columns} images: {image_set.title}", image_set.title, expected)


def test_sets_with_too_few_images_of_a_class_are_shown_as_they_come() -> None:
    sets = [make_set("real", 10, num=12)]
    evaluation = make_evaluation()._replace(sets=sets, labelled_samples=sets[0])
    evaluation.figures["class_names"] = [f"c{n}" for n in range(10)]
    [shown, *_] = draw_side_by_side(evaluation)
    captions = [f"c{label}" for label in sets[0].labels.tolist()]
    assert shown.png == grid_png(sets[0].images / 255, 10, captions)


def test_the_closest_pairs_have_their_class_and_their_distances() -> None:
    evaluation = make_evaluation()
    evaluation.figures["class_names"] = ["zero", "one"]
    drawn = draw_closest(evaluation)
    assert [shown.caption for shown in drawn] == [f"class {name}: distance 0.000 to 0.400" for name in ("zero", "one")]
    assert [shown.png for shown in drawn] == [grid_png(pairs.images / 255) for pairs in evaluation.closest]
    without = ClosestPairs(make_split(4).images.unflatten(0, (2, 2)), torch.tensor([0.1, 0.2]))
    [shown] = draw_closest(evaluation._replace(closest=[without]))
    assert shown.caption == "all samples: distance 0.100 to 0.200"
    assert shown.alt == "2 pairs of a sample and the training image nearest to it, all samples"


def test_the_plots_say_what_they_show_for_maps_of_any_shape() -> None:
    nats = torch.rand(4, 30)
    drawn = draw_plots(make_evaluation()._replace(nats=nats, unigram_nats=nats + 1))
    assert f"{nats.mean() + 1:.2f} on average under the per-position unigram, {nats.mean():.2f} under the Pix" in (
        drawn["nats-by-position"].alt
    )
    assert "3 of 4 are used" in drawn["code-usage"].caption
    sizes = [Image.open(io.BytesIO(shown.png)).size for shown in drawn.values()]
    assert sizes == [(675, 1050), (675, 525)]
