import gzip
import hashlib
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import FIXTURE, make_split
from vqvae.data.mnist import MNIST_MD5, load_mnist
from vqvae.errors import InputError, MissingFileError


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    processed = Path(shutil.copytree(FIXTURE, tmp_path / "data")) / "MNIST" / "processed"
    processed.mkdir()
    for name in ("training.pt", "test.pt"):  # torchvision prefers these files, which nothing checks; they are not read
        (processed / name).write_bytes(b"damaged")
    return processed.parent / "raw"


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def test_the_splits_are_the_files_images_and_the_facts_are_counted_from_them(raw: Path) -> None:
    dataset = load_mnist(raw.parents[1], download=False)
    train, validation, test = splits = dataset.train, dataset.validation, dataset.load_test()
    assert [split.images.shape for split in splits] == [(num, 1, 28, 28) for num in (440, 40, 120)]
    assert {(split.images.dtype, split.labels.dtype) for split in splits} == {(torch.uint8, torch.int64)}
    # The test digits keep their order, and the training digits are those of the file in another one.
    assert idx(test.images[:, 0].numpy()) == (raw / "t10k-images-idx3-ubyte").read_bytes()
    assert idx(test.labels.numpy()) == (raw / "t10k-labels-idx1-ubyte").read_bytes()
    content, labels = ((raw / f"train-{kind}-ubyte").read_bytes() for kind in ("images-idx3", "labels-idx1"))
    given = [(content[16 + 784 * i :][:784], label) for i, label in enumerate(labels[8:])]
    found = [(x.numpy().tobytes(), int(y)) for split in (train, validation) for x, y in zip(*split, strict=True)]
    assert sorted(found) == sorted(given)
    info = dataset.info
    assert (info.name, info.image_shape, info.class_names) == ("mnist", (1, 28, 28), tuple("0123456789"))
    assert info.class_counts == tuple(int((train.labels == label).sum()) for label in range(10))


@pytest.mark.parametrize("gone", [*MNIST_MD5, "all"])
def test_missing_data_offline_names_the_files_and_where_to_put_them(raw: Path, gone: str) -> None:
    shutil.rmtree(raw) if gone == "all" else (raw / gone).unlink()
    message = r"expected the four MNIST files .* `download=False` was given; .*put the four files there .*`data_folder`"
    with pytest.raises(MissingFileError, match=message) as error:
        load_mnist(raw.parents[1], download=False)
    assert {ValueError, FileNotFoundError} <= set(MissingFileError.__mro__)
    assert all(text in str(error.value) for text in (*MNIST_MD5, f" in {raw},"))


@pytest.mark.parametrize("name", MNIST_MD5)
@pytest.mark.parametrize("damage", [lambda file: file[:-1], lambda file: file[:-1] + b"\xa7", lambda file: b""])
def test_a_damaged_file_is_named_before_any_training(raw: Path, name: str, damage: object) -> None:
    (raw / name).write_bytes(damage((raw / name).read_bytes()))
    # A file that is cut short counts as missing. These are no originals, so a download would not bring them.
    for download, why in enumerate(("`download=False` was given", "the MD5SUMS there lists others")):
        message = f"expected MD5 [0-9a-f]{{32}} of .*{name}, as MD5SUMS .* lists, found|found {name} missing or .*{why}"
        with pytest.raises(InputError, match=message):
            load_mnist(raw.parents[1], download=bool(download))


