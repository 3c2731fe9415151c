"""The vector-quantisation layer (arXiv:1711.00937, section 3), and the two ways in which its codebook learns."""

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqvae.distributed import all_gather, all_reduce_mean, all_reduce_sum, broadcast, rank, world_size
from vqvae.errors import InputError, plain

CodebookLearning = Literal["gradient", "ema"]

KMEANS_STEPS = 10
RESTART_BELOW = 0.15  # a code is dead when its average count is below this share of an even split
JITTER = 1e-3  # noise on restarted codes, in units of the vectors' spread; it keeps codes from equal vectors apart
LOST_IN_ROUNDING = 1e-5  # the share of the numbers it comes from below which a float32 distance says little
COMPARED_AGAIN = ("cpu",)  # the devices on which such distances are taken again in float64
MOST_DISTANCES = 2**20  # computed at once; the 4 MB that they take fit into a cache


class Quantized(NamedTuple):
    """The output of the layer. The positions are those of the input, such as (H, W)."""

    z_q: Tensor  # (B, D, *positions), the chosen codes; its gradient goes straight to z_e
    indices: Tensor  # (B, *positions) int64 in [0, K)
    codebook_loss: Tensor  # scalar, mean over elements of (sg[z_e] - z_q)^2: moves the codebook only
    commitment_loss: Tensor  # scalar, mean over elements of (z_e - sg[z_q])^2: moves the encoder only


