import math
from pathlib import Path

import pytest
import torch

from prior.demo.analysis import analyse, bits_at_random
from tests.helpers import make_split, save_pair


@pytest.mark.parametrize("num_classes", [5, 2, 0])
def test_an_analysis_is_what_the_pair_says_of_the_image(tmp_path: Path, num_classes: int) -> None:
    pair = save_pair(tmp_path, (3, 16, 12), num_classes)
    images = make_split(3, (3, 16, 12)).images
    for image, unit in zip(images, images / 255, strict=True):
        found = analyse(pair, image)
        torch.testing.assert_close(found.image, unit)
        assert torch.equal(found.indices, pair.encode(unit[None])[0])
        torch.testing.assert_close(found.reconstruction, pair.reconstruct(unit[None])[0])
        assert found.bits == pytest.approx(-float(pair.log_likelihood(unit[None])) / math.log(2))
        chances = pair.label_probabilities(unit[None])[0].tolist() if num_classes else []
        expected = sorted(zip(chances, pair.info.class_names, strict=True), reverse=True)[:3]
        assert [name for name, _ in found.likeliest] == [name for _, name in expected]
        assert [chance for _, chance in found.likeliest] == pytest.approx([chance for chance, _ in expected])


def test_codes_at_random_take_the_bits_of_a_uniform_choice(tmp_path: Path) -> None:
    assert bits_at_random(save_pair(tmp_path, (1, 16, 12))) == 4 * 3 * 4  # 4x3 codes, each one of 16
