"""What visitors draw and upload: well-made pictures become images like MNIST's, and bad ones a sentence."""

import base64
import io
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from prior.demo.drawing import MOST_BYTES, MOST_SIDE, centred, read_url, to_url
from tests.helpers import mnist
from vqvae.errors import InputError

SHAPE = (1, 28, 28)


def url_of(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def drawn(size: tuple[int, int] = (280, 280), mode: str = "L", paper: Any = 0, ink: Any = 255) -> Image.Image:
    """A thick stroke, near a corner."""
    image = Image.new(mode, size, paper)
    ImageDraw.Draw(image).line([(20, 30), (60, 40), (40, 110)], ink, width=14)
    return image


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 16, 12)])
def test_a_picture_of_the_models_own_size_is_taken_as_it_is(shape: tuple[int, int, int]) -> None:
    image = torch.randint(256, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert torch.equal(read_url(to_url(image / 255), shape), image)


@pytest.mark.parametrize("shape", [(1, 28, 28), (1, 20, 36)])
def test_a_drawing_fills_a_box_of_five_sevenths_and_its_mass_is_in_the_middle(shape: tuple[int, int, int]) -> None:
    image = read_url(url_of(encoded(drawn())), shape)
    assert image.shape == shape
    assert image.dtype == torch.uint8
    assert image.max() == 255
    rows = image[0].amax(dim=1).nonzero()
    assert rows.max() - rows.min() + 1 == round(shape[1] * 5 / 7)  # it is higher than wide
    mass = image[0].double() / image.sum()
    for axis, side in ((1, shape[1]), (0, shape[2])):
        assert abs((mass.sum(dim=axis) * (torch.arange(side) + 0.5)).sum() - side / 2 - 0.5) <= 0.5


def test_real_digits_that_are_enlarged_and_moved_come_back_to_where_they_were() -> None:
    errors = []
    for digit in mnist().train.images[:60]:
        page = Image.new("L", (300, 280))
        page.paste(Image.fromarray(digit[0].numpy()).resize((140, 140), Image.Resampling.BILINEAR), (150, 10))
        back = read_url(url_of(encoded(page)), SHAPE).double()
        moved = [back.roll(shift, (1, 2)) for shift in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))]
        errors.append(torch.stack([(image - digit).abs().mean() for image in moved]))
    mean = torch.stack(errors).mean(dim=0)
    assert mean[0] < 0.05 * 255
    assert mean[0] < 0.75 * mean[1:].min()


def test_dark_ink_on_light_paper_is_the_same_drawing() -> None:
    expected = read_url(url_of(encoded(drawn())), SHAPE)
    for image in (drawn(paper=255, ink=0), drawn(paper=230, ink=60), drawn(mode="RGB", paper="white", ink="black")):
        found = read_url(url_of(encoded(image)), SHAPE)
        assert (found.double() - expected.double()).abs().max() <= 2


@pytest.mark.parametrize(
    "data",
    [
        encoded(drawn(mode="RGBA", paper=(0, 0, 0, 0), ink="white")),
        encoded(drawn().convert("P")),
        encoded(drawn(), "JPEG"),
        encoded(drawn(mode="I;16", ink=65535)),
        encoded(drawn((2000, 130))),
        encoded(drawn((70, 3000))),
    ],
    ids=["transparent", "palette", "JPEG", "16 bits", "wide", "high"],
)
def test_pictures_of_many_kinds_are_read(data: bytes) -> None:
    assert read_url(url_of(data), SHAPE).max() == 255
    assert read_url(url_of(data), (3, 16, 12)).shape == (3, 16, 12)


CUT = "expected an image, found a file that is cut short, damaged or of another kind"
BLANK = "expected a drawing, found an empty picture; draw something, or choose a file"
NONE = "expected a picture of at most 8 MB, found none; choose a smaller file"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (None, NONE),
        ("x" * 2 * MOST_BYTES, NONE),
        ("data:,", CUT),
        ("data:image/png;base64,é", CUT),
        (url_of(b"no image"), CUT),
        (url_of(encoded(drawn())[:200]), CUT),
        (url_of(encoded(Image.new("1", (8200, 8200)))), "expected an image of at most 67108864 pixels, found more"),
        (url_of(encoded(drawn(), "GIF", save_all=True, append_images=[drawn(ink=9)])), "expected one still image, "),
        (url_of(encoded(Image.new("L", (1, 1), 255))), BLANK),
        (url_of(encoded(Image.new("L", (280, 280)))), BLANK),
    ],
    ids=["nothing", "long", "empty", "no base64", "text", "cut", "huge", "animated", "one pixel", "blank"],
)
def test_what_cannot_be_read_is_told_in_a_sentence_that_names_no_file(url: Any, message: str) -> None:
    with pytest.raises(InputError) as refused:
        read_url(url, SHAPE)
    assert str(refused.value).startswith(message)
    assert "/" not in str(refused.value)


def test_the_thinnest_strokes_are_scaled_too() -> None:
    for picture in (torch.zeros(1, 200), torch.zeros(200, 3), torch.zeros(500, 400)):
        picture[:, len(picture[0]) // 2] = 255
        assert centred(picture.to(torch.uint8), SHAPE).max() == 255


def test_a_picture_of_many_pixels_is_reduced_before_it_is_computed_with() -> None:
    large = torch.from_numpy(np.array(drawn().resize((2800, 2800), Image.Resampling.NEAREST)))
    with patch("prior.demo.drawing.torch.from_numpy", wraps=torch.from_numpy) as computed:
        found = centred(large, SHAPE)
    assert all(max(call.args[0].shape) < 2 * MOST_SIDE for call in computed.call_args_list)
    assert (found.double() - centred(torch.from_numpy(np.array(drawn())), SHAPE)).abs().mean() <= 2
