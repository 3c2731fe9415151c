"""Stage one: its training task, and the whole training. The loss is `loss.loss_terms`."""

import math
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from vqvae.codec import reconstruct_images
from vqvae.compute import eval_mode, pick_device, require_memory_to_train, require_whole
from vqvae.console import remark
from vqvae.data.dataset import Dataset, DatasetInfo
from vqvae.data.load import load_dataset
from vqvae.data.pixels import to_model_range, unit_images
from vqvae.distributed import main_first
from vqvae.errors import InputError
from vqvae.loss import VQVAETraining, evaluate_vqvae, loss_terms
from vqvae.model import VQVAE, VQVAEConfig, load_vqvae, map_shape_of
from vqvae.pictures import grid
from vqvae.predictor import CausalPredictor
from vqvae.storage import checkpoint
from vqvae.storage.runs import run_lock, weights_file
from vqvae.training.logs import RunLog
from vqvae.training.loop import Run, Task, fit
from vqvae.training.settings import decline
from vqvae.training.start import require_kept, require_same_network

HARDLY_USED = 1 / 20  # the share of a codebook below which its perplexity is remarked on
NUM_SHOWN = 100


def slow_down_codes(model: VQVAE, training: VQVAETraining, progress: float) -> None:
    """Let an EMA codebook average over more batches as the learning rate declines.

    Codes that follow a fast encoder are averages of few vectors, and so noisy. In the end the encoder hardly moves.

    Args:
        progress: of the run, in 0..1.
    """
    model.quantizer.decay = 1 - (1 - model.config.ema_decay) * max(decline(training, progress), training.slowest_codes)


class VQVAETask(Task):
    """Stage one as a task for the training loop.

    Args:
        path: of the file that keeps the best weights.
        seed: of the initial weights, and of the run.
        start: a model to take the initial weights from, and its fingerprint. None: they are random.
    """

    unit = "images"
    best_by = "squared_error"

    def __init__(
        self,
        config: VQVAEConfig,
        training: VQVAETraining,
        dataset: Dataset,
        path: Path,
        device: torch.device,
        seed: int,
        start: tuple[VQVAE, str] | None = None,
    ) -> None:
        self.training, self.info, self.path = training, dataset.info, path
        self.settings = {**asdict(config), **asdict(training), "seed": seed, "data": dataset.digest}
        self.settings["start_from"] = start and start[1]
        torch.manual_seed(seed)
        self.data, self.validation = (dataset.train.images,), dataset.validation
        self.vqvae = VQVAE(config, dataset.info.image_shape).to(device).to(memory_format=torch.channels_last)
        learning: list[nn.Module] = [self.vqvae]
        if start and training.decoder_only:
            self.vqvae.encoder.load_state_dict(start[0].encoder.state_dict())
            self.vqvae.quantizer.load_state_dict(start[0].quantizer.state_dict())
            self.vqvae.eval().requires_grad_(False)  # so that an EMA codebook stays, too
            learning = [self.vqvae.decoder.requires_grad_()]
        elif start:
            self.vqvae.load_state_dict(start[0].state_dict())  # with the codebook, which does not start from k-means
            batch_size = min(training.batch_size, len(dataset.train.images))
            self.vqvae.quantizer.scale_averages(batch_size * math.prod(self.vqvae.map_shape))
        self.predictor: CausalPredictor | None = None
        if training.prediction_weight > 0:
            self.predictor = CausalPredictor(config.code_dim, self.vqvae.map_shape).to(device)
            learning.append(self.predictor)
        self.model = nn.ModuleList(learning)

    def before_step(self, progress: float) -> None:
        slow_down_codes(self.vqvae, self.training, progress)

    def loss(self, *batch: Tensor) -> dict[str, Tensor]:
        (images,) = batch
        return loss_terms(self.vqvae, images, self.training, self.predictor)[0]

    def evaluate(self) -> dict[str, float]:
        return evaluate_vqvae(self.vqvae, self.validation, self.training, self.predictor)

    def save_best(self, figures: dict[str, float]) -> None:
        checkpoint.save(
            self.path,
            self.vqvae,
            stage="vqvae",
            config=asdict(self.vqvae.config),
            data=asdict(self.info),
            recipe=self.settings,
            metrics=figures,
        )

    def show(self, log: RunLog, epoch: int, step: int) -> None:
        shown = self.validation.images[:NUM_SHOWN]
        if epoch == 1:
            with eval_mode(self.vqvae):
                log.graph(self.vqvae, (to_model_range(shown[:1].to(self.vqvae.device)),))
        log.picture("original", grid(unit_images(shown)), step)
        log.picture("reconstruction", grid(reconstruct_images(self.vqvae, shown)[1]), step)


