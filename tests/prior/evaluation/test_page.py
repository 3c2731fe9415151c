import base64
import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prior.evaluation.illustrations import draw_closest, draw_plots, draw_sets, draw_side_by_side
from prior.evaluation.measure import Evaluation
from prior.evaluation.page import render_page
from prior.evaluation.sets import ImageSet
from prior.evaluation.tables import COLUMNS, notes, tabulate
from prior.evaluation.verdict import judge
from tests.browser import browser
from tests.helpers import make_split
from tests.prior.evaluation.test_report import make_evaluation

FINGERPRINT = "0123456789abcdef" * 4


def make_whole() -> Evaluation:
    """Every kind of set, and texts with markup wherever a page might take it for its own."""
    evaluation = make_evaluation()
    real, unigram = evaluation.figures["rows"]
    names = ("reconstructions", "pixelcnn_guided", "pixelcnn_unlabelled", "pixelcnn")
    others = [unigram | {"name": name, "title": f"<i>{name}</i>"} for name in names]
    evaluation.figures["rows"] = [real, *others, unigram]
    evaluation.figures["origin"] |= {"vqvae": FINGERPRINT, "dataset": "<u>made</u>"}
    sets = [
        ImageSet(row["name"], row["title"], make_split(12, seed=n).images)
        for n, row in enumerate(evaluation.figures["rows"])
    ]
    return evaluation._replace(sets=sets, labelled_samples=sets[2])


def render(evaluation: Evaluation) -> str:
    return render_page(evaluation, draw_sets(evaluation), draw_plots(evaluation))


def inside(tag: str, source: str) -> list[str]:
    """The text of each element, without the tags within."""
    found = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", source, re.DOTALL)
    return [html.unescape(re.sub("<[^>]*>", "", text)) for text in found]


def test_the_page_is_one_file_that_has_every_figure_and_shows_markup_as_text() -> None:
    evaluation = make_whole()
    source = render(evaluation)
    for refused in ("<b>", "<i>", "<u>", "<script", "<link", "<iframe", "href", "@import", "url(", "http", '"quoted"'):
        assert refused not in re.sub('base64,[^"]*', "", source)
    rows = [re.findall(r"<t[hd][^>]*>.*?</t[hd]>", row) for row in re.findall("<tr>.*?</tr>", source, re.DOTALL)]
    shown = [[inside("t[hd]", cell)[0].removesuffix(" (best)") for cell in row] for row in rows if len(row) > 1]
    assert shown == [row for _, table in tabulate(evaluation.figures) for row in table]
    assert inside("li", source) == notes(evaluation.figures)
    verdict = judge(evaluation.figures)
    assert inside("p", source)[:2] == [verdict.sentence, verdict.rule]
    drawn = [*draw_side_by_side(evaluation), *draw_closest(evaluation), *draw_plots(evaluation).values()]
    drawn += draw_sets(evaluation).values()
    pictures = re.findall('<img alt="([^"<>]+)" src="data:image/png;base64,([^"]*)">', source)
    assert [(html.unescape(alt), base64.b64decode(png)) for alt, png in pictures] == [(p.alt, p.png) for p in drawn]
    assert inside("figcaption", source) == [picture.caption for picture in drawn]


def test_the_verdict_is_first_and_how_it_was_made_is_last_with_short_fingerprints() -> None:
    evaluation = make_whole()
    source = render(evaluation)
    assert inside("h1", source) == ["Evaluation of a VQ-VAE and its PixelCNN prior on <u>made</u>"]
    table, *_ = (title for title, _ in tabulate(evaluation.figures))
    assert inside("h2", source) == [
        *(judge(evaluation.figures).words, "Side by side", table, "How to read the figures", "Closest pairs", "Codes"),
        *("Other figures", "More of each set", "How it was made"),
    ]
    made = source[source.index('id="origin"') :]
    facts = dict(zip(inside("dt", made), inside("dd", made), strict=True))
    assert facts == {
        "split": "test",
        "num samples": "12",
        "classifier": "ab12cd34ef56",
        "note": "<script>alert('&')",
        "vqvae": "0123456789ab",
        "dataset": "<u>made</u>",
    }
    assert FINGERPRINT[:13] not in source


