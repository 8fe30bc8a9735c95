"""Nash-MTL: the tasks bargain over the direction; each gains in proportion to what it gives."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .base import GramianAggregator
from .simplex import solve


class NashMTL(GramianAggregator):
    """m solves G m = 1 / m for the Gramian G, then the direction is cut to ``max_norm``.

    The equation is the optimum of the convex m'Gm / 2 - sum log m, found here by Newton's method: no solver package, no
    approximation from a previous batch. Its direction has length sqrt(K) for any gradients, so the learning rate alone
    sets the step and has to fall for the training to settle.

    Args:
        tasks: task names or their number.
        static: the user's weights.
        max_norm: longest direction; 0 does not cut.
        update_every: solve every so many batches and keep the weights in between.

    Source: Navon et al. 2022, "Multi-task learning as a bargaining game", eq. 1; the cut is the authors' code's.
    """

    kept: Tensor
    steps: Tensor

    def __init__(
        self,
        tasks: int | Sequence[str],
        static: Mapping[str, float] | None = None,
        max_norm: float = 1.0,
        update_every: int = 1,
    ) -> None:
        super().__init__(tasks, static)
        if max_norm < 0:
            raise ValueError(f"max_norm must be >= 0, got {max_norm}")
        if update_every < 1:
            raise ValueError(f"update_every must be >= 1, got {update_every}")
        self.max_norm, self.update_every = max_norm, update_every
        self.register_buffer("kept", torch.full((len(self.tasks),), torch.nan, dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def coefficients(self, gramian: Tensor, here: list[int]) -> Tensor:
        kept = self.kept[here].to(gramian)
        # A task that was absent when the weights were solved has none yet: solve again.
        if int(self.steps) % self.update_every == 0 or bool(kept.isnan().any()):
            kept = nash_mtl_weights(gramian) if bool(gramian.any()) else torch.ones_like(gramian[0])
            self.kept[here] = kept.to(self.kept)
        self.steps += 1
        length = (kept @ gramian @ kept).clamp_min(0).sqrt()
        return kept * (self.max_norm / length) if self.max_norm and length > self.max_norm else kept


def nash_mtl_weights(gramian: Tensor) -> Tensor:
    """The positive solution of G m = 1 / m [K].

    Args:
        gramian: inner products of the gradients [K, K]. Where they are dependent G is singular and the solution may be
            infinite: 1e-9 on the diagonal of the cosines keeps it finite.
    """
    inner: list[list[float]] = gramian.tolist()
    k = len(inner)
    # With m = u / |g| the equation is that of the cosines, C u = 1 / u: no gradient is too small to be heard.
    mean = max(math.sqrt(sum(inner[i][i] for i in range(k)) / k), 1e-150)
    norms = [math.sqrt(inner[i][i]) if inner[i][i] > 0 else mean for i in range(k)]
    products = [[x / norms[i] / norms[j] + 1e-9 * (i == j) for j, x in enumerate(row)] for i, row in enumerate(inner)]
    m = [1 / math.sqrt(products[i][i]) for i in range(k)]
    for _ in range(200):
        slope = [sum(g * x for g, x in zip(row, m, strict=True)) - 1 / x0 for row, x0 in zip(products, m, strict=True)]
        curve = [[x + (i == j) / m[i] ** 2 for j, x in enumerate(row)] for i, row in enumerate(products)]
        step = solve(curve, [-s for s in slope])
        # The objective is self-concordant: this damped step never leaves m > 0 and converges from anywhere.
        decrement = math.sqrt(max(-sum(s * d for s, d in zip(slope, step, strict=True)), 0.0))
        size = 1 / (1 + decrement) if decrement > 0.25 else 1.0
        m = [x + size * d for x, d in zip(m, step, strict=True)]
        if decrement < 1e-8:
            break
    return torch.tensor([u / norm for u, norm in zip(m, norms, strict=True)], dtype=gramian.dtype)
