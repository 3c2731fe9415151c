import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from prior.evaluation import comparison
from prior.evaluation.comparison import as_text, compare_modes, first_of_each_class, save_comparison
from prior.likelihood import nats_per_map
from prior.maps import draw_maps
from prior.sampling import GUIDANCE, draw_labels
from tests.helpers import make_dataset, make_split, save_pair
from tests.prior.evaluation.test_metrics import all_distances
from tests.prior.evaluation.test_sets import seeded
from vqvae.codec import decode_images
from vqvae.data.dataset import Dataset, Split
from vqvae.errors import InputError
from vqvae.gaussian import gaussian_images, gaussian_latents

SHAPES = {10: (1, 28, 28), 3: (3, 32, 32), 26: (1, 20, 36), 0: (3, 24, 16)}
NAMES = ["real", "reconstructed", "gaussian_latent", "gaussian_image", "pixelcnn", "pixelcnn_unlabelled"]


def make_data(num_classes: int = 10, num_test: int = 60) -> Dataset:
    images, labels = make_split(num_test, SHAPES[num_classes], num_classes, seed=1)
    return replace(make_dataset(30, SHAPES[num_classes], num_classes), load_test=lambda: Split(images, labels.flip(0)))


@pytest.mark.parametrize("num_classes", SHAPES)
def test_every_mode_has_its_images_and_figures_and_is_in_the_table_and_the_files(
    num_classes: int, tmp_path: Path
) -> None:
    pair, data = save_pair(tmp_path, SHAPES[num_classes], num_classes), make_data(num_classes)
    test, frequencies, columns = data.load_test(), pair.info.class_frequencies, num_classes or 10
    num = 2 * columns
    state = torch.get_rng_state()
    pair.prior.train()
    pair.vqvae.encoder.train()
    found = compare_modes(pair, data, num_samples=num, seed=4)
    assert (pair.prior.training, pair.vqvae.encoder.training, pair.vqvae.training) == (True, True, False)
    assert torch.equal(torch.get_rng_state(), state)
    pair.vqvae.eval()
    modes = {mode.name: mode for mode in found}
    assert list(modes) == NAMES[: 6 if num_classes else 5]
    of_class = [[n for n in range(60) if test.labels[n] == label] for label in range(max(num_classes, 1))]
    rows = [rows[turn] for turn in range(num // len(of_class)) for rows in of_class]
    assert torch.allclose(modes["real"].images, test.images[rows] / 255, atol=1e-6)
    assert torch.equal(modes["real"].indices, modes["reconstructed"].indices)
    assert torch.equal(modes["gaussian_latent"].indices, gaussian_latents(pair.vqvae, num, seeded(4, "latents")))
    assert torch.equal(modes["gaussian_image"].indices, gaussian_images(pair.vqvae, num, seeded(4, "images")))
    none, asked = torch.full((num,), -1), torch.arange(num) % columns
    expected = dict.fromkeys(NAMES, none)
    if num_classes:
        drawn = draw_labels(frequencies, num, seeded(4, "labels"))
        expected = dict(zip(NAMES, (asked, asked, none, none, asked, drawn), strict=True))
        for name in NAMES[4:]:
            maps = draw_maps(pair.prior, num, seeded(4, name), labels=expected[name], guidance=GUIDANCE)
            assert torch.equal(modes[name].indices, maps)
    for name, mode in modes.items():
        assert torch.equal(mode.labels, expected[name])
        assert name == "real" or torch.equal(mode.images, decode_images(pair.vqvae, mode.indices))
        labels = enumerate(frequencies.tolist() or [1.0])
        p = sum(p * nats_per_map(pair.prior, mode.indices, none * 0 + label).neg().exp() for label, p in labels)
        assert mode.nats_per_code == pytest.approx(-p.log().mean().item() / mode.indices[0].numel(), abs=1e-6)
        assert mode.codes_used == len(set(mode.indices.flatten().tolist()))
        distances = all_distances(mode.images, data.validation.images / 255) / mode.images[0].numel() ** 0.5
        assert mode.distance == pytest.approx(distances.min(axis=1).mean(), abs=1e-4)
    head, *lines, remark = as_text(found).splitlines()
    assert (head.split(), "not told their labels" in remark) == (["codes", "used", "nats/code", "distance"], True)
    for mode, line in zip(found, lines, strict=True):
        assert line.split() == f"{mode.title} {mode.codes_used} {mode.nats_per_code:.2f} {mode.distance:.3f}".split()
    for name in ("c.npz", "c.png"):
        save_comparison(found, tmp_path / name, data.info.class_names)
    arrays = np.load(tmp_path / "c.npz")
    assert arrays["modes"].tolist() == [name for name in modes for _ in range(num)]
    for name in ("images", "indices", "labels"):
        assert np.array_equal(arrays[name], torch.cat([getattr(mode, name) for mode in found]).numpy())
    (_, height, width), scale = SHAPES[num_classes], -(-56 // min(SHAPES[num_classes][1:]))
    with Image.open(tmp_path / "c.png") as sheet:  # one row of three classes twice, two of more, or else of ten images
        shown_columns, num_rows = (6, 1) if num_classes == 3 else (columns, 2)
        assert sheet.width == scale * (shown_columns * (width + 2) + 2) + 24
        assert sheet.height == len(modes) * (scale * (num_rows * (height + 2) + 2) + 30) + 12 + 15 * (num_classes > 0)


@pytest.mark.parametrize(
    ("num_classes", "num_test", "num", "columns"),
    [(10, 60, 30, 10), (3, 60, 27, 9), (3, 12, 12, 6), (3, 6, 6, 6), (26, 52, 52, 26), (0, 60, 30, 10), (0, 4, 4, 4)],
)
def test_without_a_number_there_are_three_rows_or_fewer_and_each_column_shows_the_class_that_stands_above_it(
    num_classes: int, num_test: int, num: int, columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, data = save_pair(tmp_path, SHAPES[num_classes], num_classes), make_data(num_classes, num_test)
    modes, sheets = compare_modes(pair, data), []
    monkeypatch.setattr(comparison, "save_sheet", lambda *sheet: sheets.append(sheet))
    names = data.info.class_names
    save_comparison(modes, tmp_path / "c.png", names)
    [(sections, _, shown_columns, heads)] = sheets
    assert ({len(images) for _, images in sections}, shown_columns, len(heads)) == (
        {num},
        columns,
        columns * (num_classes > 0),
    )
    for place, label in enumerate(modes[0].labels.tolist() if heads else ()):
        assert heads[place % columns] == names[label]


def test_samples_that_make_no_whole_rows_and_other_data_are_refused(tmp_path: Path) -> None:
    pair = save_pair(tmp_path)
    for num, data, message in (
        (15, make_data(), "`num_samples`, a multiple of 10, .* found 15; try `num_samples=10`"),
        (0, make_data(), "`num_samples`, a multiple of 10, the number of classes, between 10 and 60, "),
        (70, make_data(num_test=65), "between 10 and 60, .* found 70; try `num_samples=60`"),
        (10, make_data(num_test=9), "images of every class, found none of some"),
        (30, make_data(3), "like those of made"),
    ):
        with pytest.raises(InputError, match=message):
            compare_modes(pair, data, num_samples=num)


def test_without_classes_the_message_speaks_of_none() -> None:
    with pytest.raises(InputError, match="expected `num_samples` between 1 and 9, for which there are enough test ima"):
        first_of_each_class(torch.zeros(9, dtype=torch.int64), 10, 0)


@given(num_samples=st.integers(-3, 80), counts=st.lists(st.integers(0, 7), min_size=1, max_size=6))
def test_advice_on_the_number_of_samples_is_accepted(num_samples: int, counts: list[int]) -> None:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    for num_classes in {len(counts), 0} if len(counts) == 1 else {len(counts)}:
        try:
            assert len(first_of_each_class(labels, num_samples, num_classes)) == num_samples
        except InputError as error:
            advice = re.search(r"try `num_samples=(.*)`", str(error))
            assert bool(advice) == (min(counts) > 0)  # no number is advised where none would do
            if advice:
                first_of_each_class(labels, int(advice[1]), num_classes)
