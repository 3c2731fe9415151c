"""What a command writes for its user, by the ending of its name: a picture, an animation, arrays or a table."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from vqvae.errors import InputError
from vqvae.pictures import save_animation, save_grid
from vqvae.storage.files import require_writable, write_arrays

ANIMATIONS = (".gif", ".webp")
KINDS = {".png": "a picture", ".npz": "arrays", ".csv": "a table", **dict.fromkeys(ANIMATIONS, "an animation")}


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
    columns: int | None = None,
    captions: Sequence[str] = (),
    stages: Iterable[Tensor] = (),
) -> None:
    """Write a grid of the images that are shown as .png, how they come about as .gif or .webp, or all arrays as .npz.

    Args:
        shown: images in 0..1, as `pictures.grid` takes them.
        columns, captions: of the grid; see `pictures.grid_png`.
        stages: what an animation shows; see `pictures.save_animation`.
    """
    if output.suffix == ".npz":
        write_arrays(output, {name: np.asarray(values) for name, values in arrays.items()})
    elif output.suffix in ANIMATIONS:
        save_animation(stages, output, columns, captions)
    else:
        save_grid(shown, output, columns, captions)
