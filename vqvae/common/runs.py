"""Where trained weights lie: the user's runs in `checkpoints/<name>/`, the shipped ones beside them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from vqvae.common.checkpoint import read_header
from vqvae.common.distributed import is_main
from vqvae.common.errors import UserError
from vqvae.common.files import SCRATCH

RUNS = Path("checkpoints")
SHIPPED = Path(__file__).parents[2] / "checkpoints" / "pretrained"


def weights_file(folder: Path, stage: str) -> Path:
    """A stage's weights in a run's folder."""
    return folder / f"{stage}.safetensors"


@contextmanager
def claimed(folder: Path, stage: str, resume: bool, overwrite: bool) -> Iterator[None]:
    """Inside, a run's folder is there and nobody else's: the lock goes with the process, however that ends. Of several
    processes that train together the main one claims it for all.

    Raises:
        UserError: a run of this stage is there already and neither to be resumed nor overwritten, or is being
            trained at this moment; the folder is the shipped weights', or it can't be written.
    """
    if not is_main():
        yield
        return
    try:
        if folder.resolve() == SHIPPED.resolve():
            raise UserError(
                f"expected an --output-folder of your own, found {folder}, which holds the shipped weights; name "
                f"another"
            )
        resume_file = folder / stage / "resume.pt"
        if resume and not resume_file.exists():
            raise UserError(f"expected a run to resume at {resume_file}, found none; start one without --resume")
        if not (resume or overwrite) and (weights_file(folder, stage).exists() or resume_file.exists()):
            raise UserError(
                f"expected no {stage} run in {folder}, found one; go on with it with --resume, replace it with "
                f"--overwrite, or name another --output-folder"
            )
        (folder / stage).mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / stage / ".lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise UserError(
            f"expected nobody else at work in {folder}, found a {stage} run that goes on; wait for its end, or name "
            f"another --output-folder"
        ) from None
    except OSError as error:
        raise UserError(f"expected to write to {folder}: {error.strerror}; name another --output-folder") from None
    try:
        for left in [*folder.glob(f".{stage}.*{SCRATCH}"), *(folder / stage).glob(f".*{SCRATCH}")]:
            left.unlink(missing_ok=True)  # by a process that was killed while it wrote
        if overwrite:
            resume_file.unlink(missing_ok=True)  # or --resume could go on with the run that was given up
        yield
    finally:
        lock.release()


def find_vqvae(given: Path | None) -> Path:
    """The VQ-VAE that was named, or else the user's newest, or else the shipped one."""
    return given or _newest_first("vqvae")[0]


def find_classifier(given: Path | None) -> Path:
    """The classifier that was named, or else the user's newest, or else the shipped one."""
    return given or _newest_first("classifier")[0]


def find_pair(vqvae: Path | None, prior: Path | None) -> tuple[Path, Path]:
    """The newest prior and the VQ-VAE that it was trained on, the user's before the shipped ones; what was named
    is not looked for.

    Raises:
        UserError: no pair fits together, or a file is damaged.
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
    raise UserError(
        f"expected a prior and its VQ-VAE, found no two that belong together among "
        f"{', '.join(map(str, [*vqvaes, *priors]))}; train one with: python cli.py train-prior --vqvae {vqvaes[0]}"
    )


def describe(path: Path) -> str:
    """A path for people: relative where it can be, and whose weights it holds."""
    owner = "the shipped weights" if path.resolve().parent == SHIPPED.resolve() else "your run"
    shown = path.resolve()
    return f"{shown.relative_to(Path.cwd()) if shown.is_relative_to(Path.cwd()) else shown} ({owner})"


def _newest_first(stage: str) -> list[Path]:
    mine = [path for path in RUNS.glob(f"*/{stage}.safetensors") if path.resolve().parent != SHIPPED.resolve()]
    return [*sorted(mine, key=lambda path: path.stat().st_mtime, reverse=True), weights_file(SHIPPED, stage)]
