"""The sampling modes side by side: images of each for one sheet of pictures, and figures for a table."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from prior.evaluation.metrics import nearest
from prior.evaluation.sets import unit_vectors
from prior.likelihood import mixture_nats_per_map
from prior.maps import draw_maps
from prior.pair import Pair
from prior.sampling import GUIDANCE, draw_labels
from vqvae.codec import decode_images, encode_images
from vqvae.compute import derive_seed, eval_mode
from vqvae.data.dataset import Dataset, require_same_kind
from vqvae.data.pixels import unit_images
from vqvae.errors import InputError
from vqvae.gaussian import gaussian_images, gaussian_latents
from vqvae.pictures import columns_for, save_sheet, whole_cycles
from vqvae.quantizer import codes_used, count_codes
from vqvae.storage.files import write_arrays

NUM_ROWS = 3  # of each mode, where no number is given
UNLABELLED = -1  # in the labels of a mode that draws for no label


class Mode(NamedTuple):
    """Images that came about in one way, and figures of them."""

    name: str  # for arrays
    title: str  # for people
    images: Tensor  # (N, C, H, W) float32 in 0..1
    indices: Tensor  # (N, h, w) int64
    labels: Tensor  # (N,) int64, the classes that the images should be of; -1 where there is none
    codes_used: int  # number of different codes in the maps
    nats_per_code: float  # of the maps under the prior, which is not told their labels
    distance: float  # root mean square over pixels to the nearest reference image, mean over images


def compare_modes(pair: Pair, dataset: Dataset, *, num_samples: int | None = None, seed: int = 0) -> list[Mode]:
    """Test images, their reconstructions, both Gaussian baselines, and the prior's samples.

    The test images are the first of each class, ordered so that a grid with a column for each class has one class in
    each column. Distances are measured to the validation images.

    Args:
        num_samples: images of each mode, a multiple of the number of classes. None stands for three rows of the sheet,
            or for fewer where the test split has fewer.
        seed: each mode draws from a generator of its own, derived from it.
    Raises:
        InputError: `num_samples` is no multiple of the number of classes, or the test split has too few images of a
            class; or the dataset is not of the kind that the models have learned.
    """
    info, vqvae = pair.info, pair.vqvae
    require_same_kind(info, dataset.info)
    test = dataset.load_test()
    chosen = first_of_each_class(test.labels, num_samples, info.num_classes)
    num_samples = len(chosen)
    unlabelled = torch.full((num_samples,), UNLABELLED)
    real, labels = test.images[chosen], test.labels[chosen] if info.class_names else unlabelled

    def generator(name: str) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(seed, name))

    real_indices = encode_images(vqvae, real)
    with eval_mode(vqvae):
        from_latents = gaussian_latents(vqvae, num_samples, generator("latents"))
        from_images = gaussian_images(vqvae, num_samples, generator("images"))
    drawn = [
        ("real", "real test images", real_indices, labels),
        ("reconstructed", "their reconstructions", real_indices, labels),
        ("gaussian_latent", "gaussian: codes nearest to Gaussian latents", from_latents, unlabelled),
        ("gaussian_image", "gaussian: Gaussian images through the model", from_images, unlabelled),
    ]
    if info.class_names:
        maps = draw_maps(pair.prior, num_samples, generator("pixelcnn"), labels=labels, guidance=GUIDANCE)
        drawn.append(("pixelcnn", "pixelcnn: codes drawn for the labels above", maps, labels))
        name, title = "pixelcnn_unlabelled", "pixelcnn: label drawn first, then the codes"
        drawn_labels = draw_labels(info.class_frequencies, num_samples, generator("labels"))
        maps = draw_maps(pair.prior, num_samples, generator(name), labels=drawn_labels, guidance=GUIDANCE)
        drawn.append((name, title, maps, drawn_labels))
    else:
        maps = draw_maps(pair.prior, num_samples, generator("pixelcnn"))
        drawn.append(("pixelcnn", "pixelcnn: codes drawn from the learned prior", maps, unlabelled))
    reference = dataset.validation.images
    originals = {"real": unit_images(real)}  # all other images are decoded codes
    return [_to_mode(pair, *parts, reference, originals.get(parts[0])) for parts in drawn]


def as_text(modes: list[Mode]) -> str:
    """The figures as a table, and what they are."""
    width = max(len(mode.title) for mode in modes)
    head = f"{'':{width}} {'codes used':>11} {'nats/code':>10} {'distance':>9}"
    rows = [f"{m.title:{width}} {m.codes_used:11} {m.nats_per_code:10.2f} {m.distance:9.3f}" for m in modes]
    remark = (
        "nats/code: of the maps under the prior, which is not told their labels; distance: to the nearest validation "
        "image, rms over pixels in 0..1"
    )
    return "\n".join([head, *rows, remark])


def save_comparison(modes: list[Mode], output: Path, class_names: Sequence[str]) -> None:
    """Write the modes to a file: one sheet of pictures as .png, or else the arrays of all modes in a row as .npz.

    Args:
        class_names: of the images. More than one stand above the columns of the sheet.
    Raises:
        InputError: the file can't be written.
    """
    if output.suffix == ".png":
        num, cycle = len(modes[0].images), max(len(class_names), 1)
        columns = min(max(columns_for(num, cycle), cycle), num)
        heads = [class_names[i % len(class_names)] for i in range(columns)] if len(class_names) > 1 else ()
        save_sheet([(mode.title, mode.images) for mode in modes], output, columns, heads)
        return
    names = np.array([mode.name for mode in modes for _ in mode.labels])
    arrays = {name: torch.cat([getattr(m, name) for m in modes]).numpy() for name in ("images", "indices", "labels")}
    write_arrays(output, {**arrays, "modes": names})


def first_of_each_class(labels: Tensor, num_samples: int | None, num_classes: int) -> Tensor:
    """Positions (num_samples,) of the first labels of each class, so that row i has the i-th of every class.

    Without classes they are the first positions.

    Args:
        num_samples: None stands for three rows of the sheet, or for fewer where there are fewer labels.
    Raises:
        InputError: `num_samples` is no multiple of the number of classes, or a class has too few labels.
    """
    columns = max(num_classes, 1)
    fewest = int(torch.bincount(labels, minlength=columns).min())
    if fewest == 0:
        raise InputError("expected test images of every class, found none of some; choose data that has some of each")
    three_rows = NUM_ROWS * whole_cycles(columns)
    num_samples = min(three_rows, fewest * columns) if num_samples is None else num_samples
    num_rows = min(max(num_samples // columns, 1), fewest)
    if num_samples != num_rows * columns:
        multiple = f", a multiple of {columns}, the number of classes," if num_classes > 1 else ""
        raise InputError(
            f"expected `num_samples`{multiple} between {columns} and {columns * fewest}, for which there are enough "
            f"test images, found {num_samples}; try `num_samples={num_rows * columns}`"
        )
    return torch.stack([(labels == label).nonzero()[:num_rows, 0] for label in range(columns)], dim=1).flatten()


def _to_mode(
    pair: Pair, name: str, title: str, indices: Tensor, labels: Tensor, reference: Tensor, images: Tensor | None = None
) -> Mode:
    """A mode with its figures.

    Args:
        reference: (M, C, H, W) uint8, the images that distances are measured to.
        images: None decodes the indices.
    """
    images = decode_images(pair.vqvae, indices) if images is None else images
    distances, _ = nearest(images.flatten(1), reference, unit_vectors)
    distance = (distances / images[0].numel() ** 0.5).mean().item()
    nats = mixture_nats_per_map(pair.prior, indices, pair.info.class_frequencies).mean().item()
    used = codes_used(count_codes(indices, pair.vqvae.config.num_codes))
    return Mode(name, title, images, indices.cpu(), labels, used, nats / indices[0].numel(), distance)
