"""Datasets from an .npz file."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import run, save_pair
from vqvae.data import arrays
from vqvae.data.chosen import read_own
from vqvae.data.dataset import Dataset
from vqvae.data.images import fit
from vqvae.data.load import load_dataset

NUM = 30


def save(path: Path, **content: Any) -> Path:
    np.savez_compressed(path, **content)
    return path


def load(path: Path, **options: object) -> Dataset:
    return load_dataset(path, path.parent / "data", **options)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def by_pixels(dataset: Dataset) -> dict[bytes, int]:
    splits = (dataset.train, dataset.validation, dataset.load_test())
    return {i.numpy().tobytes(): int(label) for split in splits for i, label in zip(*split, strict=True)}


@pytest.mark.parametrize(
    ("shape", "axes", "image_shape"),
    [
        ((NUM, 6, 5), None, (1, 6, 5)),
        ((NUM, 6, 5, 1), (0, 3, 1, 2), (1, 6, 5)),
        ((NUM, 6, 5, 3), (0, 3, 1, 2), (3, 6, 5)),
        ((NUM, 1, 6, 5), None, (1, 6, 5)),
        ((NUM, 3, 6, 5), None, (3, 6, 5)),
        ((NUM, 3, 6, 3), None, (3, 6, 3)),  # it fits both; the second axis counts
    ],
)
@pytest.mark.parametrize("dtype", ["u1", "<f4", ">f8", "f2"])
def test_every_layout_and_type_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: Any, axes: Any, image_shape: Any, dtype: str
) -> None:
    monkeypatch.setattr(arrays, "READ_AT_ONCE", 1000)  # several pieces
    images, labels = noise(*shape), np.arange(NUM, dtype=np.uint16) % 3
    values = images if dtype == "u1" else (images / 255).astype(dtype)
    dataset = load(save(tmp_path / "set.npz", images=values, labels=labels))
    assert dataset.info.image_shape == image_shape
    assert dataset.info.class_names == ("0", "1", "2")
    rows = images if axes is None else images.transpose(axes)
    assert by_pixels(dataset) == {row.tobytes(): label for row, label in zip(rows, labels, strict=True)}


def test_labels_may_be_text_or_missing(tmp_path: Path) -> None:
    images = noise(NUM, 6, 5)
    names = np.array(["dog", "9", "10"])[np.arange(NUM) % 3]
    dataset = load(save(tmp_path / "text.npz", images=images, labels=names))
    assert dataset.info.class_names == ("9", "10", "dog")
    found = {content: dataset.info.class_names[label] for content, label in by_pixels(dataset).items()}
    assert found == {row.tobytes(): name for row, name in zip(images, names, strict=True)}
    assert load(save(tmp_path / "none.npz", images=images)).info.class_names == ()


@pytest.mark.parametrize("numbers", [[1, 2, 26], [-5, 0, 10], [2**64 - 2, 2**63, 2**63 + 1]])
def test_labels_that_are_numbers_are_the_names_of_their_classes(tmp_path: Path, numbers: list[int]) -> None:
    images, labels = noise(NUM, 6, 5), np.array(numbers)[np.arange(NUM) % 3]
    dataset = load(save(tmp_path / "set.npz", images=images, labels=labels))
    assert dataset.info.class_names == tuple(map(str, sorted(numbers)))
    found = {content: int(dataset.info.class_names[label]) for content, label in by_pixels(dataset).items()}
    assert found == {row.tobytes(): label for row, label in zip(images, labels, strict=True)}


@pytest.mark.parametrize("shape", [(NUM, 9, 12), (NUM, 3, 9, 12)])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_resized_and_converted_as_those_of_files_are(tmp_path: Path, shape: Any, channels: int) -> None:
    images = noise(*shape)
    dataset = load(save(tmp_path / "set.npz", images=images), image_size="3x4", channels=channels)
    assert dataset.info.image_shape == (channels, 3, 4)
    expected = set()
    for image in images:
        picture = Image.fromarray(image if image.ndim == 2 else np.ascontiguousarray(image.transpose(1, 2, 0)))
        fitted = np.atleast_3d(np.array(fit(picture.convert("L" if channels == 1 else "RGB"), (3, 4))))
        expected.add(fitted.transpose(2, 0, 1).tobytes())
    assert set(by_pixels(dataset)) == expected


def test_the_suffix_may_be_in_capitals(tmp_path: Path) -> None:
    path = save(tmp_path / "set.npz", images=noise(NUM, 6, 5)).rename(tmp_path / "SET.NPZ")
    assert load(path).info.image_shape == read_own(path, (1, 6, 5)).images.shape[1:] == (1, 6, 5)


def test_a_file_in_the_place_of_another_of_its_size_and_time_is_noticed(tmp_path: Path) -> None:
    path, images = tmp_path / "set.npz", noise(NUM, 6, 5)
    for content in (images, 255 - images):
        np.savez(tmp_path / "new.npz", images=content)
        os.utime(tmp_path / "new.npz", (1, 1))
        (tmp_path / "new.npz").rename(path)
        assert set(by_pixels(load(path))) == {row.tobytes() for row in content}


def test_a_later_start_reads_nothing_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "set.npz", images=noise(NUM, 6, 5))
    expected = load(path).train.images
    monkeypatch.setattr(arrays.zipfile, "ZipFile", None)
    assert torch.equal(load(path).train.images, expected)


def test_drawn_images_are_a_dataset(tmp_path: Path) -> None:
    save_pair(tmp_path)
    weights = ["--vqvae", tmp_path / "vqvae.safetensors", "--prior", tmp_path / "prior.safetensors"]
    drawn = tmp_path / "drawn.npz"
    options = ["--labels", "0-9", "--num-samples", 40, "--device", "cpu", "--output", drawn]
    result = run("sample", "--mode", "pixelcnn", *weights, *options)
    assert result.status == 0, result.stderr
    assert load(drawn).info.image_shape == (1, 28, 28)
    assert load(drawn).info.num_classes == 10