def train_vqvae(
    config: VQVAEConfig,
    training: VQVAETraining,
    *,
    seed: int = 0,
    dataset: str | Path = "mnist",
    image_size: str | int | None = None,
    data_folder: Path,
    output_folder: Path,
    start_from: Path | None = None,
    device: str | torch.device = "auto",
    resume: bool = False,
    overwrite: bool = False,
    download: bool = True,
) -> dict[str, float]:
    """Train stage one. The best epoch on validation is kept as `<output folder>/vqvae.safetensors`.

    Args:
        dataset, image_size, data_folder: see `vqvae.data.load.load_dataset`.
        start_from: a checkpoint of the same network, whose weights the run begins with. None: random ones.
        resume: go on with the run in the output folder.
        overwrite: replace the run in the output folder.
        download: fetch the data where it is missing.
    Returns:
        the figures of that best epoch on the test split.
    Raises:
        InputError: an argument is out of range, a file is missing or damaged, the images do not fit the network, or
            they are too few for its codes.
        Interrupted: a signal came; the run is saved.
    """
    if start_from is None and training.decoder_only:
        raise InputError("expected weights to start from with `decoder_only`, found none; name them by `start_from`")
    seed = require_whole("seed", seed, 0)
    path, where = weights_file(output_folder, "vqvae"), pick_device(device)
    with main_first():
        data = load_dataset(dataset, data_folder, image_size=image_size, download=download)
    require_enough_images(len(data.train.labels), data.info.image_shape, config)
    require_memory_to_train(lambda: VQVAE(config, data.info.image_shape), config.width)
    start = None if start_from is None else load_start(start_from, path, config, data.info, training.decoder_only)
    with run_lock(output_folder, "vqvae", resume=resume, overwrite=overwrite):
        task = VQVAETask(config, training, data, path, where, seed, start)
        fit(task, training, Run(output_folder / "vqvae", seed, task.settings, resume))
        best, _ = load_vqvae(path, where)
        figures = evaluate_vqvae(best, data.load_test(), training)
    if advice := advice_on_codebook(figures, config):
        remark(advice)
    return figures


def load_start(
    file: Path, weights: Path, config: VQVAEConfig, info: DatasetInfo, decoder_only: bool
) -> tuple[VQVAE, str]:
    """The model to begin a training with, and its fingerprint.

    Args:
        file: its checkpoint.
        weights: the file that the run writes.
        config, info: what is to be trained, and on which data.
        decoder_only: the decoder may be another one.
    Raises:
        InputError: the checkpoint is missing or damaged, it is of another network, or the run would replace it.
    """

    def shaped_by(config: VQVAEConfig, image_shape: tuple[int, int, int]) -> dict[str, object]:
        config = replace(config, ema_decay=0)  # which changes no shape
        if decoder_only:
            config = replace(config, num_decoder_blocks=0, decoder_width=None)
        return {"image_shape": image_shape, **asdict(config)}

    require_kept(file, weights)
    model, header = load_vqvae(file, torch.device("cpu"))
    require_same_network(file, shaped_by(model.config, model.image_shape), shaped_by(config, info.image_shape))
    return model, header.fingerprint


def require_enough_images(num_images: int, image_shape: tuple[int, int, int], config: VQVAEConfig) -> None:
    """Refuse to train more codes than there are positions to take them, and remark on more codes than images.

    Args:
        num_images: for training.
    Raises:
        InputError: there are fewer positions in all code maps than codes; or the network does not take such images.
    """
    num_codes, num_positions = config.num_codes, num_images * math.prod(map_shape_of(image_shape, config.downsampling))
    fewer = 2 ** max(num_images.bit_length() - 1, 1)  # a power of two, at most as many as the images
    if num_positions < num_codes:
        raise InputError(
            f"expected at least one position in the code maps for each of {num_codes} codes, found {num_positions} in "
            f"{num_images} training images; add images, or try `num_codes={fewer}`"
        )
    if num_images < num_codes:
        remark(
            f"there are fewer training images, {num_images}, than codes, {num_codes}; try fewer codes, such as {fewer}"
        )


def advice_on_codebook(figures: dict[str, float], config: VQVAEConfig) -> str | None:
    """What to change where the codes are hardly used, or None where they are.

    A perplexity of 1 means that every position has the same code: the maps say nothing of the image.
    """
    num_codes, perplexity = config.num_codes, figures["perplexity"]
    if perplexity >= max(1.5, HARDLY_USED * num_codes):
        return None
    change = "a smaller lr" if config.codebook_learning == "ema" else 'codebook_learning = "ema" in the recipe'
    return (
        f"the codebook is hardly used: {figures['codes_used']:.0f} of {num_codes} codes, as unevenly as "
        f"{perplexity:.1f} codes used evenly; try {change}, more epochs, or fewer codes"
    )


def summarise(figures: dict[str, float], num_codes: int) -> str:
    """The main figures of stage one, for people."""
    return (
        f"squared error {figures['squared_error']:.5f}, PSNR {figures['psnr_db']:.2f} dB, "
        f"{figures['codes_used']:.0f} of {num_codes} codes used, perplexity {figures['perplexity']:.0f}"
    )
