import base64
import html
import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from prior.evaluation import report
from prior.evaluation.measure import Evaluation
from prior.evaluation.sets import ImageSet
from prior.evaluation.tables import as_markdown, as_text, describe_origin, notes, tabulate
from tests.helpers import ROOT, make_split
from tests.prior.evaluation.test_tables import AWKWARD, make_figures
from vqvae.pictures import grid_png

TEXTS = ["metrics.json", "table.txt", "table.md"]
PICTURES = ["real", "unigram", "closest", "nats-by-position", "code-usage"]
ABOUT, NOTES, TABLES = describe_origin(make_figures()), notes(make_figures()), tabulate(make_figures())


def make_evaluation() -> Evaluation:
    """Twelve images a set."""
    rows = make_figures()["rows"]
    sets = [ImageSet(row["name"], row["title"], make_split(12, seed=n).images) for n, row in enumerate(rows)]
    nats = 1 + torch.arange(49.0).view(7, 7) / 10
    closest = make_split(20, seed=9).images.unflatten(0, (10, 2))
    return Evaluation(make_figures(), sets, sets[1], closest, nats, nats + 0.5, torch.arange(4))


def test_every_form_has_every_figure_and_the_page_is_one_file_that_shows_markup_as_text(tmp_path: Path) -> None:
    def inside(tag: str, text: str | None = None) -> list[str]:
        return [html.unescape(found) for found in re.findall(f"<{tag}>(.*?)</{tag}>", text or source)]

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
    source, pictures = (folder / "report.html").read_text(encoding="utf-8"), report.draw_pictures(make_evaluation())
    assert [inside("t[hd]", row) for row in re.findall("<tr>.*?</tr>", source)] == [row for _, t in TABLES for row in t]
    assert inside("h2") == [*(title for title, _ in TABLES), "Pictures"]
    assert inside("p") == ["; ".join(ABOUT), *NOTES]
    captions = [picture.caption for picture in pictures.values()]
    assert f"{AWKWARD}: the first 12" in captions
    shown = re.findall('<img alt="([^"<>]*)" src="data:image/png;base64,([^"]*)">', source)
    assert inside("figcaption") == [html.unescape(text) for text, _ in shown] == captions
    assert [base64.b64decode(data) for _, data in shown] == [(folder / f"{name}.png").read_bytes() for name in PICTURES]
    for refused in ("<b>", "<script", "<link", "<iframe", "href", "@import", "url(", "http", '"quoted"'):
        assert refused not in re.sub('base64,[^"]*', "", source)


def test_the_pictures_show_the_first_images_of_each_set_and_the_closest_pairs_and_maps_of_any_shape() -> None:
    many, nats = ImageSet("many", "many", make_split(130, (3, 8, 16)).images), torch.rand(4, 30)
    labelled, names = many._replace(name="labelled", labels=torch.arange(130) % 2), make_figures()["class_names"]
    sets = [many, labelled]
    drawn = report.draw_pictures(make_evaluation()._replace(sets=sets, nats=nats, unigram_nats=nats))
    assert drawn["many"] == ("many: the first 100", grid_png(many.images[:100] / 255))
    assert drawn["labelled"].png == grid_png(many.images[:100] / 255, captions=[names[i % 2] for i in range(100)])
    assert drawn["closest"].png == grid_png(make_evaluation().closest / 255)
    assert [Image.open(io.BytesIO(drawn[name].png)).size for name in PICTURES[3:]] == [(800, 350)] * 2


def test_the_numbers_outlive_a_failing_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    monkeypatch.setattr(report, "write_atomically", lambda path, content: written.append(path.name))
    report.write_report(make_evaluation(), tmp_path)
    assert list(tmp_path.iterdir()) == []  # nothing gets there another way
    assert written == [*TEXTS, *(f"{name}.png" for name in PICTURES), "report.html"]
    monkeypatch.setattr(report, "draw_pictures", lambda _: 1 / 0)
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
