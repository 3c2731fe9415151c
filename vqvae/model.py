"""The VQ-VAE (arXiv:1711.00937): encoder, vector quantisation, decoder.

    x (B, C, S, T) --Encoder--> z_e (B, D, H, W) --VectorQuantizer--> z_q --Decoder--> x_hat (B, C, S, T)

H = S/4 and W = T/4. The network is the paper's (section 4.1): two strided 4x4 convolutions, then residual blocks (ReLU,
3x3, ReLU, 1x1), and the mirror image of it. With a third strided convolution they are S/8 and T/8. There is no
normalisation, so no item of a batch depends on another. The residual blocks work at a quarter of the image's side or
less, where a convolution costs a sixteenth or less.

Two departures from the paper. The decoder rises by sub-pixel convolutions, which run faster on a CPU. They contain the
paper's transposed ones: a 4x4 transposed convolution of stride 2 is a 3x3 convolution to four times the channels, with
some weights zero. And a residual block is the identity at the start of training.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vqvae.data.dataset import DatasetInfo
from vqvae.errors import InputError
from vqvae.quantizer import CodebookLearning, VectorQuantizer
from vqvae.storage import checkpoint
from vqvae.storage.recipe import from_dict, require_range

NUM_LEVELS = {4: 2, 8: 3}  # how often the image's side is halved, by downsampling


@dataclass(frozen=True)
class VQVAEConfig:
    """The network. The shape of its images comes from the data. The defaults are the baseline recipe's."""

    code_dim: int = 40  # D, size of the latent vectors
    num_codes: int = 512  # K
    width: int = 40  # channels of the residual blocks
    num_encoder_blocks: int = 2
    num_decoder_blocks: int = 2
    codebook_learning: CodebookLearning = "gradient"
    ema_decay: float = 0.99  # of an EMA codebook
    downsampling: int = 4  # image side over code-map side, 4 or 8
    decoder_width: int | None = None  # `width` of the decoder; None: the same

    def __post_init__(self) -> None:
        require_range("code_dim", self.code_dim, 1, 1024)
        require_range("num_codes", self.num_codes, 2, 32767)  # code maps are stored as int16
        require_range("width", self.width, 4, 2048)
        if self.decoder_width is not None:
            require_range("decoder_width", self.decoder_width, 4, 2048)
        require_range("num_encoder_blocks", self.num_encoder_blocks, 0, 64)
        require_range("num_decoder_blocks", self.num_decoder_blocks, 0, 64)
        require_range("ema_decay", self.ema_decay, 0, 0.99999)
        if self.downsampling not in NUM_LEVELS:
            raise InputError(f"expected `downsampling` to be 4 or 8, found {self.downsampling}; choose one of the two")


class VQVAEOutput(NamedTuple):
    """One pass through the whole model."""

    x_hat: Tensor  # (B, C, S, T)
    z_e: Tensor  # (B, D, H, W)
    z_q: Tensor  # (B, D, H, W)
    indices: Tensor  # (B, H, W) int64
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
    """x (B, C, S, T) to z_e (B, D, H, W)."""

    def __init__(self, config: VQVAEConfig, num_channels: int) -> None:
        width, num_levels = config.width, NUM_LEVELS[config.downsampling]
        widths = [num_channels, width // 2, *[width] * (num_levels - 1)]
        halving = [m for pair in pairwise(widths) for m in (nn.ReLU(), nn.Conv2d(*pair, 4, stride=2, padding=1))]
        super().__init__(
            *halving[1:],  # without a ReLU on the image
            *(ResidualBlock(width) for _ in range(config.num_encoder_blocks)),
            nn.ReLU(),
            nn.Conv2d(width, config.code_dim, 1),
        )


class Decoder(nn.Sequential):
    """z_q (B, D, H, W) to x_hat (B, C, S, T), unbounded."""

    def __init__(self, config: VQVAEConfig, num_channels: int) -> None:
        width, num_levels = config.decoder_width or config.width, NUM_LEVELS[config.downsampling]
        widths = [width, *[width // 2] * (num_levels - 2), width // 4, num_channels]
        super().__init__(
            nn.Conv2d(config.code_dim, width, 3, padding=1),
            *(ResidualBlock(width) for _ in range(config.num_decoder_blocks)),
        )
        for channels_in, channels_out in pairwise(widths):
            self.extend([nn.ReLU(), nn.Conv2d(channels_in, 4 * channels_out, 3, padding=1), nn.PixelShuffle(2)])


def map_shape_of(image_shape: tuple[int, int, int], downsampling: int) -> tuple[int, int]:
    """(H, W) of the code maps of images (C, S, T).

    Raises:
        InputError: a height or width that `downsampling` does not divide.
    """
    _, height, width = image_shape
    if min(height, width) < 1 or height % downsampling or width % downsampling:
        fitting = "x".join(str(max(side // downsampling, 1) * downsampling) for side in (height, width))
        raise InputError(
            f"expected images whose height and width divide by {downsampling}, found {height}x{width}; try "
            f"`image_size={fitting}`"
        )
    return height // downsampling, width // downsampling


class VQVAE(nn.Module):
    """Stage one: images to maps of codes, and back.

    The model works in every floating-point type. `model.to(dtype)` changes it, and the images follow.

    Args:
        config: the network.
        image_shape: (C, S, T), channels, height and width.
    Raises:
        InputError: a height or width that `config.downsampling` does not divide.
    """

    def __init__(self, config: VQVAEConfig, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.config, self.image_shape = config, image_shape
        self.map_shape = map_shape_of(image_shape, config.downsampling)
        self.encoder = Encoder(config, image_shape[0])
        self.quantizer = VectorQuantizer(config.num_codes, config.code_dim, config.codebook_learning, config.ema_decay)
        self.decoder = Decoder(config, image_shape[0])

    def forward(self, x: Tensor) -> VQVAEOutput:
        """Reconstruct images (B, C, S, T), floating point in -1..1.

        Raises:
            ValueError: images of another shape, or of whole numbers.
        """
        z_e = self.encode_continuous(x)
        quantized = self.quantizer(z_e)
        return VQVAEOutput(self.decoder(quantized.z_q), z_e, *quantized)

    @property
    def device(self) -> torch.device:
        return self.quantizer.codebook.device

    def encode_continuous(self, x: Tensor) -> Tensor:
        """z_e (B, D, H, W) of images (B, C, S, T) in -1..1, in the codebook's type, under autocast too."""
        if x.shape[1:] != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise ValueError(f"expected images of shape (B, {expected}), found {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"expected images of floating-point values in -1..1, found {x.dtype}")
        dtype = self.quantizer.codebook.dtype
        return self.encoder(x.to(dtype)).to(dtype)

    def encode(self, x: Tensor) -> Tensor:
        """Indices (B, H, W) int64 of images (B, C, S, T) in -1..1."""
        return self.quantizer.nearest(self.encode_continuous(x))

    def decode_indices(self, indices: Tensor) -> Tensor:
        """Images (B, C, S, T) of code maps (B, H, W) int64. This is the only way from codes to pixels."""
        return self.decoder(self.quantizer.lookup(indices))


def load_vqvae(path: Path, device: torch.device) -> tuple[VQVAE, checkpoint.Header]:
    """The model of a checkpoint, in eval mode, and the checkpoint's header.

    Raises:
        InputError: no whole VQ-VAE checkpoint is there.
    """

    def build(header: checkpoint.Header) -> VQVAE:
        return VQVAE(from_dict(VQVAEConfig, header.config), from_dict(DatasetInfo, header.data).image_shape)

    model, header = checkpoint.load(path, "vqvae", build)
    return model.to(device).eval(), header
