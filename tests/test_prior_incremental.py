"""The logits position by position, held against whole passes, and what is drawn from them against the plain sampler."""

import itertools

import pytest
import torch
from torch import Tensor

from prior import incremental
from prior.incremental import FEWEST_OPERATIONS, IncrementalLogits, Product
from prior.model import NO_LABEL, GatedPixelCNN, PriorConfig
from prior.sampling import guided, plain_logits, sample

SHAPES = [(7, 7), (4, 6), (6, 3), (1, 7), (7, 1), (1, 1)]
EVERY_LABEL = torch.arange(10)


def make_prior(map_shape: tuple[int, int], dtype: torch.dtype = torch.float64) -> GatedPixelCNN:
    """A network with no parameter near zero, with dropout, and whose codes are all in use. In float64 the two ways'
    rounding is too small to put a uniform number on one side of a code's bound here and on the other there."""
    torch.manual_seed(3)
    network = GatedPixelCNN(PriorConfig(width=8, num_layers=max(map_shape), dropout=0.5), 5, map_shape).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.normal_(std=1.0 if "label" in name or "embedding" in name else 0.4)
        logits = network(random_maps(200, network), torch.arange(200) % (NO_LABEL + 1))
        mean, std = logits.mean(dim=(0, 2, 3)), logits.std(dim=(0, 2, 3))
        head = network.head[-1]
        head.weight.div_(std[:, None, None, None])
        head.bias.sub_(mean).div_(std)
    return network.to(dtype)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_maps(num: int, network: GatedPixelCNN, seed: int = 1) -> Tensor:
    return torch.randint(network.num_codes, (num, *network.map_shape), generator=seeded(seed))


