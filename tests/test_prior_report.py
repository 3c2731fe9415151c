"""The report of an evaluation: which files, what stands in them, and that the page needs no other."""

import base64
import io
import json
import re
from copy import deepcopy
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import prior.report
import pytest
import torch
from PIL import Image
from prior.evaluate import Evaluation, ImageSet
from prior.report import NOTE, as_html, as_markdown, as_text, draw, tabulate, write_report
from vqvae.common.errors import UserError

AWKWARD = 'a <b>bold</b> set & "more"'
ORIGIN = {"split": "test", "num_samples": 12, "guidance": 1.5, "vqvae": "ab12", "note": "<script>alert('&')</script>"}
PICTURES = ["real", "pixelcnn_labelled", "unigram", "closest", "nats-by-position", "code-usage"]


def make_row(name: str, title: str, first: float, **more: object) -> dict:
    """A set's figures, `first` and what follows it in steps of 0.01."""
    names = ("fid", "fid_infinity", "precision", "recall", "density", "coverage", "sure")
    figures = {figure: round(first + 0.01 * n, 4) for n, figure in enumerate(names)}
    return {"name": name, "title": title, **figures, "kid": 0.00123, "kid_std": 0.0004, "digits": [*range(10)], **more}


def make_evaluation() -> Evaluation:
    """Twelve images a set and figures that differ wherever two might be mistaken for one another."""
    generator = torch.Generator().manual_seed(0)

    def images(num: int) -> torch.Tensor:
        return torch.randint(256, (num, 1, 28, 28), dtype=torch.uint8, generator=generator)

    by_digit = [round(0.9 + 0.005 * digit, 3) for digit in range(10)]
    split = {"nats_per_code": 2.0, "nats_per_code_unlabelled": 2.25, "bits_per_image": 141.4, "uniform": 6.238}
    memorisation = {
        "distance": {"real": 0.1511, "reconstructions": 0.1422, "samples": 0.1633},
        "p_closer_than_real": 0.7512,
        "p_closer_than_reconstructions": 1.234e-05,
        "p_reconstructions_closer_than_real": 0.0321,
        "copied_maps": 17,
        "copied_maps_real": 23,
    }
    stage_one = {"squared_error": 0.00312, "psnr_db": 25.67, "ssim": 0.9712, "perplexity": 401.2, "codes_used": 512}
    figures = {
        "rows": [
            make_row("real", "held-out digits", 0.11, agreement=0.9912, agreement_by_digit=by_digit),
            make_row("pixelcnn_labelled", AWKWARD, 0.31, agreement=0.9534, agreement_by_digit=by_digit[::-1]),
            make_row("unigram", "per-position unigram", 0.51),
        ],
        "stage_one": stage_one,
        "likelihood": {"train": {**split, "unigram": 4.0}, "test": {**split, "unigram": 3.2}},
        "memorisation": memorisation,
    }
    sets = [ImageSet(row["name"], row["title"], images(12)) for row in figures["rows"]]
    nats = 1 + torch.arange(49.0).view(7, 7) / 10
    counts = torch.tensor([5, 0, 12, 1])
    return Evaluation(figures, sets, sets[1], images(20), nats, nats + 0.5, counts)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder, made for it, that has the report."""
    folder = tmp_path_factory.mktemp("report") / "new" / "evaluation"
    write_report(make_evaluation(), ORIGIN, folder)
    return folder


class Page(HTMLParser):
    """The tags with their attributes, and the text of each table's cells, row by row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.headings: list[str] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self.inside = tag
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "h2":
            self.headings.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.inside in ("td", "th"):
            self.tables[-1][-1][-1] += data
        elif self.inside == "h2":
            self.headings[-1] += data


@pytest.fixture(scope="module")
def page(written: Path) -> Page:
    return Page((written / "report.html").read_text(encoding="utf-8"))


# The files


def test_exactly_these_files_are_written_in_a_folder_made_for_them(written: Path) -> None:
    names = {path.name for path in written.iterdir()}
    assert names == {"metrics.json", "table.txt", "table.md", "report.html", *(f"{name}.png" for name in PICTURES)}


def test_metrics_json_is_the_figures_and_where_they_come_from(written: Path) -> None:
    found = json.loads((written / "metrics.json").read_text())
    assert found == {"origin": ORIGIN, **make_evaluation().figures}


