import json
from dataclasses import asdict, replace

import pytest
import torch

from tests.helpers import make_info, make_split
from vqvae.data.dataset import DatasetInfo, Split, digest, require_same_kind, split_validation
from vqvae.errors import InputError
from vqvae.storage.recipe import from_dict


@pytest.mark.parametrize(("image_shape", "num_classes"), [((1, 28, 28), 10), ((3, 20, 36), 1), ((1, 1, 1024), 0)])
def test_the_facts_survive_a_checkpoints_header(image_shape: tuple[int, int, int], num_classes: int) -> None:
    info, counts = make_info(image_shape, num_classes), range(1, num_classes + 1)  # class c has c + 1 images
    assert from_dict(DatasetInfo, json.loads(json.dumps(asdict(info)))) == info
    assert (info.num_classes, info.class_frequencies.dtype) == (num_classes, torch.float64)
    assert info.class_frequencies.tolist() == pytest.approx([count / sum(counts) for count in counts], abs=1e-15)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_shape": (2, 28, 28)}, "expected images of 1 or 3 channels, found 2"),
        ({"image_shape": (1, 0, 28)}, r"expected `image_shape\[1\]` between 1 and 1024, found 0"),
        ({"image_shape": (1, 28, 1025)}, r"expected `image_shape\[2\]` between 1 and 1024, found 1025"),
        ({"name": ""}, "expected names that can be printed"),
        ({"class_names": ("a", "\x1b[2J")}, "expected names that can be printed"),
        ({"class_counts": (1,)}, "expected as many class counts as class names, 2, found 1"),
        ({"class_counts": (3, -1)}, "expected class counts of 0 or more with a sum above 0"),
        ({"class_counts": (0, 0)}, "expected class counts of 0 or more with a sum above 0"),
    ],
)
def test_facts_that_cannot_be_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(make_info(num_classes=2), **changes)


def test_one_image_in_twelve_is_for_validation_whatever_the_random_state() -> None:
    full, state = Split(torch.arange(100).reshape(100, 1, 1, 1), torch.arange(100) + 1), torch.get_rng_state()
    train, validation = split_validation(full)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert all(map(torch.equal, split_validation(full)[1], validation))
    assert [len(part.labels) for part in (train, validation)] == [92, 8]
    assert sorted([*train.labels.tolist(), *validation.labels.tolist()]) == full.labels.tolist()
    assert all(torch.equal(part.images.flatten() + 1, part.labels) for part in (train, validation))
    assert validation.labels.max() - validation.labels.min() > 50  # drawn from all over, not from one end
    assert all(map(torch.equal, train.first(5), (train.images[:5], train.labels[:5])))


def test_a_digest_knows_every_pixel_and_every_label() -> None:
    split, digests = make_split(20), set()
    for tensor in split:
        digests.add(digest(split))
        tensor.view(-1)[7] += 1
    assert len({*digests, digest(split)}) == 3


def test_only_images_of_the_same_shape_and_classes_are_of_the_same_kind() -> None:
    require_same_kind(make_info(), make_info())
    for other in (make_info((1, 28, 32)), make_info(num_classes=3)):
        with pytest.raises(InputError, match=r"images and classes like those of made, .*, found those of made"):
            require_same_kind(make_info(), other)
