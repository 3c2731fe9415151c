"""Writing a file so that a cut at any moment leaves the old one or the new one, never half of it."""

import io
import os
import tempfile
from pathlib import Path

import numpy as np

from vqvae.common.errors import UserError


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside `path`, flush to disk, rename onto it.

    Raises:
        UserError: the folder can't be written, or the disk is full; `path` is then as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(scratch).chmod(0o644)  # mkstemp's 0600 would hide the file from everybody else
            Path(scratch).replace(path)
        except BaseException:
            Path(scratch).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(f"expected to write {path}: {error.strerror}; name a place that can be written") from None


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write named arrays as a compressed .npz, whole or not at all."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_atomically(path, buffer.getvalue())
