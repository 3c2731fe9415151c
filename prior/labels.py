"""Labels as a caller gives them, by the names or by the numbers of classes, checked."""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from vqvae.compute import require_whole
from vqvae.errors import InputError

RANGE = re.compile(r"(\d{1,4})-(\d{1,4})", re.ASCII)
NUMBER = re.compile(r"\d{1,4}", re.ASCII)
MOST_NAMES = 12  # that a message lists


def to_labels(
    labels: Iterable[int | str] | Tensor, num_classes: int, num: int | None = None, *, class_names: Sequence[str] = ()
) -> Tensor:
    """Labels as a tensor (N,) int64, checked. Without classes every label is 0, which stands for none there.

    Args:
        labels: whole numbers or names of classes in a list, a tensor, an array, or anything else that gives them one by
            one. A string is a name, even if it looks like a number.
        num: N; None stands for any number of at least 1.
        class_names: the names that the labels may be.
    Raises:
        InputError: another number of labels, or labels that are no whole numbers or no classes.
    """
    tensor = _to_tensor(labels, class_names)
    if num is not None and len(tensor) != num:
        raise InputError(f"expected {num} labels, one for each image, found {len(tensor)}; give as many `labels`")
    if len(tensor) == 0:
        raise InputError("expected at least one label, found none; leave `labels` out to draw any")
    if num_classes == 0 and tensor.any():
        raise InputError("expected no labels, because the prior has no classes, found some; leave `labels` out")
    wrong = tensor[(tensor < 0) | (tensor >= max(num_classes, 1))]
    if len(wrong) > 0:
        raise InputError(f"expected labels in 0..{num_classes - 1}, found {int(wrong[0])}; choose others by `labels`")
    return tensor


def parse_labels(text: str | None, class_names: Sequence[str]) -> list[int] | None:
    """The numbers of the classes written as "cat,dog", "7", "0-9", or as a mixture of these. None stays None.

    Where a class is called by a number, such as "3", all numbers are names of classes. A name with a comma cannot be
    written here; its number can.

    Raises:
        InputError: a part of the text is neither a class nor a number nor a range of numbers.
    """
    if text is None:
        return None
    labels = []
    for part in text.split(","):
        ends = RANGE.fullmatch(part)
        if part in class_names or not ends or int(ends[1]) > int(ends[2]):
            labels.append(parse_label(part, class_names))
        else:
            labels += [parse_label(str(number), class_names) for number in range(int(ends[1]), int(ends[2]) + 1)]
    return labels


def parse_label(text: str, class_names: Sequence[str]) -> int:
    """The number of the class that is written as its name or, where no class is called by a number, as its number.

    Raises:
        InputError: it is neither.
    """
    if class_names and NUMBER.fullmatch(text) and not _are_numbers(class_names):
        return int(text)  # `to_labels` says whether there is such a class
    return class_number(text, class_names)


def class_number(name: str, class_names: Sequence[str]) -> int:
    """The number of a class.

    Raises:
        InputError: no class has that name.
    """
    if name in class_names:
        return list(class_names).index(name)
    if not class_names:
        raise InputError(
            f"expected `labels` to be left out, because the prior has no classes, found {name!r:.80}; leave them out"
        )
    known = ", ".join(class_names[:MOST_NAMES]) + (", ..." if len(class_names) > MOST_NAMES else "")
    close = get_close_matches(name, class_names, n=1)
    remedy = "give such names"
    if close:
        remedy = f"did you mean {close[0]!r:.80}?"
    elif not _are_numbers(class_names):
        remedy += f", or numbers in 0..{len(class_names) - 1}"
    raise InputError(f"expected `labels` to be names of classes ({known:.300}), found {name!r:.80}; {remedy}")


def _are_numbers(class_names: Sequence[str]) -> bool:
    """Whether classes are called by numbers, so that a number is a name."""
    return any(map(NUMBER.fullmatch, class_names))


def names_of(labels: Tensor, class_names: Sequence[str]) -> list[str]:
    """The names of labels (N,). Without classes there are none."""
    return [class_names[label] for label in labels] if class_names else []


def _to_tensor(labels: Any, class_names: Sequence[str]) -> Tensor:
    if isinstance(labels, Tensor) and labels.dtype == torch.int64 and labels.ndim == 1:
        return labels.cpu()  # there may be millions
    try:
        if isinstance(labels, str):  # it would be read letter by letter
            raise TypeError
        values = list(labels.tolist() if hasattr(labels, "tolist") else labels)
    except TypeError:  # a single number, for instance
        raise InputError(f"expected a list of `labels`, found {labels!r:.80}; try `labels=[0, 1]`") from None
    numbers = [class_number(value, class_names) if isinstance(value, str) else value for value in values]
    return torch.tensor([require_whole("labels", number, -(2**63)) for number in numbers], dtype=torch.int64)