def test_every_picture_opens_and_shows_what_it_is_of(written: Path) -> None:
    sizes = {}
    for name in PICTURES:
        with Image.open(written / f"{name}.png") as picture:
            picture.load()
            assert picture.format == "PNG"
            sizes[name] = picture.size
    assert sizes["real"] == sizes["pixelcnn_labelled"] == sizes["closest"] == (302, 62)  # two rows of ten
    for name in ("nats-by-position", "code-usage"):
        assert sizes[name] == (800, 350)
        with Image.open(written / f"{name}.png") as picture:
            assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 5
    for name, images in (("unigram", make_evaluation().sets[2].images), ("closest", make_evaluation().closest)):
        with Image.open(written / f"{name}.png") as picture:
            pixels = np.asarray(picture)
        for n, image in enumerate(images[:, 0].numpy()):
            top, left = 2 + n // 10 * 30, 2 + n % 10 * 30
            assert np.array_equal(pixels[top : top + 28, left : left + 28, 0], image)


def test_a_second_report_takes_the_firsts_place_and_leaves_no_scraps(tmp_path: Path) -> None:
    evaluation = make_evaluation()
    write_report(evaluation, ORIGIN, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    write_report(evaluation, {**ORIGIN, "split": "validation"}, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == names
    for name in ("metrics.json", "table.txt", "table.md", "report.html"):
        assert "validation" in (tmp_path / name).read_text(encoding="utf-8")


def test_every_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = {}
    monkeypatch.setattr(prior.report, "write_atomically", lambda path, content: contents.update({path: content}))
    write_report(make_evaluation(), ORIGIN, tmp_path)
    assert list(tmp_path.iterdir()) == []  # nothing gets there another way
    assert {path.parent for path in contents} == {tmp_path}
    assert len(contents) == 4 + len(PICTURES)
    assert all(isinstance(content, bytes) and content for content in contents.values())


def test_a_folder_that_cannot_be_written_is_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=r"expected to write .*metrics.json"):
        write_report(make_evaluation(), ORIGIN, tmp_path / "file")


# The tables


def test_the_tables_show_each_figure_under_its_head() -> None:
    tables = dict(tabulate(make_evaluation().figures))
    assert list(tables) == [
        "Sets of images against training digits",
        "Stage one, held-out digits",
        "Likelihood",
        "Memorisation",
        "Agreement with the label asked for, by digit",
        "What the classifier takes them for",
    ]
    head, real, labelled, unigram = tables["Sets of images against training digits"]
    assert dict(zip(head, real, strict=True)) == {
        "set": "held-out digits",
        "FID": "0.110",
        "FID∞": "0.120",
        "KID x 1000": "1.23 ± 0.40",
        "precision": "0.130",
        "recall": "0.140",
        "density": "0.150",
        "coverage": "0.160",
        "sure (p ≥ 0.99)": "0.170",
        "agree with label": "0.9912",
    }
    assert (labelled[0], labelled[-1]) == (AWKWARD, "0.9534")
    assert (unigram[1], unigram[-1]) == ("0.510", "")  # nobody asked it for a label
    head, row = tables["Stage one, held-out digits"]
    assert dict(zip(head, row, strict=True)) == {
        "squared error": "0.00312",
        "PSNR": "25.67 dB",
        "SSIM": "0.9712",
        "perplexity": "401",
        "codes used": "512",
    }
    head, train, test = tables["Likelihood"]
    assert dict(zip(head, test, strict=True)) == {
        "split": "test",
        "nats per code": "2.000",
        "without labels": "2.250",
        "bits per image": "141.4",
        "unigram": "3.200",
        "uniform": "6.238",
        "over unigram": "0.625",
    }
    assert (train[0], train[-1]) == ("train", "0.500")


def test_the_table_of_memorisation_has_each_set_beside_its_own_figures() -> None:
    _, real, reconstructions, samples = dict(tabulate(make_evaluation().figures))["Memorisation"]
    assert real == ["held-out digits", "0.1511", "", "23"]
    assert reconstructions[:3] == ["their reconstructions", "0.1422", "0.0321"]
    assert samples == ["samples", "0.1633", "0.751 (their reconstructions: 1.23e-05)", "17"]


def test_the_tables_by_digit_have_a_column_for_each() -> None:
    tables = dict(tabulate(make_evaluation().figures))
    agreement, digits = (
        tables["Agreement with the label asked for, by digit"],
        tables["What the classifier takes them for"],
    )
    assert [row[0] for row in agreement[1:]] == ["held-out digits", AWKWARD]  # the sets that have labels
    assert agreement[1][1:] == [
        "0.900",
        "0.905",
        "0.910",
        "0.915",
        "0.920",
        "0.925",
        "0.930",
        "0.935",
        "0.940",
        "0.945",
    ]
    assert [len(row) for row in digits] == [11] * 4
    assert digits[3][1:] == [str(digit) for digit in range(10)]
    assert [cell[-1] for cell in digits[0][1:]] == [str(digit) for digit in range(10)]


def test_the_classification_accuracy_score_has_a_table_where_it_was_measured() -> None:
    figures = deepcopy(make_evaluation().figures)
    figures["classification_accuracy_score"] = {"samples": 0.95123, "real": 0.98765}
    rows = dict(tabulate(figures))["Classification accuracy score"]
    assert rows[1:] == [["samples", "0.9512"], ["as many real digits", "0.9877"]]


def test_text_has_its_columns_one_under_another() -> None:
    lines = as_text([["set", "a"], ["long name", "b"], ["x", "c"]]).splitlines()
    assert lines == ["set        a", "long name  b", "x          c"]


def test_markdown_has_a_line_under_the_head_and_as_many_cells_in_every_row() -> None:
    lines = as_markdown([["set", "a", "b"], ["real", "1", ""]]).splitlines()
    assert lines == ["| set | a | b |", "|---|---|---|", "| real | 1 |  |"]


def test_both_text_files_have_every_table_what_it_was_made_with_and_the_note(written: Path) -> None:
    text, markdown = ((written / name).read_text(encoding="utf-8") for name in ("table.txt", "table.md"))
    for found in (text, markdown):
        assert NOTE in found
        assert "num samples: 12\n" in found
        assert "vqvae: ab12\n" in found
    for title, rows in tabulate(make_evaluation().figures):
        assert f"{title}\n{as_text(rows)}\n" in text
        assert f"**{title}**\n\n{as_markdown(rows)}\n" in markdown


# The page


def test_the_page_needs_no_other_file(written: Path, page: Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base")
        assert not {"href", "srcset", "action", "background", "onload"} & set(attributes)
        if "src" in attributes:
            assert tag == "img"
            assert attributes["src"].startswith("data:image/png;base64,")
    style = re.search(r"<style>(.*?)</style>", (written / "report.html").read_text(encoding="utf-8"), re.DOTALL)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]


def test_the_page_has_every_picture_that_lies_beside_it_with_a_caption(written: Path, page: Page) -> None:
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    shown = [base64.b64decode(attributes["src"].partition(",")[2], validate=True) for attributes in images]
    assert shown == [(written / f"{name}.png").read_bytes() for name in PICTURES]
    for attributes, (caption, _) in zip(images, draw(make_evaluation()).values(), strict=True):
        assert attributes["alt"] == caption
        assert caption in page.text
    assert f"{AWKWARD}: the first 12" in page.text


def test_the_page_has_every_table_cell_by_cell(page: Page) -> None:
    tables = tabulate(make_evaluation().figures)
    assert page.tables == [rows for _, rows in tables]
    assert page.headings == [*(title for title, _ in tables), "Pictures"]
    assert NOTE in page.text


def test_what_looks_like_markup_is_shown_and_not_obeyed(written: Path, page: Page) -> None:
    source = (written / "report.html").read_text(encoding="utf-8")
    assert "<b>" not in source
    assert "<script" not in source
    assert ORIGIN["note"] in page.text
    assert AWKWARD in page.text
    assert not {"b", "script"} & {tag for tag, _ in page.tags}


def test_words_of_the_pages_own_frame_may_stand_in_it() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, format="PNG")
    source = as_html(["BODY: BODY"], [("BODY", [["BODY"], ["1"]])], {"BODY": ("BODY", buffer.getvalue())})
    page = Page(source)
    assert page.tables == [[["BODY"], ["1"]]]
    assert page.text.count("BODY") == 5  # twice above, the table's title and head, the caption
    assert [tag for tag, _ in page.tags].count("img") == 1


# The pictures


def test_at_most_a_hundred_images_of_a_set_are_shown() -> None:
    evaluation = make_evaluation()
    many = evaluation.sets[0]._replace(images=torch.zeros(130, 1, 28, 28, dtype=torch.uint8))
    caption, data = draw(evaluation._replace(sets=[many]))["real"]
    assert caption == "held-out digits: the first 100"
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.size == (302, 302)


def test_a_map_of_another_shape_and_codes_used_alike_are_drawn_too() -> None:
    evaluation = make_evaluation()
    nats = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    pictures = draw(evaluation._replace(nats=nats, unigram_nats=nats + 1, code_counts=torch.full((512,), 3)))
    for name in ("nats-by-position", "code-usage"):
        assert Image.open(io.BytesIO(pictures[name][1])).size == (800, 350)
