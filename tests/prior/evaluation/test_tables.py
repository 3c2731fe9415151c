from typing import Any

import pytest

from prior.evaluation.tables import (
    NOTE,
    NOTE_ON_ERRORS,
    NOTE_ON_FEW,
    NOTE_ON_FEW_FEATURES,
    as_markdown,
    as_text,
    describe_origin,
    notes,
    tabulate,
)

AWKWARD = 'a <b>bold</b> & "quoted" set'


def make_figures() -> dict[str, Any]:
    """Figures that differ wherever two might be mistaken for one another."""
    names = ("fid", "fid_infinity", "precision", "recall", "density", "coverage", "confident")
    first, second = ({name: start + 0.01 * n for n, name in enumerate(names)} for start in (0.11, 0.51))
    second |= {"name": "unigram", "title": "unigram", "kid": 0.00123, "kid_std": 0.0, "predicted": [7, 8]}
    labelled = {"name": "real", "title": AWKWARD, "agreement": 0.9912, "agreement_by_class": [0.905, None]}
    second |= {"fid_infinity": None, "fid_infinity_error": None}
    likelihood = {"num_maps": 99, "nats_per_code": 2.0, "bits_per_image": 141.4, "uniform": 6.238}
    p_values = {"p_closer_than_reconstructions": 1.234e-05, "p_reconstructions_closer_than_real": 0.0321}
    shares = {"closer_than_real": [0.4, 0.02], "closer_than_reconstructions": [0.6, 0.03]}
    shares |= {"reconstructions_closer_than_real": [0.5, 0.01], "num_images": 88}
    distance = {"real": 0.1511, "reconstructions": 0.1422, "samples": 0.1633}
    copies = {"copied_maps": 17, "copied_maps_real": 23}
    return {
        "origin": {"split": "test", "num_samples": 12, "classifier": "ab12cd34ef56789", "note": "<script>alert('&')"},
        "class_names": ["zero", AWKWARD],
        "rows": [second | first | labelled | {"kid_std": 0.0004, "fid_infinity_error": 0.03}, second],
        "stage_one": {"num_images": 77, "squared_error": 3e-3, "psnr_db": 25.67, "ssim": 0.9712}
        | {"perplexity": 401.2, "codes_used": 512},
        "likelihood": {"train": {**likelihood, "unigram": 4.0}, "test": {**likelihood, "unigram": 3.2}},
        "without_label": {"num_maps": 100, "nats_per_code": 2.4474, "accuracy": 0.98765},
        "memorisation": {"distance": distance, "p_closer_than_real": 0.7512, **p_values, **shares, **copies},
        "classification_accuracy_score": {"samples": 0.95123, "real": 0.98765},
    }


TABLES = f"""Sets of 12 images against as many training images
set|FID|FID∞|KID x 1000|precision|recall|density|coverage|confident (p ≥ 0.99)|agree with label
{AWKWARD}|0.110|0.120 ± 0.030|1.23 ± 0.40|0.130|0.140|0.150|0.160|0.170|0.9912
unigram|0.510|too few|1.23|0.530|0.540|0.550|0.560|0.570|
Classification accuracy score
trained on|accuracy on held-out images
samples|0.9512
as many real images|0.9877
Stage one, held-out images
images|squared error|PSNR|SSIM|perplexity|codes used
77|0.00300|25.67 dB|0.9712|401|512
Likelihood
split|maps|nats per code|bits per image|unigram|uniform|over unigram
train|99|2.000|141.4|4.000|6.238|0.500
test|99|2.000|141.4|3.200|6.238|0.625
Held-out maps, label unknown to the prior
maps|nats per code|label by Bayes' rule, accuracy
100|2.447|0.9877
Memorisation
to the nearest training image (rms over pixels)|images|distance|share closer than held-out images (0.5: none is)|\
than their reconstructions|same map
held-out images|88|0.1511|||23
their reconstructions|88|0.1422|0.500 ± 0.010 (p 0.0321)||23
samples|88|0.1633|0.400 ± 0.020 (p 0.751)|0.600 ± 0.030 (p 1.23e-05)|17
Agreement with the label, by class
label|zero|{AWKWARD}
{AWKWARD}|0.905|
What the classifier takes them for
taken for|zero|{AWKWARD}
{AWKWARD}|7|8
unigram|7|8"""


def test_the_tables_show_each_figure_under_its_head_and_the_notes_say_where_sets_are_small() -> None:
    figures = make_figures()
    assert "\n".join("\n".join([title, *map("|".join, rows)]) for title, rows in tabulate(figures)) == TABLES
    titles = [line for line in TABLES.splitlines() if "|" not in line and line[0].isupper()]
    del figures["without_label"], figures["classification_accuracy_score"]
    without: dict[str, Any] = {"rows": []}  # without a classifier
    assert [title for title, _ in tabulate(figures)] == [titles[n] for n in (0, 2, 3, 5, 6, 7)]
    assert [title for title, _ in tabulate(figures | without)] == [titles[n] for n in (2, 3, 5)]
    always, few = [NOTE, NOTE_ON_ERRORS], [NOTE_ON_FEW, NOTE_ON_FEW_FEATURES]
    for num, expected in ((12, [*always, *few]), (4999, [*always, *few]), (5000, always)):
        assert notes(figures | {"origin": {"num_samples": num}}) == expected
    for names, reason in ((["a"], "train one on the same dataset"), ([], "images have no classes")):
        first, *others = notes(figures | without | {"class_names": names})
        assert reason in first
        assert ("left out" in first, others) == (True, [NOTE_ON_ERRORS, NOTE_ON_FEW])
    assert "fewer than 5,000 images" in NOTE_ON_FEW
    assert describe_origin(make_figures())[:2] == ["split: test", "num samples: 12"]
    assert as_text([["set", "a"], ["long name", "b"], ["x", ""]]) == "set        a\nlong name  b\nx"
    assert as_markdown([["set", "a", "b"], ["real", "1", ""]]) == "| set | a | b |\n|---|---|---|\n| real | 1 |  |"
    assert as_markdown([["a|b", "c"]]).startswith("| a\\|b | c |\n|---|---|")


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [(0.3, 0.1, "0.300 ± 0.100"), (0.2, 0.1, "< 0.400"), (-0.3, 0.1, "< 0.200"), (2.0, 1e-5, "2.000")],
)
def test_a_figure_that_cannot_be_told_from_0_is_not_shown_as_a_number_of_its_own(
    value: float, error: float, shown: str
) -> None:
    figures = make_figures()
    figures["rows"][0] |= {"fid_infinity": value, "fid_infinity_error": error}
    assert tabulate(figures)[0][1][1][2] == shown
