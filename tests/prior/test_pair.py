import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import prior
from prior.likelihood import label_log_joint, nats_per_map
from prior.pair import Pair, draw_maps
from prior.sampling import GUIDANCE, draw_labels, invert_cumulative
from tests.helpers import SHIPPED, make_info, make_prior, make_split, save_pair
from vqvae.compute import derive_seed
from vqvae.data.pixels import to_unit_range
from vqvae.errors import InputError

IMAGE_SHAPE, MAP_SHAPE = (3, 16, 12), (4, 3)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(num: int) -> Tensor:
    """Random images in 0..1."""
    return make_split(num, IMAGE_SHAPE).images / 255


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """Five classes and sharp softmaxes."""
    pair = save_pair(tmp_path, IMAGE_SHAPE, num_classes=5)
    with torch.no_grad():
        pair.prior.head[-1].weight.mul_(4)
    return pair


def test_the_uniforms_come_from_the_generator_map_by_map_and_from_nothing_else() -> None:
    def global_states() -> tuple[Any, ...]:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    network, before = make_prior(MAP_SHAPE), global_states()
    maps = draw_maps(network, 20, seeded(14))
    assert global_states() == before
    torch.nn.functional.embedding(maps, torch.zeros(16, 1, requires_grad=True)).sum().backward()  # trainable on
    torch.manual_seed(2)
    assert torch.equal(draw_maps(network, 20, seeded(14)), maps)
    assert not torch.equal(draw_maps(network, 20, seeded(15)), maps)
    for num in (1, 2, 19):
        assert torch.equal(draw_maps(network, num, seeded(14), batch_size=8), maps[:num])


def test_drawing_is_free_of_dropout_and_restores_the_mode_of_every_module_after_an_error_too() -> None:
    network = make_prior(MAP_SHAPE, dropout=0.5)
    expected = draw_maps(network, 9, seeded(15))
    network.train().layers[1].eval()
    modes = [module.training for module in network.modules()]
    assert torch.equal(draw_maps(network, 9, seeded(15)), expected)
    assert [module.training for module in network.modules()] == modes
    with pytest.raises(ZeroDivisionError):
        draw_maps(network, 9, seeded(16), progress=lambda num: 1 // 0)
    assert [module.training for module in network.modules()] == modes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "expected `num_samples` of at least 1, found 0; try `num_samples=100`"),
        ({"guidance": 2.0}, "expected labels with `guidance=2`, found none; give `labels` too"),
        ({"labels": torch.tensor([0, 10])}, "expected labels in 0..9, found 10; choose others by `labels`"),
        ({"labels": torch.tensor([-1, 0])}, "expected labels in 0..9, found -1; choose others by `labels`"),
        ({"labels": torch.tensor([0])}, "expected 2 labels, one for each image, found 1; give as many `labels`"),
        ({"known_codes": torch.full((2, 4, 3), 16)}, "expected known codes below 16, found 16; encode"),
        ({"known_codes": torch.full((2, 3, 4), 0)}, "int64 of shape (2, 4, 3), found torch.int64 of shape (2, 3, 4)"),
        ({"known_codes": torch.full((2, 4, 3), 2.7)}, "found torch.float32 of shape (2, 4, 3)"),
    ],
)
def test_labels_codes_and_options_that_do_not_fit_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        draw_maps(make_prior(MAP_SHAPE), **{"num_samples": 2, "generator": seeded(0), **options})


def test_without_labels_the_label_is_drawn_first_by_its_frequency_in_training(pair: Pair) -> None:
    frequencies, num = torch.arange(1, 6) / 15, 2000
    samples = pair.draw(num, seed=4)
    assert torch.equal(pair.draw(num, labels=samples.labels, seed=4).images, samples.images)
    labels = draw_labels(frequencies, num, seeded(derive_seed(4, "labels")))  # apart from the codes' uniforms
    assert torch.equal(samples.labels, labels)


