"""Settings: the defaults of dataclasses, replaced by a TOML recipe, replaced by the caller's own values.

A recipe has one table for each stage, `[vqvae]` and `[prior]`. The keys of a table are the fields of that stage's
dataclasses. The same checks read the configuration in a checkpoint's header. Both kinds of file may come from anybody:
for any content at all, the functions here either return a valid value or raise `InputError`.
"""

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from vqvae.errors import InputError, plain
from vqvae.storage.files import open_checked, read_at_most
from vqvae.storage.shipped import find_recipe

STAGES = ("vqvae", "prior")
FORMER_NAMES = {  # of keys in the first edition's recipes, which can still be read
    "hidden_size": "code_dim",
    "k": "num_codes",
    "free_overshoot": "clipped_loss",
    "predictability": "prediction_weight",
}
MAX_RECIPE = 16 * 1024  # bytes; the time that tomllib takes grows with the square of a key's length
MAX_SHOWN = 80  # characters of a value in a message
T = TypeVar("T")


def read_recipe(path: Path, stage: str) -> dict[str, Any]:
    """One stage's table of a TOML recipe; it is empty if the recipe does not have that table.

    Raises:
        MissingFileError: there is no file.
        InputError: the file is not TOML, it has a table that belongs to no stage, or a key by its old and its new name.
    """
    with open_checked(find_recipe(path), "a TOML recipe", "name another, such as configs/mnist.toml") as file:
        try:
            text = read_at_most(file, MAX_RECIPE).decode("utf-8-sig")  # with or without a byte-order mark
        except UnicodeDecodeError:
            text = "\0"
        if "\0" in text:  # as every second character of UTF-16 is
            raise InputError(
                f"expected a TOML recipe in UTF-8 at {path}, found a file of another kind or in another encoding, such "
                f"as UTF-16; save it as UTF-8, or name another, such as configs/mnist.toml"
            )
        try:
            recipe = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise InputError(
                f"expected a TOML recipe at {path}, found text that is not TOML: {error}; correct it there"
            ) from None
    for table, content in recipe.items():
        if table not in STAGES:
            raise InputError(
                f"{path}: expected the tables [vqvae] and [prior], found {_shown(table)}{_suggestion(table, STAGES)}"
            )
        if not isinstance(content, dict):
            found = f"a list, as [[{table}]] makes one" if isinstance(content, list) else f"{table} = {_shown(content)}"
            raise InputError(f"{path}: expected a table [{table}], found {found}; write [{table}], and its keys below")
    settings: dict[str, Any] = {}
    for key, value in recipe.get(stage, {}).items():
        name = FORMER_NAMES.get(key, key)
        if name in settings:
            former = next(old for old, new in FORMER_NAMES.items() if new == name)
            raise InputError(
                f"{path}: expected {name!r} once in [{stage}], found {former!r} too, which is the same; leave one out"
            )
        settings[name] = value
    return settings


def resolve(
    classes: tuple[type, ...], recipe: Mapping[str, Any], overrides: Mapping[str, Any], source: Path | None = None
) -> list[Any]:
    """One instance of each dataclass. The recipe replaces its defaults, and the overrides replace the recipe.

    Args:
        classes: dataclasses that have no field name in common.
        recipe: one stage's table.
        overrides: values by field name; None means that no value was given.
        source: the recipe's file, which the messages name.
    Raises:
        InputError: a key is unknown, or a value has the wrong type or is out of range.
    """
    values = {**recipe, **{name: value for name, value in overrides.items() if value is not None}}
    known = [field.name for cls in classes for field in dataclasses.fields(cls)]
    try:
        for key in values:
            if key not in known:
                raise InputError(f"unknown key {_shown(key)} in the recipe{_suggestion(key, known)}")
        return [from_dict(cls, {k: v for k, v in values.items() if k in _field_types(cls)}) for cls in classes]
    except InputError as error:
        if source is None:
            raise
        raise InputError(f"{error} (the recipe is {source})") from None


def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    """An instance of a dataclass, made from plain values whose types are checked.

    A field may have the type int, float, bool or str, a `Literal` of strings, a tuple of these, or some of these or
    None. JSON and TOML have no tuples, so a list serves for a tuple.

    Raises:
        InputError: a key is not a field, a field without a default has no value, or a value has the wrong type or is
            out of range.
    """
    field_types = _field_types(cls)
    checked = {}
    for key, value in values.items():
        if key not in field_types:
            raise InputError(f"unknown key {_shown(key)}{_suggestion(key, list(field_types))}")
        checked[key] = _checked(key, value, field_types[key])
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]  # T can't say that it is a dataclass
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if field.name not in checked and not has_default:
            raise InputError(f"expected a value for `{field.name}`, found none; add one")
    return cls(**checked)


def require_range(name: str, value: float, low: float, high: float) -> None:
    """Check that a setting lies between `low` and `high`; both ends are allowed.

    Raises:
        InputError: it does not; the message names the setting.
    """
    if not low <= value <= high:  # so that NaN is refused too
        raise InputError(
            f"expected `{name}` between {low:g} and {high:g}, found {plain(value)}; set it within that range"
        )


def _field_types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _checked(key: str, value: Any, expected: Any) -> Any:
    """A value that has the expected type. A list becomes a tuple and a whole number a float, if these are expected.

    Args:
        key: the name in messages: a field, or one element of it, such as `image_shape[0]`.
    """
    kind, arguments = typing.get_origin(expected), typing.get_args(expected)
    if kind is Literal:
        if value not in arguments:
            raise InputError(f"expected `{key}` to be one of {', '.join(map(repr, arguments))}, found {_shown(value)}")
        return value
    if kind in (types.UnionType, Union):  # such as int | None
        others = [argument for argument in arguments if argument is not types.NoneType]
        fitting = type(value) if type(value) in others else others[0]
        return None if value is None else _checked(key, value, fitting)
    if kind is tuple and isinstance(value, list | tuple):
        element_types = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        if len(value) == len(element_types):
            pairs = zip(value, element_types, strict=True)
            return tuple(_checked(f"{key}[{i}]", element, type_) for i, (element, type_) in enumerate(pairs))
    if isinstance(value, int) and not -(2**63) <= value < 2**63:  # too large for a float and for a message
        raise InputError(f"expected `{key}` to be a number of at most 64 bits, found a longer one")
    if expected is float and type(value) is int:
        value = float(value)
    if type(value) is not expected:
        name = expected.__name__ if kind is None else str(expected)
        raise InputError(f"expected `{key}` to be of type {name}, found {_shown(value)}")
    return value


def _suggestion(word: str, known: typing.Sequence[str]) -> str:
    close = difflib.get_close_matches(word[:MAX_SHOWN], known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _shown(value: Any) -> str:
    """A value as Python writes it, on one line, shortened if it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, or thousands of nested tables
        return "a value too long to show"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
