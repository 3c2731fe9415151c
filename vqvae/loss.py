"""Stage one's loss and its evaluation: what is minimised, and the figures of a whole split."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vqvae.compute import eval_mode, images_at_once, in_batches
from vqvae.data.dataset import Split
from vqvae.data.pixels import pixel_errors, to_model_range, to_unit_range, unit_images
from vqvae.distributed import all_reduce_sum, shard
from vqvae.errors import InputError
from vqvae.model import VQVAE
from vqvae.predictor import CausalPredictor
from vqvae.quantizer import codes_used, count_codes, perplexity
from vqvae.storage.recipe import require_range
from vqvae.training.averages import MetricAverager
from vqvae.training.settings import Training

EVALUATION_BATCH = 500


@dataclass(frozen=True)
class VQVAETraining(Training):
    """How stage one is trained. The defaults are the baseline recipe's."""

    beta: float = 1.0  # weight of the commitment term
    clipped_loss: bool = False  # no reconstruction error where clipping the output to 0..1 removes it
    prediction_weight: float = 0.0  # of the prediction term (vqvae/predictor.py); 0 leaves it out
    slowest_codes: float = 1.0  # how fast an EMA codebook moves at the end of a run, as a share of how fast at first
    decoder_only: bool = False  # a new decoder learns from codes that stay those of the weights to start from

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range("beta", self.beta, 0.1, 2.0)
        require_range("prediction_weight", self.prediction_weight, 0, 10)
        require_range("slowest_codes", self.slowest_codes, 0, 1)


def loss_terms(
    model: VQVAE, images: Tensor, training: VQVAETraining, predictor: CausalPredictor | None = None
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The three terms of eq. 3 (arXiv:1711.00937), the prediction term, and their sum.

    Args:
        images: (B, C, S, T) uint8.
        predictor: None leaves its term out.
    Returns:
        the terms as scalars, each a mean over elements and over the batch, the sum first under "total"; the
        reconstructions (B, C, S, T) in 0..1; the indices (B, H, W).
    """
    x = to_model_range(images)
    x_hat, z_e, z_q, indices, codebook_loss, commitment_loss = model(x)
    x_hat, target = x_hat.float(), x
    if training.clipped_loss:
        # A pixel that is pure black or white, and that the model draws purer still, is right once it is clipped.
        target = torch.where(x_hat.clamp(-1, 1) == x, x_hat.detach(), x)
    terms = {
        "reconstruction": F.mse_loss(x_hat, target),
        "codebook": codebook_loss,
        "commitment": training.beta * commitment_loss,
    }
    if predictor is not None:
        terms["prediction"] = training.prediction_weight * predictor.fraction_unexplained(z_e, z_q)
    total = sum(terms.values(), torch.zeros((), device=x.device))
    return {"total": total, **terms}, to_unit_range(x_hat), indices


def evaluate_vqvae(
    model: VQVAE, split: Split, training: VQVAETraining, predictor: CausalPredictor | None = None
) -> dict[str, float]:
    """Figures of a whole split.

    Returns:
        the loss terms; `squared_error` and `psnr_db` of pixels in 0..1, means over images; `perplexity` and
        `codes_used`, from counts over the whole split.
    Raises:
        InputError: there are no images.
    """
    if len(split.labels) == 0:
        raise InputError("expected at least one image to evaluate, found none; choose another split")
    averager, num_codes = MetricAverager(), model.config.num_codes
    counts = torch.zeros(num_codes, dtype=torch.int64, device=model.device)
    with eval_mode(*(network for network in (model, predictor) if network is not None)):
        for rows in shard(in_batches(len(split.labels), images_at_once(EVALUATION_BATCH, model.image_shape))):
            images = split.images[rows].to(model.device)
            terms, x_hat, indices = loss_terms(model, images, training, predictor)
            error, psnr = pixel_errors(x_hat, unit_images(images))
            averager.add({**terms, "squared_error": error.mean(), "psnr_db": psnr.mean()}, len(images))
            counts += count_codes(indices, num_codes)
    counts = all_reduce_sum(counts)
    return {**averager.averages(), "perplexity": perplexity(counts), "codes_used": codes_used(counts)}
