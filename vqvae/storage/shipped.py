"""Where the recipes and the weights lie that come with the program: in a clone, and where a wheel is installed."""

import os
from pathlib import Path

_TOP = Path(__file__).parents[2]  # the clone, or the folder that holds all installed packages
_PACKAGE = _TOP / "vqvae_pixelcnn"  # what a wheel has in place of a clone's top (pyproject.toml)
HOME = _PACKAGE if (_PACKAGE / "configs").is_dir() else _TOP
RECIPES = HOME / "configs"
SHIPPED = HOME / "checkpoints" / "pretrained"


def find_recipe(path: Path) -> Path:
    """The recipe that is meant: the file at `path` or, if there is none, a shipped one, as in `configs/mnist.toml`.

    A link that leads nowhere is meant all the same, so that it is told.
    """
    return next((place for place in (path, HOME / path) if os.path.lexists(place)), path)
