"""A training that begins from the weights of an earlier one, instead of random ones."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vqvae.errors import InputError


def require_same_network(file: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse to begin from the weights of another network.

    Args:
        file: where the weights are.
        found, expected: all that shapes the network in the file, and the one that is to be trained, by name.
    Raises:
        InputError: a value differs; the message names the first.
    """
    for name, value in expected.items():
        if found[name] != value:
            raise InputError(
                f"expected weights to start from of the network that is to be trained, with {name} = {value}, found "
                f"{name} = {found[name]} in {file}; train with the same, or leave out `start_from`"
            )


def require_kept(file: Path, weights: Path) -> None:
    """Refuse to begin from a file that the run itself replaces. It could not be resumed.

    Args:
        file: where the weights are.
        weights: the file that the run writes.
    Raises:
        InputError: they are the same.
    """
    if os.path.realpath(file) == os.path.realpath(weights):
        raise InputError(
            f"expected `start_from` to be another file than the one that this run writes, found {file}; name another "
            f"`output_folder`"
        )