class VectorQuantizer(nn.Module):
    """Replace each encoder vector by its nearest code: z_q = e_k with k = argmin_j |z_e - e_j| (eqs. 1 and 2).

    With `learning="gradient"` the codebook is a parameter. It follows the codebook loss of eq. 3, from a start that is
    uniform in -1/K..1/K.

    With `learning="ema"` the codebook is a buffer. Each code follows an exponential moving average of the vectors that
    chose it (appendix A.1). The codebook starts from k-means on the first training batch. Codes that fall out of use
    restart from vectors of the current batch (arXiv:2005.00341). Processes that train together share one codebook:
    counts, sums and restarts are those of the whole batch.

    The channels are axis 1, and any number of positions follows: images (B, D, H, W), sequences (B, D, N), vectors
    (B, D). With `channel_last` they are the last axis: sequences (B, N, D). The layer works in every floating-point
    type; `module.to(dtype)` changes it. The averages of an EMA codebook are then as coarse as the type, so train it in
    float32, under autocast for speed.

    Args:
        num_codes: K, at least 1.
        code_dim: D.
        decay: weight of the past in the moving averages, in 0..1.
        channel_last: whether D is the last axis of what comes in and goes out, instead of axis 1.
    Raises:
        InputError: another way to learn, or a number out of range.
    """

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        learning: CodebookLearning = "gradient",
        decay: float = 0.99,
        channel_last: bool = False,
    ) -> None:
        super().__init__()
        if learning not in get_args(CodebookLearning):
            raise InputError(
                f"expected a codebook that learns by gradient or ema, found {learning!r}; choose one of the two"
            )
        if num_codes < 1 or code_dim < 1 or not 0 <= decay <= 1:
            raise InputError(
                f"expected at least one code of one dimension and a decay in 0..1, found {num_codes} codes of "
                f"{code_dim} dimensions and a decay of {plain(decay)}; choose others"
            )
        self.num_codes, self.code_dim, self.learning, self.decay = num_codes, code_dim, learning, decay
        self.channel_axis = -1 if channel_last else 1
        codebook = torch.empty(num_codes, code_dim).uniform_(-1 / num_codes, 1 / num_codes)
        if learning == "gradient":
            self.codebook = nn.Parameter(codebook)
            return
        self.register_buffer("codebook", codebook)
        self.register_buffer("counts", torch.ones(num_codes))  # average number of vectors that choose a code
        self.register_buffer("sums", codebook.clone())  # average sum of those vectors; codebook = sums / counts
        self.register_buffer("initialised", torch.tensor(False))
        self._started = False  # a copy of `initialised` that can be read without waiting for a GPU

    counts: Tensor
    sums: Tensor
    initialised: Tensor

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._started = False  # what was loaded says whether it has been

    def forward(self, z_e: Tensor) -> Quantized:
        """Quantise z_e. In training mode an EMA codebook is updated afterwards.

        Args:
            z_e: (B, D, *positions) floating point. Without any vectors the losses are NaN and the codes stay. Where a
                vector is not finite, the losses are not finite either.
        Raises:
            ValueError: z_e does not have D channels, or it has whole numbers.
        """
        updating = self.training and self.learning == "ema"
        vectors = self._to_rows(z_e.detach()) if updating else None
        if vectors is not None and not self._started:
            if not self.initialised:
                self._initialise(vectors)
            self._started = bool(self.initialised)
        indices = self.nearest(z_e)
        z_q = self.lookup(indices).to(z_e.dtype)
        codebook_loss = F.mse_loss(z_q, z_e.detach())
        commitment_loss = F.mse_loss(z_e, z_q.detach())
        if vectors is not None:
            self._update(vectors, indices.flatten())
        z_q = z_q.detach() + (z_e - z_e.detach())  # straight-through: the gradient of z_q is copied to z_e
        return Quantized(z_q, indices, codebook_loss, commitment_loss)

    @torch.no_grad()
    def nearest(self, z_e: Tensor) -> Tensor:
        """Indices (B, *positions) int64 of the codes nearest to z_e (B, D, *positions). Ties go to the lowest (eq. 1).

        Distances are float32 at least, under autocast too, so that the indices do not depend on it.

        Raises:
            ValueError: z_e does not have D channels.
        """
        vectors = self._to_rows(z_e)
        flat = _nearest(vectors, self.codebook.to(vectors.dtype))
        return flat.view(z_e.movedim(self.channel_axis, -1).shape[:-1])

    def lookup(self, indices: Tensor) -> Tensor:
        """The codes (B, D, *positions) at indices (B, *positions)."""
        return F.embedding(indices, self.codebook).movedim(-1, self.channel_axis)

    @torch.no_grad()
    def scale_averages(self, num_vectors: int) -> None:
        """Make an EMA codebook's averages those of batches of this many vectors. The codes stay.

        Averages of smaller batches would look like those of dead codes.
        """
        if self.learning == "ema":
            factor = num_vectors / self.counts.sum()
            self.counts.mul_(factor)
            self.sums.mul_(factor)

    def _to_rows(self, z_e: Tensor) -> Tensor:
        """z_e as vectors (N, D), in float32, or in float64 where z_e or the codebook has it."""
        if z_e.ndim < 2 or z_e.shape[self.channel_axis] != self.code_dim:
            expected = f"(B, {self.code_dim}, ...)" if self.channel_axis == 1 else f"(B, ..., {self.code_dim})"
            raise ValueError(f"expected z_e of shape {expected}, found {tuple(z_e.shape)}")
        if not z_e.is_floating_point():
            raise ValueError(f"expected z_e of floating-point values, found {z_e.dtype}")
        dtype = torch.promote_types(torch.promote_types(z_e.dtype, self.codebook.dtype), torch.float32)
        return z_e.to(dtype).movedim(self.channel_axis, -1).reshape(-1, self.code_dim)

    @torch.no_grad()
    def _initialise(self, vectors: Tensor) -> None:
        """Start the codebook from k-means on vectors (N, D). No more vectors than codes are the codes themselves, and
        without any the start has to wait."""
        num_vectors = sum(all_gather(len(vectors)))
        if num_vectors == 0:
            return
        codes = _draw_rows(vectors, self.num_codes)
        for _ in range(KMEANS_STEPS if num_vectors > self.num_codes else 0):
            chosen = _nearest(vectors, codes)
            counts, sums = (all_reduce_sum(part) for part in _count_and_sum(vectors, chosen, self.num_codes))
            codes = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], codes)
        self.codebook.copy_(codes)
        self.counts.fill_(num_vectors / self.num_codes)
        self.sums.copy_(self.codebook * self.counts[:, None])
        self.initialised.fill_(True)

    @torch.no_grad()
    def _update(self, vectors: Tensor, chosen: Tensor) -> None:
        """Update the moving averages by one step, then restart dead codes.

        Args:
            vectors: (N, D).
            chosen: (N,), the code that each vector chose.
        """
        counts, sums = (all_reduce_sum(part) for part in _count_and_sum(vectors, chosen, self.num_codes))
        self.counts.lerp_(counts.to(self.counts.dtype), 1 - self.decay)
        self.sums.lerp_(sums.to(self.sums.dtype), 1 - self.decay)
        # A code that nothing chose keeps its vector exactly. Its average is a quotient of two fading numbers.
        moved = self.sums / self.counts.clamp(min=torch.finfo(self.counts.dtype).tiny)[:, None]
        self.codebook.copy_(torch.where(counts[:, None] > 0, moved, self.codebook))
        self._restart_dead_codes(vectors, num_vectors=counts.sum(), even_share=counts.mean())

    def _restart_dead_codes(self, vectors: Tensor, num_vectors: Tensor, even_share: Tensor) -> None:
        """Give dead codes a vector of the batch, with its sum and an even share of the counts."""
        dead = self.counts < RESTART_BELOW * even_share
        if not _reading_waits(dead) and not dead.any():
            return  # drawing vectors takes time, and mostly no code is dead
        nth = dead.cumsum(0)  # the nth dead code takes the nth vector drawn
        dead &= nth <= num_vectors  # no more codes restart than there are vectors
        fresh = _draw_rows(vectors, self.num_codes)[(nth - 1).clamp(min=0)]
        self.codebook.copy_(torch.where(dead[:, None], fresh, self.codebook))
        self.sums.copy_(torch.where(dead[:, None], fresh * even_share, self.sums))
        self.counts.copy_(torch.where(dead, even_share, self.counts))


