"""A run's `metrics.jsonl`: the scalars of each logged step, as JSON, one line a step."""

import json
import os
from pathlib import Path

from vqvae.storage.files import open_regular

METRICS_FILE = "metrics.jsonl"


def read_history(path: Path) -> list[dict[str, float]]:
    """The rows of a file, which may still be written to. Lines that are damaged are left out.

    Returns:
        rows, each with its `step`.
    Raises:
        OSError: there is no such file, or it cannot be read.
    """
    with open(path, "rb", opener=open_regular) as file:
        return [row for line in file if (row := _parse(line))]


def start_history(path: Path, first_step: int) -> None:
    """Make the file, or drop what it has of a step and of later ones. 0 drops everything.

    Raises:
        OSError: it cannot be written.
    """
    path.touch()
    with open(path, "r+b", opener=open_regular) as file:
        lines = [] if first_step == 0 else file.readlines()
        file.seek(0)
        file.write(b"".join(line for line in lines if (row := _parse(line)) and row["step"] < first_step))
        file.truncate()


def append_row(path: Path, row: dict[str, float]) -> None:
    """Write one more row, which has its `step`.

    Raises:
        OSError: it cannot be written, or the file is gone.
    """
    # Not opened by "a", which would make it, so that a folder that is gone is told.
    with open(path, "r+b", opener=open_regular) as file:
        file.seek(0, os.SEEK_END)
        file.write(json.dumps(row).encode() + b"\n")


def _parse(line: bytes) -> dict[str, float] | None:
    """The scalars of a line. None: it is damaged, or was cut off."""
    try:
        row = {name: float(value) for name, value in json.loads(line).items()}
    except (AttributeError, TypeError, ValueError, OverflowError, RecursionError):
        return None
    return row if "step" in row and line.endswith(b"\n") else None
