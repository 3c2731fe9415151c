"""Where trained weights lie: the user's runs in `checkpoints/<name>/`, and the shipped weights beside them."""

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from inspect import signature
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from vqvae.console import remark
from vqvae.distributed import is_main
from vqvae.errors import InputError, MissingFileError, printable
from vqvae.storage.checkpoint import Header, read_header
from vqvae.storage.files import NOT_SUPPORTED, SCRATCH, named, open_regular, refusals, require_writable
from vqvae.storage.shipped import SHIPPED

RUNS = Path("checkpoints")
LOGS = ("events.out.tfevents*", "metrics.jsonl")  # in a run's folder; without the rest they are somebody's all the same
ANOTHER_FOLDER = "name another `output_folder`"
# Where there are no locks, newer versions of filelock take a file's being there for one. A killed run leaves it there.
NO_MARKERS: dict[str, Any] = (
    {"fallback_to_soft": False} if "fallback_to_soft" in signature(FileLock.__init__).parameters else {}
)
TRAINING = threading.RLock()  # torch's random generator and its tracer are the process's, so they serve one training
MAX_LISTED = 6  # files in a message


def weights_file(folder: Path, stage: str) -> Path:
    """The file of a stage's weights in a run's folder."""
    return folder / f"{stage}.safetensors"


@contextmanager
def run_lock(output_folder: Path, stage: str, resume: bool, overwrite: bool) -> Iterator[None]:
    """A lock on a stage's run in a folder, which is made if it does not exist.

    The operating system frees the lock when the process ends, however it ends. If several processes train together,
    the main one holds the lock for all of them.

    All that can be refused is refused before anything is made or deleted.

    Args:
        overwrite: allow a run where there is one already. Nothing is deleted: new saves replace the old files.
    Raises:
        MissingFileError: there is no run to resume.
        InputError: both `resume` and `overwrite` are given; there is a run already and neither is given; another
            process is training in the folder; another thread of this process is training anywhere; the folder holds
            the shipped weights or cannot be written.
    """
    if not TRAINING.acquire(blocking=False):
        raise InputError("expected one training at a time in a process, found a second; start it in its own process")
    try:
        with _folder_lock(output_folder, stage, resume, overwrite):
            yield
    finally:
        TRAINING.release()


@contextmanager
def _folder_lock(output_folder: Path, stage: str, resume: bool, overwrite: bool) -> Iterator[None]:
    if not is_main():
        yield
        return
    folder = output_folder / stage
    with refusals(f"expected to write to {named(output_folder)}", ANOTHER_FOLDER):
        _require_free(output_folder, stage, resume, overwrite)
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0, **NO_MARKERS)
        _acquire(lock, output_folder, stage)
    try:
        with suppress(OSError):
            for left in [*output_folder.glob(f".{stage}.*{SCRATCH}"), *folder.glob(f".*{SCRATCH}")]:
                left.unlink()  # a process that was killed while it wrote left this file
        yield
    finally:
        with suppress(OSError):
            lock.release()


def find_vqvae(given: Path | None) -> Path:
    """The given VQ-VAE checkpoint, or else the user's newest, or else the shipped one."""
    return given or _newest("vqvae")


def find_classifier(given: Path | None, fits: Callable[[Header], bool], beside: Path | None = None) -> Path | None:
    """The given classifier checkpoint, or else the one beside another file, the user's newest, or the shipped one: the
    first that fits."""
    return given or next((path for path, header in _readable("classifier", beside) if fits(header)), None)


def find_pair(vqvae: Path | None, prior: Path | None) -> tuple[Path, Path]:
    """The newest prior and the VQ-VAE that it was trained on. The user's come before the shipped ones.

    If one of the two is given, its partner is looked for, first in the same folder. If both are given, they are
    returned as they are. No header is read twice, and none that is not needed.

    Raises:
        InputError: no prior and VQ-VAE belong together, or a given file is damaged.
    """
    if vqvae and prior:
        return vqvae, prior
    priors = iter([(prior, read_header(prior, "prior"))] if prior else _readable("prior", beside=vqvae))
    vqvaes = iter([(vqvae, read_header(vqvae, "vqvae"))] if vqvae else _readable("vqvae", beside=prior))
    known: dict[str | None, Path] = {}  # the VQ-VAEs that were looked at so far, by their fingerprints
    tried = []
    for candidate, header in priors:
        wanted = header.vqvae_fingerprint
        while wanted not in known and (following := next(vqvaes, None)):
            known.setdefault(following[1].fingerprint, following[0])  # the newest, if some are equal
        if wanted in known:
            return known[wanted], candidate
        tried.append(candidate)
    if not tried:
        raise MissingFileError("expected a prior and its VQ-VAE, found none; create one with `train_prior()`")
    given = f", given `vqvae={str(next(iter(known.values())))!r}`" if known else ""
    raise InputError(
        f"expected a prior and its VQ-VAE, found no two that belong together among "
        f"{_listed([*known.values(), *tried])}; train one with `train_prior()`{given}"
    )


def is_shipped(path: Path) -> bool:
    """Whether a checkpoint is one of the shipped weights."""
    real, same_name = os.path.realpath(path), os.path.realpath(SHIPPED / path.name)
    # Some installers make each file of a package a link to a file elsewhere.
    return Path(real).parent == Path(os.path.realpath(SHIPPED)) or real == same_name