@pytest.mark.parametrize("labels", [None, [0, 4, 2]])
def test_a_draw_is_that_of_the_maps_decoded_with_every_option_passed_on(pair: Pair, labels: list[int] | None) -> None:
    options, done = {"guidance": 3.0, "temperature": 1.4, "top_k": 12, "top_p": 0.9}, []
    found = pair.draw(7, labels=labels, seed=8, progress=done.append, **options)
    assert torch.equal(found.indices, draw_maps(pair.prior, 7, seeded(8), labels=found.labels, **options))
    assert torch.equal(found.images, pair.decode(found.indices))
    assert torch.equal(pair.sample(7, labels=labels, seed=8, **options), found.images)
    assert sum(done) == 7
    default = draw_maps(pair.prior, 7, seeded(0), labels=pair.draw(7, labels=labels).labels, guidance=GUIDANCE)
    assert torch.equal(pair.draw(7, labels=labels).indices, default)


def test_labels_are_drawn_in_turn_once_each_by_default(pair: Pair) -> None:
    assert pair.draw(7, labels=range(3)).labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert pair.draw(2, labels=iter([4, 3, 2])).labels.tolist() == [4, 3]
    assert pair.draw(labels=torch.tensor([4, 4, 1])).labels.tolist() == [4, 4, 1]
    assert pair.sample().shape == (1, *IMAGE_SHAPE)


def test_without_classes_the_default_guidance_is_1(tmp_path: Path) -> None:
    pair = save_pair(tmp_path, IMAGE_SHAPE, num_classes=0)
    samples = pair.draw(5, seed=3)
    assert samples.labels.tolist() == [0] * 5
    assert torch.equal(samples.indices, draw_maps(pair.prior, 5, seeded(3)))
    assert pair.complete(images(2), 1).shape == (2, *IMAGE_SHAPE)


def test_a_draw_of_nothing_is_refused(pair: Pair) -> None:
    with pytest.raises(InputError, match="expected at least one label, found none; leave `labels` out"):
        pair.draw(labels=[])
    for labels in (None, [1]):
        with pytest.raises(InputError, match="expected `num_samples` of at least 1, found 0"):
            pair.draw(0, labels=labels)


def test_images_in_0_to_1_go_through_stage_one_and_back(pair: Pair) -> None:
    x = images(9)
    indices = pair.encode(x)
    with torch.no_grad():
        assert torch.equal(indices, pair.vqvae.encode(x * 2 - 1))
        decoded = to_unit_range(pair.vqvae.decode_indices(indices))
    assert indices.unique().numel() > 5
    torch.testing.assert_close(pair.decode(indices), decoded)
    assert torch.equal(pair.reconstruct(x), pair.decode(indices))


@pytest.mark.parametrize("method", ["encode", "reconstruct", "log_likelihood", "label_probabilities", "complete"])
def test_images_out_of_range_or_shape_are_a_value_error(pair: Pair, method: str) -> None:
    for wrong, found in ((images(2) * 255, "values from 0 to 255"), (images(2).transpose(2, 3), "(2, 3, 12, 16)")):
        with pytest.raises(ValueError, match=re.escape(f"found {found}")):
            getattr(pair, method)(wrong, *([1] if method == "complete" else []))


def test_maps_of_another_shape_type_or_range_are_a_value_error(pair: Pair) -> None:
    maps = pair.encode(images(2))
    for wrong, found in (
        (maps.transpose(1, 2), "found torch.int64 of shape (2, 3, 4)"),
        (maps.float(), "found torch.float32 of shape (2, 4, 3)"),
        (maps * 0 + 16, "found 16 to 16"),
        (maps * 0 - 1, "found -1 to -1"),
    ):
        with pytest.raises(ValueError, match=re.escape(found)):
            pair.decode(wrong)


