import math
import os
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
from prior.maps import draw_maps
from prior.pair import Pair
from prior.sampling import GUIDANCE, draw_labels, invert_cumulative
from tests.helpers import SHIPPED, make_info, make_prior, make_split, save_pair
from vqvae.compute import derive_seed
from vqvae.data.pixels import to_unit_range
from vqvae.errors import InputError
from vqvae.gaussian import draw_gaussian

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
        ({"known_codes": torch.full((2, 4, 3), 16)}, "expected known codes in -1..15, found 16 to 16; encode"),
        ({"known_codes": torch.full((2, 4, 3), -2)}, "expected known codes in -1..15, found -2 to -2; encode"),
        ({"known_codes": np.zeros((2, 4, 3))}, "int64 of shape (2, 4, 3), found ndarray; encode"),
        ({"batch_size": 0}, "expected `batch_size` of at least 1, found 0"),
        ({"known_codes": torch.full((2, 3, 4), 0)}, "int64 of shape (2, 4, 3), found torch.int64 of shape (2, 3, 4)"),
        ({"known_codes": torch.full((2, 4, 3), 2.7)}, "found torch.float32 of shape (2, 4, 3)"),
    ],
)
def test_labels_codes_and_options_that_do_not_fit_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        draw_maps(make_prior(MAP_SHAPE), **{"num_samples": 2, "generator": seeded(0), **options})


@pytest.mark.parametrize("labels", [[1, 2], np.array([1, 2], np.uint8), torch.tensor([1, 2]), iter([1, 2])], ids=type)
def test_labels_may_be_whole_numbers_of_any_kind(pair: Pair, labels: Any) -> None:
    drawn = pair.draw(labels=labels).labels
    assert (drawn.tolist(), drawn.dtype) == ([1, 2], torch.int64)


NO_NUMBERS = [True, "1", 1.0, None, math.nan, 2**63, 10**30, torch.ones(1)]


@pytest.mark.parametrize("value", [*NO_NUMBERS, -1], ids=str)
def test_what_is_no_whole_number_is_refused_by_its_argument(pair: Pair, value: Any) -> None:
    x, vqvae = images(1), pair.vqvae
    calls = {
        "labels": [lambda: pair.draw(labels=[value]), lambda: pair.log_likelihood(x, [value])],
        "seed": [lambda: pair.draw(seed=value), lambda: pair.complete(x, 1, seed=value)],
        "num_rows": [lambda: pair.complete(x, value)],
        "num_samples": [lambda: pair.complete(x, 1, value)],
    }
    calls["num_samples"].append(lambda: draw_maps(pair.prior, value, seeded(0)))
    calls["num_samples"].append(lambda: draw_gaussian(vqvae, "latent", value, 0))
    calls["seed"].append(lambda: draw_gaussian(vqvae, "image", 1, value))
    for name, several in calls.items():
        for call in several:
            with pytest.raises(InputError, match=f"expected `?{name}`? (to be|of at least|between|in) "):
                call()