def relative(path: Path) -> Path:
    """The path as seen from the current folder, if it lies there."""
    with suppress(OSError, ValueError):  # the current folder is gone, or the path does not lie in it
        return path.relative_to(Path.cwd())
    return path


def describe(path: Path) -> str:
    """A checkpoint's path and its owner, for people."""
    owner = "the shipped weights" if is_shipped(path) else "your run"
    return f"{printable(str(relative(Path(os.path.realpath(path)))))} ({owner})"


def folder_for(recipe: Path, vqvae: Path | None = None) -> Path:
    """The output folder of a run where none is named: that of its own VQ-VAE, or one named after the recipe or after
    what else stands for it, such as the dataset.

    Raises:
        InputError: that name names no folder.
    """
    if vqvae is not None and not is_shipped(vqvae):
        return vqvae.parent
    if recipe.stem in (".", ".."):
        raise InputError(f"expected a recipe's name to name a folder, found {recipe}; give `output_folder` too")
    return RUNS / recipe.stem


def _require_free(output_folder: Path, stage: str, resume: bool, overwrite: bool) -> None:
    """Refuse a run that would destroy another one, a run to resume that is not there, and a place for no run."""
    if resume and overwrite:
        raise InputError("expected `resume=True` or `overwrite=True`, found both; choose one of them")
    folder, weights = output_folder / stage, weights_file(output_folder, stage)
    resume_file = folder / "resume.pt"
    for file in (weights, resume_file):
        require_writable(file, ANOTHER_FOLDER)
    if is_shipped(weights):
        raise InputError(
            f"expected an `output_folder` of your own, found {named(output_folder)}, which holds the shipped weights; "
            f"name another"
        )
    # The weights are read at the end of a run, and the log is opened at its first save.
    for file, flags, task in ((weights, os.O_RDONLY, "read"), (folder / "metrics.jsonl", os.O_RDWR, "write")):
        with refusals(f"expected to {task} {file}", f"mend that, or {ANOTHER_FOLDER}"), suppress(FileNotFoundError):
            os.close(open_regular(str(file), flags))
    logs = (log for pattern in LOGS for log in folder.glob(pattern))
    found = [*(file for file in (resume_file, weights) if file.exists()), *islice(logs, 1)]
    if resume and resume_file not in found:
        if found:
            raise MissingFileError(
                f"expected a run to resume at {resume_file}, found none, but {found[0]}; start anew with "
                f"`overwrite=True` instead of `resume=True`, or name another `output_folder`"
            )
        raise MissingFileError(
            f"expected a run to resume at {resume_file}, found none; start one without `resume=True`"
        )
    if found and not (resume or overwrite):
        go_on = "go on with it with `resume=True`, " if resume_file in found else ""
        raise InputError(
            f"expected no {stage} run in {named(output_folder)}, found one ({found[0].relative_to(output_folder)}); "
            f"{go_on}replace it with `overwrite=True`, or name another `output_folder`"
        )


def _acquire(lock: BaseFileLock, output_folder: Path, stage: str) -> None:
    """Take the lock of a run. Where the file system has no locks, a remark stands for it."""
    try:
        lock.acquire()
    except Timeout:
        raise InputError(
            f"expected nobody else at work in {named(output_folder)}, found a {stage} run that goes on; wait for its "
            f"end, or name another `output_folder`"
        ) from None
    except (NotImplementedError, OSError) as error:
        if getattr(error, "errno", errno.ENOSYS) not in NOT_SUPPORTED:
            raise
        remark(f"{named(output_folder)} cannot be locked; see that no other process trains there")


def _newest(stage: str) -> Path:
    """The user's newest readable checkpoint of a stage, or else the shipped one, whether that can be read or not."""
    return next((path for path, _ in _readable(stage)), weights_file(SHIPPED, stage))


def _readable(stage: str, beside: Path | None = None) -> Iterator[tuple[Path, Header]]:
    """A stage's checkpoints: the user's, the newest first, and the shipped one at the end. Each is read when its turn
    comes. One that cannot be read is left out, so that it does not stand in the way of the others.

    Args:
        beside: a file in whose folder one is looked for before all others.
    """
    first = [weights_file(beside.parent, stage)] if beside else []
    for path in dict.fromkeys([*first, *_own(stage), weights_file(SHIPPED, stage)]):
        try:
            header = read_header(path, stage)
        except MissingFileError:  # it has just vanished, or nothing was shipped
            continue
        except InputError:
            remark(f"left out {path}, which cannot be read as a {stage} checkpoint of this version")
            continue
        yield path, header


def _own(stage: str) -> list[Path]:
    """The user's checkpoints of a stage, the newest first. None of them is opened."""
    found = []
    try:
        paths = [weights_file(folder, stage) for folder in RUNS.iterdir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        remark(f"left out the folder {RUNS}, which cannot be read: {error.strerror}")
        return []
    for path in paths:
        try:
            found.append((path.stat().st_mtime, path))
        except (FileNotFoundError, NotADirectoryError):  # a run of another stage, or no run
            continue
        except OSError as error:
            remark(f"left out {path}, which cannot be read: {error.strerror}")
    return [path for _, path in sorted(found, reverse=True) if not is_shipped(path)]


def _listed(paths: Sequence[Path]) -> str:
    """The first few paths, for a message."""
    shown = ", ".join(map(str, paths[:MAX_LISTED]))
    return shown if len(paths) <= MAX_LISTED else f"{shown} and {len(paths) - MAX_LISTED} more"
