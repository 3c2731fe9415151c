"""Training the classifier: on all training images for the metrics, or on a few images for the accuracy score."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from prior.evaluation.classifier import EVALUATION_BATCH, Classifier, ClassifierConfig, load_classifier
from vqvae.compute import eval_mode, images_at_once, in_batches, pick_device
from vqvae.data.dataset import Dataset, DatasetInfo, Split
from vqvae.data.deform import Deformation, deform
from vqvae.data.load import load_dataset
from vqvae.data.pixels import to_model_range
from vqvae.distributed import require_one_process
from vqvae.errors import InputError
from vqvae.storage import checkpoint
from vqvae.storage.runs import run_lock, weights_file
from vqvae.training.averages import MetricAverager
from vqvae.training.logs import RunLog
from vqvae.training.loop import Run, Task, fit
from vqvae.training.settings import Training


@dataclass(frozen=True)
class ClassifierTraining(Training):
    """How the classifier is trained."""

    num_epochs: int = 12
    lr: float = 4e-3
    schedule: Literal["constant", "one-cycle"] = "one-cycle"
    weight_decay: float = 0.01


def evaluate_classifier(model: Classifier, split: Split) -> dict[str, float]:
    """`cross_entropy` in nats, and `error`: the share of a split that the classifier takes for another class."""
    averager = MetricAverager()
    with eval_mode(model):
        for rows in in_batches(len(split.labels), images_at_once(EVALUATION_BATCH, model.image_shape)):
            labels = split.labels[rows].to(model.device)
            logits = model(to_model_range(split.images[rows].to(model.device)))
            error = (logits.argmax(dim=1) != labels).float().mean()
            averager.add({"cross_entropy": F.cross_entropy(logits, labels), "error": error}, len(labels))
    return averager.averages()


class ClassifierTask(Task):
    """A classifier that learns from augmented images. It is evaluated on images as they are."""

    model: Classifier
    unit = "images"
    best_by = "cross_entropy"

    def __init__(self, model: Classifier, train: Split, validation: Split, deformation: Deformation) -> None:
        self.model, self.validation, self.deformation = model, validation, deformation
        self.data = (train.images, train.labels)

    def loss(self, *batch: Tensor) -> dict[str, Tensor]:
        """Mean cross-entropy in nats of images (B, C, H, W) uint8 under their labels (B,)."""
        images, labels = batch
        return {"cross_entropy": F.cross_entropy(self.model(deform(to_model_range(images), self.deformation)), labels)}

    def evaluate(self) -> dict[str, float]:
        return evaluate_classifier(self.model, self.validation)


class SavedClassifierTask(ClassifierTask):
    """The same, and the weights of the best epoch are saved at `path`."""

    def __init__(self, model: Classifier, dataset: Dataset, path: Path, recipe: Mapping[str, Any]) -> None:
        super().__init__(model, dataset.train, dataset.validation, dataset.deformation)
        self.info, self.path, self.recipe = dataset.info, path, recipe

    def save_best(self, figures: dict[str, float]) -> None:
        checkpoint.save(
            self.path,
            self.model,
            stage="classifier",
            config=asdict(self.model.config),
            data=asdict(self.info),
            recipe=dict(self.recipe),
            metrics=figures,
        )

    def show(self, log: RunLog, epoch: int, step: int) -> None:
        if epoch == 1:
            with eval_mode(self.model):
                log.graph(self.model, (to_model_range(self.validation.images[:1].to(self.model.device)),))


def train_classifier(
    config: ClassifierConfig,
    training: ClassifierTraining,
    *,
    seed: int = 0,
    dataset: str | Path = "mnist",
    image_size: str | int | None = None,
    data_folder: Path,
    output_folder: Path,
    device: str | torch.device = "auto",
    resume: bool = False,
    overwrite: bool = False,
    download: bool = True,
) -> dict[str, float]:
    """Train the classifier. The best epoch on validation is saved as `<output folder>/classifier.safetensors`.

    Args:
        dataset, image_size, data_folder: see `vqvae.data.load.load_dataset`.
        device: "cpu", "cuda", or "auto" for CUDA where there is a device.
        resume: go on with the run in the output folder; the result equals that of a run never stopped.
        overwrite: replace the run in the output folder.
        download: fetch the data if it is not in `data_folder`.
    Returns:
        the figures of that best epoch on the test split.
    Raises:
        InputError: the data is missing or damaged, it has no classes, the output folder is in use or holds another
            run, or there are several processes.
        Interrupted: a signal came; the run is saved.
    """
    require_one_process("a classifier")  # before anything is downloaded
    where = pick_device(device)
    data = load_dataset(dataset, data_folder, image_size=image_size, download=download)
    require_trainable(data.info)
    path = weights_file(output_folder, "classifier")
    with run_lock(output_folder, "classifier", resume, overwrite):
        torch.manual_seed(seed)
        model = Classifier(config, data.info.image_shape, data.info.num_classes).to(where)
        settings = {**asdict(config), **asdict(training), "seed": seed, "data": data.digest}
        task = SavedClassifierTask(model, data, path, settings)
        fit(task, training, Run(output_folder / "classifier", seed, settings, resume))
        best, _ = load_classifier(path, where)
        return evaluate_classifier(best, data.load_test())


def accuracy_after_training_on(
    split: Split,
    test: Split,
    info: DatasetInfo,
    training: ClassifierTraining,
    deformation: Deformation,
    seed: int,
    device: torch.device,
) -> float:
    """The share of test images that a new classifier gets right after it has seen only `split` (arXiv:1905.10887).

    The weights are those of the last epoch, because choosing an epoch would take real images.

    Raises:
        InputError: the data has no classes, or there are several processes.
    """
    require_trainable(info)
    torch.manual_seed(seed)
    model = Classifier(ClassifierConfig(), info.image_shape, info.num_classes).to(device)
    watched = split.first(EVALUATION_BATCH)  # the loop wants figures after each epoch; nothing is chosen by them
    fit(ClassifierTask(model, split, watched, deformation), training, Run(None, seed, settings={}))
    return 1 - evaluate_classifier(model, test)["error"]


def require_trainable(info: DatasetInfo) -> None:
    """Refuse to train a classifier where it cannot be trained.

    Raises:
        InputError: the data has fewer than two classes, or there are several processes.
    """
    require_one_process("a classifier")  # because batch normalisation does not share its statistics
    if info.num_classes < 2:
        raise InputError(
            f"expected images of at least 2 classes to train a classifier on, found {info.num_classes} in {info.name}; "
            f"choose a dataset with labels"
        )
