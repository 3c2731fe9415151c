"""How likely images are under the prior, and the label that fits each best: a table, or a detector of images unlike
those that the prior has learned."""

import csv
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from prior.labels import names_of
from prior.likelihood import label_log_joint
from prior.pair import Pair
from vqvae.codec import encode_images
from vqvae.errors import printable
from vqvae.storage.files import write_arrays, write_atomically

MOST_ROWS = 20  # that the terminal shows
FORMULA = ("=", "+", "-", "@")  # what a spreadsheet would compute


class Scores(NamedTuple):
    """Images with their likelihoods, and with the labels that fit them best."""

    names: tuple[str, ...]
    nats: Tensor  # (N,) float64: log p(map), without a label told, in nats
    num_codes: int  # of a map
    labels: Tensor  # (N,) int64: argmax of p(label | map)
    probabilities: Tensor  # (N,) float64: p(label | map) of that label
    class_names: tuple[str, ...]  # () without classes; then labels and probabilities say nothing

    @property
    def bits(self) -> Tensor:
        """log2 p(map), (N,)."""
        return self.nats / math.log(2)

    @property
    def bits_per_code(self) -> Tensor:
        """-log2 p(map) of each code, (N,): the more, the less likely."""
        return -self.bits / self.num_codes


def score(
    pair: Pair, images: Tensor, names: Sequence[str], progress: Callable[[int], object] = lambda num_done: None
) -> Scores:
    """The log-likelihood of each image's code map, and the label that fits it best.

    The likelihood is that of the mixture: the sum over the labels, each with its frequency in the training set.

    Args:
        images: (N, C, S, T) uint8 in 0..255, N at least 1.
        names: of the images.
        progress: called with the number of maps that were scored since the last call, under one of the labels.
    """
    info, indices = pair.info, encode_images(pair.vqvae, images).cpu()
    joint = label_log_joint(pair.prior, indices, info.class_frequencies, progress=progress)
    probabilities, labels = joint.softmax(dim=1).max(dim=1)
    nats = joint.logsumexp(dim=1)
    return Scores(tuple(names), nats, indices[0].numel(), labels, probabilities, info.class_names)


def as_text(scores: Scores) -> str:
    """The first rows as a table, and a summary."""
    rows = _table(scores, MOST_ROWS)
    texts = [[f"{value:#.4g}" if isinstance(value, float) else printable(value)[:40] for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in texts]
    if (num_left := len(scores.names) - MOST_ROWS) > 0:
        lines.append(f"... and {num_left} more, which a file shows")
    nats, bits, of_each_code = (x.mean() for x in (scores.nats, scores.bits, scores.bits_per_code))
    lines.append(
        f"mean of {len(scores.names)} images: {nats:.2f} nats, {bits:.2f} bits, {of_each_code:.3f} bits per code"
    )
    return "\n".join(lines)


def save_scores(scores: Scores, output: Path) -> None:
    """Write all rows to a file: a table as .csv, or else arrays as .npz.

    Raises:
        InputError: the file can't be written.
    """
    if output.suffix == ".csv":
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(map(_inert, _table(scores)))
        write_atomically(output, text.getvalue().encode())
        return
    arrays = {"names": np.array(scores.names), "nats": scores.nats.numpy(), "bits": scores.bits.numpy()}
    arrays["bits_per_code"] = scores.bits_per_code.numpy()
    if scores.class_names:
        arrays |= {"labels": scores.labels.numpy(), "probabilities": scores.probabilities.numpy()}
        arrays["class_names"] = np.array(scores.class_names)
    write_arrays(output, arrays)


def _table(scores: Scores, most: int | None = None) -> list[list[str | float]]:
    """A row of headings and, for each image, or for as many as are asked for, a row of figures."""
    columns: list[list[str | float]] = [["name", *scores.names[:most]]]
    figures = {"nats": scores.nats, "bits": scores.bits, "bits per code": scores.bits_per_code}
    columns += [[name, *values[:most].tolist()] for name, values in figures.items()]
    if scores.class_names:
        columns.append(["label", *names_of(scores.labels[:most], scores.class_names)])
        columns.append(["probability", *scores.probabilities[:most].tolist()])
    return [list(row) for row in zip(*columns, strict=True)]


def _inert(row: list[str | float]) -> list[str | float]:
    """A row whose texts are on one line, and none of them is a formula for a spreadsheet."""
    texts = [printable(value) if isinstance(value, str) else value for value in row]
    return [f"'{text}" if isinstance(text, str) and text.startswith(FORMULA) else text for text in texts]