def positions(network: GatedPixelCNN) -> list[tuple[int, int]]:
    height, width = network.map_shape
    return [(i, j) for i in range(height) for j in range(width)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("map_shape", SHAPES)
@torch.no_grad()
def test_the_logits_are_those_of_a_whole_pass_and_no_code_yet_to_come_is_looked_at(
    map_shape: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    network = make_prior(map_shape, dtype)
    labels = torch.arange(NO_LABEL + 1)
    maps = random_maps(len(labels), network)
    whole = network(maps, labels)
    assert whole.std(dim=1).mean() > 0.5  # logits that are far apart
    logits_at = IncrementalLogits(network, labels)
    for i, j in positions(network):
        so_far = torch.full_like(maps, -1)  # to embed one of these is an IndexError
        so_far[:, :i], so_far[:, i, :j] = maps[:, :i], maps[:, i, :j]
        assert torch.allclose(logits_at(so_far, i, j), whole[:, :, i, j], rtol=0, atol=tolerance), (i, j)


@torch.no_grad()
def test_two_that_are_asked_in_turn_keep_apart() -> None:
    network = make_prior((4, 6))
    maps, labels = random_maps(2, network).split(1), torch.tensor([3, NO_LABEL]).split(1)
    whole = [network(*one) for one in zip(maps, labels, strict=True)]
    both = [IncrementalLogits(network, label) for label in labels]
    for (i, j), n in itertools.product(positions(network), range(2)):
        assert torch.allclose(both[n](maps[n], i, j), whole[n][:, :, i, j], rtol=0, atol=1e-12)


def on_avx512(monkeypatch: pytest.MonkeyPatch, there: bool, fewest_operations: int = FEWEST_OPERATIONS) -> None:
    """oneDNN computes the same on any processor; where it is the faster one is all that depends on it."""
    monkeypatch.setattr(incremental, "processor_has", lambda instructions: there)
    monkeypatch.setattr(incremental, "FEWEST_OPERATIONS", fewest_operations)


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("num", [1, FEWEST_OPERATIONS // (8 * 24) - 1, FEWEST_OPERATIONS // (8 * 24) + 1])
@torch.no_grad()
def test_a_product_is_the_same_whichever_library_makes_it(
    num: int, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_avx512(monkeypatch, there)
    x, weight, plus = (torch.randn(*shape, generator=seeded(0)) for shape in ((num, 8), (24, 8), (num, 24)))
    bias = torch.randn(24, generator=seeded(1))
    product = Product(weight)
    expected = x.double() @ weight.T.double()
    torch.testing.assert_close(product(x, plus=bias).double(), expected + bias, rtol=0, atol=1e-5)
    kept, out = plus.clone(), torch.empty(num, 24)
    torch.testing.assert_close(product(x, plus=plus).double(), expected + plus, rtol=0, atol=1e-5)
    assert product(x, plus=plus, out=out) is out
    torch.testing.assert_close(out.double(), expected + kept, rtol=0, atol=1e-5)
    assert torch.equal(plus, kept)
    torch.testing.assert_close(product(x, plus=plus, out=plus).double(), expected + kept, rtol=0, atol=1e-5)


def test_onednn_is_left_alone_where_torch_was_built_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    on_avx512(monkeypatch, True, fewest_operations=0)
    assert Product(torch.ones(24, 8)).fewest_inputs == 0
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert Product(torch.ones(24, 8)).fewest_inputs == float("inf")


@pytest.mark.parametrize("map_shape", SHAPES)
@torch.no_grad()
def test_the_logits_are_the_same_where_onednn_makes_every_product(
    map_shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = make_prior(map_shape, torch.float32)
    labels = torch.arange(NO_LABEL + 1)
    maps = random_maps(len(labels), network)
    both = []
    for there in (False, True):
        on_avx512(monkeypatch, there, fewest_operations=0)
        logits_at = IncrementalLogits(network, labels)
        both.append([logits_at(maps, i, j) for i, j in positions(network)])
    torch.testing.assert_close(both[0], both[1], rtol=0, atol=1e-5)


def given_maps(map_shape: tuple[int, int], share: float) -> Tensor:
    """Ten maps of codes with about this share of them told."""
    codes = torch.randint(5, (10, *map_shape), generator=seeded(4))
    return codes.where(torch.rand(codes.shape, generator=seeded(5)) < share, -1)


# Options of sample(); "labels" and "given" stand for the tensors that all_options() puts there.
OPTIONS: list[dict[str, float]] = [
    {},
    {"labels": 1},
    {"labels": 1, "guidance": 0.0},
    {"labels": 1, "guidance": 0.5},
    {"labels": 1, "guidance": 2.0},
    {"labels": 1, "guidance": 100.0},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 2},
    {"top_p": 0.7},
    {"given": 0.0},
    {"given": 0.4},
    {"given": 1.0},
    {"labels": 1, "guidance": 2.0, "temperature": 1.5, "top_k": 4, "top_p": 0.9, "given": 0.3},
]


def all_options(options: dict[str, float], map_shape: tuple[int, int]) -> dict[str, object]:
    labels = {"labels": EVERY_LABEL} if "labels" in options else {}
    given = {"given": given_maps(map_shape, options["given"])} if "given" in options else {}
    return {**options, **labels, **given}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("map_shape", SHAPES)
def test_the_indices_are_those_of_the_plain_sampler(map_shape: tuple[int, int], options: dict[str, float]) -> None:
    network = make_prior(map_shape).train()  # dropout would show, were it not turned off
    told = all_options(options, map_shape)
    drawn = sample(network, 10, seeded(6), **told)
    assert torch.equal(drawn, sample(network, 10, seeded(6), logits_from=plain_logits, **told))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_on_cuda_the_indices_are_those_of_the_plain_sampler(options: dict[str, float]) -> None:
    network, told = make_prior((7, 7)), all_options(options, (7, 7))
    expected = sample(network, 10, seeded(6), logits_from=plain_logits, **told)
    assert torch.equal(sample(network.cuda(), 10, seeded(6), **told), expected)
    assert torch.equal(sample(network, 10, seeded(6), logits_from=plain_logits, **told), expected)


def test_at_the_default_size_the_indices_are_those_of_the_plain_sampler() -> None:
    torch.manual_seed(3)
    network = GatedPixelCNN(PriorConfig(), 512, (7, 7))
    with torch.no_grad():
        network.head[-1].weight.mul_(30)
    told = {"labels": torch.tensor([0, 7]), "guidance": 1.5}
    drawn = sample(network, 2, seeded(9), **told)
    assert len(drawn.unique()) > 20
    assert torch.equal(drawn, sample(network, 2, seeded(9), logits_from=plain_logits, **told))


def test_those_options_matter() -> None:
    """Else the comparison above would say little of them."""
    network = make_prior((4, 6))
    drawn = {str(options): sample(network, 10, seeded(6), **all_options(options, (4, 6))) for options in OPTIONS}
    same = {(a, b) for a, b in itertools.combinations(drawn, 2) if torch.equal(drawn[a], drawn[b])}
    nothing = str({})
    assert same == {
        (nothing, str({"labels": 1, "guidance": 0.0})),
        (nothing, str({"given": 0.0})),
        (str({"labels": 1, "guidance": 0.0}), str({"given": 0.0})),
    }
    for maps in drawn.values():
        assert (maps[0] != maps[1:]).flatten(1).any(dim=1).all()


@pytest.mark.parametrize("options", [{}, OPTIONS[-1]], ids=str)
@pytest.mark.parametrize("batch_size", [1, 4, 5, 10, 100])
def test_each_batch_starts_afresh(batch_size: int, options: dict[str, float]) -> None:
    network = make_prior((4, 6))
    told = all_options(options, (4, 6))
    expected = sample(network, 10, seeded(7), logits_from=plain_logits, **told)
    for _ in range(2):
        assert torch.equal(sample(network, 10, seeded(7), batch_size=batch_size, **told), expected)


def test_plain_logits_alone_run_the_network_whole() -> None:
    """Once a position and batch, so the two samplers that are compared here are two."""
    network, calls = make_prior((4, 6)), []
    network.register_forward_hook(lambda *_: calls.append(1))
    sample(network, 10, seeded(8), batch_size=5)
    assert len(calls) == 0
    sample(network, 10, seeded(8), batch_size=5, logits_from=plain_logits)
    assert len(calls) == 2 * 4 * 6


@torch.no_grad()
def test_a_guidance_of_1_gives_the_logits_with_the_label_to_the_last_bit() -> None:
    network = make_prior((4, 6), torch.float32)
    maps = random_maps(10, network)
    plain, by_guidance = IncrementalLogits(network, EVERY_LABEL), guided(network, EVERY_LABEL, 1.0, IncrementalLogits)
    for i, j in positions(network):
        assert torch.equal(by_guidance(maps, i, j), plain(maps, i, j))
