"""Stage two: its objective, its evaluation, its training run."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from prior.codes import Codes, extract, extract_cached
from prior.model import NO_LABEL, GatedPixelCNN, PriorConfig, load_prior
from prior.sampling import sample
from prior.unigram import baselines
from vqvae.common import checkpoint
from vqvae.common.config import require_range
from vqvae.common.data import NUM_CLASSES, load_test, load_train_and_validation
from vqvae.common.distributed import main_first, share
from vqvae.common.engine import Means, Training, derive_seed, evaluating, fit, in_batches
from vqvae.common.grids import grid
from vqvae.common.logs import RunLog
from vqvae.common.metrics import nats_to_bits
from vqvae.model import load_vqvae
from vqvae.train import decode

EVALUATION_BATCH = 250
SHOW_EVERY = 4  # epochs between sample grids


@dataclass(frozen=True)
class PriorTraining(Training):
    """How stage two is trained."""

    label_dropout: float = 0.1  # share of a batch trained without its label

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range("label_dropout", self.label_dropout, 0, 1)


def objective(prior: GatedPixelCNN, indices: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
    """Mean negative log-likelihood of maps (B, H, W) under labels (B,) or under none, in nats per code."""
    logits = rearrange(prior(indices, labels).float(), "b k h w -> (b h w) k")  # twice as fast as over a middle axis
    return {"nats_per_code": F.cross_entropy(logits, indices.flatten())}


def drop_labels(labels: Tensor, share: float) -> Tensor:
    """Labels (B,), each replaced by NO_LABEL with probability `share`."""
    return torch.where(torch.rand(labels.shape, device=labels.device) < share, NO_LABEL, labels)


def evaluate(prior: GatedPixelCNN, codes: Codes) -> dict[str, float]:
    """Likelihood of a whole split with its labels and (`_unlabelled`) without."""
    means = Means()
    with evaluating(prior):
        for rows in share(in_batches(len(codes.labels), EVALUATION_BATCH)):
            indices, labels = codes.indices[rows], codes.labels[rows]
            with_label = objective(prior, indices, labels)["nats_per_code"]
            without = objective(prior, indices, None)["nats_per_code"]
            means.add({"nats_per_code": with_label, "nats_per_code_unlabelled": without}, len(indices))
    figures = means.read()
    num_positions = codes.indices[0].numel()
    return {**figures, "bits_per_image": nats_to_bits(figures["nats_per_code"]) * num_positions}


def nats_by_position(prior: GatedPixelCNN, codes: Codes) -> Tensor:
    """Mean negative log-likelihood of each position (H, W) over a split with its labels."""
    total = torch.zeros(prior.map_shape, dtype=torch.float64, device=prior.device)
    with evaluating(prior):
        for rows in in_batches(len(codes.labels), EVALUATION_BATCH):
            logits = prior(codes.indices[rows], codes.labels[rows])
            total += F.cross_entropy(logits, codes.indices[rows], reduction="none").sum(dim=0)
    return total / len(codes.labels)


def train_prior(
    config: PriorConfig,
    training: PriorTraining,
    *,
    vqvae_path: Path,
    seed: int,
    data_folder: Path,
    output_folder: Path,
    device: torch.device,
    resume: bool = False,
    download: bool = True,
) -> dict[str, float]:
    """Train stage two on the code maps of a VQ-VAE; the best epoch on validation is kept as
    `<output folder>/prior.safetensors`.

    Returns:
        the figures of that best epoch on the test split, the baselines' among them.
    """
    vqvae, vqvae_header = load_vqvae(vqvae_path, device)
    folder = output_folder / "prior"
    with main_first():
        splits = dict(zip(("train", "validation"), load_train_and_validation(data_folder, download), strict=True))
        train, validation = (
            extract_cached(vqvae, vqvae_header.fingerprint, split, name, folder) for name, split in splits.items()
        )
    del splits
    reference = baselines(train, validation, vqvae.config.k)
    torch.manual_seed(seed)
    prior = GatedPixelCNN(config, vqvae.config.k, vqvae.map_shape).to(device)
    settings = {**asdict(config), **asdict(training), "seed": seed, "vqvae": vqvae_header.fingerprint}
    path = output_folder / "prior.safetensors"

    def save_best(figures: dict[str, float]) -> None:
        checkpoint.save(
            path,
            prior,
            stage="prior",
            config=asdict(config),
            recipe=settings,
            metrics=figures,
            vqvae_fingerprint=vqvae_header.fingerprint,
        )

    def show(log: RunLog, epoch: int, step: int) -> None:
        if epoch == 1:
            with evaluating(prior):
                log.graph(prior, (train.indices[:1], train.labels[:1]))
        if epoch % SHOW_EVERY == 0 or epoch == training.num_epochs:
            labels = torch.arange(NUM_CLASSES).repeat(NUM_CLASSES)
            generator = torch.Generator().manual_seed(derive_seed(seed, "samples"))
            maps = sample(prior, len(labels), generator, labels=labels)
            log.picture("samples", grid(decode(vqvae, maps.to(device))), step)

    fit(
        prior,
        (train.indices, train.labels),
        lambda indices, labels: objective(prior, indices, labels),
        lambda: {**evaluate(prior, validation), **reference},
        save_best,
        best_by="nats_per_code",
        training=training,
        seed=seed,
        folder=folder,
        unit="maps",
        settings=settings,
        after_epoch=show,
        prepare=lambda indices, labels: (indices, drop_labels(labels, training.label_dropout)),
        resume=resume,
    )
    best, _ = load_prior(path, vqvae, vqvae_header, device)
    test = extract(vqvae, load_test(data_folder, download))
    return {**evaluate(best, test), **baselines(train, test, vqvae.config.k)}
