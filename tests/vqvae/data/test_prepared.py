"""Splits by content, and the files that a user's images are made into."""

import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vqvae.data import prepared
from vqvae.data.dataset import Dataset
from vqvae.data.prepared import (
    LEFT_OUT,
    TEST,
    TRAIN,
    VALIDATION,
    ImageFormat,
    SourceImages,
    assign_splits,
    load_prepared,
)
from vqvae.errors import InputError

Patch = pytest.MonkeyPatch
SHAPE = (1, 2, 3)


def hashes_of(contents: list[int]) -> np.ndarray:
    return np.array([prepared.hash_content(bytes([content])) for content in contents], f"S{prepared.HASH_BYTES}")


IMAGES = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3), st.booleans()), min_size=1, max_size=120)


@settings(deadline=None, max_examples=200)
@given(IMAGES, st.booleans(), st.randoms())
def test_no_content_is_on_two_sides_in_whatever_order_images_come(images: Any, has_test: bool, random: Any) -> None:
    parts: dict[Any, int] = {}
    for _ in range(2):
        contents, labels, tested = zip(*images, strict=True)
        in_test = np.array(tested) if has_test else None
        found = assign_splits(np.array(labels), hashes_of(contents), in_test)
        sides: dict[int, set[int]] = {}
        for image, part in zip(images, found, strict=True):
            assert parts.setdefault((image if has_test else image[:2]), part) == part  # the same in any order
            if has_test and image[2]:
                assert part == TEST
            if part != LEFT_OUT:
                sides.setdefault(image[0], set()).add(part)
            else:
                assert has_test
                assert any(other[0] == image[0] and other[2] for other in images)
        assert all(len(parts_of_one) == 1 for parts_of_one in sides.values())
        if not has_test:
            labels_of = {content: {label for c, label, _ in images if c == content} for content in contents}
            for label in set(labels):
                own = {content for content, its_labels in labels_of.items() if min(its_labels) == label}
                num = max(round(len(own) / 10), 1)
                for part in (VALIDATION, TEST):
                    assert sum(sides[c] == {part} for c in own) == min(num, max(len(own) - (part == TEST) * num, 0))
        random.shuffle(images)


def test_a_tenth_of_each_class_is_for_validation_and_a_tenth_for_test() -> None:
    labels = np.repeat([0, 1, 2], [1000, 50, 3])
    parts = assign_splits(labels, numbered_hashes(len(labels)))
    nums = [[int((parts[labels == label] == part).sum()) for part in (TRAIN, VALIDATION, TEST)] for label in range(3)]
    assert nums == [[800, 100, 100], [40, 5, 5], [1, 1, 1]]
    own_test = np.arange(len(labels)) % 2 == 0
    parts = assign_splits(labels, numbered_hashes(len(labels)), own_test)
    assert [int((parts[labels == 0] == part).sum()) for part in (TRAIN, VALIDATION, TEST)] == [450, 50, 500]
    assert abs(np.flatnonzero(parts[:1000] == VALIDATION).mean() - 500) < 150  # drawn from all over


def numbered_hashes(num: int) -> np.ndarray:
    return np.array([prepared.hash_content(i.to_bytes(8, "little")) for i in range(num)], f"S{prepared.HASH_BYTES}")


class Made:
    """A made source of images, which counts how often it is read."""

    def __init__(self, num: int = 40, num_classes: int = 2, shape: tuple[int, int, int] = SHAPE) -> None:
        self.num, self.num_classes, self.shape, self.times_read = num, num_classes, shape, 0

    def image(self, row: int) -> Tensor:
        return torch.randint(256, self.shape, generator=torch.Generator().manual_seed(row)).to(torch.uint8)

    def images(self) -> Iterator[tuple[int, Tensor]]:
        for row in range(self.num):
            if row != 7:  # it cannot be read
                yield row, self.image(row)

    def read(self, wanted: ImageFormat) -> SourceImages:
        self.times_read += 1
        shape = (wanted.channels or self.shape[0], *(wanted.size or self.shape[1:]))
        self.shape = shape
        names = tuple(f"c{label}" for label in range(self.num_classes))
        return SourceImages(shape, names, np.arange(self.num) % max(self.num_classes, 1), None, self.images())

    def load(self, folder: Path, state: str = "", wanted: ImageFormat | None = None) -> Dataset:
        return load_prepared(folder / "my set", state, wanted or ImageFormat(), folder, self.read)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("prepared/*/*.safetensors"))


