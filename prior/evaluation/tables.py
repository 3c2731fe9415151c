"""The figures of an evaluation as tables, in plain text and in Markdown."""

from collections.abc import Sequence
from typing import Any

from prior.evaluation.figures import CONFIDENT
from prior.evaluation.metrics import KID_SUBSET_SIZE

Rows = list[list[str]]  # rows of cells; the first row is the head
Table = tuple[str, Rows]  # a title, and its rows

NOTE = (
    "FID and KID are in the features of the project's own classifier: they are not Inception figures and compare only "
    "with figures of the same classifier."
)
NOTE_ON_FEW = (
    f"The sets have no more than {KID_SUBSET_SIZE:,} images each. So FID is much too high, FID∞ is uncertain, "
    "and KID has no spread over subsets."
)


def tabulate(figures: dict[str, Any]) -> list[Table]:
    """The figures of an evaluation as tables, the most important first."""
    tables = [("Sets of images against training images", _sets(figures["rows"]))]
    if "classification_accuracy_score" in figures:
        tables.append(("Classification accuracy score", _accuracy_score(figures["classification_accuracy_score"])))
    tables += [
        ("Stage one, held-out images", _stage_one(figures["stage_one"])),
        ("Likelihood", _likelihood(figures["likelihood"])),
    ]
    if "without_label" in figures:
        tables.append(("Held-out maps, label unknown to the prior", _without_label(figures["without_label"])))
    tables.append(("Memorisation", _memorisation(figures["memorisation"])))
    if figures["class_names"]:
        tables += [
            ("Agreement with the label, by class", _agreement(figures["rows"], figures["class_names"])),
            ("What the classifier takes them for", _predicted(figures["rows"], figures["class_names"])),
        ]
    return tables


def describe_origin(figures: dict[str, Any]) -> list[str]:
    """What was measured, and with what: one line for each fact."""
    return [f"{name.replace('_', ' ')}: {value}" for name, value in figures["origin"].items()]


def notes(figures: dict[str, Any]) -> list[str]:
    """What a reader of the tables has to know."""
    return [NOTE, NOTE_ON_FEW] if figures["origin"]["num_samples"] <= KID_SUBSET_SIZE else [NOTE]


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Cells in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    """Cells as a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _sets(rows: list[dict[str, Any]]) -> Rows:
    shares = ("precision", "recall", "density", "coverage", "confident")
    head = ["set", "FID", "FID∞", "KID x 1000", *shares[:-1], f"confident (p ≥ {CONFIDENT})", "agree with label"]
    return [head] + [
        [
            row["title"],
            f"{row['fid']:.3f}",
            f"{row['fid_infinity']:.3f}",
            _kid(row),
            *(f"{row[name]:.3f}" for name in shares),
            f"{row['agreement']:.4f}" if "agreement" in row else "",
        ]
        for row in rows
    ]


def _kid(row: dict[str, Any]) -> str:
    spread = "" if row["kid_std"] is None else f" ± {1000 * row['kid_std']:.2f}"
    return f"{1000 * row['kid']:.2f}{spread}"


def _accuracy_score(score: dict[str, float]) -> Rows:
    return [
        ["trained on", "accuracy on held-out images"],
        ["samples", f"{score['samples']:.4f}"],
        ["as many real images", f"{score['real']:.4f}"],
    ]


def _stage_one(figures: dict[str, float]) -> Rows:
    return [
        ["squared error", "PSNR", "SSIM", "perplexity", "codes used"],
        [
            f"{figures['squared_error']:.5f}",
            f"{figures['psnr_db']:.2f} dB",
            f"{figures['ssim']:.4f}",
            f"{figures['perplexity']:.0f}",
            f"{figures['codes_used']:.0f}",
        ],
    ]


def _likelihood(splits: dict[str, dict[str, float]]) -> Rows:
    head = ["split", "nats per code", "bits per image", "unigram", "uniform", "over unigram"]
    return [head] + [
        [
            name,
            f"{values['nats_per_code']:.3f}",
            f"{values['bits_per_image']:.1f}",
            f"{values['unigram']:.3f}",
            f"{values['uniform']:.3f}",
            f"{values['nats_per_code'] / values['unigram']:.3f}",
        ]
        for name, values in splits.items()
    ]


def _without_label(figures: dict[str, float]) -> Rows:
    return [
        ["maps", "nats per code", "label by Bayes' rule, accuracy"],
        [str(figures["num_maps"]), f"{figures['nats_per_code']:.3f}", f"{figures['accuracy']:.4f}"],
    ]


def _memorisation(figures: dict[str, Any]) -> Rows:
    distance = figures["distance"]
    p_samples = f"{figures['p_closer_than_real']:.3g}"
    p_reconstructions = f"{figures['p_closer_than_reconstructions']:.3g}"
    return [
        [
            "to the nearest training image (rms over pixels)",
            "distance",
            "p, test for lying closer than held-out images",
            "same map",
        ],
        ["held-out images", f"{distance['real']:.4f}", "", str(figures["copied_maps_real"])],
        [
            "their reconstructions",
            f"{distance['reconstructions']:.4f}",
            f"{figures['p_reconstructions_closer_than_real']:.3g}",
            str(figures["copied_maps_real"]),
        ],
        [
            "samples",
            f"{distance['samples']:.4f}",
            f"{p_samples} (their reconstructions: {p_reconstructions})",
            str(figures["copied_maps"]),
        ],
    ]


def _agreement(rows: list[dict[str, Any]], class_names: list[str]) -> Rows:
    return [["label", *class_names]] + [
        [row["title"], *("" if share is None else f"{share:.3f}" for share in row["agreement_by_class"])]
        for row in rows
        if "agreement" in row
    ]


def _predicted(rows: list[dict[str, Any]], class_names: list[str]) -> Rows:
    return [["taken for", *class_names]] + [[row["title"], *map(str, row["predicted"])] for row in rows]
