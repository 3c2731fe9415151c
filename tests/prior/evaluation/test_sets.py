from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from prior.evaluation.sets import Sampler, choose, decoded_images, make_samplers, real_images
from prior.independent import draw_independently
from prior.maps import draw_maps
from prior.sampling import draw_labels
from tests.helpers import make_info, make_prior, make_split, make_vqvae, random_maps
from vqvae.codec import encode_images
from vqvae.compute import derive_seed
from vqvae.data.dataset import Split, require_same_kind
from vqvae.data.pixels import unit_images
from vqvae.errors import InputError
from vqvae.gaussian import gaussian_images, gaussian_latents


def seeded(*keys: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(*keys))


@pytest.mark.parametrize(("num_classes", "guidance"), [(3, 2.5), (3, 1.0), (0, 2.5)])
def test_every_sampler_draws_in_its_own_way_for_its_own_labels(num_classes: int, guidance: float) -> None:
    def pixelcnn(labels: Tensor | None, guidance: float = 1.0) -> Callable[[torch.Generator], Tensor]:
        return lambda g: draw_maps(prior, 6, g, labels=labels, guidance=guidance)

    vqvae, info, held_out = make_vqvae(), make_info(num_classes=num_classes), make_split(6, num_classes=num_classes)
    prior, asked = make_prior(num_classes=num_classes), torch.tensor([2, 0, 0, 1, 2, 1])
    drawn = draw_labels(make_info(num_classes=3).class_frequencies, 6, seeded(4, "labels"))
    frequencies, even = torch.rand(7, 7, 16, generator=seeded(0)).double(), torch.ones(7, 7, 16).double()
    expected = [
        ("their reconstructions", held_out.labels, lambda g: encode_images(vqvae, held_out.images)),
        ("pixelcnn, labels asked for, guidance 2.5", asked, pixelcnn(asked, 2.5)),
        ("pixelcnn, labels asked for, guidance 1", asked, pixelcnn(asked)),
        (f"pixelcnn, label drawn first, guidance {guidance:g}", drawn, pixelcnn(drawn, guidance)),
        ("pixelcnn without any label", None, pixelcnn(None)),
        ("per-position unigram", None, lambda g: draw_independently(frequencies, 6, g)),
        ("uniform code", None, lambda g: draw_independently(even, 6, g)),
        ("gaussian latents", None, lambda g: gaussian_latents(vqvae, 6, g)),
        ("gaussian images", None, lambda g: gaussian_images(vqvae, 6, g)),
    ]
    if guidance == 1:
        del expected[1]
    if num_classes == 0:
        expected[:5] = [("their reconstructions", None, expected[0][2]), ("pixelcnn", None, pixelcnn(None))]
    samplers = make_samplers(vqvae, prior, info, held_out, asked, frequencies, seed=4, guidance=guidance)
    done: list[int] = []
    for sampler, (title, labels, draw) in zip(samplers, expected, strict=True):
        assert sampler.title == title
        assert torch.equal(sampler.draw(seeded(1), done.append), draw(seeded(1))), title
        assert sampler.labels is labels is None or torch.equal(sampler.labels, labels)
    assert done == [6] * sum("pixelcnn" in title for title, _, _ in expected)  # these take long, and tell


def test_drawn_maps_are_decoded_to_the_nearest_byte_in_eval_mode_and_every_mode_is_restored() -> None:
    def draw(generator: torch.Generator, progress: Callable[[int], object]) -> Tensor:
        assert not vqvae.training
        assert torch.equal(torch.rand(1, generator=generator), torch.rand(1, generator=seeded(3, "name")))  # its own
        return maps

    vqvae, labels = make_vqvae((3, 20, 36)).train(), torch.arange(5)
    vqvae.decoder.eval()
    modes, maps = [module.training for module in vqvae.modules()], random_maps(5, make_prior(vqvae.map_shape))
    found = decoded_images(Sampler("name", "A title", draw, labels), vqvae, 3)
    assert [module.training for module in vqvae.modules()] == modes
    assert (found.name, found.title, found.labels is labels) == ("name", "A title", True)
    with torch.no_grad():
        exact = (vqvae.eval().decode_indices(maps).double() + 1).div(2).clamp(0, 1).mul(255)
    assert torch.equal(found.images, exact.round().to(torch.uint8))
    assert torch.equal(found.indices, maps)


def test_real_images_have_labels_where_there_are_classes_and_others_than_were_learned_are_refused() -> None:
    split, values = make_split(3), torch.arange(256).to(torch.uint8)
    found = real_images(split, make_info())
    assert (found.images is split.images, found.labels is split.labels, found.indices) == (True, True, None)
    assert real_images(split, make_info(num_classes=0)).labels is None
    assert torch.equal(unit_images(values), ((values.float() / 127.5 - 1) + 1) / 2)  # rounded as the model's are
    require_same_kind(make_info(), make_info())
    for other in (make_info((1, 28, 32)), make_info(num_classes=3)):
        with pytest.raises(InputError, match=r"images and classes like those of made, .*, found those of made"):
            require_same_kind(make_info(), other)


def test_the_images_to_measure_are_spread_over_the_whole_split_and_in_order() -> None:
    split = Split(torch.arange(10000), torch.arange(10000) + 1)
    rows, labels = choose(split, 1000, seed=3)
    assert torch.equal(rows, rows.unique())
    assert torch.equal(labels, rows + 1)
    assert [int((rows // 1000 == part).sum()) for part in range(10)] == pytest.approx([100] * 10, abs=40)
    assert not torch.equal(rows, choose(split, 1000, seed=4).images)
    assert torch.equal(choose(split, 10000, seed=3).images, split.images)
