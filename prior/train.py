"""Stage two: its evaluation and its training task. The loss is `likelihood.nats_per_code`."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prior.codes import Codes, extract_cached
from prior.independent import baselines
from prior.likelihood import maps_at_once, nats_per_code
from prior.maps import draw_maps
from prior.model import GatedPixelCNN, PriorConfig, layers_needed, load_prior
from vqvae.codec import decode_images, encode_images
from vqvae.compute import derive_seed, eval_mode, in_batches, pick_device, require_memory_to_train, require_whole
from vqvae.console import remark
from vqvae.data.dataset import Dataset, DatasetInfo, require_same_kind
from vqvae.data.deform import deform
from vqvae.data.load import load_like
from vqvae.data.pixels import to_model_range
from vqvae.distributed import main_first, shard
from vqvae.model import VQVAE, load_vqvae
from vqvae.pictures import COLUMNS, grid
from vqvae.storage import checkpoint
from vqvae.storage.checkpoint import Header
from vqvae.storage.recipe import from_dict, require_range
from vqvae.storage.runs import run_lock, weights_file
from vqvae.training.averages import MetricAverager
from vqvae.training.logs import RunLog
from vqvae.training.loop import Run, Task, fit
from vqvae.training.settings import Training
from vqvae.training.start import require_kept, require_same_network
from vqvae.training.state import require_same_settings

SHOW_EVERY = 4  # epochs between sample grids
NUM_SHOWN = 100
LESS = 0.5  # images are deformed half as far as a classifier's, which leaves them closer to those that are drawn


@dataclass(frozen=True)
class PriorTraining(Training):
    """How stage two is trained."""

    label_dropout: float = 0.1  # share of a batch that is trained without its label

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range("label_dropout", self.label_dropout, 0, 1)


def drop_labels(labels: Tensor, share: float, no_label: int) -> Tensor:
    """Labels (B,), each replaced by `no_label` with probability `share`."""
    return torch.where(torch.rand(labels.shape, device=labels.device) < share, no_label, labels)


def evaluate_prior(prior: GatedPixelCNN, codes: Codes) -> dict[str, float]:
    """Likelihood of a whole split with its labels: `nats_per_code` and `bits_per_image`."""
    averager = MetricAverager()
    with eval_mode(prior):
        for rows in shard(in_batches(len(codes.labels), maps_at_once(prior))):
            indices, labels = codes.indices[rows].to(prior.device).long(), codes.labels[rows].to(prior.device)
            averager.add({"nats_per_code": nats_per_code(prior, indices, labels)}, len(indices))
    nats = averager.averages()["nats_per_code"]
    return {"nats_per_code": nats, "bits_per_image": nats / math.log(2) * codes.indices[0].numel()}


def run_settings(
    config: PriorConfig,
    training: PriorTraining,
    dataset: Dataset,
    vqvae_header: Header,
    seed: int,
    start: tuple[GatedPixelCNN, str] | None,
) -> dict[str, Any]:
    """All that the result of a training depends on."""
    origin = {"vqvae": vqvae_header.fingerprint, "data": dataset.digest, "start_from": start and start[1]}
    return {**asdict(config), **asdict(training), "seed": seed, **origin}


class PriorTask(Task):
    """Stage two as a task for the training loop.

    Args:
        dataset: what the codes were extracted from.
        train, validation: its code maps.
        vqvae, vqvae_header: stage one, which the codes come from.
        path: of the file that keeps the best weights.
        seed: of the initial weights, and of the run.
        start: a network to take the initial weights from, and its fingerprint. None: they are random.
    """

    unit = "maps"
    best_by = "nats_per_code"

    def __init__(
        self,
        config: PriorConfig,
        training: PriorTraining,
        dataset: Dataset,
        train: Codes,
        validation: Codes,
        vqvae: VQVAE,
        vqvae_header: Header,
        path: Path,
        seed: int,
        start: tuple[GatedPixelCNN, str] | None = None,
    ) -> None:
        self.training, self.info, self.path, self.seed = training, dataset.info, path, seed
        self.vqvae, self.vqvae_fingerprint = vqvae, vqvae_header.fingerprint
        self.settings = run_settings(config, training, dataset, vqvae_header, seed, start)
        self.data, self.validation, self.deformation = tuple(train), validation, dataset.deformation.scaled(LESS)
        if config.deformed_share > 0:
            self.data += (dataset.train.images,)
        num_codes = vqvae.config.num_codes
        self.baselines = baselines(train, validation, num_codes)
        torch.manual_seed(seed)
        self.prior = GatedPixelCNN(config, num_codes, vqvae.map_shape, self.info.num_classes).to(vqvae.device)
        if start:
            self.prior.load_state_dict(start[0].state_dict())
        self.model = self.prior

    def prepare(self, *batch: Tensor) -> tuple[Tensor, ...]:
        """Some maps are replaced by those of deformed images. Their labels say so (DistAug, ICML 2020)."""
        indices, labels, *images = batch
        indices, labels = indices.long(), drop_labels(labels, self.training.label_dropout, self.prior.no_label)
        if images:
            some = slice(round(self.prior.config.deformed_share * len(indices)))  # the order of a batch is random
            indices[some] = encode_images(self.vqvae, deform(to_model_range(images[0][some]), self.deformation))
            labels[some] += self.prior.deformed
        return indices, labels

    def loss(self, *batch: Tensor) -> dict[str, Tensor]:
        indices, labels = batch
        return {"nats_per_code": nats_per_code(self.prior, indices, labels)}

    def evaluate(self) -> dict[str, float]:
        return {**evaluate_prior(self.prior, self.validation), **self.baselines}

    def save_best(self, figures: dict[str, float]) -> None:
        checkpoint.save(
            self.path,
            self.prior,
            stage="prior",
            config=asdict(self.prior.config),
            data=asdict(self.info),
            recipe=self.settings,
            metrics=figures,
            vqvae_fingerprint=self.vqvae_fingerprint,
        )

    def show(self, log: RunLog, epoch: int, step: int) -> None:
        indices, labels, *_ = self.data
        if epoch == 1:
            example = (indices[:1].to(self.prior.device).long(), labels[:1].to(self.prior.device))
            with eval_mode(self.prior):
                log.graph(self.prior, example)
        if epoch % SHOW_EVERY == 0 or epoch == self.training.num_epochs:
            columns = torch.arange(NUM_SHOWN) % COLUMNS % max(self.info.num_classes, 1)
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "samples"))
            maps = draw_maps(self.prior, NUM_SHOWN, generator, labels=columns)
            log.picture("samples", grid(decode_images(self.vqvae, maps)), step)


def train_prior(
    config: PriorConfig,
    training: PriorTraining,
    *,
    vqvae_path: Path,
    seed: int = 0,
    dataset: str | Path | None = None,
    data_folder: Path,
    output_folder: Path,
    start_from: Path | None = None,
    device: str | torch.device = "auto",
    resume: bool = False,
    overwrite: bool = False,
    download: bool = True,
) -> dict[str, float]:
    """Train stage two on the code maps of a VQ-VAE. The best epoch on validation is kept as
    `<output folder>/prior.safetensors`.

    Args:
        dataset, data_folder: see `vqvae.data.load.load_like`. None stands for the dataset of the VQ-VAE.
        start_from: a checkpoint of the same network, whose weights the run begins with. None: random ones.
        resume: go on with the run in the output folder.
        overwrite: replace the run in the output folder.
        download: fetch the data where it is missing.
    Returns:
        the figures of that best epoch on the test split, and those of the priors without neighbours.
    Raises:
        InputError: an argument is out of range, a file is missing or damaged, or the images or classes are not those
            that the VQ-VAE has learned.
        Interrupted: a signal came; the run is saved.
    """
    seed, where = require_whole("seed", seed, 0), pick_device(device)
    vqvae, vqvae_header = load_vqvae(vqvae_path, where)
    folder, path = output_folder / "prior", weights_file(output_folder, "prior")
    with main_first():
        info = from_dict(DatasetInfo, vqvae_header.data)
        data = load_like(info, dataset, data_folder, download=download)
        require_same_kind(info, data.info)
    num_codes, num_classes = vqvae.config.num_codes, data.info.num_classes
    require_memory_to_train(lambda: GatedPixelCNN(config, num_codes, vqvae.map_shape, num_classes), config.width)
    start = None if start_from is None else load_start(start_from, path, config, data.info, vqvae)
    with run_lock(output_folder, "prior", resume=resume, overwrite=overwrite):
        if resume:  # before the code maps of other data replace this run's
            settings = run_settings(config, training, data, vqvae_header, seed, start)
            require_same_settings(folder / "resume.pt", settings)
        with main_first():
            train, validation = (
                extract_cached(vqvae, vqvae_header.fingerprint, split, name, folder)
                for name, split in (("train", data.train), ("validation", data.validation))
            )
        task = PriorTask(config, training, data, train, validation, vqvae, vqvae_header, path, seed, start)
        fit(task, training, Run(folder, seed, task.settings, resume))
        best, _ = load_prior(path, vqvae, vqvae_header, where)
        with main_first():
            test = extract_cached(vqvae, vqvae_header.fingerprint, data.load_test(), "test", folder)
        figures = {**evaluate_prior(best, test), **baselines(train, test, num_codes)}
    if figures["nats_per_code"] >= figures["unigram"]:
        remark(
            "the prior knows no more than how often each code comes at each position; try more epochs or more images"
        )
    return figures


def load_start(
    file: Path, weights: Path, config: PriorConfig, info: DatasetInfo, vqvae: VQVAE
) -> tuple[GatedPixelCNN, str]:
    """The network to begin a training with, and its fingerprint. It may have learned the codes of another VQ-VAE.

    Args:
        file: its checkpoint.
        weights: the file that the run writes.
        config, info, vqvae: what is to be trained, on which data, and on whose codes.
    Raises:
        InputError: the checkpoint is missing or damaged, it is of another network, or the run would replace it.
    """
    require_kept(file, weights)
    header, shapes = checkpoint.read_header(file, "prior"), checkpoint.read_shapes(file, "prior")
    learned = from_dict(DatasetInfo, header.data)
    learned_config = from_dict(PriorConfig, header.config)
    found = {  # what the header does not say is read off the weights
        "image_shape": learned.image_shape,
        "num_classes": learned.num_classes,
        "num_codes": (shapes.get("embedding.weight") or (0,))[0],
        "width": learned_config.width,
        "deformed": learned_config.deformed_share > 0,
        "num_layers": sum(name.endswith(".label.weight") for name in shapes),
    }
    num_codes, num_layers = vqvae.config.num_codes, config.num_layers or layers_needed(vqvae.map_shape)
    expected = {"image_shape": info.image_shape, "num_classes": info.num_classes, "num_codes": num_codes}
    require_same_network(
        file,
        found,
        {**expected, "width": config.width, "deformed": config.deformed_share > 0, "num_layers": num_layers},
    )

    def build(header: Header) -> GatedPixelCNN:
        return GatedPixelCNN(config, num_codes, vqvae.map_shape, info.num_classes)

    network, header = checkpoint.load(file, "prior", build)
    return network, header.fingerprint


def summarise(figures: dict[str, float]) -> str:
    """The main figures of stage two, for people."""
    nats, unigram = figures["nats_per_code"], figures["unigram"]
    return (
        f"{nats:.3f} nats per code ({figures['bits_per_image']:.1f} bits an image), {nats / unigram:.3f} of the "
        f"per-position unigram's {unigram:.3f}; uniform {figures['uniform']:.3f}"
    )
