"""Builders that several test files share: data, small networks, checkpoints, and the command line in this process."""

import io
import json
import os
import signal
import sys
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import cli
from prior.codes import Codes
from prior.model import GatedPixelCNN, PriorConfig
from prior.pair import Pair, load
from vqvae.data.dataset import Dataset, DatasetInfo, Split
from vqvae.data.mnist import load_mnist
from vqvae.model import VQVAE, VQVAEConfig
from vqvae.storage import checkpoint

signal.signal(signal.SIGINT, signal.default_int_handler)  # the command line, when it is imported, sets its own
signal.signal(signal.SIGTERM, signal.SIG_DFL)

ROOT = Path(__file__).parents[1]
FIXTURE = ROOT / "tests" / "fixture"  # 480 training and 120 test digits of the real MNIST
SHIPPED = ROOT / "checkpoints" / "pretrained"
CPU = torch.device("cpu")
NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, NO_CUDA])])
both_ways = pytest.mark.parametrize("learning", ["gradient", "ema"])


@cache
def mnist() -> Dataset:
    """The fixture: 440 digits for training, 40 for validation, 120 for test."""
    return load_mnist(FIXTURE, download=False)


def make_info(image_shape: tuple[int, int, int] = (1, 28, 28), num_classes: int = 10) -> DatasetInfo:
    """A dataset's facts. Class c has c + 1 training images."""
    names = tuple(f"class {label}" for label in range(num_classes))
    return DatasetInfo("made", image_shape, names, tuple(range(1, num_classes + 1)))


def make_split(
    num: int, image_shape: tuple[int, int, int] = (1, 28, 28), num_classes: int = 10, seed: int = 0
) -> Split:
    """Random images, and every class in turn. Without classes every label is 0."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (num, *image_shape), generator=generator).to(torch.uint8)
    return Split(images, torch.arange(num) % max(num_classes, 1))


def make_dataset(num: int = 60, image_shape: tuple[int, int, int] = (1, 28, 28), num_classes: int = 10) -> Dataset:
    """Random images as a dataset: `num` for training, 20 each for validation and test."""
    train, validation, test = (make_split(n, image_shape, num_classes, seed) for seed, n in enumerate((num, 20, 20)))
    return Dataset(make_info(image_shape, num_classes), train, validation, lambda: test)


def make_vqvae(image_shape: tuple[int, int, int] = (1, 28, 28), seed: int = 0, **config: Any) -> VQVAE:
    """A small VQ-VAE in eval mode: 4 dimensions, 16 codes, an EMA codebook of vectors from its encoder."""
    torch.manual_seed(seed)
    small = {"code_dim": 4, "num_codes": 16, "width": 8, "num_encoder_blocks": 1, "num_decoder_blocks": 1}
    model = VQVAE(VQVAEConfig(**{**small, "codebook_learning": "ema", **config}), image_shape)
    with torch.no_grad():
        some = torch.rand(model.config.num_codes, *image_shape) * 2 - 1
        model.quantizer.codebook.copy_(model.encode_continuous(some)[:, :, 0, 0])
        if model.config.codebook_learning == "ema":
            model.quantizer.sums.copy_(model.quantizer.codebook)
            model.quantizer.initialised.fill_(True)
    return model.eval()


def make_prior(
    map_shape: tuple[int, int] = (7, 7), num_codes: int = 16, num_classes: int = 10, seed: int = 0, **config: Any
) -> GatedPixelCNN:
    """A small prior in eval mode, whose weights are large enough that every input matters."""
    torch.manual_seed(seed)
    prior = GatedPixelCNN(PriorConfig(**{"width": 8, **config}), num_codes, map_shape, num_classes)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.mul_(1.5)
    return prior.eval()


def random_maps(num: int, prior: GatedPixelCNN, seed: int = 1) -> Tensor:
    """Code maps (num, H, W) that fit a prior."""
    return torch.randint(prior.num_codes, (num, *prior.map_shape), generator=torch.Generator().manual_seed(seed))


def make_codes(num: int, prior: GatedPixelCNN, seed: int = 1) -> Codes:
    """Random maps, and every class in turn."""
    return Codes(random_maps(num, prior, seed), torch.arange(num) % max(prior.num_classes, 1))


def save_model(
    path: Path, model: nn.Module, stage: str, info: DatasetInfo, vqvae_fingerprint: str | None = None
) -> checkpoint.Header:
    """Write a model as a checkpoint of a stage."""
    return checkpoint.save(
        path,
        model,
        stage=stage,
        config=asdict(model.config),
        data=asdict(info),
        recipe={},
        metrics={},
        vqvae_fingerprint=vqvae_fingerprint,
    )


def save_pair(
    folder: Path, image_shape: tuple[int, int, int] = (1, 28, 28), num_classes: int = 10, seed: int = 0
) -> Pair:
    """A small VQ-VAE and its prior, written to a folder as `vqvae.safetensors` and `prior.safetensors`, and loaded."""
    info = make_info(image_shape, num_classes)
    vqvae = make_vqvae(image_shape, seed)
    prior = make_prior(vqvae.map_shape, num_classes=num_classes, seed=seed)
    header = save_model(folder / "vqvae.safetensors", vqvae, "vqvae", info)
    save_model(folder / "prior.safetensors", prior, "prior", info, header.fingerprint)
    return load(folder / "vqvae.safetensors", folder / "prior.safetensors", CPU)


def log_rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Result(NamedTuple):
    """How a command ended."""

    status: int | str | None
    stdout: str
    stderr: str


def run(*arguments: object) -> Result:
    """`python cli.py <arguments>` in this process. An exception that is not the user's mistake is raised."""
    stdout, stderr, status = io.StringIO(), io.StringIO(), 0
    with ExitStack() as stack:
        for context in (redirect_stdout(stdout), redirect_stderr(stderr), patch.dict(os.environ)):  # --quiet sets it
            stack.enter_context(context)
        stack.enter_context(patch.object(sys, "argv", ["cli.py", *map(str, arguments)]))
        stack.callback(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT))
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
    return Result(status, stdout.getvalue(), stderr.getvalue())