def test_each_column_is_explained_and_its_best_sampled_sets_are_marked() -> None:
    evaluation = make_whole()
    rows = evaluation.figures["rows"]
    for number, row in enumerate(rows):  # the floor is the best wherever it is not left out
        row |= {column.key: 0.9 - 0.1 * number for column in COLUMNS}
        row |= {column.key: 0.1 + 0.1 * number for column in COLUMNS if column.better == "lower"}
        row |= {"kid_std": 0.0, "fid_infinity_error": 0.0001, "agreement_by_class": [None, None]}
    rows[2] |= {"fid": 0.40003, "fid_infinity": None, "density": 0.2}
    rows[3] |= {"fid": 0.4, "density": 1.2, "agreement": 0.9}
    del rows[5]["agreement"]
    source = render(evaluation)
    best = {}
    for row in re.findall('<tr><th scope="row">.*?</tr>', source)[:6]:
        cells = re.findall("<td[^>]*>", row)
        best[inside("th", row)[0]] = [c.key for c, cell in zip(COLUMNS, cells, strict=True) if 'class="best"' in cell]
        assert row.count("(best)") == row.count('class="best"')
    assert best == {
        rows[0]["title"]: [],
        rows[1]["title"]: [],
        rows[2]["title"]: ["fid", "kid", "precision", "recall", "coverage", "confident"],
        rows[3]["title"]: ["fid", "fid_infinity", "density", "agreement"],  # 0.400 is as good as another 0.400
        rows[4]["title"]: [],
        rows[5]["title"]: [],
    }
    explained = dict(zip(inside("dt", source), inside("dd", source), strict=True))
    for column in COLUMNS:
        assert column.meaning in explained[column.head]
        assert f"{column.better} " in explained[column.head]
    groups = re.findall('<th scope="rowgroup"[^>]*><span>([^:]*?)[:<]', source)
    assert groups == ["The floor", "Stage one alone", "Samples of the learned prior", "Baselines"]


def test_without_a_classifier_the_page_has_what_is_left() -> None:
    evaluation = make_whole()
    evaluation.figures["rows"] = []
    for name in ("without_label", "classification_accuracy_score"):
        del evaluation.figures[name]
    source = render(evaluation)
    assert inside("h2", source)[:3] == ["Not judged", "Side by side", "How to read the figures"]
    assert inside("h3", source) == [title for title, _ in tabulate(evaluation.figures)]
    assert "best" not in inside("main", source)[0].split()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as found:
        yield found


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser_the_page_never_scrolls_sideways_and_is_there_for_everyone(
    chromium: Any, scheme: str, width: int, tmp_path: Path
) -> None:
    file, heard = tmp_path / "report.html", []
    file.write_text(render(make_whole()), encoding="utf-8")
    page = chromium.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.on("console", lambda message: heard.append(message.text))
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on("request", lambda request: request.url.startswith("data:") or heard.append(request.url))
    page.goto(file.as_uri())
    assert heard == [file.as_uri()]  # no request but for itself, and no error
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth && image.alt)")
    assert page.evaluate("[...document.querySelectorAll('th')].every(head => head.scope)")
    assert page.evaluate("[...document.querySelectorAll('table')].every(table => table.tHead)")
    names = "[...document.querySelectorAll('[aria-labelledby]')].map(e => e.getAttribute('aria-labelledby'))"
    assert page.evaluate(f"{names}.every(name => document.getElementById(name)?.innerText)")
    red, _, _ = map(int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor")))
    assert (red < 64) == (scheme == "dark")
    scrolled = []  # by the keyboard alone
    for _ in range(page.locator(".scroll").count()):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "scroll"
        page.keyboard.press("ArrowRight")
        page.wait_for_timeout(300)
        scrolled.append(page.evaluate("document.activeElement.scrollLeft > 0"))
    assert scrolled[0] == (width == 390)
    page.close()
