import math
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import prior.model
from prior.likelihood import nats_per_code, nats_per_map
from prior.model import GatedPixelCNN, layers_needed, load_prior
from tests.helpers import CPU, make_info, make_prior, make_vqvae, random_maps, save_model, save_pair
from vqvae.errors import InputError
from vqvae.model import load_vqvae

SHAPES = [(7, 7), (1, 7), (7, 1), (4, 6), (6, 4), (1, 10), (10, 1), (8, 8)]
TINY = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 2), (1, 3), (3, 1)]


def plain_logits(network: GatedPixelCNN, maps: Tensor, labels: Tensor, kept: float = 1.0) -> Tensor:
    """The paper's equations by torch's own functions, from the same weights. Dropout keeps this share of everything."""
    weights = dict(network.named_parameters())

    def convolve(x: Tensor, name: str, padding: tuple[int, ...] = (0, 0)) -> Tensor:
        return F.conv2d(F.pad(x, padding), weights[f"{name}.weight"], weights[f"{name}.bias"])

    def gated(features: Tensor, label: Tensor) -> Tensor:
        f, g = (features + label[:, :, None, None]).chunk(2, dim=1)
        return torch.tanh(f) * torch.sigmoid(g)

    embedded = weights["embedding.weight"][maps].permute(0, 3, 1, 2)
    v = F.pad(embedded, (0, 0, 1, -1))  # one row down: (i, j) holds the code above it
    h = F.pad(embedded, (1, -1))  # one column right: (i, j) holds the code to its left
    for n in range(len(network.layers)):
        layer = f"layers.{n}"
        v_label, h_label = weights[f"{layer}.label.weight"][labels].chunk(2, dim=1)
        v_features = convolve(kept * v, f"{layer}.vertical", (1, 1, 1, 0))
        link = convolve(v_features, f"{layer}.vertical_to_horizontal")
        h_features = convolve(kept * h, f"{layer}.horizontal", (1, 0)) + link
        v = v + convolve(gated(v_features, v_label), f"{layer}.vertical_out")
        h = h + convolve(gated(h_features, h_label), f"{layer}.horizontal_out")
    return convolve(F.relu(convolve(F.relu(v + h), "head.1")), "head.3")


@pytest.mark.parametrize("map_shape", [(4, 6), (3, 1), (1, 4), (1, 1)])
def test_the_network_is_the_papers_figure_by_plain_convolutions(map_shape: tuple[int, int]) -> None:
    network = make_prior(map_shape, num_codes=5).double()
    maps, labels = random_maps(11, network), torch.arange(11)
    torch.testing.assert_close(network(maps, labels), plain_logits(network, maps, labels))


def test_dropout_meets_the_inputs_of_both_stacks_in_training_alone_and_a_pass_writes_no_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    halve = Mock(side_effect=lambda x, p: x * 0.5)
    monkeypatch.setattr(prior.model, "dropout", halve)
    network, labels = make_prior((4, 6), dropout=0.3).double(), torch.arange(3)
    maps, before = random_maps(3, network), {name: tensor.clone() for name, tensor in network.state_dict().items()}
    torch.testing.assert_close(network(maps, labels), plain_logits(network, maps, labels))
    make_prior((4, 6), dropout=0.0).train()(maps, labels)
    halve.assert_not_called()
    found = network.train()(maps, labels)
    torch.testing.assert_close(found, plain_logits(network, maps, labels, kept=0.5))
    assert [call.args[1] for call in halve.call_args_list] == [0.3] * 2 * len(network.layers)
    found.sum().backward()
    assert list(network.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def raster_past(map_shape: tuple[int, int]) -> Tensor:
    """[output, input], both in raster order: True where the input comes before the output."""
    return torch.ones(math.prod(map_shape), math.prod(map_shape)).tril(-1).bool()


@torch.no_grad()
def influence(network: GatedPixelCNN) -> Tensor:
    """[output, input]: True where some other code at an input position changes the logits at an output position."""
    num, base = math.prod(network.map_shape), random_maps(1, network).flatten(1)
    changed = torch.zeros(num, num, dtype=torch.bool)
    for step in range(1, network.num_codes):
        maps = base.repeat(num + 1, 1)
        maps[range(num), range(num)] = (base[0] + step) % network.num_codes
        logits = network.double()(maps.unflatten(1, network.map_shape)).flatten(2)
        changed |= ((logits[:-1] - logits[-1:]).abs().amax(dim=1) > 1e-13).T
    return changed


@pytest.mark.parametrize("map_shape", SHAPES + TINY)
def test_each_position_sees_all_codes_before_it_and_no_others_at_the_default_depth(map_shape: tuple[int, int]) -> None:
    assert torch.equal(influence(make_prior(map_shape, num_codes=3)), raster_past(map_shape))


@pytest.mark.parametrize("map_shape", SHAPES)
def test_the_default_depth_is_the_least_one_and_one_layer_less_is_refused(map_shape: tuple[int, int]) -> None:
    depth = layers_needed(map_shape)
    network = make_prior(map_shape, num_codes=3)
    assert len(network.layers) == depth
    message = f"at least {depth} layers for a map of {map_shape[0]}x{map_shape[1]} codes.*found {depth - 1}; set"
    with pytest.raises(InputError, match=message):
        make_prior(map_shape, num_layers=depth - 1)
    network.layers = network.layers[:-1]
    seen, past = influence(network), raster_past(map_shape)
    assert not (seen & ~past).any()
    assert (past & ~seen).any()


@pytest.mark.parametrize("num_classes", [0, 3, 10])
@torch.no_grad()
def test_no_labels_stand_for_no_label_and_unknown_labels_codes_and_shapes_are_errors(num_classes: int) -> None:
    network = make_prior((2, 3), num_classes=num_classes)
    maps = random_maps(2, network)
    assert network.no_label == num_classes
    assert torch.equal(network(maps), network(maps, torch.full((2,), num_classes)))
    for unknown in (-1, num_classes + 1):
        with pytest.raises(IndexError):
            network(maps, torch.tensor([0, unknown]))
    with pytest.raises(IndexError):
        network(torch.full((1, 2, 3), network.num_codes))
    with pytest.raises(ValueError, match=r"expected maps of shape \(2, 3\), found \(3, 2\)"):
        network(maps.transpose(1, 2))


@pytest.mark.parametrize("map_shape", [(16, 16), (3, 5)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.5), (torch.float16, 0.05)])
@torch.no_grad()
def test_the_logits_of_every_type_are_those_of_float64(
    dtype: torch.dtype, tolerance: float, map_shape: tuple[int, int]
) -> None:
    network, labels = make_prior(map_shape, num_codes=5), torch.arange(4)
    maps = random_maps(4, network)
    exact, found = network.double()(maps, labels), network.to(dtype)(maps, labels)
    assert (found.dtype, found.shape) == (dtype, (4, 5, *map_shape))
    assert (found.double() - exact).abs().mean() < tolerance * exact.std()