def test_the_likelihood_of_images_is_that_of_their_maps_under_their_labels_or_the_mixture(pair: Pair) -> None:
    x, labels, p_label = images(6), [0, 1, 2, 3, 4, 0], torch.arange(1, 6).double() / 15
    maps = pair.encode(x)
    torch.testing.assert_close(pair.log_likelihood(x, labels), -nats_per_map(pair.prior, maps, torch.tensor(labels)))
    each = torch.stack([-nats_per_map(pair.prior, maps, torch.full((6,), label)) for label in range(5)], dim=1)
    joint = p_label * each.exp()
    torch.testing.assert_close(pair.log_likelihood(x), joint.sum(dim=1).log())
    torch.testing.assert_close(pair.label_probabilities(x), joint / joint.sum(dim=1, keepdim=True))


def test_labels_that_do_not_fit_the_images_are_refused(pair: Pair) -> None:
    for labels, message in (([0], "expected 2 labels"), ([0, 5], "expected labels in 0..4")):
        with pytest.raises(InputError, match=message):
            pair.log_likelihood(images(2), labels)
        with pytest.raises(InputError, match=message):
            pair.complete(images(2), 1, labels=labels)


def test_a_completion_keeps_the_first_rows_and_draws_the_rest(pair: Pair) -> None:
    x, labels = images(6), [0, 1, 2, 3, 4, 0]
    known = pair.encode(x)
    known[:, 2:] = -1
    common = {"labels": torch.tensor(labels), "known_codes": known}
    options = {"guidance": 2.0, "temperature": 1.3, "top_k": 14, "top_p": 0.95}
    maps = draw_maps(pair.prior, 6, seeded(5), **common, **options)
    assert torch.equal(pair.complete(x, 2, labels=labels, seed=5, **options), pair.decode(maps))
    maps = draw_maps(pair.prior, 6, seeded(0), **common, guidance=GUIDANCE)
    assert torch.equal(pair.complete(x, 2, labels=labels), pair.decode(maps))
    assert torch.equal(pair.complete(x, 4), pair.reconstruct(x))
    for num_rows in (-1, 5):
        with pytest.raises(InputError, match=f"`num_rows` between 0 and 4, found {num_rows}; try `num_rows=2`"):
            pair.complete(x, num_rows)


@pytest.mark.parametrize("num_rows", [0, 1, 3])
def test_without_labels_a_completion_draws_each_label_given_the_kept_rows_alone(pair: Pair, num_rows: int) -> None:
    x = images(40)
    found = pair.complete(x, num_rows, seed=6)
    joint = label_log_joint(pair.prior, pair.encode(x), pair.info.class_frequencies, num_rows=num_rows)
    uniforms = torch.rand(40, generator=seeded(derive_seed(6, "labels")), dtype=torch.float64)
    labels = invert_cumulative(joint.softmax(dim=1), uniforms)
    assert torch.equal(found, pair.complete(x, num_rows, labels=labels, seed=6))
    assert torch.equal(found, pair.sample(40, seed=6)) == (num_rows == 0)


def test_a_pair_is_loaded_from_two_files_or_by_default_from_the_shipped_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = save_pair(tmp_path, IMAGE_SHAPE, num_classes=5).files
    pair = prior.load(str(files[0]), files[1], device="cpu")
    assert pair.files == files == (tmp_path / "vqvae.safetensors", tmp_path / "prior.safetensors")
    assert pair.origin == f"{files[0]} (your run) and {files[1]} (your run)"
    assert pair.info == make_info(IMAGE_SHAPE, 5)
    assert (pair.prior.training, pair.vqvae.training) == (False, False)
    with pytest.raises(InputError, match="expected the VQ-VAE that the prior was trained on"):
        prior.load(files[0], SHIPPED / "prior.safetensors")
    monkeypatch.chdir(tmp_path)
    shipped = prior.load()
    assert shipped.files == (SHIPPED / "vqvae.safetensors", SHIPPED / "prior.safetensors")
    assert shipped.sample(labels=range(10)).shape == (10, 1, 28, 28)
    names = {"GatedPixelCNN", "Pair", "PriorConfig", "PriorTraining", "Samples", "load", "train_prior"}
    assert {*prior.__all__} == names
