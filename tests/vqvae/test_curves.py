import json
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from vqvae.curves import plot_runs
from vqvae.errors import InputError

Patch = pytest.MonkeyPatch


def log(folder: Path, *rows: dict[str, float], end: str = "\n") -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + end)
    return folder.parent


def epochs(*nats: float) -> list[dict[str, float]]:
    """The rows of epochs with these figures on validation. Those of training are larger by 1."""
    return [
        {"step": 10 * i, "nats_per_code/train": value + 1, "nats_per_code/validation": value, "lr": 0.1 * i, "epoch": i}
        | {"unigram/validation": 4.5}
        for i, value in enumerate(nats, start=1)
    ]


def drawn(output: Path, *runs: Path, monkeypatch: Patch) -> dict[str, Axes]:
    """The panels by the names of their axes."""
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: [figures.append(self), save(self, *a, **k)])
    plot_runs(runs, output)
    with Image.open(output) as picture:
        assert picture.format == "PNG"
    return {panel.get_ylabel(): panel for panel in figures[0].get_axes()}


def curves(panel: Axes, color: str) -> dict[str, tuple[list[float], list[float]]]:
    """The curves of a run in a panel, by what sets them apart."""
    lines = [line for line in panel.get_lines() if line.get_color() == color and len(line.get_xdata()) > 0]
    names = {("-", ","): "step", ("--", "."): "train", ("-", "o"): "validation"}
    return {
        names[line.get_linestyle(), line.get_marker()]: (list(line.get_xdata()), list(line.get_ydata()))
        for line in lines
    }


def test_runs_lie_over_one_another_with_train_and_validation_told_apart_and_the_last_figures_named(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    steps = {"step": 5, "nats_per_code/train_step": 6.0, "lr": 0.05}
    first = log(tmp_path / "first" / "prior", steps, *epochs(3.0, 2.5))
    log(tmp_path / "first" / "vqvae", {"step": 3, "psnr_db/validation": 20.0, "lr": 1.0})
    second = log(tmp_path / "second" / "prior", *epochs(3.5))
    panels = drawn(tmp_path / "plot.png", first, second, monkeypatch=monkeypatch)
    assert list(panels) == ["PSNR, dB", "learning rate", "nats per code"]
    nats = panels["nats per code"]
    assert (nats.get_yscale(), panels["PSNR, dB"].get_yscale()) == ("log", "linear")
    one, other = curves(nats, "C0"), curves(nats, "C1")
    assert one == {"step": ([5], [6.0]), "train": ([10, 20], [4.0, 3.5]), "validation": ([10, 20], [3.0, 2.5])}
    assert other == {"train": ([10], [4.5]), "validation": ([10], [3.5])}
    texts = [text.get_text() for text in nats.get_legend().get_texts()]
    assert texts == [f"{first}: 2.5", f"{second}: 3.5", "unigram: 4.5"]
    assert [text.get_text() for text in panels["PSNR, dB"].get_legend().get_texts()] == [f"{first}: 20"]


def test_a_run_that_still_goes_on_is_drawn_before_its_first_validation(tmp_path: Path, monkeypatch: Patch) -> None:
    rows = [{"step": 50, "total/train_step": 2.0, "lr": 0.1}, {"step": 100, "total/train_step": 1.0, "lr": 0.1}]
    run = log(tmp_path / "run" / "vqvae", *rows, end='\n{"step": 150, "total/tr')
    panels = drawn(tmp_path / "plot.png", run, monkeypatch=monkeypatch)
    loss = panels["loss, sum of its terms"]
    assert curves(loss, "C0") == {"step": ([50, 100], [2.0, 1.0])}
    assert loss.get_yscale() == "log"
    assert [text.get_text() for text in loss.get_legend().get_texts()] == [str(run)]


def test_figures_of_0_and_logs_without_a_known_figure_are_drawn_too(tmp_path: Path, monkeypatch: Patch) -> None:
    run = log(tmp_path / "run" / "classifier", *({"step": step, "error/validation": 0.0} for step in (1, 2)))
    log(run / "vqvae", {"step": 1, "lr": 0.1})
    panels = drawn(tmp_path / "plot.png", run, monkeypatch=monkeypatch)
    assert panels["share of wrong classes"].get_yscale() == "linear"
    assert list(panels) == ["learning rate", "share of wrong classes"]


def test_a_folder_without_a_log_is_refused_in_a_sentence_and_nothing_is_written(tmp_path: Path) -> None:
    good, empty = log(tmp_path / "good" / "prior", *epochs(3.0)), log(tmp_path / "empty" / "prior", end="")
    locked = tmp_path / "locked"
    (locked / "vqvae" / "metrics.jsonl").mkdir(parents=True)
    for folder, found in (
        (tmp_path / "none", "expected a run's output folder, with a log such as .*, found none there; name"),
        (empty, "expected a run's output folder"),
        (locked, "expected to read the logs in .*locked: Is a directory; make them readable"),
    ):
        with pytest.raises(InputError, match=found):
            plot_runs([good, folder], tmp_path / "plot.png")
    assert not (tmp_path / "plot.png").exists()


def test_a_folder_named_like_a_formula_and_values_that_no_axis_holds_are_drawn_all_the_same(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    run = log(tmp_path / "$\\frac$" / "prior", *epochs(3.5, float("nan"), float("inf"), -1e308, 1e308))
    panel = drawn(tmp_path / "a.png", run, monkeypatch=monkeypatch)["nats per code"]
    assert [list(line.get_ydata()) for line in panel.get_lines() if line.get_label().endswith(": 3.5")] == [[]]
    assert [3.5] in [list(line.get_ydata()) for line in panel.get_lines()]