@pytest.mark.parametrize("num_classes", [2, 0])
def test_every_image_is_in_one_split_with_its_label(tmp_path: Path, num_classes: int) -> None:
    made = Made(num_classes=num_classes)
    dataset = made.load(tmp_path)
    info, splits = dataset.info, (dataset.train, dataset.validation, dataset.load_test())
    found = {tuple(i.flatten().tolist()): int(label) for s in splits for i, label in zip(*s, strict=True)}
    expected = {tuple(made.image(row).flatten().tolist()): row % max(num_classes, 1) for row in range(40) if row != 7}
    assert found == expected
    assert [len(split.labels) for split in splits] == [31, 4, 4]
    assert all((split.images.dtype, split.labels.dtype) == (torch.uint8, torch.int64) for split in splits)
    assert (info.name, info.source, info.image_shape) == ("my set", str(tmp_path / "my set"), SHAPE)
    assert info.class_names == ("c0", "c1")[:num_classes]
    assert info.class_counts == tuple(torch.bincount(dataset.train.labels).tolist())[:num_classes]


def test_a_set_is_made_once_and_anew_where_its_source_has_changed(tmp_path: Path) -> None:
    made = Made()
    first, second = made.load(tmp_path), made.load(tmp_path)
    assert made.times_read == 1
    assert torch.equal(first.train.images, second.train.images)
    assert second.info == first.info
    made.load(tmp_path, wanted=ImageFormat(SHAPE[1:], SHAPE[0]))  # what it is anyway, as a checkpoint wants it
    assert made.times_read == 1
    made.load(tmp_path, state="another")
    assert (made.times_read, len(shards(tmp_path))) == (2, 3)  # the old files are replaced
    assert made.load(tmp_path, "another", ImageFormat((4, 5), 3)).info.image_shape == (3, 4, 5)
    assert (made.times_read, len(shards(tmp_path))) == (3, 6)
    assert {path.name for path in tmp_path.glob("prepared/*/*")} <= {path.name for path in shards(tmp_path)} | {".lock"}


def test_of_a_set_of_another_size_only_the_facts_are_read(tmp_path: Path, monkeypatch: Patch) -> None:
    Made().load(tmp_path)
    own, hashed, digest = set(shards(tmp_path)), set(), prepared.hashlib.file_digest

    def counted(file: Any, name: str) -> Any:
        hashed.add(Path(file.name))
        return digest(file, name)

    monkeypatch.setattr(prepared.hashlib, "file_digest", counted)
    Made().load(tmp_path, wanted=ImageFormat((4, 5)))
    assert hashed == set(shards(tmp_path)) - own


@pytest.mark.parametrize("name", prepared.SPLITS)
@pytest.mark.parametrize("damage", ["missing", "cut short", "another byte", "empty"])
def test_a_damaged_file_is_made_anew(tmp_path: Path, name: str, damage: str) -> None:
    made = Made()
    expected = made.load(tmp_path).load_test().images.clone()
    (path,) = (path for path in shards(tmp_path) if path.stem == name)
    content = bytearray(path.read_bytes())
    content[-9] ^= 1  # of a label
    path.unlink()
    if damage != "missing":
        path.write_bytes({"cut short": content[:-8], "another byte": content, "empty": b""}[damage])
    assert torch.equal(made.load(tmp_path).load_test().images, expected)
    assert made.times_read == 2


@pytest.mark.parametrize(
    ("names", "old", "new"),
    [(prepared.SPLITS, b"[16, 15]", b"[15, 16]"), *(([name], b'c1\\"', b'c2\\"') for name in prepared.SPLITS)],
)
def test_facts_that_contradict_each_other_or_the_labels_are_made_anew(
    tmp_path: Path, names: list[str], old: bytes, new: bytes
) -> None:
    made = Made()
    expected = made.load(tmp_path).info
    for path in (path for path in shards(tmp_path) if path.stem in names):
        content = path.read_bytes()
        assert content.count(old) == 1
        path.write_bytes(content.replace(old, new))
    assert made.load(tmp_path).info == expected
    assert made.times_read == 2


