"""An evaluation as one HTML page that needs no other file. Its form is report.html.jinja; this module fills it in."""

import base64
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment

from prior.evaluation.illustrations import Picture, draw_closest, draw_side_by_side
from prior.evaluation.measure import Evaluation
from prior.evaluation.tables import COLUMNS, Column, notes, tabulate
from prior.evaluation.verdict import judge

TEMPLATE = Path(__file__).with_name("report.html.jinja")
FINGERPRINT_LENGTH = 12  # as many characters as other commands print
FINGERPRINTS = ("vqvae", "prior", "classifier")
REAL = ("real", "reconstructions")  # sets that are not sampled, of which none is marked as the best
GROUPS = {  # of rows in the table of sets, by how the names of their sets begin
    "real": "The floor: real images, which samples can hardly surpass",
    "reconstructions": "Stage one alone: real images to codes and back",
    "pixelcnn": "Samples of the learned prior",
    "": "Baselines: codes drawn without a learned prior",
}
ABOUT_TABLES = {  # one sentence for each of the other tables, by its title
    "Classification accuracy score": "A classifier that learned from samples alone, beside one that learned from real "
    "images. The nearer the two are, the better the samples stand for real images.",
    "Stage one, held-out images": "How much an image loses on its way to codes and back. Less squared error is better, "
    "more of everything else.",
    "Likelihood": "How well codes of images are predicted. Fewer nats and bits are better; fewer for training "
    "images than for others show overfitting. The unigram and uniform columns are what a code needs without its "
    "neighbours.",
    "Held-out maps, label unknown to the prior": "The prior as a classifier: which label makes a map the most likely.",
    "Memorisation": "Whether samples repeat training images. A share well above 0.5 would say that they lie closer to "
    "training images than the others do.",
    "Agreement with the label, by class": "The share of each class that the classifier takes for that class; more is "
    "better. A class far below the others is one that samples often miss.",
    "What the classifier takes them for": "Images of each set by the class that the classifier takes them for. "
    "Compare each row with that of the held-out images.",
}


class Cell(NamedTuple):
    """A figure in the table of sets."""

    text: str
    is_best: bool  # among the sampled sets


def render_page(evaluation: Evaluation, sets: dict[str, Picture], plots: dict[str, Picture]) -> str:
    """The page. Every text is escaped.

    Args:
        sets, plots: pictures that were drawn already, see `illustrations`.
    """
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["base64"] = lambda png: base64.b64encode(png).decode()
    figures = evaluation.figures
    tables = tabulate(figures)
    of_sets = tables.pop(0) if figures["rows"] else None
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        dataset=figures["origin"].get("dataset"),
        verdict=judge(figures),
        side_by_side=draw_side_by_side(evaluation),
        table_of_sets=of_sets,
        columns=COLUMNS,
        groups=_groups(figures["rows"], of_sets[1][1:]) if of_sets else [],
        notes=notes(figures),
        closest=draw_closest(evaluation),
        plots=plots.values(),
        tables=[(title, ABOUT_TABLES[title], rows) for title, rows in tables],
        sets=sets.values(),
        origin=_origin(figures["origin"]),
    )


def _groups(rows: list[dict[str, Any]], texts: list[list[str]]) -> list[tuple[str, list[tuple[str, list[Cell]]]]]:
    """The rows of the table of sets in groups: the title of each, and its rows as their titles and cells.

    Args:
        rows: the figures of the sets, those of real images first.
        texts: the same as `tabulate` shows them, a title and a text for each column.
    """
    best = [_best(column, rows) for column in COLUMNS]
    best_texts = [None if row is None else texts[row][n] for n, row in enumerate(best, start=1)]
    groups: dict[str, list[tuple[str, list[Cell]]]] = {}
    for row, (title, *cells) in zip(rows, texts, strict=True):
        # Sets whose figures look equal are equally good.
        is_best = [row["name"] not in REAL and text == best for text, best in zip(cells, best_texts, strict=True)]
        group = next(group for start, group in GROUPS.items() if row["name"].startswith(start))
        groups.setdefault(group, []).append((title, list(map(Cell, cells, is_best))))
    return list(groups.items())


def _best(column: Column, rows: list[dict[str, Any]]) -> int | None:
    """Which of the sampled rows is the best of a column; None where none has a figure there."""
    of_real = rows[0].get(column.key)
    order = {"lower": lambda value: value, "higher": lambda value: -value, "nearer": lambda value: abs(value - of_real)}
    found = [n for n, row in enumerate(rows) if row["name"] not in REAL and row.get(column.key) is not None]
    return min(found, key=lambda n: order[column.better](rows[n][column.key]), default=None)


def _origin(origin: dict[str, Any]) -> dict[str, str]:
    """What was measured and with what, for a reader. Fingerprints are as short as other commands print them."""
    return {
        name.replace("_", " "): str(value)[:FINGERPRINT_LENGTH] if name in FINGERPRINTS else str(value)
        for name, value in origin.items()
    }
