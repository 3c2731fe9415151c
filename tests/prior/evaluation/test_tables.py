from typing import Any

from prior.evaluation.tables import NOTE, NOTE_ON_FEW, as_markdown, as_text, describe_origin, notes, tabulate

AWKWARD = 'a <b>bold</b> & "quoted" set'


def make_figures() -> dict[str, Any]:
    """Figures that differ wherever two might be mistaken for one another."""
    names = ("fid", "fid_infinity", "precision", "recall", "density", "coverage", "confident")
    first, second = ({name: start + 0.01 * n for n, name in enumerate(names)} for start in (0.11, 0.51))
    second |= {"name": "unigram", "title": "unigram", "kid": 0.00123, "kid_std": None, "predicted": [7, 8]}
    labelled = {"name": "real", "title": AWKWARD, "agreement": 0.9912, "agreement_by_class": [0.905, None]}
    likelihood = {"nats_per_code": 2.0, "bits_per_image": 141.4, "uniform": 6.238}
    p_values = {"p_closer_than_reconstructions": 1.234e-05, "p_reconstructions_closer_than_real": 0.0321}
    distance = {"real": 0.1511, "reconstructions": 0.1422, "samples": 0.1633}
    copies = {"copied_maps": 17, "copied_maps_real": 23}
    return {
        "origin": {"split": "test", "num_samples": 12, "classifier": "ab12cd34ef56789", "note": "<script>alert('&')"},
        "class_names": ["zero", AWKWARD],
        "rows": [second | first | labelled | {"kid_std": 0.0004}, second],
        "stage_one": {"squared_error": 3e-3, "psnr_db": 25.67, "ssim": 0.9712, "perplexity": 401.2, "codes_used": 512},
        "likelihood": {"train": {**likelihood, "unigram": 4.0}, "test": {**likelihood, "unigram": 3.2}},
        "without_label": {"num_maps": 100, "nats_per_code": 2.4474, "accuracy": 0.98765},
        "memorisation": {"distance": distance, "p_closer_than_real": 0.7512, **p_values, **copies},
        "classification_accuracy_score": {"samples": 0.95123, "real": 0.98765},
    }


TABLES = f"""Sets of images against training images
set|FID|FID∞|KID x 1000|precision|recall|density|coverage|confident (p ≥ 0.99)|agree with label
{AWKWARD}|0.110|0.120|1.23 ± 0.40|0.130|0.140|0.150|0.160|0.170|0.9912
unigram|0.510|0.520|1.23|0.530|0.540|0.550|0.560|0.570|
Classification accuracy score
trained on|accuracy on held-out images
samples|0.9512
as many real images|0.9877
Stage one, held-out images
squared error|PSNR|SSIM|perplexity|codes used
0.00300|25.67 dB|0.9712|401|512
Likelihood
split|nats per code|bits per image|unigram|uniform|over unigram
train|2.000|141.4|4.000|6.238|0.500
test|2.000|141.4|3.200|6.238|0.625
Held-out maps, label unknown to the prior
maps|nats per code|label by Bayes' rule, accuracy
100|2.447|0.9877
Memorisation
to the nearest training image (rms over pixels)|distance|p, test for lying closer than held-out images|same map
held-out images|0.1511||23
their reconstructions|0.1422|0.0321|23
samples|0.1633|0.751 (their reconstructions: 1.23e-05)|17
Agreement with the label, by class
label|zero|{AWKWARD}
{AWKWARD}|0.905|
What the classifier takes them for
taken for|zero|{AWKWARD}
{AWKWARD}|7|8
unigram|7|8"""


def test_the_tables_show_each_figure_under_its_head_and_the_notes_say_where_sets_are_too_small_for_a_spread() -> None:
    figures = make_figures()
    assert "\n".join("\n".join([title, *map("|".join, rows)]) for title, rows in tabulate(figures)) == TABLES
    titles = [line for line in TABLES.splitlines() if "|" not in line and line[0].isupper()]
    del figures["without_label"], figures["classification_accuracy_score"]
    assert [title for title, _ in tabulate(figures | {"class_names": []})] == [titles[n] for n in (0, 2, 3, 5)]
    for num, expected in ((12, [NOTE, NOTE_ON_FEW]), (1000, [NOTE, NOTE_ON_FEW]), (1001, [NOTE])):
        assert notes({"origin": {"num_samples": num}}) == expected
    assert "no more than 1,000 images" in NOTE_ON_FEW
    assert describe_origin(make_figures())[:2] == ["split: test", "num samples: 12"]
    assert as_text([["set", "a"], ["long name", "b"], ["x", ""]]) == "set        a\nlong name  b\nx"
    assert as_markdown([["set", "a", "b"], ["real", "1", ""]]) == "| set | a | b |\n|---|---|---|\n| real | 1 |  |"
