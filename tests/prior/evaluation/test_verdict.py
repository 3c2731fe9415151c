from typing import Any

import pytest

from prior.evaluation.verdict import RULE, RULE_FOR_FEW, RULE_WITHOUT_FID, judge


def make_figures(fid: float, floor: float = 0.1, num: int = 10_000, **memorisation: Any) -> dict[str, Any]:
    """Of samples of a prior with labels, beside which other rows stand that do not count."""
    rows = [{"name": "real", "fid": floor, "agreement": 0.9956}, {"name": "pixelcnn_guided", "fid": 9.0}]
    rows += [{"name": "pixelcnn_unlabelled", "title": "drawn", "fid": fid, "agreement": 0.981}]
    rows += [{"name": "pixelcnn", "title": "without", "fid": 8.0}, {"name": "uniform", "fid": 7.0}]
    copies = {"num_images": num, "copied_maps": 0, "copied_maps_real": 0, "closer_than_reconstructions": [0.42, 0.01]}
    likelihood = {"train": {"nats_per_code": 9.0, "unigram": 9.0}, "test": {"nats_per_code": 2.4, "unigram": 4.8}}
    origin = {"num_samples": num}
    return {"origin": origin, "rows": rows, "memorisation": copies | memorisation, "likelihood": likelihood}


@pytest.mark.parametrize(
    ("fid", "words", "times"),
    [
        (0.0, "Close to real images", "0.0 times"),
        (0.5, "Close to real images", "5.0 times"),
        (0.51, "At some distance from real images", "5.1 times"),
        (5.0, "At some distance from real images", "50.0 times"),
        (5.1, "Far from real images", "51.0 times"),
        (10.1, "Far from real images", "more than 100 times"),
    ],
)
def test_the_words_follow_from_the_fid_of_default_samples_over_that_of_real_images(
    fid: float, words: str, times: str
) -> None:
    found = judge(make_figures(fid))
    assert found.words == words
    assert found.sentence == (
        f"The FID of samples is {times} that of other real images ({fid:.3f} against 0.100), "
        "98.1% of samples are taken for their label, as 99.6% of real images are, and none of 10,000 repeats the code "
        "map of a training image."
    )
    assert found.rule == f"Samples are the set “drawn”. {RULE}"
    assert "up to 5 is close, over 50 is far" in RULE


def test_few_images_and_images_without_a_classifier_are_not_judged() -> None:
    few, enough = (judge(make_figures(0.3, num=num)) for num in (4999, 5000))
    assert (few.words, enough.words) == ("Not judged", "Close to real images")
    assert few.rule.endswith(RULE_FOR_FEW)
    assert "3.0 times that of" in few.sentence
    without = judge(make_figures(0.3) | {"rows": []})
    assert (without.words, without.rule) == ("Not judged", RULE_WITHOUT_FID)
    assert without.sentence == (
        "The prior predicts a code of held-out images with 2.40 nats, 50% of what each position's code frequencies "
        "need, and none of 10,000 repeats the code map of a training image."
    )


def test_samples_without_labels_and_images_that_are_all_equal_make_a_sentence_too() -> None:
    figures = make_figures(0.3)
    figures["rows"] = [{"name": "real", "fid": 2.0}, {"name": "pixelcnn", "title": "without", "fid": 8.0}]
    assert "label" not in judge(figures).sentence
    assert "4.0 times" in judge(figures).sentence
    assert "0.0 times" in judge(make_figures(-1e-9, floor=-1e-9)).sentence


def test_samples_that_repeat_training_images_or_lie_too_close_to_them_are_told() -> None:
    found = judge(make_figures(0.3, copied_maps=1234, copied_maps_real=5)).sentence
    assert found.endswith("and 1,234 of 10,000 have the code map of a training image, as 5 held-out images do.")
    for share, is_told in ((0.521, True), (0.519, False)):  # two standard errors above one half, or less
        sentence = judge(make_figures(0.3, closer_than_reconstructions=[share, 0.01])).sentence
        assert ("samples lie closer to training images than reconstructions" in sentence) == is_told
