"""`torchrun ... ranks.py VQVAE PRIOR FOLDER`: what each of several processes does in tests/test_common_distributed.py,
where the main one writes what came out."""

import sys
from pathlib import Path
from typing import Any

import torch

from prior.codes import extract
from prior.model import load_prior
from prior.sampling import sample
from prior.train import evaluate as evaluate_prior
from vqvae import train
from vqvae.common.data import load_train_and_validation
from vqvae.common.distributed import gathered, is_main, joined, share_of_batch
from vqvae.model import load_vqvae
from vqvae.predictor import CausalPredictor
from vqvae.quantizer import VectorQuantizer

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def figures_and_samples(vqvae_file: Path, prior_file: Path) -> dict[str, Any]:
    """The figures of a split in many batches, and samples in batches of which no two ranks have as many."""
    vqvae, header = load_vqvae(vqvae_file, CPU)
    prior, _ = load_prior(prior_file, vqvae, header, CPU)
    split = load_train_and_validation(ROOT / "tests" / "fixture", download=False)[0]
    train.EVALUATION_BATCH = evaluate_prior.__globals__["EVALUATION_BATCH"] = 60
    labels = torch.arange(13) % 10
    generator = torch.Generator().manual_seed(1)
    return {
        "vqvae": train.evaluate(vqvae, split, train.VQVAETraining()),
        "prior": evaluate_prior(prior, extract(vqvae, split)),
        "samples": sample(prior, len(labels), generator, labels=labels, guidance=1.5, batch_size=3),
        "generator": torch.rand(1, generator=generator),
    }


def codebook_after(num_steps: int) -> list[VectorQuantizer]:
    """A codebook that starts, follows and restarts on batches shared out among the processes; that of each of them."""
    torch.manual_seed(0)
    quantizer = VectorQuantizer(24, 3, "ema", decay=0.5).train()
    batches = torch.Generator().manual_seed(1)
    for step in range(num_steps):
        z_e = torch.randn(7, 3, 2, 2, generator=batches) * (1 + step)  # codes fall out of use as it grows
        torch.manual_seed(step)
        quantizer(z_e[share_of_batch(7)])
    return gathered(quantizer)


def prediction_gradient() -> torch.Tensor:
    """Of the prediction term with respect to a whole batch."""
    torch.manual_seed(0)
    predictor = CausalPredictor(3, (4, 4)).train()
    z_e = torch.randn(7, 3, 4, 4, requires_grad=True)
    mine = share_of_batch(7)
    (predictor.unexplained(z_e[mine], z_e[mine].detach()) * (mine.stop - mine.start) / 7).backward()
    assert z_e.grad is not None
    return torch.stack(gathered(z_e.grad)).sum(dim=0)


def everything(vqvae_file: Path, prior_file: Path) -> dict[str, Any]:
    return {
        **figures_and_samples(vqvae_file, prior_file),
        "codebooks": [quantizer.state_dict() for quantizer in codebook_after(6)],
        "prediction_gradient": prediction_gradient(),
    }


if __name__ == "__main__":
    with joined():
        torch.set_num_threads(1)
        found = everything(Path(sys.argv[1]), Path(sys.argv[2]))
        if is_main():
            torch.save(found, Path(sys.argv[3]) / "found.pt")
