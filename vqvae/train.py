"""Stage one: its objective, its evaluation, its training run."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae.common import checkpoint
from vqvae.common.config import require_range
from vqvae.common.data import Split, digest, load_test, load_train_and_validation, to_model_range, to_unit_range
from vqvae.common.distributed import main_first, share, summed
from vqvae.common.engine import Means, Training, evaluating, fit, in_batches
from vqvae.common.grids import grid
from vqvae.common.logs import RunLog
from vqvae.common.metrics import codes_used, count_codes, perplexity
from vqvae.model import VQVAE, VQVAEConfig, load_vqvae
from vqvae.predictor import CausalPredictor

EVALUATION_BATCH = 500
NUM_SHOWN = 100


@dataclass(frozen=True)
class VQVAETraining(Training):
    """How stage one is trained; the defaults are the documented recipe's."""

    beta: float = 1.0  # weight of the commitment term
    free_overshoot: bool = False  # leave out of the reconstruction term what clipping to 0..1 undoes
    predictability: float = 0.0  # weight of the prediction term (vqvae/predictor.py); 0 leaves it out

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range("beta", self.beta, 0.1, 2.0)
        require_range("predictability", self.predictability, 0, 10)


def networks(
    config: VQVAEConfig, training: VQVAETraining, device: torch.device
) -> tuple[VQVAE, CausalPredictor | None, nn.ModuleList]:
    """A new model, the predictor where the recipe has one, and both as one module, for what trains them."""
    model = VQVAE(config).to(device).to(memory_format=torch.channels_last)
    predictable = training.predictability > 0
    predictor = CausalPredictor(config.hidden_size, model.map_shape).to(device) if predictable else None
    return model, predictor, nn.ModuleList([model, predictor] if predictor is not None else [model])


def objective(
    model: VQVAE, images: Tensor, training: VQVAETraining, predictor: CausalPredictor | None = None
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The three terms of eq. 3, each a mean over elements and the batch, the prediction term, and their sum.

    Args:
        images: (B, 1, S, S) uint8.
        predictor: None leaves its term out.
    Returns:
        the terms as scalars, the reconstructions (B, 1, S, S) in 0..1, the indices (B, H, W).
    """
    x = to_model_range(images)
    x_hat, z_e, z_q, indices, codebook_loss, commitment_loss = model(x)
    x_hat, target = x_hat.float(), x
    if training.free_overshoot:
        # A pixel of pure ink or paper that the model makes purer still is drawn right: no error.
        target = torch.where(x_hat.clamp(-1, 1) == x, x_hat.detach(), x)
    terms = {
        "reconstruction": F.mse_loss(x_hat, target),
        "codebook": codebook_loss,
        "commitment": training.beta * commitment_loss,
    }
    if predictor is not None:
        terms["prediction"] = training.predictability * predictor.unexplained(z_e, z_q)
    return (
        {"total": sum(terms.values(), torch.zeros((), device=x.device)), **terms},
        to_unit_range(x_hat),
        indices,
    )


def evaluate(
    model: VQVAE, split: Split, training: VQVAETraining, predictor: CausalPredictor | None = None
) -> dict[str, float]:
    """Figures of a whole split: the terms; `squared_error` and `psnr_db` (mean over images) of pixels
    in 0..1; `perplexity` and `codes_used` from counts over the split."""
    means = Means()
    counts = torch.zeros(model.config.k, dtype=torch.int64, device=split.images.device)
    with evaluating(*(network for network in (model, predictor) if network is not None)):
        for rows in share(in_batches(len(split.labels), EVALUATION_BATCH)):
            images = split.images[rows]
            terms, x_hat, indices = objective(model, images, training, predictor)
            error = (x_hat - to_unit_range(to_model_range(images))).square().flatten(1).mean(1)
            psnr = -10 * error.clamp(min=1e-10).log10()
            means.add({**terms, "squared_error": error.mean(), "psnr_db": psnr.mean()}, len(images))
            counts += count_codes(indices, model.config.k)
    counts = summed(counts)
    return {**means.read(), "perplexity": perplexity(counts), "codes_used": codes_used(counts)}


def reconstruct(model: VQVAE, images: Tensor) -> tuple[Tensor, Tensor]:
    """Code maps (N, H, W) and reconstructions (N, 1, S, S) in 0..1 of uint8 images (N, 1, S, S)."""
    with evaluating(model):
        indices = torch.cat(
            [model.encode(to_model_range(images[rows])) for rows in in_batches(len(images), EVALUATION_BATCH)]
        )
    return indices, decode(model, indices)


def decode(model: VQVAE, indices: Tensor) -> Tensor:
    """Images (N, 1, S, S) in 0..1, on the CPU, of code maps (N, H, W)."""
    with evaluating(model):
        return torch.cat(
            [
                to_unit_range(model.decode_indices(indices[rows])).cpu()
                for rows in in_batches(len(indices), EVALUATION_BATCH)
            ]
        )


def train_vqvae(
    config: VQVAEConfig,
    training: VQVAETraining,
    *,
    seed: int,
    data_folder: Path,
    output_folder: Path,
    device: torch.device,
    resume: bool = False,
    download: bool = True,
) -> dict[str, float]:
    """Train stage one; the best epoch on validation is kept as `<output folder>/vqvae.safetensors`.

    Returns:
        the figures of that best epoch on the test split.
    """
    with main_first():
        train, validation = (split.to(device) for split in load_train_and_validation(data_folder, download))
    torch.manual_seed(seed)
    model, predictor, both = networks(config, training, device)
    path = output_folder / "vqvae.safetensors"
    settings = {**asdict(config), **asdict(training), "seed": seed, "data": digest(train)}
    shown = validation.images[:NUM_SHOWN]

    def save_best(figures: dict[str, float]) -> None:
        checkpoint.save(
            path,
            model,
            stage="vqvae",
            config=asdict(config),
            recipe=settings,
            metrics=figures,
        )

    def show(log: RunLog, epoch: int, step: int) -> None:
        if epoch == 1:
            with evaluating(model):
                log.graph(model, (to_model_range(shown[:1]),))
        log.picture("original", grid(to_unit_range(to_model_range(shown))), step)
        log.picture("reconstruction", grid(reconstruct(model, shown)[1]), step)

    fit(
        both,
        (train.images,),
        lambda images: objective(model, images, training, predictor)[0],
        lambda: evaluate(model, validation, training, predictor),
        save_best,
        best_by="squared_error",
        training=training,
        seed=seed,
        folder=output_folder / "vqvae",
        unit="images",
        settings=settings,
        after_epoch=show,
        resume=resume,
    )
    best, _ = load_vqvae(path, device)
    return evaluate(best, load_test(data_folder, download).to(device), training)
