"""What a command writes for its user: a picture (.png) or arrays (.npz), by the name's ending."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from vqvae.errors import InputError
from vqvae.pictures import save_grid
from vqvae.storage.files import require_writable, write_arrays


def check_output(output: Path, *, with_original: bool = False) -> Path:
    """The same path. Nothing is made there.

    Args:
        with_original: `save_reconstructions` will write it, so a picture gets another beside it.
    Raises:
        InputError: its name ends neither in .png nor in .npz, or it cannot be written.
    """
    if output.suffix not in (".png", ".npz"):
        named = output / "images" if output.name in ("", "..") else output
        raise InputError(
            f"expected `output` to end in .png (a picture) or .npz (arrays), found {output}; "
            f"try `output={named.with_name(f'{named.stem}.png')}`"
        )
    require_writable(output)
    if with_original and output.suffix == ".png":
        require_writable(_original(output))
    return output


def save_images(output: Path, arrays: Mapping[str, Tensor], shown: str = "images") -> None:
    """Write a grid of the images that are shown as .png, or all arrays as .npz.

    Args:
        shown: the name of the images (N, C, S, T) in 0..1 among the arrays.
    """
    if output.suffix == ".npz":
        write_arrays(output, {name: np.asarray(values) for name, values in arrays.items()})
    else:
        save_grid(arrays[shown], output)


def save_reconstructions(output: Path, arrays: Mapping[str, Tensor]) -> list[Path]:
    """`save_images` of the reconstructions. A picture gets another beside it, <name>-original.png.

    Returns:
        the files that were written.
    """
    written = []
    if output.suffix == ".png":
        written.append(_original(output))
        save_images(written[0], arrays)
    save_images(output, arrays, shown="reconstructions")
    return [*written, output]


def _original(output: Path) -> Path:
    return output.with_name(f"{output.stem}-original.png")