def fit(network: GatedPixelCNN, batches: list[Tensor], lr: float) -> None:
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, len(batches))
    for maps in batches:
        optimizer.zero_grad()
        nats_per_code(network, maps, None).backward()
        optimizer.step()
        schedule.step()


def test_four_maps_are_learned_to_log_4_nats_a_map_and_not_below() -> None:
    network = make_prior((7, 7), num_codes=8, width=16)
    maps = random_maps(4, network)
    fit(network, [maps] * 200, lr=5e-3)
    found = nats_per_code(network, maps, None).item()
    floor = math.log(4) / 49  # below it, a code would have been seen before it was told
    assert floor * 0.999 < found < floor * 1.05


def test_on_a_source_of_known_entropy_the_likelihood_comes_close_to_it_and_never_passes_it() -> None:
    """A row repeats the row above shifted left by one (around the edge), each code with probability 0.8 and
    one of the two others otherwise. So what a position has to see lies above it on its right, or far left."""
    rng = np.random.default_rng(0)

    def draw(num: int) -> tuple[Tensor, Tensor]:
        maps, kept = np.empty((num, 3, 3), dtype=np.int64), rng.random((num, 2, 3)) < 0.8
        maps[:, 0] = rng.integers(3, size=(num, 3))
        for row in (1, 2):
            slips = rng.integers(1, 3, size=(num, 3)) * ~kept[:, row - 1]
            maps[:, row] = (np.roll(maps[:, row - 1], -1, axis=1) + slips) % 3
        nats = 3 * math.log(3) - np.where(kept, math.log(0.8), math.log(0.1)).sum(axis=(1, 2))
        return torch.from_numpy(maps), torch.from_numpy(nats)

    entropy = 3 * math.log(3) - 6 * (0.8 * math.log(0.8) + 0.2 * math.log(0.1))
    network = make_prior((3, 3), num_codes=3, width=16)
    fit(network, [draw(64)[0] for _ in range(300)], lr=1e-2)
    maps, true_nats = draw(4000)
    assert abs(true_nats.mean().item() - entropy) < 4 * true_nats.std().item() / math.sqrt(4000)
    excess = nats_per_map(network, maps, None) - true_nats  # of the same maps, so the noise of the source drops out
    error = excess.std().item() / math.sqrt(4000)
    assert -3 * error < excess.mean().item() < 0.01 * entropy


def test_saved_weights_give_equal_logits_and_every_size_comes_from_the_files(tmp_path: Path) -> None:
    info = make_info((3, 16, 20), num_classes=3)
    header = save_model(tmp_path / "vqvae.safetensors", make_vqvae(info.image_shape, num_codes=11), "vqvae", info)
    vqvae, _ = load_vqvae(tmp_path / "vqvae.safetensors", CPU)
    network = make_prior((4, 5), num_codes=11, num_classes=3, num_layers=7, width=6, dropout=0.5)
    save_model(tmp_path / "prior.safetensors", network, "prior", info, header.fingerprint)
    loaded, _ = load_prior(tmp_path / "prior.safetensors", vqvae, header, CPU)
    sizes = (loaded.num_codes, loaded.map_shape, loaded.num_classes, len(loaded.layers), loaded.config.width)
    assert sizes == (11, (4, 5), 3, 7, 6)
    assert not loaded.training
    maps, labels = random_maps(4, network), torch.arange(4)
    with torch.no_grad():
        assert torch.equal(loaded(maps, labels), network(maps, labels))


def test_a_prior_beside_a_vqvae_with_one_other_codebook_value_is_refused_and_both_are_named(tmp_path: Path) -> None:
    pair = save_pair(tmp_path)
    load_prior(pair.files[1], pair.vqvae, pair.vqvae_header, CPU)
    with torch.no_grad():
        pair.vqvae.quantizer.codebook[3, 2] += 1e-6
    other = save_model(tmp_path / "other.safetensors", pair.vqvae, "vqvae", pair.info)
    with pytest.raises(InputError, match="expected the VQ-VAE that the prior was trained on") as refusal:
        load_prior(pair.files[1], pair.vqvae, other, CPU)
    for named in (str(pair.files[1]), other.fingerprint[:12], pair.vqvae_header.fingerprint[:12]):
        assert named in str(refusal.value)
