"""Where trained weights lie: the user's runs in `checkpoints/<name>/`, and the shipped weights beside them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from vqvae.console import remark
from vqvae.distributed import is_main
from vqvae.errors import InputError, MissingFileError
from vqvae.storage.checkpoint import read_header
from vqvae.storage.files import SCRATCH
from vqvae.storage.shipped import SHIPPED

RUNS = Path("checkpoints")


def weights_file(folder: Path, stage: str) -> Path:
    """The file of a stage's weights in a run's folder."""
    return folder / f"{stage}.safetensors"


@contextmanager
def run_lock(output_folder: Path, stage: str, resume: bool, overwrite: bool) -> Iterator[None]:
    """A lock on a stage's run in a folder, which is made if it does not exist.

    The operating system frees the lock when the process ends, however it ends. If several processes train together,
    the main one holds the lock for all of them.

    Args:
        overwrite: allow a run where there is one already. Nothing is deleted: new saves replace the old files.
    Raises:
        MissingFileError: there is no run to resume.
        InputError: both `resume` and `overwrite` are given; there is a run already and neither is given; another
            process is training in the folder; the folder holds the shipped weights or cannot be written.
    """
    if not is_main():
        yield
        return
    resume_file = output_folder / stage / "resume.pt"
    try:
        _require_free(output_folder, stage, resume_file, resume, overwrite)
        (output_folder / stage).mkdir(parents=True, exist_ok=True)
        lock = FileLock(output_folder / stage / ".lock", timeout=0)
        lock.acquire()
    except InputError:  # a missing file is an OSError too
        raise
    except Timeout:
        raise InputError(
            f"expected nobody else at work in {output_folder}, found a {stage} run that goes on; wait for its end, or "
            f"name another `output_folder`"
        ) from None
    except OSError as error:
        raise InputError(
            f"expected to write to {output_folder}: {error.strerror}; name another `output_folder`"
        ) from None
    try:
        for left in [*output_folder.glob(f".{stage}.*{SCRATCH}"), *(output_folder / stage).glob(f".*{SCRATCH}")]:
            left.unlink(missing_ok=True)  # a process that was killed while it wrote left this file
        yield
    finally:
        lock.release()


def find_vqvae(given: Path | None) -> Path:
    """The given VQ-VAE checkpoint, or else the user's newest, or else the shipped one."""
    return given or _newest_first("vqvae")[0]


def find_classifier(given: Path | None) -> Path:
    """The given classifier checkpoint, or else the user's newest, or else the shipped one."""
    return given or _newest_first("classifier")[0]


def find_pair(vqvae: Path | None, prior: Path | None) -> tuple[Path, Path]:
    """The newest prior and the VQ-VAE that it was trained on. The user's come before the shipped ones.

    If one of the two is given, only its partner is looked for. If both are given, they are returned as they are.

    Raises:
        InputError: no prior and VQ-VAE belong together, or a given file is damaged.
    """
    if vqvae and prior:
        return vqvae, prior
    priors = [prior] if prior else _newest_first("prior")
    vqvaes = [vqvae] if vqvae else _newest_first("vqvae")
    for candidate in priors:
        wanted = read_header(candidate, "prior").vqvae_fingerprint
        for partner in vqvaes:
            if read_header(partner, "vqvae").fingerprint == wanted:
                return partner, candidate
    raise InputError(
        f"expected a prior and its VQ-VAE, found no two that belong together among "
        f"{', '.join(map(str, [*vqvaes, *priors]))}; train one with `train_prior()`, given `vqvae={str(vqvaes[0])!r}`"
    )


def is_shipped(path: Path) -> bool:
    """Whether a checkpoint is one of the shipped weights."""
    return path.resolve().parent == SHIPPED.resolve()


def relative(path: Path) -> Path:
    """The path as seen from the current folder, if it lies there."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def describe(path: Path) -> str:
    """A checkpoint's path and its owner, for people."""
    return f"{relative(path.resolve())} ({'the shipped weights' if is_shipped(path) else 'your run'})"


def folder_for(recipe: Path, vqvae: Path | None = None) -> Path:
    """The output folder of a run where none is named: that of its own VQ-VAE, or one named after the recipe.

    Raises:
        InputError: the recipe's name names no folder.
    """
    if vqvae is not None and not is_shipped(vqvae):
        return vqvae.parent
    if recipe.stem in (".", ".."):
        raise InputError(f"expected a recipe's name to name a folder, found {recipe}; give `output_folder` too")
    return RUNS / recipe.stem


def _require_free(output_folder: Path, stage: str, resume_file: Path, resume: bool, overwrite: bool) -> None:
    """Refuse a run that would destroy another one, and a run to resume that is not there."""
    if resume and overwrite:
        raise InputError("expected `resume=True` or `overwrite=True`, found both; choose one of them")
    if output_folder.resolve() == SHIPPED.resolve():
        raise InputError(
            f"expected an `output_folder` of your own, found {output_folder}, which holds the shipped weights; name "
            f"another"
        )
    if resume and not resume_file.exists():
        raise MissingFileError(
            f"expected a run to resume at {resume_file}, found none; start one without `resume=True`"
        )
    if not (resume or overwrite) and (weights_file(output_folder, stage).exists() or resume_file.exists()):
        raise InputError(
            f"expected no {stage} run in {output_folder}, found one; go on with it with `resume=True`, replace it with "
            f"`overwrite=True`, or name another `output_folder`"
        )


def _newest_first(stage: str) -> list[Path]:
    """A stage's checkpoints: the user's, the newest first, and the shipped one at the end.

    A file of the user's that cannot be read is left out, so that it does not stand in the way of the others.
    """
    found = []
    for path in RUNS.glob(f"*/{stage}.safetensors"):
        if is_shipped(path):
            continue
        try:
            read_header(path, stage)
            found.append((path.stat().st_mtime, path))
        except (InputError, OSError):
            remark(f"left out {path}, which cannot be read as a {stage} checkpoint of this version")
    return [*(path for _, path in sorted(found, reverse=True)), weights_file(SHIPPED, stage)]
