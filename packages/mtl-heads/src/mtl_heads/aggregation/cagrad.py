"""CAGrad: the direction near the mean gradient that serves the worst task best."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .base import GramianAggregator
from .simplex import minimise_on_simplex


class CAGrad(GramianAggregator):
    """d = g_0 + c |g_0| g_w / |g_w|, g_0 the mean gradient, w the minimum of g_w . g_0 + c |g_0| |g_w| on the simplex.

    Args:
        tasks: task names or their number.
        static: the user's weights.
        c: radius in [0, 1) relative to |g_0|: 0 is the mean, towards 1 the worst task decides.
        rescale: divide by 1 + c^2 as the authors' code does; the paper's algorithm does not.

    Source: Liu et al. 2021, "Conflict-averse gradient descent", algorithm 1.
    """

    def __init__(
        self,
        tasks: int | Sequence[str],
        static: Mapping[str, float] | None = None,
        c: float = 0.4,
        rescale: bool = False,
    ) -> None:
        super().__init__(tasks, static)
        if c < 0:
            raise ValueError(f"c must be >= 0, got {c}")
        self.c, self.rescale = c, rescale

    def coefficients(self, gramian: Tensor, here: list[int]) -> Tensor:
        weights = cagrad_weights(gramian, self.c)
        return weights / (1 + self.c**2) if self.rescale else weights


def cagrad_weights(gramian: Tensor, c: float = 0.4) -> Tensor:
    """Coefficients 1/K + sqrt(phi) / |g_w| w of the direction [K]; 1/K where no direction helps all tasks (g_w = 0).

    Args:
        gramian: inner products of the gradients [K, K].
        c: radius relative to the mean gradient's length.
    """
    products: list[list[float]] = gramian.tolist()
    k = len(products)
    scale = sum(products[i][i] for i in range(k)) / k
    weights = [1 / k] * k
    if scale > 0 and c > 0:
        products = [[x / scale for x in row] for row in products]
        along = [sum(row) / k for row in products]
        radius = c * math.sqrt(max(sum(along) / k, 0.0))
        w = minimise_on_simplex(products, along, 0.0, radius)
        length = math.sqrt(max(sum(w[i] * products[i][j] * w[j] for i in range(k) for j in range(k)), 0.0))
        if length > 1e-9:
            weights = [1 / k + radius / length * x for x in w]
    return torch.tensor(weights, dtype=gramian.dtype)
