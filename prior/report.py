"""What `evaluate` measured, for people and for programs: metrics.json, tables, pictures, one HTML page of it all."""

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from prior.evaluate import SURE, Evaluation
from vqvae.common.data import NUM_CLASSES, to_model_range, to_unit_range
from vqvae.common.files import write_atomically
from vqvae.common.grids import grid_png

NUM_SHOWN = 100
Table = tuple[str, list[list[str]]]  # a title; rows of cells, the first row the head

NOTE = (
    "FID and KID are in the features of the project's own digit classifier: they are not Inception figures and compare "
    "only with figures of the same classifier."
)


def write_report(evaluation: Evaluation, origin: dict[str, Any], folder: Path) -> None:
    """Write everything into a folder, made if missing.

    Args:
        origin: what was measured with what: fingerprints, split, numbers, seed.
    """
    pictures = draw(evaluation)
    tables = tabulate(evaluation.figures)
    about = [f"{name.replace('_', ' ')}: {value}" for name, value in origin.items()]
    texts = {
        "metrics.json": json.dumps({"origin": origin, **evaluation.figures}, indent=2) + "\n",
        "table.txt": "\n".join([*about, NOTE, *(f"\n{title}\n{as_text(rows)}" for title, rows in tables)]) + "\n",
        "table.md": "\n".join([*about, "", NOTE, *(f"\n**{t}**\n\n{as_markdown(rows)}" for t, rows in tables)]) + "\n",
        "report.html": as_html(about, tables, pictures),
    }
    for name, text in texts.items():
        write_atomically(folder / name, text.encode())
    for name, (_, data) in pictures.items():
        write_atomically(folder / f"{name}.png", data)


def tabulate(figures: dict[str, Any]) -> list[Table]:
    """The figures as tables."""
    rows = figures["rows"]
    sets = [["set", "FID", "FID∞", "KID x 1000", "precision", "recall", "density", "coverage", f"sure (p ≥ {SURE})"]]
    sets[0] += ["agree with label"]
    digits = [["taken for", *map(str, range(NUM_CLASSES))]]
    agreement = [["label", *map(str, range(NUM_CLASSES))]]
    for row in rows:
        sets.append(
            [
                row["title"],
                f"{row['fid']:.3f}",
                f"{row['fid_infinity']:.3f}",
                f"{1000 * row['kid']:.2f} ± {1000 * row['kid_std']:.2f}",
                *(f"{row[name]:.3f}" for name in ("precision", "recall", "density", "coverage", "sure")),
                f"{row['agreement']:.4f}" if "agreement" in row else "",
            ]
        )
        digits.append([row["title"], *map(str, row["digits"])])
        if "agreement" in row:
            agreement.append(
                [row["title"], *("" if share is None else f"{share:.3f}" for share in row["agreement_by_digit"])]
            )
    one = figures["stage_one"]
    stage_one = [
        ["squared error", "PSNR", "SSIM", "perplexity", "codes used"],
        [
            f"{one['squared_error']:.5f}",
            f"{one['psnr_db']:.2f} dB",
            f"{one['ssim']:.4f}",
            f"{one['perplexity']:.0f}",
            f"{one['codes_used']:.0f}",
        ],
    ]
    likelihood = [["split", "nats per code", "without labels", "bits per image", "unigram", "uniform", "over unigram"]]
    for name, values in figures["likelihood"].items():
        likelihood.append(
            [
                name.replace("_", " "),
                f"{values['nats_per_code']:.3f}",
                f"{values['nats_per_code_unlabelled']:.3f}",
                f"{values['bits_per_image']:.1f}",
                f"{values['unigram']:.3f}",
                f"{values['uniform']:.3f}",
                f"{values['nats_per_code'] / values['unigram']:.3f}",
            ]
        )
    found = figures["memorisation"]
    distance = found["distance"]
    memorisation = [
        [
            "to the nearest training digit (rms over pixels)",
            "distance",
            "p: no closer than held-out digits",
            "same map",
        ],
        ["held-out digits", f"{distance['real']:.4f}", "", str(found["copied_maps_real"])],
        [
            "their reconstructions",
            f"{distance['reconstructions']:.4f}",
            f"{found['p_reconstructions_closer_than_real']:.3g}",
            str(found["copied_maps_real"]),
        ],
        [
            "samples",
            f"{distance['samples']:.4f}",
            f"{found['p_closer_than_real']:.3g} (their reconstructions: {found['p_closer_than_reconstructions']:.3g})",
            str(found["copied_maps"]),
        ],
    ]
    tables = [
        ("Sets of images against training digits", sets),
        ("Stage one, held-out digits", stage_one),
        ("Likelihood", likelihood),
        ("Memorisation", memorisation),
        ("Agreement with the label asked for, by digit", agreement),
        ("What the classifier takes them for", digits),
    ]
    if "classification_accuracy_score" in figures:
        score = figures["classification_accuracy_score"]
        cells = [["trained on", "accuracy on held-out digits"]]
        cells += [["samples", f"{score['samples']:.4f}"], ["as many real digits", f"{score['real']:.4f}"]]
        tables.insert(1, ("Classification accuracy score", cells))
    return tables


