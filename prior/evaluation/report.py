"""An evaluation written down: metrics.json and tables, pictures, and one HTML page that holds everything."""

import json
import math
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from prior.evaluation.illustrations import draw_all_closest, draw_plots, draw_sets
from prior.evaluation.measure import Evaluation, evaluate_pair
from prior.evaluation.page import FINGERPRINT_LENGTH, render_page
from prior.evaluation.tables import as_markdown, as_text, describe_origin, notes, tabulate
from prior.pair import Pair
from vqvae.data.dataset import Dataset, DatasetInfo
from vqvae.distributed import is_main
from vqvae.storage.files import require_writable, write_atomically

FILES = ("metrics.json", "table.txt", "table.md", "report.html")  # in every report, beside the pictures
NOT_ALWAYS = ("pixelcnn_guided", "pixelcnn_labelled", "pixelcnn_unlabelled")  # sets that only some reports have


def evaluate_and_report(
    pair: Pair,
    classifier_file: Path | None,
    load_dataset: Callable[[DatasetInfo], Dataset],
    folder: Path,
    **options: Any,
) -> str:
    """Measure a pair, write the report into a folder, and return all tables as text.

    Args:
        classifier_file, load_dataset: see `measure.evaluate_pair`.
        options: split, num_samples, guidance, seed and accuracy_score of `measure.evaluate_pair`.
    Raises:
        InputError: an option is out of range, a file is missing or damaged, or the folder can't be written.
    """
    for name in FILES:
        require_writable(folder / name)  # before the measuring, which takes minutes
    save = partial(write_report, folder=folder)
    evaluation = evaluate_pair(pair, classifier_file, load_dataset, save=save, **options)
    save(evaluation)
    return tables_as_text(evaluation)


def write_report(evaluation: Evaluation, folder: Path) -> None:
    """Write everything into a folder, which is made if it is missing. The numbers come first, then the pictures.

    Pictures of an older report that this one does not have are deleted in the end.

    Raises:
        InputError: the folder can't be written.
    """
    figures, is_report = evaluation.figures, (folder / "metrics.json").exists()
    about, remarks, tables = describe_origin(figures), notes(figures), tabulate(figures)
    texts = {
        "metrics.json": [json.dumps(_finite(figures), indent=2, allow_nan=False)],
        "table.txt": [*about, *remarks, *(f"\n{title}\n{as_text(rows)}" for title, rows in tables)],
        "table.md": [*about, "", *remarks, *(f"\n**{title}**\n\n{as_markdown(rows)}" for title, rows in tables)],
    }
    for name, lines in texts.items():
        write_atomically(folder / name, "\n".join([*lines, ""]).encode())
    sets, plots = draw_sets(evaluation), draw_plots(evaluation)
    pngs = {name: picture.png for name, picture in {**sets, **plots}.items()}
    for name, png in {**pngs, "closest": draw_all_closest(evaluation)}.items():
        write_atomically(folder / f"{name}.png", png)
    write_atomically(folder / "report.html", render_page(evaluation, sets, plots).encode())
    for name in set(NOT_ALWAYS) - set(sets) if is_report and is_main() else ():
        with suppress(OSError):  # there is none
            (folder / f"{name}.png").unlink()


def _finite(value: Any) -> Any:
    """Plain data without NaN and infinities, for which JSON has no word: None stands for them."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def tables_as_text(evaluation: Evaluation) -> str:
    """All tables for a terminal. Each names the classifier that its figures are taken with, if there is one."""
    classifier = evaluation.figures["origin"].get("classifier")
    by = f" (classifier {classifier[:FINGERPRINT_LENGTH]})" if classifier else ""
    tables = [f"\n{title}{by}\n{as_text(rows)}" for title, rows in tabulate(evaluation.figures)]
    return "\n".join([*tables, "", *notes(evaluation.figures)])
