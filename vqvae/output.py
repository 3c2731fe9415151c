"""What a command writes for its user: a picture (.png), arrays (.npz) or a table (.csv), by the name's ending."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from vqvae.errors import InputError
from vqvae.pictures import COLUMNS, save_grid
from vqvae.storage.files import require_writable, write_arrays

KINDS = {".png": "a picture", ".npz": "arrays", ".csv": "a table"}


def check_output(output: Path, *endings: str) -> Path:
    """The same path. Nothing is made there.

    Args:
        endings: of `KINDS`, those that the name may have. Without any, .png and .npz.
    Raises:
        InputError: its name has another ending, or it cannot be written.
    """
    endings = endings or (".png", ".npz")
    if output.suffix not in endings:
        named = output / "images" if output.name in ("", "..") else output
        expected = " or ".join(f"{ending} ({KINDS[ending]})" for ending in endings)
        raise InputError(
            f"expected `output` to end in {expected}, found {output}; "
            f"try `output={named.with_name(f'{named.stem}{endings[0]}')}`"
        )
    require_writable(output)
    return output


def save_images(
    output: Path,
    arrays: Mapping[str, Tensor | Sequence[str]],
    shown: Tensor,
    *,
    columns: int = COLUMNS,
    captions: Sequence[str] = (),
) -> None:
    """Write a grid of the images that are shown as .png, or all arrays as .npz.

    Args:
        shown: images (N, C, S, T) in 0..1.
        columns, captions: of the grid; see `pictures.grid_png`.
    """
    if output.suffix == ".npz":
        write_arrays(output, {name: np.asarray(values) for name, values in arrays.items()})
    else:
        save_grid(shown, output, columns, captions)
