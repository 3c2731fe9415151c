"""Run settings: a dataclass's defaults, under a TOML recipe, under command-line flags.

A recipe has one table for each stage, `[vqvae]` and `[prior]`. Its keys are the fields of that stage's
dataclasses, and the fields are the flags' names with `_` for `-`.
"""

import dataclasses
import difflib
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vqvae.common.errors import UserError
from vqvae.common.files import read_at_most, reading

STAGES = ("vqvae", "prior")
MAX_RECIPE = 16 * 1024  # bytes; tomllib's time grows with the square of a key's length
MAX_SHOWN = 80  # characters of a value in a message


def read_recipe(path: Path, stage: str) -> dict[str, Any]:
    """One stage's table of a TOML recipe, empty where the recipe has none.

    Raises:
        UserError: the file is missing, is not TOML, or has a table that no stage reads.
    """
    with reading(path, "a TOML recipe", "name another, such as --config configs/mnist.toml") as file:
        text = read_at_most(file, MAX_RECIPE).decode()
        try:
            recipe = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise UserError(
                f"expected a TOML recipe at {path}, found text that is not TOML: {error}; mend it there"
            ) from None
    for table, content in recipe.items():
        if table not in STAGES or not isinstance(content, dict):
            raise UserError(
                f"{path}: expected the tables [vqvae] and [prior], found {_shown(table)}{_nearest(table, STAGES)}"
            )
    return dict(recipe.get(stage, {}))


def resolve(
    classes: tuple[type, ...], recipe: Mapping[str, Any], flags: Mapping[str, Any], source: Path | None = None
) -> list[Any]:
    """One instance of each dataclass: its defaults, then the recipe's values, then the flags that were given.

    Args:
        classes: dataclasses whose field names don't overlap.
        recipe: one stage's table.
        flags: values by field name; None means that the flag was not given.
        source: the recipe's file, for messages.
    Raises:
        UserError: an unknown key, a value of the wrong type, or one out of range.
    """
    values = {**recipe, **{name: value for name, value in flags.items() if value is not None}}
    known = [field.name for cls in classes for field in dataclasses.fields(cls)]
    try:
        for key in values:
            if key not in known:
                raise UserError(f"unknown key {_shown(key)} in the recipe{_nearest(key, known)}")
        return [from_dict(cls, {k: v for k, v in values.items() if k in _types(cls)}) for cls in classes]
    except UserError as error:
        if source is None:
            raise
        raise UserError(f"{error} (the recipe is {source})") from None


def from_dict(cls: type, values: Mapping[str, Any]) -> Any:
    """An instance of a dataclass from plain values, their types checked.

    Raises:
        UserError: a key that is no field, a value of the wrong type, or one out of range.
    """
    types = _types(cls)
    checked = {}
    for key, value in values.items():
        if key not in types:
            raise UserError(f"unknown key {_shown(key)}{_nearest(key, list(types))}")
        checked[key] = _checked(key, value, types[key])
    return cls(**checked)


def require_range(name: str, value: float, low: float, high: float) -> None:
    """Refuse a setting outside low..high (both allowed).

    Raises:
        UserError: always then, naming the setting.
    """
    if not low <= value <= high:
        raise UserError(
            f"expected {name} between {low:g} and {high:g}, found {value:g}; set it within that range, "
            f"in the recipe or by its flag where it has one"
        )


def _types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _checked(key: str, value: Any, expected: Any) -> Any:
    choices = typing.get_args(expected)  # of a Literal
    if choices:
        if value not in choices:
            raise UserError(f"expected {key} to be one of {', '.join(map(repr, choices))}, found {_shown(value)}")
        return value
    if isinstance(value, int) and not -(2**63) <= value < 2**63:  # past what a float, or a message, can hold
        raise UserError(f"expected {key} to be a number of at most 64 bits, found a longer one")
    if expected is float and type(value) is int:
        value = float(value)
    if type(value) is not expected:
        raise UserError(f"expected {key} to be of type {expected.__name__}, found {_shown(value)}")
    return value


def _nearest(word: str, known: typing.Sequence[str]) -> str:
    close = difflib.get_close_matches(word[:MAX_SHOWN], known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _shown(value: Any) -> str:
    """A value as it is written in Python, on one line, its end left out where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, or tables nested as deep
        return "a value too long to show"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
