"""A small digit classifier: the eyes that `fidelity` sees through.

Its features stand in for Inception's, which were learned on photographs of another size; so figures made with it
compare only with figures made with the same weights, and its fingerprint is printed beside them.
"""

import math
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae.common import checkpoint
from vqvae.common.config import from_dict, require_range
from vqvae.common.data import NUM_CLASSES, Split, digest, load_test, load_train_and_validation, to_model_range
from vqvae.common.distributed import require_alone
from vqvae.common.engine import Means, Training, evaluating, fit, in_batches
from vqvae.common.logs import RunLog

EVALUATION_BATCH = 500
# How far training digits are deformed, each by its own draw, uniform up to:
MAX_ROTATION = math.radians(12)
MAX_SCALING = 0.12  # of the size
MAX_SHIFT = 0.15  # of half the image's side: two pixels


@dataclass(frozen=True)
class ClassifierConfig:
    """The network."""

    width: int = 32  # channels of the first layer; the last has four times as many

    def __post_init__(self) -> None:
        require_range("width", self.width, 1, 512)


@dataclass(frozen=True)
class ClassifierTraining(Training):
    """How the classifier is trained."""

    num_epochs: int = 12
    lr: float = 4e-3
    schedule: Literal["constant", "one-cycle"] = "one-cycle"
    weight_decay: float = 0.01


class Classifier(nn.Module):
    """Images (B, 1, 28, 28) in -1..1 to logits (B, 10)."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        width = config.width
        self.trunk = nn.Sequential(
            *_block(1, width, stride=2),
            *_block(width, 2 * width),
            *_block(2 * width, 2 * width, stride=2),
            *_block(2 * width, 4 * width),
            *_block(4 * width, 4 * width, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(4 * width, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))


def _block(channels_in: int, channels_out: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(channels_out), nn.ReLU()]


def look(model: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """What the classifier makes of images (N, 1, 28, 28) uint8, on the CPU.

    Returns:
        features (N, F) float32, which its last layer decides by; probabilities (N, 10) float32.
    """
    features, probabilities = [], []
    device = model.head.weight.device
    with evaluating(model):
        for rows in in_batches(len(images), EVALUATION_BATCH):
            seen = model.trunk(to_model_range(images[rows].to(device)))
            features.append(seen.cpu())
            probabilities.append(model.head(seen).softmax(dim=1).cpu())
    return torch.cat(features), torch.cat(probabilities)


def deform(x: Tensor) -> Tensor:
    """Images (B, 1, S, S) in -1..1, each turned, scaled and shifted a little; what comes in from outside is paper."""

    def draw(most: float) -> Tensor:
        return torch.empty(len(x), device=x.device).uniform_(-most, most)

    angle, scale = draw(MAX_ROTATION), 1 + draw(MAX_SCALING)
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    rows = [torch.stack([cosine, -sine, draw(MAX_SHIFT)], 1), torch.stack([sine, cosine, draw(MAX_SHIFT)], 1)]
    places = F.affine_grid(torch.stack(rows, dim=1), list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, places, align_corners=False) - 1  # zero is paper for grid_sample


def objective(model: Classifier, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Mean cross-entropy in nats of deformed images (B, 1, S, S) uint8 under their labels (B,)."""
    return {"cross_entropy": F.cross_entropy(model(deform(to_model_range(images))), labels)}


def evaluate(model: Classifier, split: Split) -> dict[str, float]:
    """`cross_entropy` in nats and `error`, the share of a split that is taken for another digit."""
    means = Means()
    with evaluating(model):
        for rows in in_batches(len(split.labels), EVALUATION_BATCH):
            labels = split.labels[rows]
            logits = model(to_model_range(split.images[rows]))
            error = (logits.argmax(dim=1) != labels).float().mean()
            means.add({"cross_entropy": F.cross_entropy(logits, labels), "error": error}, len(labels))
    return means.read()


def train_classifier(
    config: ClassifierConfig,
    training: ClassifierTraining,
    *,
    seed: int,
    data_folder: Path,
    output_folder: Path,
    device: torch.device,
    resume: bool = False,
    download: bool = True,
) -> dict[str, float]:
    """Train the classifier; the best epoch on validation is kept as `<output folder>/classifier.safetensors`.

    Returns:
        the figures of that best epoch on the test split.
    """
    require_alone("a classifier")  # its batch statistics are not shared
    train, validation = (split.to(device) for split in load_train_and_validation(data_folder, download))
    torch.manual_seed(seed)
    model = Classifier(config).to(device)
    path = output_folder / "classifier.safetensors"
    settings = {**asdict(config), **asdict(training), "seed": seed, "data": digest(train)}

    def save_best(figures: dict[str, float]) -> None:
        checkpoint.save(path, model, stage="classifier", config=asdict(config), recipe=settings, metrics=figures)

    def show(log: RunLog, epoch: int, step: int) -> None:
        if epoch == 1:
            with evaluating(model):
                log.graph(model, (to_model_range(validation.images[:1]),))

    fit(
        model,
        (train.images, train.labels),
        lambda images, labels: objective(model, images, labels),
        lambda: evaluate(model, validation),
        save_best,
        best_by="cross_entropy",
        training=training,
        seed=seed,
        folder=output_folder / "classifier",
        unit="images",
        settings=settings,
        after_epoch=show,
        resume=resume,
    )
    best, _ = load_classifier(path, device)
    return evaluate(best, load_test(data_folder, download).to(device))


def accuracy_after_training_on(split: Split, test: Split, training: ClassifierTraining, seed: int) -> float:
    """The share of test digits that a new classifier gets right, having seen only `split` (arXiv:1905.10887).

    Its last epoch is taken: choosing one would take real digits.
    """
    require_alone("a classifier")
    torch.manual_seed(seed)
    model = Classifier(ClassifierConfig()).to(split.images.device)
    watched = Split(split.images[:EVALUATION_BATCH], split.labels[:EVALUATION_BATCH])
    with tempfile.TemporaryDirectory() as folder:
        fit(
            model,
            tuple(split),
            lambda images, labels: objective(model, images, labels),
            lambda: evaluate(model, watched),
            lambda figures: None,
            best_by="cross_entropy",
            training=training,
            seed=seed,
            folder=Path(folder),
            unit="images",
            settings={},
            after_epoch=lambda log, epoch, step: None,
        )
    return 1 - evaluate(model, test)["error"]


def load_classifier(path: Path, device: torch.device) -> tuple[Classifier, checkpoint.Header]:
    """The classifier of a checkpoint, in eval mode, and its header.

    Raises:
        UserError: no whole classifier checkpoint is there.
    """
    header = checkpoint.read_header(path, "classifier")
    model = checkpoint.load(path, header, lambda: Classifier(from_dict(ClassifierConfig, header.config)))
    return model.to(device).eval(), header
