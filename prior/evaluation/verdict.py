"""The figures of an evaluation in a few plain words: how close the samples come to real images."""

from typing import Any, NamedTuple

from prior.evaluation.tables import FEW

CLOSE, FAR = 5, 50  # times the FID of other real images
LEAST = 1e-6  # FID of equal images, up to rounding
RULE = (
    f"The words rest on one figure, the FID of samples divided by that of held-out real images: up to {CLOSE} is "
    f"close, over {FAR} is far. Look at the pictures too, because no figure sees all that an eye sees."
)
RULE_FOR_FEW = (
    f"Fewer than {FEW:,} images are not judged: the smaller the sets, the larger is the FID even of real images, and "
    "the less it says of samples."
)
RULE_WITHOUT_FID = (
    "Only a classifier of these images could say how real a sample looks, and there was none. Look at the pictures."
)


class Verdict(NamedTuple):
    """What a reader wants to know first."""

    words: str  # how close the samples come to real images
    sentence: str  # the figures that matter most
    rule: str  # what the words rest on


def judge(figures: dict[str, Any]) -> Verdict:
    """The verdict on samples drawn as `sample` draws them by default, by the figures of an `Evaluation`."""
    sets = {row["name"]: row for row in figures["rows"]}
    samples = sets.get("pixelcnn_unlabelled") or sets.get("pixelcnn")
    if samples is None:
        likelihood = list(figures["likelihood"].values())[-1]  # of the split that is measured
        share = likelihood["nats_per_code"] / likelihood["unigram"]
        sentence = (
            f"The prior predicts a code of held-out images with {likelihood['nats_per_code']:.2f} nats, {share:.0%} of "
            f"what each position's code frequencies need, and {_copies(figures)}."
        )
        return Verdict("Not judged", sentence, RULE_WITHOUT_FID)
    floor = sets["real"]
    ratio = max(samples["fid"], 0) / max(floor["fid"], LEAST)
    is_few = figures["origin"]["num_samples"] < FEW
    sentence = (
        f"The FID of samples is {_times(ratio)} that of other real images ({samples['fid']:.3f} against "
        f"{floor['fid']:.3f}), "
    )
    if "agreement" in samples:
        sentence += (
            f"{samples['agreement']:.1%} of samples are taken for their label, as {floor['agreement']:.1%} of real "
            f"images are, "
        )
    return Verdict(
        "Not judged" if is_few else _words(ratio),
        f"{sentence}and {_copies(figures)}.",
        f"Samples are the set “{samples['title']}”. {RULE_FOR_FEW if is_few else RULE}",
    )


def _words(ratio: float) -> str:
    if ratio <= CLOSE:
        return "Close to real images"
    return "Far from real images" if ratio > FAR else "At some distance from real images"


def _times(ratio: float) -> str:
    return f"{ratio:.1f} times" if ratio < 100 else "more than 100 times"


def _copies(figures: dict[str, Any]) -> str:
    """Whether samples repeat training images, as the end of a sentence."""
    memorisation = figures["memorisation"]
    num, copied, copied_real = (memorisation[name] for name in ("num_images", "copied_maps", "copied_maps_real"))
    repeat = "repeats the code map of a training image"
    copies = (
        f"none of {num:,} {repeat}"
        if copied == 0
        else (f"{copied:,} of {num:,} have the code map of a training image, as {copied_real:,} held-out images do")
    )
    share, error = memorisation["closer_than_reconstructions"]
    if share - 2 * error > 0.5:
        copies += "; but samples lie closer to training images than reconstructions of held-out images do"
    return copies
