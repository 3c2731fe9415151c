"""What the page answers, for images and classes of any kind."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch

from prior.demo.answers import ANY, Answers
from prior.demo.drawing import to_url
from tests.helpers import make_dataset, save_pair
from vqvae.errors import MissingFileError

OPTIONS = (1.0, 1.0, 16, 1.0, 0)  # guidance, temperature, top-k, top-p, seed


@pytest.mark.parametrize(
    ("shape", "num_classes"), [((1, 28, 28), 10), ((1, 16, 20), 0), ((3, 16, 12), 3)], ids=["digits", "grey", "colour"]
)
def test_every_tab_gets_its_answer_for_images_of_any_kind(
    tmp_path: Path, shape: tuple[int, int, int], num_classes: int
) -> None:
    load_data = Mock(return_value=make_dataset(30, shape, num_classes))
    answers = Answers(save_pair(tmp_path, shape, num_classes), load_data)
    url = to_url(torch.rand(shape, generator=torch.Generator().manual_seed(0)))
    assert answers.picture(url).count("<figure") == 3
    assert ("Likeliest labels" in answers.picture(url)) == (num_classes > 0)
    assert answers.completions(url, 2, 0).count("<figure") == 8
    assert answers.completions(url, 2, 0) != answers.completions(url, 2, 1)
    assert answers.samples(ANY, *OPTIONS).count("<section") == 2
    load_data.assert_not_called()  # nothing is read before it is needed
    codes = answers.codes()
    assert " of 16 codes, counted in 30 training images." in codes
    code = int(codes.split('data-code="')[1].split('"')[0])
    assert f"Code {code}," in answers.places(code)
    load_data.assert_called_once()


def test_options_of_a_sample_are_those_that_are_chosen(tmp_path: Path) -> None:
    pair = save_pair(tmp_path, num_classes=3)
    with patch.object(type(pair), "draw", wraps=pair.draw) as draw:
        Answers(pair, Mock()).samples("class 2", 2.0, 0.5, 3, 0.9, 7)
    draw.assert_called_once_with(25, labels=["class 2"], seed=7, guidance=2.0, temperature=0.5, top_k=3, top_p=0.9)


def test_without_data_the_codes_are_counted_in_what_the_prior_draws_and_that_is_said(tmp_path: Path) -> None:
    answers = Answers(save_pair(tmp_path), Mock(side_effect=MissingFileError("expected data, found none")))
    assert "because the training images are not in the data folder" in answers.codes()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("picture", (None,)),
        ("picture", (to_url(torch.zeros(1, 40, 40)),)),
        ("completions", (to_url(torch.zeros(1, 40, 40)), 2, 0)),
        ("completions", (to_url(torch.rand(1, 28, 28)), 99, 0)),
        ("samples", (ANY, *OPTIONS[:-1], None)),
        ("samples", (ANY, 1.0, 0.0, *OPTIONS[2:])),
        ("samples", ("<b>", *OPTIONS)),
        ("places", (99,)),
        ("places", ("<b>",)),
    ],
)
def test_what_a_visitor_does_wrong_is_told_in_a_sentence(tmp_path: Path, name: str, arguments: Any) -> None:
    answers = Answers(save_pair(tmp_path), Mock(return_value=make_dataset(30)))
    told = getattr(answers, name)(*arguments)
    assert told.startswith('<p class="refusal">Expected ')
    assert "<b>" not in told
