"""The VQ-VAE (arXiv:1711.00937): encoder, vector quantisation, decoder.

    x (B, 1, S, S) --Encoder--> z_e (B, D, S/4, S/4) --VectorQuantizer--> z_q --Decoder--> x_hat (B, 1, S, S)

The network is the paper's (section 4.1): two strided 4x4 convolutions, then residual blocks (ReLU, 3x3,
ReLU, 1x1), and the mirror image of it; no normalisation, so no item of a batch knows of another. All the
residual work is done at a quarter of the image's side, where a convolution costs a sixteenth. The decoder
rises by sub-pixel convolutions, which contain the paper's transposed ones (a 4x4 transposed convolution
of stride 2 is a 3x3 convolution to four times the channels with some weights zero) and run faster on a CPU.
One more departure: residual blocks start as the identity.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vqvae.common import checkpoint
from vqvae.common.config import from_dict, require_range
from vqvae.common.errors import UserError
from vqvae.quantizer import CodebookLearning, VectorQuantizer

DOWNSAMPLING = 4  # image side over code-map side


@dataclass(frozen=True)
class VQVAEConfig:
    """The network; the defaults are the documented recipe's."""

    hidden_size: int = 40  # D, size of the latent vectors
    k: int = 512  # number of codes
    width: int = 40  # channels of the residual blocks
    num_encoder_blocks: int = 2
    num_decoder_blocks: int = 2
    codebook_learning: CodebookLearning = "gradient"
    ema_decay: float = 0.99  # of an EMA codebook
    image_size: int = 28

    def __post_init__(self) -> None:
        require_range("hidden_size", self.hidden_size, 1, 1024)
        require_range("k", self.k, 2, 32767)  # code maps are stored as int16
        require_range("width", self.width, 4, 2048)
        require_range("num_encoder_blocks", self.num_encoder_blocks, 0, 64)
        require_range("num_decoder_blocks", self.num_decoder_blocks, 0, 64)
        require_range("ema_decay", self.ema_decay, 0, 0.99999)
        require_range("image_size", self.image_size, DOWNSAMPLING, 1024)


class Forward(NamedTuple):
    """One pass through the whole model."""

    x_hat: Tensor  # (B, 1, S, S)
    z_e: Tensor  # (B, D, S/4, S/4)
    z_q: Tensor  # (B, D, S/4, S/4)
    indices: Tensor  # (B, S/4, S/4) int64
    codebook_loss: Tensor
    commitment_loss: Tensor


class ResidualBlock(nn.Sequential):
    """x + conv1x1(relu(conv3x3(relu(x)))), the identity at the start."""

    def __init__(self, width: int) -> None:
        last = nn.Conv2d(width, width, 1)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        super().__init__(nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), last)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Encoder(nn.Sequential):
    """x (B, 1, S, S) to z_e (B, D, S/4, S/4)."""

    def __init__(self, config: VQVAEConfig) -> None:
        width = config.width
        super().__init__(
            nn.Conv2d(1, width // 2, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width // 2, width, 4, stride=2, padding=1),
            *(ResidualBlock(width) for _ in range(config.num_encoder_blocks)),
            nn.ReLU(),
            nn.Conv2d(width, config.hidden_size, 1),
        )


class Decoder(nn.Sequential):
    """z_q (B, D, S/4, S/4) to x_hat (B, 1, S, S), unbounded."""

    def __init__(self, config: VQVAEConfig) -> None:
        width = config.width
        super().__init__(
            nn.Conv2d(config.hidden_size, width, 3, padding=1),
            *(ResidualBlock(width) for _ in range(config.num_decoder_blocks)),
            nn.ReLU(),
            nn.Conv2d(width, 4 * (width // 4), 3, padding=1),
            nn.PixelShuffle(2),
            nn.ReLU(),
            nn.Conv2d(width // 4, 4, 3, padding=1),
            nn.PixelShuffle(2),
        )


class VQVAE(nn.Module):
    """Stage one: images to maps of codes, and back.

    Raises:
        UserError: an image size that does not divide by 4.
    """

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        if config.image_size % DOWNSAMPLING != 0:
            raise UserError(f"expected an image size that divides by {DOWNSAMPLING}, found {config.image_size}")
        self.config = config
        side = config.image_size // DOWNSAMPLING
        self.map_shape = (side, side)
        self.encoder = Encoder(config)
        self.quantizer = VectorQuantizer(config.k, config.hidden_size, config.codebook_learning, config.ema_decay)
        self.decoder = Decoder(config)

    def forward(self, x: Tensor) -> Forward:
        """Reconstruct (B, 1, S, S) images, float32 in -1..1.

        Raises:
            ValueError: images of another shape.
        """
        z_e = self.latents(x)
        quantized = self.quantizer(z_e)
        return Forward(self.decoder(quantized.z_q), z_e, *quantized)

    @property
    def device(self) -> torch.device:
        return self.quantizer.codebook.device

    def latents(self, x: Tensor) -> Tensor:
        """z_e (B, D, S/4, S/4), float32 under autocast too, of images (B, 1, S, S) in -1..1."""
        size = self.config.image_size
        if x.shape[1:] != (1, size, size):
            raise ValueError(f"expected images of shape (B, 1, {size}, {size}), found {tuple(x.shape)}")
        return self.encoder(x).float()

    def encode(self, x: Tensor) -> Tensor:
        """Indices (B, S/4, S/4) int64 of images (B, 1, S, S) in -1..1."""
        return self.quantizer.nearest(self.latents(x))

    def decode_indices(self, indices: Tensor) -> Tensor:
        """Images (B, 1, S, S) of code maps (B, S/4, S/4) int64: the only way from codes to pixels."""
        return self.decoder(self.quantizer.lookup(indices))


def load_vqvae(path: Path, device: torch.device) -> tuple[VQVAE, checkpoint.Header]:
    """The model of a checkpoint, in eval mode, and its header.

    Raises:
        UserError: no whole VQ-VAE checkpoint is there.
    """
    header = checkpoint.read_header(path, "vqvae")
    model = checkpoint.load(path, header, lambda: VQVAE(from_dict(VQVAEConfig, header.config)))
    return model.to(device).eval(), header
