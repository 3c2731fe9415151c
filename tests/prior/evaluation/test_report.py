import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prior.evaluation import report
from prior.evaluation.illustrations import draw_plots, draw_sets
from prior.evaluation.measure import Evaluation
from prior.evaluation.memorisation import ClosestPairs
from prior.evaluation.page import render_page
from prior.evaluation.sets import ImageSet
from prior.evaluation.tables import as_markdown, as_text, describe_origin, notes, tabulate
from tests.helpers import ROOT, make_split
from tests.prior.evaluation.test_tables import make_figures
from vqvae.pictures import grid_png

TEXTS = ["metrics.json", "table.txt", "table.md"]
PICTURES = ["real", "unigram", "nats-by-position", "code-usage", "closest"]
ABOUT, NOTES, TABLES = describe_origin(make_figures()), notes(make_figures()), tabulate(make_figures())


def make_evaluation() -> Evaluation:
    """Twelve images a set."""
    rows = make_figures()["rows"]
    sets = [ImageSet(row["name"], row["title"], make_split(12, seed=n).images) for n, row in enumerate(rows)]
    nats = 1 + torch.arange(49.0).view(7, 7) / 10
    closest = [
        ClosestPairs(make_split(10, seed=9 + n).images.unflatten(0, (5, 2)), torch.arange(5) / 10, n) for n in range(2)
    ]
    return Evaluation(make_figures(), sets, sets[1], closest, nats, nats + 0.5, torch.arange(4))


def test_every_form_has_every_figure(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    report.write_report(make_evaluation(), folder)
    assert {path.name for path in folder.iterdir()} == {*TEXTS, "report.html", *(f"{name}.png" for name in PICTURES)}
    assert json.loads((folder / TEXTS[0]).read_text()) == make_figures()
    text, markdown = ((folder / name).read_text(encoding="utf-8") for name in TEXTS[1:])
    terminal = report.tables_as_text(make_evaluation())
    assert terminal.endswith("\n\n" + "\n".join(NOTES))
    assert all(f"{line}\n" in text and f"{line}\n" in markdown for line in [*ABOUT, *NOTES])
    for title, rows in TABLES:
        assert f"\n{title}\n{as_text(rows)}\n" in text
        assert f"\n{title} (classifier ab12cd34ef56)\n{as_text(rows)}\n" in terminal
        assert f"\n**{title}**\n\n{as_markdown(rows)}\n" in markdown
    page = render_page(make_evaluation(), draw_sets(make_evaluation()), draw_plots(make_evaluation()))
    assert (folder / "report.html").read_text(encoding="utf-8") == page
    for name, picture in {**draw_sets(make_evaluation()), **draw_plots(make_evaluation())}.items():
        assert (folder / f"{name}.png").read_bytes() == picture.png
    pairs = torch.cat([pairs.images for pairs in make_evaluation().closest])
    assert (folder / "closest.png").read_bytes() == grid_png(pairs / 255)


def test_the_numbers_outlive_a_failing_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    monkeypatch.setattr(report, "write_atomically", lambda path, content: written.append(path.name))
    report.write_report(make_evaluation(), tmp_path)
    assert list(tmp_path.iterdir()) == []  # nothing gets there another way
    assert written == [*TEXTS, *(f"{name}.png" for name in PICTURES), "report.html"]
    monkeypatch.setattr(report, "draw_sets", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.write_report(make_evaluation(), tmp_path)
    assert written[len(PICTURES) + 4 :] == TEXTS
    monkeypatch.setattr(report, "evaluate_pair", lambda *_, save, **__: (save(make_evaluation()), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        report.evaluate_and_report(None, None, None, tmp_path)
    assert written[len(PICTURES) + 7 :] == TEXTS  # what was measured is kept where training a classifier fails


def test_figures_that_are_no_numbers_are_null_in_json(tmp_path: Path) -> None:
    evaluation = make_evaluation()
    evaluation.figures["stage_one"]["ssim"], evaluation.figures["rows"][0]["agreement_by_class"][0] = math.nan, math.inf
    report.write_report(evaluation, tmp_path)
    found = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert found["stage_one"]["ssim"] is found["rows"][0]["agreement_by_class"][0] is None


@pytest.mark.parametrize("was_report", [True, False])
def test_a_report_leaves_no_picture_of_an_older_one_beside_it_and_every_other_file(
    was_report: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale, others = tmp_path / "pixelcnn_guided.png", [tmp_path / "holiday.png", tmp_path / "pixelcnn_guided.txt"]
    for path in (stale, *others, *([tmp_path / "metrics.json"] if was_report else [])):
        path.touch()
    with monkeypatch.context() as failing:
        failing.setattr(report, "render_page", lambda *_: 1 / 0)
        failing.setattr(report, "write_atomically", lambda *_: None)
        with pytest.raises(ZeroDivisionError):
            report.write_report(make_evaluation(), tmp_path)
    assert stale.exists()  # until the new report is there
    report.write_report(make_evaluation(), tmp_path)
    assert stale.exists() != was_report
    assert all(path.exists() for path in others)


def test_a_matplotlibrc_in_the_current_folder_has_no_effect(tmp_path: Path) -> None:
    program = "import prior.evaluation.report, matplotlib; assert matplotlib.rcParams['lines.linewidth'] == 1.5"
    (tmp_path / "matplotlibrc").write_text("lines.linewidth: 99\nno such setting: 1\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
