"""A small image classifier. The metrics are taken in its features.

The features stand in for those of Inception, which has learned from photographs of another size. Figures made with this
classifier compare only with figures made with the same weights, so its fingerprint is printed beside them.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vqvae.compute import eval_mode, images_at_once, in_batches
from vqvae.data.dataset import DatasetInfo
from vqvae.data.pixels import to_model_range
from vqvae.storage import checkpoint
from vqvae.storage.recipe import from_dict, require_range

EVALUATION_BATCH = 100  # what the first layer gives then fits into a cache, which halves the time of 500


@dataclass(frozen=True)
class ClassifierConfig:
    """The network."""

    width: int = 32  # channels of the first layer; the last has four times as many

    def __post_init__(self) -> None:
        require_range("width", self.width, 1, 512)


class Classifier(nn.Module):
    """Images (B, C, H, W) in -1..1 to logits (B, num_classes).

    Args:
        image_shape: (C, H, W).
    """

    def __init__(self, config: ClassifierConfig, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.config, self.image_shape, self.num_classes = config, image_shape, num_classes
        width = config.width
        self.trunk = nn.Sequential(
            *_block(image_shape[0], width, stride=2),
            *_block(width, 2 * width),
            *_block(2 * width, 2 * width, stride=2),
            *_block(2 * width, 4 * width),
            *_block(4 * width, 4 * width, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(4 * width, num_classes)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))


def _block(channels_in: int, channels_out: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(channels_out), nn.ReLU()]


def extract_features(model: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """The features and the class probabilities of images (N, C, H, W) uint8.

    Returns:
        features (N, F) float32, the input of the last layer; probabilities (N, num_classes) float32. Both are on the
        CPU.
    """
    features, probabilities = [], []
    with eval_mode(model):
        for rows in in_batches(len(images), images_at_once(EVALUATION_BATCH, model.image_shape)):
            batch_features = model.trunk(to_model_range(images[rows].to(model.device)))
            features.append(batch_features.cpu())
            probabilities.append(model.head(batch_features).softmax(dim=1).cpu())
    return torch.cat(features), torch.cat(probabilities)


def load_classifier(path: Path, device: torch.device) -> tuple[Classifier, checkpoint.Header]:
    """The classifier of a checkpoint, in eval mode, and its header.

    Raises:
        InputError: there is no whole classifier checkpoint at `path`.
    """

    def build(header: checkpoint.Header) -> Classifier:
        info = from_dict(DatasetInfo, header.data)
        return Classifier(from_dict(ClassifierConfig, header.config), info.image_shape, info.num_classes)

    model, header = checkpoint.load(path, "classifier", build)
    return model.to(device).eval(), header