@pytest.mark.parametrize("num", [10**9, 10**12, 2**63 - 1])
def test_more_samples_than_fit_into_memory_are_refused_by_arithmetic(
    pair: Pair, num: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sysconf", lambda name: 2**17)  # 16 GiB
    calls = [lambda: pair.draw(num), lambda: pair.draw(num, labels=[0]), lambda: draw_maps(pair.prior, num, seeded(0))]
    calls += [lambda source=source: draw_gaussian(pair.vqvae, source, num, 0) for source in ("latent", "image")]
    for call in calls:
        with pytest.raises(
            InputError, match=rf"`num_samples` for which 16 GiB .* found {num}, which needs \d+; choose"
        ):
            call()


def test_memory_that_runs_out_while_drawing_is_one_sentence(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prior.maps, "sample_codes", lambda *_, **__: torch.empty(10**15))
    with pytest.raises(InputError, match="expected enough memory for this `num_samples`"):
        pair.draw(2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_pair_of_another_type_draws_and_scores(pair: Pair, dtype: torch.dtype) -> None:
    x, single = images(40), pair.log_likelihood(images(40), [1] * 40)
    known, completed = pair.encode(x), pair.complete(x, 2)
    pair.vqvae.to(dtype), pair.prior.to(dtype)
    drawn = pair.draw(3, labels=[1], guidance=2.0)
    assert (drawn.images.dtype, drawn.images.isfinite().all()) == (torch.float32, True)
    assert pair.complete(x, 2).shape == completed.shape
    tolerance = 0.15 if dtype == torch.bfloat16 else 0.02
    assert (pair.encode(x) != known).float().mean() <= (0 if dtype == torch.float64 else tolerance)
    torch.testing.assert_close(-nats_per_map(pair.prior, known, torch.ones(40).long()), single, rtol=tolerance, atol=0)


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


def test_labels_that_are_none_or_no_list_are_refused(pair: Pair) -> None:
    with pytest.raises(InputError, match="expected at least one label, found none; leave `labels` out"):
        pair.draw(labels=[])
    for labels in (3, torch.tensor(3)):
        with pytest.raises(InputError, match=r"expected a list of `labels`, found .*3.*; try `labels=\[0, 1\]`"):
            pair.draw(labels=labels)


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


def test_maps_that_no_image_has_are_a_value_error(pair: Pair) -> None:
    maps = pair.encode(images(2))
    for wrong, found in ((maps.transpose(1, 2), r"of shape \(2, 3, 4\)"), (maps * 0 - 1, "found -1 to -1")):
        with pytest.raises(ValueError, match=found):
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
    counted = torch.zeros(40, *MAP_SHAPE).bool()
    counted[:, :num_rows] = True
    joint = label_log_joint(pair.prior, pair.encode(x), pair.info.class_frequencies, counted=counted)
    uniforms = torch.rand(40, generator=seeded(derive_seed(6, "labels")), dtype=torch.float64)
    labels = invert_cumulative(joint.softmax(dim=1), uniforms)
    assert torch.equal(found, pair.complete(x, num_rows, labels=labels, seed=6))
    assert torch.equal(found, pair.sample(40, seed=6)) == (num_rows == 0)


def random_knowledge(num: int) -> Tensor:
    """Code maps of which each has another share of codes unknown, from none to all, anywhere."""
    share = torch.arange(num)[:, None, None] / (num - 1)
    unknown = torch.rand(num, *MAP_SHAPE, generator=seeded(3)) < share
    codes = torch.randint(16, (num, *MAP_SHAPE), generator=seeded(4))
    return torch.where(unknown, -1, codes)


def complete_by_hand(pair: Pair, known: Tensor, labels: list[int], seed: int, guidance: float) -> Tensor:
    """Each map on its own, each code by a pass over a map in which garbage stands where nothing was drawn yet."""
    network, maps = pair.prior, torch.full_like(known, 15)
    uniforms = torch.rand(known.shape, generator=seeded(seed), dtype=torch.float64)
    for n, i, j in np.ndindex(*known.shape):
        both = torch.tensor([labels[n], network.no_label])
        with torch.no_grad():
            labelled, unlabelled = network(maps[[n, n]], both)[:, :, i, j].softmax(dim=1).log()
        cumulative = (unlabelled + guidance * (labelled - unlabelled)).softmax(dim=0).double().cumsum(dim=0)
        drawn = int((cumulative <= uniforms[n, i, j] * cumulative[-1]).sum())
        maps[n, i, j] = known[n, i, j] if known[n, i, j] >= 0 else drawn
    return maps


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_known_codes_of_any_shape_are_kept_and_the_others_are_those_of_the_plain_network(
    pair: Pair, guidance: float
) -> None:
    known, labels = random_knowledge(20), [n % 5 for n in range(20)]
    found = pair.draw_completions(known, labels=labels, seed=7, guidance=guidance)
    assert torch.equal(found.indices[known >= 0], known[known >= 0])
    assert torch.equal(found.indices, complete_by_hand(pair, known, labels, 7, guidance))
    assert torch.equal(found.images, pair.decode(found.indices))


def test_what_is_drawn_depends_only_on_known_codes_before_it_and_so_does_the_label(pair: Pair) -> None:
    known = random_knowledge(12)
    expected = pair.draw_completions(known, seed=7)
    for place in range(known[0].numel()):
        changed = known.flatten(1).clone()
        changed[:, place] = torch.where(changed[:, place] >= 0, (changed[:, place] + 5) % 16, -1)
        found = pair.draw_completions(changed.view_as(known), seed=7)
        before = slice(0, place)
        later = (known.flatten(1)[:, before] < 0).any(dim=1)  # it stands after a code that is drawn
        assert torch.equal(found.labels[later], expected.labels[later])
        assert torch.equal(found.indices.flatten(1)[later, before], expected.indices.flatten(1)[later, before])
    unknown = torch.full((2, *MAP_SHAPE), -1)
    assert torch.equal(pair.draw_completions(unknown, 6, seed=9).indices, pair.draw(12, seed=9).indices)


@pytest.mark.parametrize("labels", [None, ["class 4", 0, 2]])
def test_several_completions_of_an_image_are_drawn_at_once_and_do_not_depend_on_the_images_after_it(
    pair: Pair, labels: list[int | str] | None
) -> None:
    x = images(3)
    known = pair.keep_rows(pair.encode(x), 1)
    found = pair.draw_completions(known, 4, labels=labels, seed=2)
    assert len(found.indices.unflatten(0, (3, 4))[0].unique(dim=0)) == 4
    numbers = found.labels if labels is None else torch.tensor([4, 0, 2]).repeat_interleave(4)
    again = pair.draw_completions(known.repeat_interleave(4, dim=0), labels=numbers, seed=2)
    for one, other in zip(again, found, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(pair.complete(x[:2], 1, 4, labels=labels and labels[:2], seed=2), found.images[:8])


def test_known_codes_that_no_map_has_are_refused(pair: Pair) -> None:
    for wrong in (torch.full((1, 3, 4), -1), torch.full((1, *MAP_SHAPE), 16), torch.zeros(1, *MAP_SHAPE)):
        with pytest.raises(InputError, match=r"expected known codes (in -1..15|as torch.int64)"):
            pair.draw_completions(wrong)


def test_labels_may_be_the_names_of_classes(pair: Pair) -> None:
    x, names, numbers = images(2), ["class 3", "class 0"], [3, 0]
    assert pair.draw(labels=names).labels.tolist() == numbers
    assert torch.equal(pair.log_likelihood(x, names), pair.log_likelihood(x, numbers))
    assert torch.equal(pair.complete(x, 1, labels=names), pair.complete(x, 1, labels=numbers))
    with pytest.raises(InputError, match=r"\(class 0, .*, class 4\), found 'klass 3'; did you mean 'class 3'\?"):
        pair.draw(labels=["klass 3"])


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
    names = {"GatedPixelCNN", "Pair", "PriorConfig", "PriorTraining", "Samples", "export_pair", "load", "train_prior"}
    assert {*prior.__all__} == names
