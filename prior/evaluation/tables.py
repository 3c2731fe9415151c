"""The figures of an evaluation as tables, in plain text and in Markdown."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from prior.evaluation.figures import CONFIDENT
from prior.evaluation.metrics import KID_SUBSET_SIZE

Rows = list[list[str]]  # rows of cells; the first row is the head
Table = tuple[str, Rows]  # a title, and its rows


class Column(NamedTuple):
    """A column of the table of sets."""

    key: str  # of the figure in a row
    head: str
    better: Literal["lower", "higher", "nearer"]  # nearer to that of real images
    meaning: str  # one line, for a reader who does not know the figure


COLUMNS = (
    Column("fid", "FID", "lower", "distance between the two sets in the classifier's features"),
    Column("fid_infinity", "FID∞", "lower", "the same for infinitely many images, extrapolated"),
    Column("kid", "KID x 1000", "lower", "another such distance, whose mean does not depend on the number of images"),
    Column("precision", "precision", "higher", "share of the set that lies where real images lie"),
    Column("recall", "recall", "higher", "share of the real images that lie where the set lies"),
    Column("density", "density", "nearer", "how closely real images surround those of the set"),
    Column("coverage", "coverage", "higher", "share of the real images that have an image of the set close by"),
    Column("confident", f"confident (p ≥ {CONFIDENT})", "nearer", "share that the classifier is nearly certain about"),
    Column("agreement", "agree with label", "higher", "share that the classifier takes for their label"),
)

NOTE = (
    "FID and KID are in the features of the project's own classifier: they are not Inception figures and compare only "
    "with figures of the same classifier. KID, which is unbiased, may be a little below 0; its error is that of sets "
    f"of at most {KID_SUBSET_SIZE:,} images. After < stands what FID∞ is hardly above, where it cannot be told from 0."
)
NOTE_WITHOUT = "FID, KID, precision, recall, density, coverage and agreement with labels are left out, because {}."
NO_CLASSES = "the images have no classes that a classifier could learn"
NO_CLASSIFIER = "there was no classifier of these images and classes; train one on the same dataset and measure again"
NOTE_ON_ERRORS = (
    "After ± stands a standard error. Errors and p-values take images as independent; where many of them are by the "
    "same people or otherwise belong together, they are too small."
)
FEW = 5000  # images in a set
NOTE_ON_FEW = (
    f"The sets have fewer than {FEW:,} images each, too few for most figures to mean much; a small p-value may be "
    "chance."
)
NOTE_ON_FEW_FEATURES = (
    "FID is too high, and compares only with that of as many images; FID∞ is left out where there are fewer than four "
    "images for each feature."
)
STAGE_ONE = {
    "images": "{num_images}",
    "squared error": "{squared_error:.5f}",
    "PSNR": "{psnr_db:.2f} dB",
    "SSIM": "{ssim:.4f}",
    "perplexity": "{perplexity:.0f}",
    "codes used": "{codes_used:.0f}",
}
LIKELIHOOD = {
    "split": "{split}",
    "maps": "{num_maps}",
    "nats per code": "{nats_per_code:.3f}",
    "bits per image": "{bits_per_image:.1f}",
    "unigram": "{unigram:.3f}",
    "uniform": "{uniform:.3f}",
    "over unigram": "{over_unigram:.3f}",
}
WITHOUT_LABEL = {
    "maps": "{num_maps}",
    "nats per code": "{nats_per_code:.3f}",
    "label by Bayes' rule, accuracy": "{accuracy:.4f}",
}


def tabulate(figures: dict[str, Any]) -> list[Table]:
    """The figures of an evaluation as tables, the most important first."""
    tables = []
    if figures["rows"]:
        num = figures["origin"]["num_samples"]
        tables.append((f"Sets of {num:,} images against as many training images", _sets(figures["rows"])))
    if "classification_accuracy_score" in figures:
        score = figures["classification_accuracy_score"]
        sources = {"samples": score["samples"], "as many real images": score["real"]}
        rows = [[source, f"{accuracy:.4f}"] for source, accuracy in sources.items()]
        tables.append(("Classification accuracy score", [["trained on", "accuracy on held-out images"], *rows]))
    splits = [
        {**values, "split": name, "over_unigram": values["nats_per_code"] / values["unigram"]}
        for name, values in figures["likelihood"].items()
    ]
    tables += [
        ("Stage one, held-out images", _formatted(STAGE_ONE, figures["stage_one"])),
        ("Likelihood", _formatted(LIKELIHOOD, *splits)),
    ]
    if "without_label" in figures:
        title = "Held-out maps, label unknown to the prior"
        tables.append((title, _formatted(WITHOUT_LABEL, figures["without_label"])))
    tables.append(("Memorisation", _memorisation(figures["memorisation"])))
    if figures["rows"]:
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
    is_few = figures["origin"]["num_samples"] < FEW
    if not figures["rows"]:
        without = NOTE_WITHOUT.format(NO_CLASSIFIER if figures["class_names"] else NO_CLASSES)
        return [without, NOTE_ON_ERRORS, *[NOTE_ON_FEW] * is_few]
    return [NOTE, NOTE_ON_ERRORS, *[NOTE_ON_FEW, NOTE_ON_FEW_FEATURES] * is_few]


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Cells in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    """Cells as a Markdown table."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _sets(rows: list[dict[str, Any]]) -> Rows:
    shares = ("precision", "recall", "density", "coverage", "confident")
    return [["set", *(column.head for column in COLUMNS)]] + [
        [
            row["title"],
            f"{row['fid']:.3f}",
            _at_infinity(row["fid_infinity"], row["fid_infinity_error"]),
            _with_error(1000 * row["kid"], 1000 * row["kid_std"], digits=2),
            *(f"{row[name]:.3f}" for name in shares),
            f"{row['agreement']:.4f}" if "agreement" in row else "",
        ]
        for row in rows
    ]


