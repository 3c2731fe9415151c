import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from prior.pair import Pair
from prior.scores import Scores, as_text, save_scores, score
from tests.helpers import make_split, save_pair

IMAGE_SHAPE = (3, 16, 12)  # to 4x3 codes
IMAGES = make_split(5, IMAGE_SHAPE).images
NAMES = ("a", "b", "c", "d", "e")


@pytest.fixture(params=[5, 0], ids=["classes", "none"])
def pair(tmp_path: Path, request: pytest.FixtureRequest) -> Pair:
    return save_pair(tmp_path, IMAGE_SHAPE, request.param)


def made(names: list[str], class_names: tuple[str, ...] = ()) -> Scores:
    num = len(names)
    return Scores(
        tuple(names), torch.linspace(-9, -4, num).double(), 3, torch.arange(num), torch.rand(num).double(), class_names
    )


def test_a_score_is_the_likelihood_of_the_mixture_and_the_label_that_fits_best(pair: Pair) -> None:
    done: list[int] = []
    found = score(pair, IMAGES, NAMES, done.append)
    torch.testing.assert_close(found.nats, pair.log_likelihood(IMAGES / 255))
    torch.testing.assert_close(found.bits, found.nats / math.log(2))
    torch.testing.assert_close(found.bits_per_code, -found.bits / 12)
    chances = pair.label_probabilities(IMAGES / 255)
    assert torch.equal(found.labels, chances.argmax(dim=1))
    torch.testing.assert_close(found.probabilities, chances.amax(dim=1))
    assert (found.names, found.class_names) == (NAMES, pair.info.class_names)
    assert sum(done) == 5 * max(pair.info.num_classes, 1)


def test_a_file_has_all_figures_and_the_labels_where_there_are_classes(pair: Pair, tmp_path: Path) -> None:
    found = score(pair, IMAGES, NAMES)
    figures = {"nats": found.nats, "bits": found.bits, "bits_per_code": found.bits_per_code}
    labelled = {"labels": found.labels, "probabilities": found.probabilities}
    if pair.info.num_classes:
        figures |= labelled
    save_scores(found, tmp_path / "s.npz")
    with np.load(tmp_path / "s.npz") as file:
        assert file["names"].tolist() == list(NAMES)
        assert set(file) == {"names", *figures, *(["class_names"] if pair.info.num_classes else [])}
        for name, values in figures.items():
            np.testing.assert_array_equal(file[name], values)
    save_scores(found, tmp_path / "s.csv")
    with (tmp_path / "s.csv").open(newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    names = ["label", "probability"] if pair.info.num_classes else []
    assert head == ["name", "nats", "bits", "bits per code", *names]
    for number, (name, nats, bits, of_each_code, *best) in enumerate(rows):
        assert name == NAMES[number]
        values = [figures[column][number].item() for column in ("nats", "bits", "bits_per_code")]
        assert [float(nats), float(bits), float(of_each_code)] == values
        if best:
            assert best[0] == f"class {found.labels[number]}"
            assert float(best[1]) == found.probabilities[number]
    assert len(rows) == 5


HARD = {"a,b": "a,b", 'say "a"': 'say "a"', "a\nb": "a\\nb", "=1+1": "'=1+1", "+a": "'+a", "-1": "'-1", "@a": "'@a"}
HARD |= {"\t=1": "\\t=1", "\x1b[2J": "\\x1b[2J", "\udcff": "\\udcff", "é": "é"}


@pytest.mark.parametrize("name", HARD)
def test_names_come_out_of_a_table_on_one_line_and_no_spreadsheet_computes_them(name: str, tmp_path: Path) -> None:
    save_scores(made([name, "b"], (name, "c")), tmp_path / "s.csv")
    with (tmp_path / "s.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert (rows[1][0], rows[1][4]) == (HARD[name], HARD[name])
    assert float(rows[1][1]) == -9  # a number may begin with a minus
    assert len((tmp_path / "s.csv").read_text(encoding="utf-8").splitlines()) == 3


def test_the_text_has_the_first_rows_and_a_summary() -> None:
    text = as_text(made([f"{number}.png" for number in range(23)])).splitlines()
    assert text[0].split() == ["name", "nats", "bits", "bits", "per", "code"]
    assert text[1].split() == ["0.png", "-9.000", "-12.98", "4.328"]
    assert [line.split()[0] for line in text[1:21]] == [f"{number}.png" for number in range(20)]
    assert text[21] == "... and 3 more, which a file shows"
    assert text[22:] == ["mean of 23 images: -6.50 nats, -9.38 bits, 3.126 bits per code"]
    text = as_text(made(["a", "b" * 100], ("cat", "dog"))).splitlines()
    assert text[0].split()[-2:] == ["label", "probability"]
    assert [line.split()[-2] for line in text[1:3]] == ["cat", "dog"]
    assert len({len(line) for line in text[:3]}) == 1  # the columns stand below each other
    assert len(text[0]) < 120
