"""Labels by name and by number, in text and in lists."""

import re
from typing import Any

import pytest
import torch

from prior.labels import names_of, parse_label, parse_labels, to_labels
from vqvae.errors import InputError

DIGITS = tuple("0123456789")
ANIMALS = ("cat", "dog", "sea lion", "a,b")
OTHER_NUMBERS = ("3", "5", "7", "1-2")  # names that are not the numbers of their classes


@pytest.mark.parametrize(
    ("text", "class_names", "labels"),
    [
        ("7", DIGITS, [7]),
        ("0-3", DIGITS, [0, 1, 2, 3]),
        ("1,30,0-1", ANIMALS, [1, 30, 0, 1]),  # whether there is a class 30 is said where labels are checked
        ("2,0-1,5-5", DIGITS, [2, 0, 1, 5]),
        ("dog,cat", ANIMALS, [1, 0]),
        ("cat,3,0-1,sea lion", ANIMALS, [0, 3, 0, 1, 2]),
        ("7,5", OTHER_NUMBERS, [2, 1]),
        ("1-2,5-5", OTHER_NUMBERS, [3, 1]),
    ],
)
def test_text_gives_the_numbers_of_classes_whose_names_win_over_numbers(
    text: str, class_names: tuple[str, ...], labels: list[int]
) -> None:
    assert parse_labels(text, class_names) == labels
    assert parse_labels(None, class_names) is None
    if "," not in text and "-" not in text:
        assert parse_label(text, class_names) == labels[0]


def test_a_single_label_may_have_a_comma() -> None:
    assert parse_label("a,b", ANIMALS) == 3


@pytest.mark.parametrize(
    "text", ["", "a", "1,", ",1", "3-1", "-1", "1-", "1-2-3", "1.5", "1 2", "12345", "\u0663", "1\n", "cat", "x" * 5000]
)
def test_text_that_is_no_class_is_refused(text: str) -> None:
    known = re.escape("expected `labels` to be names of classes (0, 1, 2, ")
    with pytest.raises(InputError, match=f"^{known}.*, found .*; (give such names|did you mean)") as refusal:
        parse_labels(text, DIGITS)
    assert len(str(refusal.value)) < 300


def test_a_name_that_is_nearly_right_is_suggested() -> None:
    expected = "names of classes (cat, dog, sea lion, a,b), found 'sea loin'; did you mean 'sea lion'?"
    with pytest.raises(InputError, match=re.escape(expected)):
        parse_labels("cat,sea loin", ANIMALS)
    many = [f"class {number}" for number in range(5000)]
    with pytest.raises(InputError, match=r"\(class 0, .*, class 11, \.\.\.\), found 'klass 4'; did you mean 'class 4'"):
        parse_label("klass 4", many)


def test_without_classes_no_label_can_be_named() -> None:
    for text in ("cat", "0", "0-9"):
        with pytest.raises(InputError, match="`labels` to be left out, because the prior has no classes, found '"):
            parse_labels(text, ())
    with pytest.raises(InputError, match="expected no labels, because the prior has no classes, found some"):
        to_labels([1], 0)


def test_in_a_list_a_string_is_a_name_and_a_whole_number_is_a_number() -> None:
    found = to_labels(["7", 1, "3"], 4, 3, class_names=OTHER_NUMBERS)
    assert (found.tolist(), found.dtype) == ([2, 1, 0], torch.int64)
    for wrong in (["2"], ["1-3"], "7"):
        with pytest.raises(InputError, match=r"expected (a list of )?`labels`"):
            to_labels(wrong, 4, class_names=OTHER_NUMBERS)


@pytest.mark.parametrize("labels", [torch.tensor([2, 0]), torch.tensor([], dtype=torch.int64)])
def test_labels_have_the_names_of_their_classes(labels: Any) -> None:
    assert names_of(labels, ANIMALS) == [ANIMALS[label] for label in labels]
    assert names_of(labels, ()) == []


@pytest.mark.parametrize("text", ["4", "3,4", "4-5", "0"])
def test_where_classes_are_called_by_numbers_another_number_is_no_class(text: str) -> None:
    with pytest.raises(InputError, match=r"names of classes \(3, 5, 7, 1-2\), found '[04]'; give such names$"):
        parse_labels(text, OTHER_NUMBERS)