def _with_error(value: float, error: float, digits: int) -> str:
    """A figure and its error, which is left out where it would be shown as 0."""
    shown = f"{error:.{digits}f}"
    return f"{value:.{digits}f}" + (f" ± {shown}" if float(shown) > 0 else "")


def _at_infinity(value: float | None, error: float | None) -> str:
    if value is None or error is None:
        return "too few"
    if value > 2 * error:
        return _with_error(value, error, digits=3)
    return f"< {max(value, 0) + 2 * error:.3f}"


def _formatted(columns: dict[str, str], *rows: dict[str, Any]) -> Rows:
    """A row for each of some figures. The columns are heads, and how the cells below are formatted."""
    return [[*columns], *([text.format_map(figures) for text in columns.values()] for figures in rows)]


def _memorisation(figures: dict[str, Any]) -> Rows:
    def closer(comparison: str) -> str:
        share, error = figures[comparison]
        return f"{_with_error(share, error, digits=3)} (p {figures[f'p_{comparison}']:.3g})"

    def start(title: str, name: str) -> list[str]:
        return [title, str(figures["num_images"]), f"{figures['distance'][name]:.4f}"]

    reconstructions, copies = closer("reconstructions_closer_than_real"), str(figures["copied_maps_real"])
    samples = [closer("closer_than_real"), closer("closer_than_reconstructions")]
    return [
        [
            "to the nearest training image (rms over pixels)",
            "images",
            "distance",
            "share closer than held-out images (0.5: none is)",
            "than their reconstructions",
            "same map",
        ],
        [*start("held-out images", "real"), "", "", copies],
        [*start("their reconstructions", "reconstructions"), reconstructions, "", copies],
        [*start("samples", "samples"), *samples, str(figures["copied_maps"])],
    ]


def _agreement(rows: list[dict[str, Any]], class_names: list[str]) -> Rows:
    return [["label", *class_names]] + [
        [row["title"], *("" if share is None else f"{share:.3f}" for share in row["agreement_by_class"])]
        for row in rows
        if "agreement" in row
    ]


def _predicted(rows: list[dict[str, Any]], class_names: list[str]) -> Rows:
    return [["taken for", *class_names]] + [[row["title"], *map(str, row["predicted"])] for row in rows]
