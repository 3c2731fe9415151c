from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from prior.demo.codebook import NUM_DRAWN, collect_codes, colours, find_places
from prior.pair import Pair
from tests.helpers import make_split, save_pair

SHAPE = (3, 16, 12)  # to 4x3 codes


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return save_pair(tmp_path, SHAPE)


def test_codes_are_sorted_by_use_and_their_patches_are_means_of_what_is_decoded(pair: Pair) -> None:
    images = make_split(9, SHAPE).images
    found = collect_codes(pair, images)
    indices = pair.encode(images / 255)
    assert torch.equal(found.indices, indices)
    torch.testing.assert_close(found.images, images / 255)
    counts = torch.bincount(indices.flatten(), minlength=16)
    assert sorted(found.codes.tolist()) == counts.nonzero().flatten().tolist()
    torch.testing.assert_close(found.uses, counts[found.codes] / counts.sum().double())
    assert found.uses.tolist() == sorted(found.uses.tolist(), reverse=True)
    decoded = F.pad(pair.decode(indices), (4, 4, 4, 4))
    for code, patch in zip(found.codes.tolist(), found.patches, strict=True):
        cells = (indices == code).nonzero().tolist()
        windows = [decoded[n, :, 4 * i : 4 * i + 12, 4 * j : 4 * j + 12] for n, i, j in cells]
        torch.testing.assert_close(patch, torch.stack(windows).mean(dim=0))


def test_the_places_of_a_code_are_in_images_that_use_it_one_in_each(pair: Pair) -> None:
    found = collect_codes(pair, make_split(30, SHAPE).images)
    for code in found.codes.tolist():
        places = find_places(found, code)
        using = (found.indices == code).flatten(1).any(dim=1).nonzero().flatten().tolist()[:12]
        assert len(places) == len(using)
        for number, (image, row, column) in zip(using, places, strict=True):
            assert torch.equal(image, found.images[number])
            assert found.indices[number, row, column] == code
    assert find_places(found, 99) == []


def test_without_images_those_that_the_prior_draws_are_counted(pair: Pair) -> None:
    assert torch.equal(collect_codes(pair).indices, pair.draw(NUM_DRAWN).indices)


def test_codes_that_are_close_look_alike() -> None:
    line = torch.linspace(-1, 1, 9)[torch.randperm(9, generator=torch.Generator().manual_seed(0))]
    found = colours(line[:, None] * torch.tensor([1.0, 2, 3, 4]))
    assert {value for colour in found for value in colour} <= set(range(40, 241))
    reds = [red for _, (red, *_) in sorted(zip(line.tolist(), found, strict=True))]
    assert reds in (sorted(reds), sorted(reds, reverse=True))
    assert len(set(reds)) == 9
    for codebook in (torch.rand(5, 2), torch.rand(1, 1), torch.zeros(4, 3)):
        assert len(colours(codebook)) == len(codebook)