def count_codes(indices: Tensor, num_codes: int) -> Tensor:
    """How often each code occurs in indices of any shape: (K,) int64. Add the counts up over a whole split."""
    return torch.bincount(indices.flatten(), minlength=num_codes)


def perplexity(counts: Tensor) -> float:
    """exp of the entropy of the codes' frequencies, in 1..K: how many codes are in effective use."""
    p = counts.double() / counts.sum()
    return math.exp(-torch.special.xlogy(p, p).sum().item())


def codes_used(counts: Tensor) -> int:
    """How many codes were chosen at least once."""
    return int((counts > 0).sum())


def _reading_waits(tensor: Tensor) -> bool:
    """Whether reading a value makes a GPU idle. Processes that train together wait for each other in any case."""
    return tensor.device.type != "cpu" and world_size() == 1


def _nearest(vectors: Tensor, codes: Tensor) -> Tensor:
    """The index (N,) of the code (K, D) that is nearest to each vector (N, D), the lowest of several.

    The squared distance is |e|^2 - 2 z.e, up to a constant for each vector. Far from the origin this is a small
    difference of large numbers, so the mean of the codes becomes the origin first. Where one code lies far from the
    others, that does not help: vectors whose distance is lost in rounding are then compared in float64. This is done on
    a CPU only, because a GPU would have to wait for it.
    """
    origin = codes.mean(dim=0)
    moved = codes - origin
    squares = moved.pow(2).sum(dim=1)
    blocks = vectors.split(max(MOST_DISTANCES // len(codes), 1))
    with torch.autocast(vectors.device.type, enabled=False):
        parts = [torch.addmm(squares, block - origin, moved.T, alpha=-2).min(dim=1) for block in blocks]
    indices = torch.cat([part.indices for part in parts])
    if vectors.device.type in COMPARED_AGAIN and vectors.dtype == torch.float32:
        lengths = (vectors - origin).pow(2).sum(dim=1)
        least = torch.cat([part.values for part in parts]) + lengths
        doubtful = least < LOST_IN_ROUNDING * (lengths + squares.max())
        if doubtful.any():
            indices[doubtful] = _nearest(vectors[doubtful].double(), codes.double())
    return indices


def _count_and_sum(vectors: Tensor, chosen: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """How many vectors chose each code (K,), and the sum of those vectors (K, D)."""
    ones = vectors.new_ones(len(vectors))
    counts = vectors.new_zeros(num_codes).index_add_(0, chosen, ones)  # bincount would make a GPU wait
    sums = vectors.new_zeros(num_codes, vectors.shape[1]).index_add_(0, chosen, vectors)
    return counts, sums


def _draw_rows(vectors: Tensor, num: int) -> Tensor:
    """Draw `num` rows (num, D) at random from the vectors of all processes.

    Every vector is drawn once before any is drawn again. A little noise keeps equal rows apart. The main process makes
    the draw, and all processes get the same rows.
    """
    sizes = all_gather(len(vectors))
    first = sum(sizes[: rank()])
    order = torch.randperm(sum(sizes), device=vectors.device)
    drawn = broadcast(order.repeat(-(-num // len(order)))[:num]) - first
    own = (drawn >= 0) & (drawn < len(vectors))
    padded = F.pad(vectors, (0, 0, 0, 1))  # a process may have no vector at all
    rows = all_reduce_sum(torch.where(own[:, None], padded[drawn.clamp(0, len(vectors))], 0))
    mean = all_reduce_mean(vectors.mean(), len(vectors))
    spread = all_reduce_mean((vectors - mean).square().mean(), len(vectors)).sqrt()
    spread = torch.maximum(spread, mean.abs().clamp(min=1) / 100)  # less would be lost in rounding
    return rows + broadcast(torch.randn_like(rows)) * spread * JITTER
