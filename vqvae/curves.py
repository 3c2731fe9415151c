"""The training curves of runs as one picture: what `metrics.jsonl` says, with several runs laid over one another."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter

from vqvae.errors import InputError
from vqvae.storage.files import refusals, write_atomically
from vqvae.training.history import METRICS_FILE, read_history

STAGES = ("vqvae", "prior", "classifier")  # from top to bottom
STYLES: dict[str, dict[str, Any]] = {  # of a figure's curves, by what its name in the log ends in
    "train_step": {"alpha": 0.4, "linewidth": 0.8, "marker": ","},  # markers, because the first value has no line
    "train": {"linestyle": "--", "linewidth": 1.2, "marker": "."},
    "validation": {"linewidth": 1.8, "marker": "o", "markersize": 4},
}
MOST_COLUMNS = 4
LARGEST = 1e30  # number that is drawn
Rows = list[dict[str, float]]


class Panel(NamedTuple):
    """A figure that is worth looking at."""

    axis: str  # what it is, and its unit
    log: bool = False  # its scale, where all values are above 0
    baseline: str = ""  # a figure to compare it with


PANELS = {
    "total": Panel("loss, sum of its terms", log=True),
    "reconstruction": Panel("reconstruction loss, pixels in -1..1", log=True),
    "commitment": Panel("commitment loss", log=True),
    "prediction": Panel("prediction loss", log=True),
    "psnr_db": Panel("PSNR, dB"),
    "perplexity": Panel("perplexity, codes"),
    "codes_used": Panel("different codes used"),
    "nats_per_code": Panel("nats per code", log=True, baseline="unigram"),
    "cross_entropy": Panel("cross-entropy, nats", log=True),
    "error": Panel("share of wrong classes", log=True),
}


def plot_runs(folders: Sequence[Path], output: Path) -> None:
    """Draw the curves of runs, each in a colour of its own, and write them as PNG.

    A run may still be going on. Each stage has its panels, of which one shows the learning rate.

    Args:
        folders: the output folders of trainings.
    Raises:
        InputError: there is no log in a folder, it cannot be read, or the picture cannot be written.
    """
    runs = {str(folder).replace("$", r"\$"): _read_run(folder) for folder in folders}  # $ would begin a formula
    stages = [stage for stage in STAGES if any(stage in run for run in runs.values())]
    shown = {stage: _shown([run.get(stage, []) for run in runs.values()]) for stage in stages}
    heights = [1.6 + 3.4 * _num_rows(figures) for figures in shown.values()]  # inches
    picture = Figure(figsize=(15, sum(heights)), layout="constrained")
    parts = picture.subfigures(len(stages), squeeze=False, height_ratios=heights)[:, 0]
    for stage, part in zip(stages, parts, strict=True):
        _draw_stage(part, shown[stage], {name: run.get(stage, []) for name, run in runs.items()})
        part.suptitle(stage, fontweight="bold")
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", dpi=100)
    write_atomically(output, buffer.getvalue())


def _read_run(folder: Path) -> dict[str, Rows]:
    """What a run has logged so far, by stage.

    Raises:
        InputError: it has no log, or one that cannot be read.
    """
    with refusals(f"expected to read the logs in {folder}", "make them readable"):
        files = {stage: folder / stage / METRICS_FILE for stage in STAGES}
        found = {stage: read_history(file) for stage, file in files.items() if file.exists()}
    found = {stage: rows for stage, rows in found.items() if rows}
    if not found:
        raise InputError(
            f"expected a run's output folder, with a log such as {files['vqvae']}, found none there; name the "
            f"`output_folder` of a training"
        )
    return found


def _shown(runs: Sequence[Rows]) -> list[str]:
    """The figures of `PANELS` that some run has."""
    logged = {name.partition("/")[0] for rows in runs for row in rows for name in row}
    return [figure for figure in PANELS if figure in logged]


def _num_rows(figures: Sequence[str]) -> int:
    return max(-(-len(figures) // MOST_COLUMNS), 1)


def _draw_stage(part: SubFigure, figures: Sequence[str], runs: dict[str, Rows]) -> None:
    """A panel for each figure, and below them a flat one for the learning rate."""
    num_rows = _num_rows(figures)
    columns = max(-(-len(figures) // num_rows), 1)
    grid = part.add_gridspec(num_rows + 1, columns, height_ratios=[1.0] * num_rows + [0.3])
    for number, figure in enumerate(figures):
        panel = part.add_subplot(grid[number // columns, number % columns])
        _draw_panel(panel, figure, runs)
    rate = part.add_subplot(grid[-1, :])
    for color, rows in zip(_colors(runs), runs.values(), strict=True):
        rate.plot(*_curve(rows, "lr"), color=color, linewidth=1)
    rate.set(xlabel="step", ylabel="learning rate")
    rate.ticklabel_format(axis="y", scilimits=(-2, 2))
    part.legend(
        handles=[
            Line2D([], [], color="black", label=name.replace("_", " "), **style) for name, style in STYLES.items()
        ],
        loc="outside upper right",
        ncols=len(STYLES),
        frameon=False,
    )


def _draw_panel(panel: Axes, figure: str, runs: dict[str, Rows]) -> None:
    """The curves of a figure. The legend has each run's last value on validation."""
    axis, log, baseline = PANELS[figure]
    for color, (name, rows) in zip(_colors(runs), runs.items(), strict=True):
        for split, style in STYLES.items():
            panel.plot(*_curve(rows, f"{figure}/{split}"), color=color, **style)
        _, values = _curve(rows, f"{figure}/validation")
        if rows:
            panel.plot([], color=color, label=f"{name}: {values[-1]:.4g}" if values else name)
    baselines = (_curve(rows, f"{baseline}/validation")[1][-1:] for rows in runs.values())
    for value in sorted({value for values in baselines for value in values}):
        panel.axhline(value, color="black", linestyle=":", label=f"{baseline}: {value:.4g}")
    panel.set(xlabel="step", ylabel=axis)
    if log and all((np.asarray(line.get_ydata()) > 0).all() for line in panel.get_lines()):
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(LogFormatter())
        panel.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small")


def _curve(rows: Rows, name: str) -> tuple[list[float], list[float]]:
    """The steps at which a figure was logged, and its values, without those that no axis can hold, such as NaN."""
    found = [(row["step"], row[name]) for row in rows if name in row]
    found = [point for point in found if all(abs(number) < LARGEST for number in point)]
    return [step for step, _ in found], [value for _, value in found]


def _colors(runs: dict[str, Rows]) -> list[str]:
    return [f"C{number}" for number in range(len(runs))]
