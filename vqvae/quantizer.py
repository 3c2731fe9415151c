"""The vector-quantisation layer (arXiv:1711.00937, section 3) and the two ways its codebook learns."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vqvae.common.distributed import averaged, from_main, gathered, rank, summed, world_size

CodebookLearning = Literal["gradient", "ema"]

KMEANS_STEPS = 10
RESTART_BELOW = 0.15  # a code is dead when its average count falls under this share of an even split
JITTER = 1e-3  # of the encoder outputs' spread: keeps codes drawn from equal vectors apart


class Quantized(NamedTuple):
    """What one pass through the layer gives."""

    z_q: Tensor  # (B, D, H, W), the chosen codes; its gradient goes straight to z_e
    indices: Tensor  # (B, H, W) int64 in [0, K)
    codebook_loss: Tensor  # scalar, mean over elements of (sg[z_e] - z_q)^2: moves the codebook only
    commitment_loss: Tensor  # scalar, mean over elements of (z_e - sg[z_q])^2: moves the encoder only


class VectorQuantizer(nn.Module):
    """Replace each encoder vector by its nearest code.

    `learning="gradient"`: the codebook is a parameter that follows the codebook loss, as in the paper's
    eq. 3, from a start uniform in -1/K..1/K.
    `learning="ema"`: the codebook is a buffer that follows an exponential moving average of the vectors
    that chose each code (the paper's appendix A.1). It starts from k-means on the first training batch,
    and codes that fall out of use restart from vectors of the current batch (arXiv:2005.00341). Processes
    that train together have one codebook: their counts, sums and restarts are the whole batch's.

    Args:
        num_codes: K, at least 1.
        code_dim: D.
        decay: weight of the past in the moving averages, in 0..1.
    """

    def __init__(
        self, num_codes: int, code_dim: int, learning: CodebookLearning = "gradient", decay: float = 0.99
    ) -> None:
        super().__init__()
        self.num_codes, self.code_dim, self.learning, self.decay = num_codes, code_dim, learning, decay
        codebook = torch.empty(num_codes, code_dim).uniform_(-1 / num_codes, 1 / num_codes)
        if learning == "gradient":
            self.codebook = nn.Parameter(codebook)
            return
        self.register_buffer("codebook", codebook)
        self.register_buffer("counts", torch.ones(num_codes))  # average number of vectors a code gets
        self.register_buffer("sums", codebook.clone())  # average sum of them; codebook = sums / counts
        self.register_buffer("initialised", torch.tensor(False))
        self._started = False  # that `initialised` was read and is true: to read it, a GPU has to wait

    counts: Tensor
    sums: Tensor
    initialised: Tensor

    def forward(self, z_e: Tensor) -> Quantized:
        """Quantise in the six documented steps; in training mode an EMA codebook then takes its own.

        Args:
            z_e: (B, D, H, W) floating point.
        Raises:
            ValueError: if z_e has not D channels.
        """
        self._check(z_e)
        learning = self.training and self.learning == "ema"
        vectors = rearrange(z_e.detach().float(), "b d h w -> (b h w) d") if learning else None
        if vectors is not None and not self._started:
            if not self.initialised:
                self._initialise(vectors)
            self._started = True
        indices = self.nearest(z_e)  # steps 1 to 3
        z_q = self.lookup(indices).to(z_e.dtype)  # steps 4 and 5
        codebook_loss = F.mse_loss(z_q, z_e.detach())
        commitment_loss = F.mse_loss(z_e, z_q.detach())
        if vectors is not None:
            self._update(vectors, indices.flatten())
        z_q = z_e + (z_q - z_e).detach()  # step 6, copy gradients: straight-through
        return Quantized(z_q, indices, codebook_loss, commitment_loss)

    @torch.no_grad()
    def nearest(self, z_e: Tensor) -> Tensor:
        """Indices (B, H, W) int64 of the codes nearest to z_e (B, D, H, W), ties to the lowest (eq. 1).

        Distances are float32 whatever autocast says, so that indices don't depend on it.
        """
        self._check(z_e)
        b, _, h, w = z_e.shape
        with torch.autocast(z_e.device.type, enabled=False):
            vectors = rearrange(z_e.float(), "b d h w -> (b h w) d")  # 1. reshape
            distances = _distances(vectors, self.codebook.float())  # 2. distances
            flat = distances.argmin(dim=1)  # 3. argmin
        return rearrange(flat, "(b h w) -> b h w", b=b, h=h, w=w)

    def lookup(self, indices: Tensor) -> Tensor:
        """The codes at indices (B, H, W), as (B, D, H, W)."""
        chosen = F.embedding(indices, self.codebook)  # 4. index the dictionary
        return rearrange(chosen, "b h w d -> b d h w")  # 5. reshape back

    def _check(self, z_e: Tensor) -> None:
        if z_e.ndim != 4 or z_e.shape[1] != self.code_dim:
            raise ValueError(f"expected z_e of shape (B, {self.code_dim}, H, W), found {tuple(z_e.shape)}")

    @torch.no_grad()
    def _initialise(self, vectors: Tensor) -> None:
        """k-means on one batch of (N, D) vectors, N of any size."""
        codes = _draw(vectors, self.num_codes)
        for _ in range(KMEANS_STEPS):
            chosen = _distances(vectors, codes).argmin(dim=1)
            counts, sums = (summed(part) for part in _count_and_sum(vectors, chosen, self.num_codes))
            codes = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], codes)
        self.codebook.copy_(codes)
        self.counts.copy_(counts.mean())
        self.sums.copy_(self.codebook * self.counts[:, None])
        self.initialised.fill_(True)

    @torch.no_grad()
    def _update(self, vectors: Tensor, chosen: Tensor) -> None:
        """One step of the moving averages, then restarts."""
        counts, sums = (summed(part) for part in _count_and_sum(vectors, chosen, self.num_codes))
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        # Codes that nothing chose keep their vector exactly, instead of a quotient of two fading numbers.
        moved = self.sums / self.counts.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        self.codebook.copy_(torch.where(counts[:, None] > 0, moved, self.codebook))
        even_share = counts.mean()
        dead = self.counts < RESTART_BELOW * even_share
        if _is_cheap_to_read(dead) and not dead.any():
            return  # else vectors are drawn for codes that may not be dead
        nth = dead.cumsum(0)  # the nth dead code takes the nth vector drawn
        dead &= nth <= counts.sum()  # not more codes than vectors
        fresh = _draw(vectors, self.num_codes)[(nth - 1).clamp(min=0)]
        self.codebook.copy_(torch.where(dead[:, None], fresh, self.codebook))
        self.sums.copy_(torch.where(dead[:, None], fresh * even_share, self.sums))
        self.counts.copy_(torch.where(dead, even_share, self.counts))


def _is_cheap_to_read(tensor: Tensor) -> bool:
    """Not so on a GPU, which would have to wait; processes that draw together wait for each other anyway."""
    return tensor.device.type == "cpu" or world_size() > 1


def _distances(vectors: Tensor, codes: Tensor) -> Tensor:
    """Squared distances (N, K) up to a constant per row: |e|^2 - 2 z.e."""
    return torch.addmm(codes.pow(2).sum(1), vectors, codes.T, alpha=-2)


def _count_and_sum(vectors: Tensor, chosen: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """How many vectors chose each code (K,), and their sum (K, D)."""
    ones = vectors.new_ones(len(vectors))
    counts = vectors.new_zeros(num_codes).index_add_(0, chosen, ones)  # bincount would make a GPU wait
    sums = vectors.new_zeros(num_codes, vectors.shape[1]).index_add_(0, chosen, vectors)
    return counts, sums


def _draw(vectors: Tensor, num: int) -> Tensor:
    """`num` rows drawn from all processes' vectors, in turn again where there are too few, no two of them equal; the
    main process draws for all."""
    sizes = gathered(len(vectors))
    first = sum(sizes[: rank()])
    order = torch.randperm(sum(sizes), device=vectors.device)
    drawn = from_main(order.repeat(-(-num // len(order)))[:num]) - first
    mine = (drawn >= 0) & (drawn < len(vectors))
    rows = summed(torch.where(mine[:, None], vectors[drawn.clamp(0, len(vectors) - 1)], 0))
    mean = averaged(vectors.mean(), len(vectors))
    spread = averaged((vectors - mean).square().mean(), len(vectors)).sqrt().clamp(min=1e-2)
    return rows + from_main(torch.randn_like(rows)) * spread * JITTER
