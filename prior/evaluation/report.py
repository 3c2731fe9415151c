"""An evaluation written down: metrics.json and tables, pictures, and one HTML page that holds everything."""

import base64
import json
import math
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment

from prior.evaluation.measure import Evaluation, evaluate_pair
from prior.evaluation.plots import plot_code_usage, plot_heat_maps
from prior.evaluation.tables import Table, as_markdown, as_text, describe_origin, notes, tabulate
from prior.labels import names_of
from prior.pair import Pair
from vqvae.data.dataset import Dataset, DatasetInfo
from vqvae.data.pixels import unit_images
from vqvae.distributed import is_main
from vqvae.pictures import grid_png
from vqvae.storage.files import require_writable, write_atomically

FILES = ("metrics.json", "table.txt", "table.md", "report.html")  # in every report, beside the pictures
NOT_ALWAYS = ("pixelcnn_guided", "pixelcnn_labelled", "pixelcnn_unlabelled")  # sets that only some reports have
NUM_SHOWN = 100

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>VQ-VAE + PixelCNN: evaluation</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { padding: 0.2rem 0.7rem; border-bottom: 1px solid #ccc; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
figure { display: inline-block; margin: 0 1.5rem 1.5rem 0; vertical-align: top; max-width: 100%; }
figcaption { max-width: 32rem; color: #444; }
img { max-width: 100%; }
</style>
</head>
<body>
<h1>VQ-VAE + PixelCNN: evaluation</h1>
<p>{{ about | join("; ") }}</p>
{% for note in notes %}
<p>{{ note }}</p>
{% endfor %}
{% for title, rows in tables %}
<h2>{{ title }}</h2>
<table>
<tr>{% for cell in rows[0] %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in rows[1:] %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% endfor %}
<h2>Pictures</h2>
<div>
{% for caption, data in pictures %}
<figure>
<img alt="{{ caption }}" src="data:image/png;base64,{{ data }}">
<figcaption>{{ caption }}</figcaption>
</figure>
{% endfor %}
</div>
</body>
</html>
"""


class Picture(NamedTuple):
    """A picture of the report."""

    caption: str
    png: bytes


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
    pictures = draw_pictures(evaluation)
    for name, picture in pictures.items():
        write_atomically(folder / f"{name}.png", picture.png)
    write_atomically(folder / "report.html", render_page(about, remarks, tables, list(pictures.values())).encode())
    for name in set(NOT_ALWAYS) - set(pictures) if is_report and is_main() else ():
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
    by = f" (classifier {classifier[:12]})" if classifier else ""
    tables = [f"\n{title}{by}\n{as_text(rows)}" for title, rows in tabulate(evaluation.figures)]
    return "\n".join([*tables, "", *notes(evaluation.figures)])


def render_page(about: list[str], remarks: list[str], tables: list[Table], pictures: list[Picture]) -> str:
    """One HTML page that needs no other file. Every text is escaped.

    Args:
        about: where the figures come from, a few words each.
        remarks: sentences that stand above the tables.
    """
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    encoded = [(picture.caption, base64.b64encode(picture.png).decode()) for picture in pictures]
    return environment.from_string(PAGE).render(about=about, notes=remarks, tables=tables, pictures=encoded)


def draw_pictures(evaluation: Evaluation) -> dict[str, Picture]:
    """The pictures by their names: the first images of each set, the closest pairs, and two plots."""
    pictures = {}
    for image_set in evaluation.sets:
        shown = unit_images(image_set.images[:NUM_SHOWN])
        labels, names = image_set.labels, evaluation.figures["class_names"]
        png = grid_png(shown, captions=() if labels is None else names_of(labels[:NUM_SHOWN], names))
        pictures[image_set.name] = Picture(f"{image_set.title}: the first {len(shown)}", png)
    pictures["closest"] = Picture(
        "Closest pairs: a sample and, below it, the training image nearest to it",
        grid_png(unit_images(evaluation.closest)),
    )
    maps = {"per-position unigram": evaluation.unigram_nats, "PixelCNN": evaluation.nats}
    pictures["nats-by-position"] = Picture("Likelihood by position, nats per code", plot_heat_maps(maps))
    pictures["code-usage"] = Picture(
        "How often each code is chosen, most frequent first", plot_code_usage(evaluation.code_counts)
    )
    return pictures