LINES = {
    "text": "{md5}  {name}",
    "binary": "{md5} *{name}",
    "one space": "{md5} {name}",
    "upper case": "{MD5}  {name}",
    "this folder": "{md5}  ./{name}",
    "other folders": "{md5}  MNIST/my raw files/{name}",
    "windows": "\\{md5} *raw\\\\{name}",
    "packed": "{md5}  {name}.gz",
    "bsd": "MD5 (./{name}) = {md5}",
    "openssl": "MD5(raw/{name})= {MD5}",
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_sums_are_read_as_every_tool_writes_them(raw: Path, line: str, end: str, encoding: str) -> None:
    lines = ["# a note", "", f"{0:032x}  another file", f"{0:032x}  old/{next(iter(MNIST_MD5))}"]
    for name in MNIST_MD5:
        content = (raw / name).read_bytes()
        if line == LINES["packed"]:  # by the user; the sums are of the packed files
            (raw / name).unlink()
            (raw / f"{name}.gz").write_bytes(content := gzip.compress(content, 1))
        md5 = hashlib.md5(content).hexdigest()
        lines.append(line.format(md5=md5, MD5=md5.upper(), name=name))
    (raw / "MD5SUMS").write_bytes(end.join(lines).encode(encoding))
    there = sorted(raw.iterdir())
    assert len(load_mnist(raw.parents[1]).train.labels) == 440
    assert sorted(raw.iterdir()) == there  # nothing is written, so the folder may be read-only


@pytest.mark.parametrize("content", [b"%032d a\n" % 0 * 2000, b"", b"\xff\xfe", b"a b c\n", b"12 train-images\n"])
def test_a_file_of_sums_that_has_none_is_refused(raw: Path, content: bytes) -> None:
    (raw / "MD5SUMS").write_bytes(content)
    message = r"MD5 sum and a name at .*MD5SUMS, found .*; write it anew with md5sum, or move"
    with pytest.raises(InputError, match=message):
        load_mnist(raw.parents[1], download=False)


def test_a_file_that_no_sums_list_is_compared_with_the_original(raw: Path) -> None:
    first, *_ = MNIST_MD5
    message = (
        rf"expected MD5 {MNIST_MD5[first]} of {raw / first}, which is the original's, found .*; move .* add its sum to"
    )
    (raw / "MD5SUMS").write_text(f"{0:032x}  another file\n")
    with pytest.raises(InputError, match=f"{message} the MD5SUMS beside it, which does not list it"):
        load_mnist(raw.parents[1])
    (raw / "MD5SUMS").unlink()
    with pytest.raises(InputError, match=f"{message} an MD5SUMS file beside it"):
        load_mnist(raw.parents[1])


@pytest.mark.parametrize("place", [".", "raw", "MNIST"])
def test_files_in_a_wrong_place_are_named(raw: Path, place: str) -> None:
    folder = Path(shutil.copytree(raw, raw.parents[2] / "other" / place))
    with pytest.raises(MissingFileError, match=f"some lie in {folder}, from where"):
        load_mnist(raw.parents[2] / "other", download=False)


IMAGES, LABELS, MISFIT = idx(make_split(12).images[:, 0].numpy()), idx(np.arange(12) % 10), "header does not fit"


@pytest.mark.parametrize("part", ["train", "t10k"])
@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (b"\0\0\x0d\x03" + IMAGES[4:], LABELS, MISFIT),  # floats
        (IMAGES[:4] + 12 * b"\xff" + IMAGES[16:], LABELS, MISFIT),  # as many as can be
        (IMAGES + b"\0", LABELS, MISFIT),
        (idx(np.zeros((0, 28, 28))), LABELS, "or it is empty"),
        (idx(np.zeros((11, 28, 28))), idx(np.zeros(11)), r"at least 12, .* found images of shape \(11, 28, 28\)"),
        (IMAGES, idx(np.zeros(13)), r"for each a label .* found images of shape \(12, 28, 28\) and 13 labels"),
        (idx(np.zeros((12, 14, 56))), LABELS, r"images of 28x28, .* found images of shape \(12, 14, 56\)"),
        (IMAGES, idx(np.arange(12) % 11), "a label from 0 to 9"),
    ],
    ids=range(8),
)
def test_files_of_another_form_are_refused(raw: Path, part: str, images: bytes, labels: bytes, message: str) -> None:
    (raw / f"{part}-images-idx3-ubyte").write_bytes(images)
    (raw / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    sums = [f"{hashlib.md5((raw / name).read_bytes()).hexdigest()}  {name}\n" for name in MNIST_MD5]
    (raw / "MD5SUMS").write_text("".join(sums))  # so that only the form is wrong
    with pytest.raises(InputError, match=message):
        load_mnist(raw.parents[1], download=False)


def test_a_folder_that_is_none_or_cannot_be_asked_is_refused(raw: Path) -> None:
    for download in (False, True):
        with pytest.raises(InputError, match="found what can't be read: File name too long; put MNIST's file there"):
            load_mnist(raw / ("x" * 5000), download)
    with pytest.raises(MissingFileError, match="expected the four MNIST files"):
        load_mnist(raw / "MD5SUMS", download=False)
