import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from vqvae.data import images
from vqvae.data.images import find_images, parse_size, read_image, read_shape
from vqvae.errors import InputError, MissingFileError

Patch = pytest.MonkeyPatch
GREY = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40  # (H, W) = (2, 3)
COLOURS = np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 14


def save(path: Path, image: Image.Image, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def luma(colours: np.ndarray) -> np.ndarray:
    return (colours @ np.array([0.299, 0.587, 0.114])).round()


def with_alpha(alpha: list[list[int]], mode: str = "RGBA") -> Image.Image:
    image = Image.fromarray(GREY if mode == "LA" else COLOURS).convert(mode)
    image.putalpha(Image.fromarray(np.array(alpha, np.uint8)))
    return image


def on_black(pixels: np.ndarray, alpha: list[list[int]]) -> np.ndarray:
    share = np.array(alpha) / 255
    return pixels * (share if pixels.ndim == 2 else share[..., None])


ALPHA = [[0, 51, 102], [153, 204, 255]]
DEEP = np.array([[0, 128, 129], [32768, 65407, 65535]], np.uint16)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(GREY), GREY),
        (Image.fromarray(COLOURS), COLOURS),
        (Image.fromarray(GREY > 90), (GREY > 90) * 255),
        (Image.fromarray(DEEP), [[0, 0, 1], [128, 255, 255]]),  # not clipped, not cut off
        (Image.fromarray(COLOURS).quantize(6), COLOURS),
        (with_alpha(ALPHA), on_black(COLOURS, ALPHA)),
        (with_alpha(ALPHA, "LA"), on_black(GREY, ALPHA)),
    ],
    ids=["grey", "rgb", "bilevel", "16-bit", "palette", "rgba", "grey with alpha"],
)
def test_every_kind_of_image_becomes_bytes_of_one_or_three_channels(
    tmp_path: Path, image: Image.Image, expected: np.ndarray
) -> None:
    path = save(tmp_path / "a.png", image)
    found, pixels = read_image(path), torch.from_numpy(np.atleast_3d(expected)).permute(2, 0, 1)
    assert found.dtype == torch.uint8
    assert tuple(found.shape) == read_shape(path) == tuple(pixels.shape)
    torch.testing.assert_close(found.double(), pixels.double(), rtol=0, atol=1 if "A" in image.mode else 0)
    in_grey, in_rgb = read_image(path, channels=1), read_image(path, channels=3)
    assert (in_grey.shape, in_rgb.shape) == ((1, 2, 3), (3, 2, 3))
    assert (in_grey[0] - torch.from_numpy(luma(in_rgb.permute(1, 2, 0).numpy()))).abs().max() <= 1


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_what_a_file_marks_as_transparent_is_black_too(tmp_path: Path, mode: str) -> None:
    white = Image.new(mode, (3, 2), "white")
    path = save(tmp_path / "a.png", white, transparency=255 if mode == "L" else (255, 255, 255))
    assert read_image(path).max() == 0


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    assert read_image(save(tmp_path / "a.jpg", Image.new("CMYK", (3, 2)))).tolist() == [[[255] * 3] * 2] * 3


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_camera_held_it(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = save(tmp_path / f"a.{suffix}", Image.fromarray(GREY), exif=exif)
    flip, turn, both = np.fliplr(GREY), np.rot90(GREY, 2), np.flipud(GREY)
    lying = GREY.T, np.rot90(GREY, 3), np.rot90(GREY.T, 2), np.rot90(GREY)
    expected = (GREY, flip, turn, both, *lying)[orientation - 1]
    assert read_image(path)[0].tolist() == expected.tolist()
    assert read_shape(path) == (1, *expected.shape)


def test_damaged_exif_data_does_not_make_an_image_unreadable(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", Image.fromarray(GREY), exif=b"Exif\0\0damaged")
    assert read_image(path)[0].tolist() == GREY.tolist()
    assert read_shape(path) == (1, *GREY.shape)


@pytest.mark.parametrize(("height", "width"), [(12, 12), (12, 20), (30, 12)])
@pytest.mark.parametrize("side", [2, 3, 6])
def test_a_smaller_image_is_the_mean_of_areas_of_the_centre(tmp_path: Path, height: int, width: int, side: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8)
    top, left = (height - 12) // 2, (width - 12) // 2
    square = pixels[top : top + 12, left : left + 12]
    means = square.reshape(side, 12 // side, side, 12 // side).mean((1, 3))
    found = read_image(save(tmp_path / "a.png", Image.fromarray(pixels)), size=(side, side))
    np.testing.assert_allclose(found[0], means, atol=1)


@pytest.mark.parametrize("size", [(1, 1), (7, 3), (3, 7), (64, 64), (5, 1024)])
@pytest.mark.parametrize("shape", [(2, 3), (40, 1), (1, 33), (31, 17)])
def test_any_size_is_reached_and_one_colour_stays(
    tmp_path: Path, shape: tuple[int, int], size: tuple[int, int]
) -> None:
    path = save(tmp_path / "a.png", Image.fromarray(np.full(shape, 77, np.uint8)))
    assert (read_image(path, size=size) == torch.full((1, *size), 77)).all()


def bomb(width: int, height: int) -> bytes:
    """A PNG's header, which promises that many pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    chunks = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, data, b"IEND"))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_what_is_no_still_image_of_moderate_size_is_refused_in_a_sentence(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(images, "MAX_FILE", 5000)
    frames = [Image.fromarray(GREY + i) for i in (0, 9)]
    several = {"save_all": True, "append_images": frames[1:]}
    whole = save(tmp_path / "whole.png", Image.effect_noise((64, 64), 50)).read_bytes()
    for name, content, message in (
        ("text.png", b"no image", r"expected an image at .*text.png, found .*damaged or .*\(ValueError: it is none of"),
        ("cut.png", whole[:2000], "expected an image at .*cut.png, found a file that is cut short"),
        ("page.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n", "found a file that is cut short"),
        ("large.png", bomb(2**13, 2**13 + 1), "expected an image of at most 67108864 pixels at .*large.png, found mo"),
        ("bomb.png", bomb(10000, 10000), "expected an image of at most 67108864 pixels at .*bomb.png, found more"),
        ("bombs.png", bomb(10**5, 10**5), "expected an image of at most 67108864 pixels at .*bombs.png, found more"),
        ("long.png", whole + bytes(5000), "expected an image of at most 5000 bytes at .*long.png, found "),
    ):
        (tmp_path / name).write_bytes(content)
        for read in (read_image, read_shape):
            if name != "cut.png" or read is read_image:
                with pytest.raises(InputError, match=message):
                    read(tmp_path / name)
    for suffix in ("gif", "png", "webp", "tif"):
        path = save(tmp_path / f"several.{suffix}", frames[0], **several)
        for read in (read_image, read_shape):
            with pytest.raises(InputError, match=r"expected one still image at .*several.\w+, found several; save one"):
                read(path)
    fractions = save(tmp_path / "a.tif", Image.fromarray(np.eye(3, dtype=np.float32)))
    for read in (read_image, read_shape):
        with pytest.raises(InputError, match=r"expected whole numbers as pixels at .*a.tif, found fractions; save"):
            read(fractions)
    with pytest.raises(MissingFileError, match=r"expected an image at .*none.png, found none"):
        read_image(tmp_path / "none.png")
    with pytest.raises(InputError, match="found what can't be read: Is a directory"):
        read_image(tmp_path)
    with pytest.raises(InputError, match="values of more than 16 bits"):
        read_image(save(tmp_path / "deep.tif", Image.fromarray(np.array([[0, 70000]], np.int32))))


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: Patch) -> None:
    save(tmp_path / "a" / "1.png", Image.fromarray(GREY))

    def scandir(path: str, scandir: Any = os.scandir) -> Any:
        if Path(path).name == "a":  # as the system refuses all users but one
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(
        InputError, match=r"expected images in .*a, found what can't be read: Permission denied; make i"
    ):
        find_images(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match="found what can't be read: It is a pipe or a device"):
        read_image(tmp_path / "pipe.png")


def test_images_are_found_in_all_subfolders_sorted_as_a_person_does(tmp_path: Path) -> None:
    names = ["10.png", "2.PNG", "a/b/1.jpeg", "a/b/c/3.Tiff"]
    for name in (*names, "notes.txt", ".hidden.png", ".hidden/1.png", "a/.git/1.png", "png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    expected = ["2.PNG", "10.png", "a/b/1.jpeg", "a/b/c/3.Tiff"]
    assert [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)] == expected
    assert find_images(tmp_path / "notes.txt") == [tmp_path / "notes.txt"]  # who names a file means it
    with pytest.raises(MissingFileError, match=r"expected images at .*none, found nothing there; name a folder of"):
        find_images(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"expected images in .*empty, found no file whose name ends in .png, .jpg"):
        find_images(tmp_path / "empty")


def test_links_may_lead_around_in_the_folder_and_not_out_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    inside = save(folder / "a" / "1.png", Image.fromarray(GREY))
    outside = save(tmp_path / "out" / "2.png", Image.fromarray(GREY))
    (folder / "a" / "round").symlink_to(folder, target_is_directory=True)
    (folder / "self.png").symlink_to(folder / "self.png")
    (folder / "again.png").symlink_to(inside)
    assert [path.name for path in find_images(folder)] == ["1.png", "again.png", "self.png"]
    for target in (outside, outside.parent, tmp_path / "missing.png"):
        link = folder / "a" / ("out.png" if target.suffix else "out")
        link.symlink_to(target)
        with pytest.raises(InputError, match=r"expected only files inside .*in, found the link .*out.*, which leads"):
            find_images(folder)
        link.unlink()


@pytest.mark.parametrize(("text", "size"), [(None, None), (32, (32, 32)), ("1", (1, 1)), ("20x1024", (20, 1024))])
def test_a_size_is_a_side_or_height_and_width(text: str | int | None, size: tuple[int, int] | None) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "0", "-3", "1025", "3x", "3x0", "0x3", "1x2x3", "3 x 4", "3.5", "9" * 99, "٣", "32\n"]
)
def test_another_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected `image_size` to be a side or HEIGHTxWIDTH, each from 1 to 1024, f"):
        parse_size(text)