def draw(evaluation: Evaluation) -> dict[str, tuple[str, bytes]]:
    """Pictures as PNG, each under its name with a caption."""
    pictures = {}
    for image_set in evaluation.sets:
        shown = to_unit_range(to_model_range(image_set.images[:NUM_SHOWN]))
        pictures[image_set.name] = (f"{image_set.title}: the first {len(shown)}", grid_png(shown))
    closest = to_unit_range(to_model_range(evaluation.closest))
    pictures["closest"] = (
        "Closest pairs: a sample and, right of it, the training digit nearest to it",
        grid_png(closest),
    )
    pictures["nats-by-position"] = ("Likelihood by position, nats per code", _heat_maps(evaluation))
    pictures["code-usage"] = ("How often each code is chosen, most frequent first", _code_usage(evaluation))
    return pictures


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Cells in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    """Cells as a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def as_html(about: list[str], tables: list[Table], pictures: dict[str, tuple[str, bytes]]) -> str:
    """One page that needs no other file."""

    def cells(row: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

    parts = [f"<p>{html.escape('; '.join(about))}</p>", f"<p>{html.escape(NOTE)}</p>"]
    for title, rows in tables:
        body = "".join(cells(row, "td") for row in rows[1:])
        parts.append(f"<h2>{html.escape(title)}</h2><table>{cells(rows[0], 'th')}{body}</table>")
    parts.append("<h2>Pictures</h2><div>")
    for caption, data in pictures.values():
        source = base64.b64encode(data).decode()
        text = html.escape(caption)
        parts.append(
            f'<figure><img alt="{text}" src="data:image/png;base64,{source}"><figcaption>{text}</figcaption></figure>'
        )
    return PAGE.replace("BODY", "\n".join([*parts, "</div>"]))


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
BODY
</body>
</html>
"""


def _heat_maps(evaluation: Evaluation) -> bytes:
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    panels = figure.subplots(1, 2)
    most = float(evaluation.unigram_nats.max())
    maps = (("per-position unigram", evaluation.unigram_nats), ("PixelCNN", evaluation.nats))
    for panel, (title, nats) in zip(panels, maps, strict=True):
        image = panel.imshow(nats.numpy(), vmin=0, vmax=most, cmap="viridis")
        panel.set_title(f"{title}: {nats.mean():.2f}")
        for (i, j), value in [((i, j), nats[i, j]) for i in range(nats.shape[0]) for j in range(nats.shape[1])]:
            panel.text(j, i, f"{value:.1f}", ha="center", va="center", color="white" if value < most / 2 else "black")
    figure.colorbar(image, ax=panels, label="nats per code")
    return _png_of(figure)


def _code_usage(evaluation: Evaluation) -> bytes:
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    panel = figure.subplots()
    counts = evaluation.code_counts.sort(descending=True).values
    panel.plot((counts / counts.sum()).numpy(), label="share of all codes")
    panel.axhline(1 / len(counts), color="gray", linestyle="--", label="an even split")
    panel.set(xlabel="code, by rank", ylabel="share", yscale="log", xlim=(0, len(counts) - 1))
    panel.legend()
    return _png_of(figure)


def _png_of(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
