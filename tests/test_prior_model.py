"""The prior's network: what each position sees, and how low its likelihood can go."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from prior.model import (
    NO_LABEL,
    GatedLayer,
    GatedPixelCNN,
    PriorConfig,
    VerticalWindows,
    gate,
    load_prior,
    to_the_right,
)
from vqvae.common import checkpoint
from vqvae.common.errors import UserError
from vqvae.model import VQVAE, VQVAEConfig, load_vqvae

SHAPES = [(7, 7), (1, 7), (7, 1), (4, 6), (6, 4)]
LONG_AND_TINY = [(1, 10), (10, 1), (1, 1), (1, 2), (2, 1), (2, 2), (3, 2)]


def make_prior(
    map_shape: tuple[int, int], num_codes: int = 3, num_layers: int | None = None, width: int = 8, seed: int = 0
) -> GatedPixelCNN:
    torch.manual_seed(seed)
    depth = least_depth(map_shape) if num_layers is None else num_layers
    return GatedPixelCNN(PriorConfig(width=width, num_layers=depth), num_codes, map_shape).eval()


def least_depth(map_shape: tuple[int, int]) -> int:
    for num_layers in range(1, 64):
        try:
            GatedPixelCNN(PriorConfig(width=1, num_layers=num_layers), 2, map_shape)
        except UserError:
            continue
        return num_layers
    raise AssertionError(f"no depth is deep enough for {map_shape}")


def random_maps(num: int, prior: GatedPixelCNN, seed: int = 1) -> Tensor:
    return torch.randint(prior.num_codes, (num, *prior.map_shape), generator=torch.Generator().manual_seed(seed))


def raster_past(map_shape: tuple[int, int]) -> Tensor:
    """[output, input], both in raster order: True where the input comes before the output."""
    positions = [(i, j) for i in range(map_shape[0]) for j in range(map_shape[1])]
    return torch.tensor([[earlier < later for earlier in positions] for later in positions])


def influence_by_gradient(prior: GatedPixelCNN) -> Tensor:
    """[output, input]: True where the logits at an output position have a gradient on the input's embedding.
    Item n of the batch asks for output position n."""
    prior = prior.double()
    num = prior.map_shape[0] * prior.map_shape[1]
    embedded: list[Tensor] = []
    handle = prior.embedding.register_forward_hook(lambda _module, _inputs, output: embedded.append(output))
    logits = prior(random_maps(1, prior).expand(num, -1, -1)).flatten(2)
    handle.remove()
    asked = torch.stack([logits[n, :, n] for n in range(num)])
    weights = torch.randn(asked.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((asked * weights).sum(), embedded[0])
    return gradient.abs().sum(dim=3).flatten(1) != 0


@torch.no_grad()
def influence_by_change(prior: GatedPixelCNN) -> Tensor:
    """[output, input]: True where some other code at an input position changes the logits at an output position."""
    prior = prior.double()
    num = prior.map_shape[0] * prior.map_shape[1]
    base = random_maps(1, prior).flatten(1)
    changed = torch.zeros(num, num, dtype=torch.bool)
    for step in range(1, prior.num_codes):
        maps = base.repeat(num + 1, 1)
        for n in range(num):
            maps[n, n] = (maps[n, n] + step) % prior.num_codes
        logits = prior(maps.unflatten(1, prior.map_shape)).flatten(2)
        changed |= ((logits[:-1] - logits[-1:]).abs().amax(dim=1) > 1e-13).T
    return changed


@pytest.mark.parametrize("map_shape", SHAPES + LONG_AND_TINY)
def test_each_position_sees_all_earlier_codes_and_no_others_at_the_least_depth(map_shape: tuple[int, int]) -> None:
    past = raster_past(map_shape)
    assert torch.equal(influence_by_gradient(make_prior(map_shape)), past)
    assert torch.equal(influence_by_change(make_prior(map_shape)), past)


@pytest.mark.parametrize("map_shape", SHAPES)
def test_each_position_sees_all_earlier_codes_and_no_others_at_the_default_depth(map_shape: tuple[int, int]) -> None:
    past = raster_past(map_shape)
    assert torch.equal(influence_by_gradient(make_prior(map_shape, num_layers=PriorConfig().num_layers)), past)
    assert torch.equal(influence_by_change(make_prior(map_shape, num_layers=PriorConfig().num_layers)), past)


@pytest.mark.parametrize("map_shape", [(7, 7), (7, 1), (4, 6), (6, 4)])
def test_one_layer_below_the_least_depth_is_refused_and_would_miss_earlier_codes(map_shape: tuple[int, int]) -> None:
    depth = least_depth(map_shape)
    message = f"at least {depth} layers for a map of {map_shape[0]}x{map_shape[1]} codes.*found {depth - 1}"
    with pytest.raises(UserError, match=message):
        make_prior(map_shape, num_layers=depth - 1)
    prior = make_prior(map_shape)
    prior.layers = prior.layers[:-1]
    seen, past = influence_by_gradient(prior), raster_past(map_shape)
    assert not (seen & ~past).any()
    assert (past & ~seen).any()


@torch.no_grad()
def test_the_first_position_depends_on_the_label_alone() -> None:
    prior = make_prior((4, 6), num_codes=5)
    labels = torch.tensor([3, 3, 3, 8, NO_LABEL])
    first = prior(random_maps(5, prior), labels)[:, :, 0, 0]
    assert torch.allclose(first[1], first[0], atol=1e-6)
    assert torch.allclose(first[2], first[0], atol=1e-6)
    assert (first[3] - first[0]).abs().max() > 1e-3
    assert (first[4] - first[0]).abs().max() > 1e-3


@torch.no_grad()
def test_the_label_reaches_every_position() -> None:
    prior = make_prior((7, 7), num_codes=16)
    logits = prior(random_maps(1, prior).expand(11, -1, -1), torch.arange(11))
    for one in range(11):
        for other in range(one):
            assert ((logits[one] - logits[other]).abs().amax(dim=0) > 1e-3).all()


def test_every_weight_takes_part_with_every_label_and_code_in_use() -> None:
    """Both stacks of every layer are told the label, and the links from one to the other are there."""
    prior = make_prior((7, 7), num_codes=5).double()
    logits = prior(random_maps(11, prior), torch.arange(11))
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    for name, parameter in prior.named_parameters():
        assert parameter.grad is not None, name
        moved = parameter.grad != 0
        assert moved.any() if name.startswith("head") else moved.all(), name  # units of the head may be dead


@torch.no_grad()
def test_no_labels_is_the_no_label_label_and_an_unknown_label_is_an_error() -> None:
    prior = make_prior((2, 3))
    maps = random_maps(2, prior)
    assert NO_LABEL not in range(10)
    assert torch.equal(prior(maps), prior(maps, torch.tensor([NO_LABEL, NO_LABEL])))
    for unknown in (-1, NO_LABEL + 1):
        with pytest.raises(IndexError):
            prior(maps, torch.tensor([0, unknown]))


def test_a_map_of_another_shape_or_with_an_unknown_code_is_an_error() -> None:
    prior = make_prior((2, 3))
    with pytest.raises(ValueError, match=r"expected maps of shape \(2, 3\), found \(3, 2\)"):
        prior(torch.zeros(1, 3, 2, dtype=torch.int64))
    with pytest.raises(IndexError):
        prior(torch.full((1, 2, 3), prior.num_codes))


def test_products_of_windows_are_the_convolutions_and_so_are_their_gradients() -> None:
    torch.manual_seed(0)
    layer = GatedLayer(3, dropout=0.0).double()
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64, requires_grad=True)
    one_side = torch.cat([to_the_right(x), x], dim=3)
    for convolution, windows, padding in (
        (layer.vertical, VerticalWindows.apply(x), (1, 1, 1, 0)),  # the row above, both sides
        (layer.horizontal, one_side, (1, 0)),  # the left
        (layer.vertical_out, x, (0, 0)),
    ):
        padded = F.pad(x.permute(0, 3, 1, 2), padding)
        expected = F.conv2d(padded, convolution.weight, convolution.bias).permute(0, 2, 3, 1)
        found = convolution(windows)
        torch.testing.assert_close(found, expected)
        leaves = (x, convolution.weight, convolution.bias)
        direction = torch.randn_like(found)
        gradients = [torch.autograd.grad((out * direction).sum(), leaves) for out in (found, expected)]
        torch.testing.assert_close(gradients[0], gradients[1])


def test_the_gate_is_tanh_times_sigmoid() -> None:
    values = torch.linspace(-20, 20, 1001)
    features = torch.stack([values, values.flip(0)], dim=1)[None]
    f, g = features.double().chunk(2, dim=2)
    torch.testing.assert_close(gate(features).double(), f.tanh() * g.sigmoid(), rtol=0, atol=3e-7)
    assert gate(features).shape == (1, 1001, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_dropout_keeps_its_share_scaled_so_that_the_mean_stays_and_nothing_is_dropped_in_eval(
    dtype: torch.dtype, share: float
) -> None:
    torch.manual_seed(0)
    layer = GatedLayer(7, dropout=share)
    x = torch.ones(30, 7, 40, 50, dtype=dtype, requires_grad=True)
    dropped = layer._dropped(x)
    assert dropped.dtype == dtype
    assert dropped.unique().tolist() == pytest.approx([0, 1 / (1 - share)], rel=4e-3)
    for dim in range(4):  # of every sample, channel, row and column alike
        zeros = (dropped == 0).double().transpose(0, dim).flatten(1).mean(1)
        five_deviations = 5 * (share * (1 - share) * len(zeros) / x.numel()) ** 0.5
        assert (zeros - share).abs().max() < five_deviations
    dropped.sum().backward()
    assert torch.equal(x.grad, dropped)
    assert layer.eval()._dropped(x) is x


@torch.no_grad()
def test_under_autocast_the_logits_are_bfloat16s_rounding_of_those_without() -> None:
    torch.manual_seed(0)
    network = GatedPixelCNN(PriorConfig(width=16), 32, (7, 7)).eval()
    maps, labels = torch.randint(32, (10, 7, 7)), torch.arange(10)
    exact = network(maps, labels)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = network(maps, labels)
    assert rounded.dtype == torch.bfloat16
    assert 0 < (rounded - exact).abs().max() < 0.1 * exact.std()


@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_items_of_a_batch_know_nothing_of_each_other(training: bool) -> None:
    prior = make_prior((4, 6), num_codes=5).double().train(training)
    maps, labels = random_maps(6, prior), torch.tensor([0, 1, 2, NO_LABEL, 4, 5])
    together = prior(maps, labels)
    for n in range(6):
        assert torch.allclose(prior(maps[n : n + 1], labels[n : n + 1])[0], together[n], atol=1e-12)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.allclose(prior(maps[order], labels[order]), together[order], atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
def test_forward_writes_nothing_into_the_weights(training: bool) -> None:
    prior = make_prior((4, 6)).train(training)
    before = {name: tensor.clone() for name, tensor in prior.state_dict().items()}
    prior(random_maps(4, prior), torch.arange(4)).sum().backward()
    assert list(prior.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in prior.state_dict().items())


@torch.no_grad()
def test_relabelled_codes_with_tables_permuted_to_match_only_permute_the_logits() -> None:
    prior, relabelled = make_prior((4, 6), num_codes=7), make_prior((4, 6), num_codes=7)
    maps = random_maps(5, prior)
    new_name = torch.tensor([4, 2, 6, 0, 1, 3, 5])
    relabelled.embedding.weight[new_name] = prior.embedding.weight
    relabelled.head[-1].weight[new_name] = prior.head[-1].weight
    relabelled.head[-1].bias[new_name] = prior.head[-1].bias
    assert torch.allclose(relabelled(new_name[maps])[:, new_name], prior(maps), atol=1e-6)
    assert not torch.allclose(relabelled(maps), prior(maps), atol=1e-3)


@pytest.mark.parametrize(
    ("field", "value"), [("width", 0), ("num_layers", 0), ("dropout", -0.1), ("dropout", 1.0), ("num_layers", 65)]
)
def test_a_setting_out_of_its_range_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{field} between .* found {value:g}"):
        PriorConfig(**{field: value})


# What likelihood can be reached


def fit(prior: GatedPixelCNN, batches: list[Tensor], labels: Tensor | None = None, lr: float = 5e-3) -> None:
    optimizer = torch.optim.Adam(prior.parameters(), lr=lr)
    for step, maps in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / len(batches))
        optimizer.zero_grad()
        F.cross_entropy(prior(maps, labels), maps).backward()
        optimizer.step()


def test_four_maps_are_learned_to_log_4_nats_a_map_and_not_below() -> None:
    prior = make_prior((7, 7), num_codes=8, width=16)
    maps = random_maps(4, prior)
    fit(prior, [maps] * 200)
    with torch.no_grad():
        nats_per_code = F.cross_entropy(prior(maps), maps).item()
    floor = math.log(4) / 49  # below it, a code would have been seen before it was told
    assert floor * 0.999 < nats_per_code < floor * 1.05


def test_maps_told_apart_by_their_label_cost_nothing_with_it() -> None:
    prior = make_prior((3, 4), num_codes=8, width=16)
    maps, labels = random_maps(4, prior), torch.tensor([0, 3, 9, NO_LABEL])
    fit(prior, [maps] * 150, labels)
    with torch.no_grad():
        assert F.cross_entropy(prior(maps, labels), maps).item() < 0.01 * math.log(4) / 12
        wrong = prior(maps, labels.roll(1))[:, :, 0, 0].argmax(dim=1)
        assert torch.equal(wrong, maps.roll(1, dims=0)[:, 0, 0])


def test_on_a_source_of_known_entropy_the_likelihood_comes_close_to_it_and_never_passes_it() -> None:
    """A row repeats the row above shifted left by one (around the edge), each code with probability 0.8 and
    one of the two others otherwise: what a position has to see lies above it on its right, or far left."""
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
    prior = make_prior((3, 3), num_codes=3, width=16)
    fit(prior, [draw(64)[0] for _ in range(300)], lr=1e-2)
    maps, true_nats = draw(4000)
    with torch.no_grad():
        nats = F.cross_entropy(prior(maps), maps, reduction="none").double().sum(dim=(1, 2))
    assert abs(true_nats.mean().item() - entropy) < 4 * true_nats.std().item() / math.sqrt(4000)
    excess = nats - true_nats  # of the same maps, so that the noise of the source drops out
    error = excess.std().item() / math.sqrt(4000)
    assert -3 * error < excess.mean().item() < 0.01 * entropy


# Checkpoints


def save_pair(folder, seed: int = 0, **settings: int) -> tuple[VQVAE, GatedPixelCNN]:
    torch.manual_seed(seed)
    config = {
        "hidden_size": 4,
        "k": 11,
        "width": 8,
        "num_encoder_blocks": 0,
        "num_decoder_blocks": 0,
        "image_size": 16,
        **settings,
    }
    vqvae = VQVAE(VQVAEConfig(**config)).eval()
    prior = GatedPixelCNN(PriorConfig(width=8, num_layers=4), vqvae.config.k, vqvae.map_shape).eval()
    common = {"recipe": {}, "metrics": {}}
    header = checkpoint.save(folder / "vqvae.safetensors", vqvae, stage="vqvae", config=config, **common)
    checkpoint.save(
        folder / "prior.safetensors",
        prior,
        stage="prior",
        config={"width": 8, "num_layers": 4},
        vqvae_fingerprint=header.fingerprint,
        **common,
    )
    return vqvae, prior


def load_pair(vqvae_folder, prior_folder) -> GatedPixelCNN:
    vqvae, header = load_vqvae(vqvae_folder / "vqvae.safetensors", torch.device("cpu"))
    return load_prior(prior_folder / "prior.safetensors", vqvae, header, torch.device("cpu"))[0]


def test_saved_weights_give_equal_logits_and_the_sizes_come_from_the_vqvae(tmp_path) -> None:
    _, prior = save_pair(tmp_path)
    loaded = load_pair(tmp_path, tmp_path)
    assert (loaded.num_codes, loaded.map_shape, loaded.training) == (11, (4, 4), False)
    maps = random_maps(3, prior)
    with torch.no_grad():
        assert torch.equal(loaded(maps, torch.arange(3)), prior(maps, torch.arange(3)))


def test_a_prior_beside_another_vqvae_is_refused_and_both_are_named(tmp_path) -> None:
    for name, seed in (("one", 0), ("other", 1)):
        save_pair(tmp_path / name, seed)
    fingerprints = [checkpoint.read_header(tmp_path / n / "vqvae.safetensors", "vqvae") for n in ("one", "other")]
    with pytest.raises(UserError) as refusal:
        load_pair(tmp_path / "other", tmp_path / "one")
    for named in (tmp_path / "one" / "prior.safetensors", *(header.fingerprint[:12] for header in fingerprints)):
        assert str(named) in str(refusal.value)


def test_one_changed_codebook_value_makes_the_prior_another_vqvaes(tmp_path) -> None:
    vqvae, _ = save_pair(tmp_path)
    load_pair(tmp_path, tmp_path)
    with torch.no_grad():
        vqvae.quantizer.codebook[3, 2] += 1e-6
    config = checkpoint.read_header(tmp_path / "vqvae.safetensors", "vqvae").config
    checkpoint.save(tmp_path / "vqvae.safetensors", vqvae, stage="vqvae", config=config, recipe={}, metrics={})
    with pytest.raises(UserError, match=r"the VQ-VAE that the prior at .* was trained on"):
        load_pair(tmp_path, tmp_path)
