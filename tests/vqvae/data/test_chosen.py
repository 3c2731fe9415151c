"""The images that a command works on: a user's own, or the first of a test split."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import FIXTURE, make_info, make_split, mnist
from vqvae.data.chosen import ImageChoice, read_own
from vqvae.errors import InputError


def save(path: Path, image_shape: tuple[int, int, int], seed: int = 0) -> torch.Tensor:
    """Random pixels as an image file. Returns them, (C, H, W)."""
    pixels = make_split(1, image_shape, seed=seed).images[0]
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).numpy()).save(path)
    return pixels


def test_a_users_images_are_read_as_they_are_with_their_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "dog" / "2.png", tmp_path / "dog" / "10.png", tmp_path / "a.png"]
    for image_shape in ((1, 28, 28), (3, 20, 36)):
        pixels = {file: save(file, image_shape, seed) for seed, file in enumerate(files)}
        found = ImageChoice(tmp_path).read(make_info(image_shape), 1)
        assert found.names == ("a.png", "dog/2.png", "dog/10.png")
        assert torch.equal(found.images, torch.stack([pixels[tmp_path / name] for name in found.names]))
        found = read_own(files[0], image_shape)
        assert found.names == ("2.png",)
        assert torch.equal(found.images[0], pixels[files[0]])
    assert capsys.readouterr().err == ""


def test_images_of_another_shape_are_made_to_fit_and_that_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, image_shape in enumerate([(1, 28, 28), (1, 56, 28), (3, 28, 28)]):
        save(tmp_path / f"{number}.png", image_shape)
    for image_shape, kind, num in (((1, 28, 28), "28x28 and grey", 2), ((3, 12, 16), "12x16 and RGB", 3)):
        assert read_own(tmp_path, image_shape).images.shape == (3, *image_shape)
        expected = f"{num} of 3 images had another size or other colours than the model's, {kind}: their centres were"
        assert capsys.readouterr().err.startswith(expected)


def test_the_first_images_of_a_test_split_are_named_by_their_numbers() -> None:
    images = mnist().load_test().images
    choices = {ImageChoice(data_folder=FIXTURE): 5, ImageChoice(data_folder=FIXTURE, num_images=120): 120}
    for choice, num in choices.items():
        found = choice.read(mnist().info, 5)
        assert torch.equal(found.images, images[:num])
        assert found.names == tuple(map(str, range(num)))
    assert len(ImageChoice(data_folder=FIXTURE).read(mnist().info, 10**6).names) == 120  # the default is at most all
    for num in (0, 121):
        with pytest.raises(InputError, match=f"`num_images` between 1 and 120, found {num}; try `num_images=120`"):
            ImageChoice(data_folder=FIXTURE, num_images=num).read(mnist().info, 5)


@pytest.mark.parametrize(("shape", "num_changed"), [((5, 28, 28), 0), ((5, 3, 14, 28), 5), ((5, 28, 14, 1), 5)])
def test_a_file_of_arrays_has_images_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shape: tuple[int, ...], num_changed: int
) -> None:
    values = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=values)
    found = read_own(tmp_path / "a.npz", (1, 28, 28))
    assert found.names == ("0", "1", "2", "3", "4")
    assert found.images.shape == (5, 1, 28, 28)
    assert capsys.readouterr().err.startswith(f"{num_changed} of 5 images had another" if num_changed else "")
    if num_changed == 0:
        assert np.array_equal(found.images[:, 0], values)
        np.savez(tmp_path / "b.npz", images=(values / 255).astype(np.float32))  # as `sample` writes them
        assert torch.equal(read_own(tmp_path / "b.npz", (1, 28, 28)).images, found.images)


@pytest.mark.parametrize(("name", "value"), [("num_images", 3), ("dataset", "cifar10")])
def test_own_images_and_a_part_of_a_dataset_contradict(name: str, value: object) -> None:
    expected = f"expected `images` or `{name}`, found a.png and {value}; give one of them, because"
    with pytest.raises(InputError, match=re.escape(expected)):
        ImageChoice(Path("a.png"), **{name: value})  # type: ignore[arg-type]