def test_what_is_mapped_stays_when_another_process_makes_the_set_anew(tmp_path: Path) -> None:
    made = Made()
    dataset = made.load(tmp_path)
    images, in_test = dataset.train.images.clone(), dataset.load_test().images.clone()
    made.num = 60
    made.load(tmp_path, state="another")
    assert torch.equal(dataset.train.images, images)
    assert torch.equal(dataset.load_test().images, in_test)


def test_of_two_that_prepare_a_set_at_once_the_second_waits_for_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, started, go_on = Made(), threading.Event(), threading.Event()
    images = made.images

    def slow() -> Iterator[tuple[int, Tensor]]:
        started.set()
        assert go_on.wait(120)
        yield from images()

    made.images = slow  # type: ignore[method-assign]
    found: list[Dataset] = []
    threads = [threading.Thread(target=lambda: found.append(made.load(tmp_path))) for _ in range(2)]
    threads[0].start()
    assert started.wait(30)
    threads[1].start()
    while "another process" not in capsys.readouterr().err:
        assert threads[1].is_alive()
        time.sleep(0.01)  # a loop without rest would keep the other threads from their turns
    go_on.set()
    for thread in threads:
        thread.join()
    assert made.times_read == 1
    assert torch.equal(found[0].train.images, found[1].train.images)


def test_an_interrupted_preparation_leaves_nothing_that_is_taken_for_a_set(tmp_path: Path) -> None:
    made = Made()
    images = made.images

    def interrupted() -> Iterator[tuple[int, Tensor]]:
        yield from [*images()][:5]
        raise KeyboardInterrupt

    made.images = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        made.load(tmp_path)
    assert [path.name for path in tmp_path.glob("prepared/*/*") if path.name != ".lock"] == []
    (killed,) = tmp_path.glob("prepared/*")
    (killed / ".train.1.partial").write_bytes(b"of a killed process")
    made.images = images  # type: ignore[method-assign]
    made.load(tmp_path)
    assert not (killed / ".train.1.partial").exists()


@pytest.mark.parametrize("error", [InputError("full"), KeyboardInterrupt()])
def test_where_one_file_cannot_be_written_the_others_are_removed(
    tmp_path: Path, monkeypatch: Patch, error: BaseException
) -> None:
    made, write = Made(), prepared.write_streamed

    def refuse(path: Path, *rest: Any) -> None:
        if path.stem == "test":
            raise error
        write(path, *rest)

    monkeypatch.setattr(prepared, "write_streamed", refuse)
    with pytest.raises(type(error)):
        made.load(tmp_path)
    monkeypatch.undo()
    assert shards(tmp_path) == []
    assert len(made.load(tmp_path).load_test().labels) == 4


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    peaks = []
    for num in (100, 800):
        made = Made(num, shape=(3, 64, 64))
        tracemalloc.start()
        made.load(tmp_path / str(num))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 700 * 200 + 100_000  # the images alone are 8.6 MB


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num": 2, "num_classes": 1}, "enough different images of c0 for each of train, validation, test, found none"),
        ({"num": 2, "num_classes": 0}, "enough different images for each of train, validation, test, found none for"),
        ({"num": 40, "num_classes": 35}, "enough different images of c0 for each of .*, found none for tra"),
        ({"shape": (2, 2, 3)}, "expected images of 1 or 3 channels, found 2"),
        ({"shape": (1, 2, 1025)}, "between 1 and 1024, found 1025"),
    ],
)
def test_a_set_that_no_model_can_be_trained_on_is_refused(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Made(**changes).load(tmp_path)
    assert shards(tmp_path) == []


def test_a_set_that_has_no_space_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(prepared.shutil, "disk_usage", lambda folder: type("", (), {"free": 479})())
    with pytest.raises(InputError, match=r"expected 480 bytes of free space to prepare my set in .*, found 479; free"):
        Made().load(tmp_path)


def test_a_name_that_cannot_be_printed_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    made = Made()
    with pytest.raises(InputError, match=r"expected `dataset` to have a name that can be printed, found .*rename it"):
        load_prepared(tmp_path / "a\x1b", "", ImageFormat(), tmp_path, made.read)
    assert made.times_read == 0
