"""MGDA: the shortest vector in the convex hull of the gradients."""

import torch
from torch import Tensor

from .base import GramianAggregator
from .simplex import minimise_on_simplex


class MGDA(GramianAggregator):
    """min |sum w_k g_k| over w >= 0, sum w = 1, solved exactly; the result is zero at a Pareto-stationary point.

    Source: Desideri 2012, "Multiple-gradient descent algorithm"; Sener and Koltun 2018, eq. 3.
    """

    def coefficients(self, gramian: Tensor, here: list[int]) -> Tensor:
        return mgda_weights(gramian)


def mgda_weights(gramian: Tensor) -> Tensor:
    """Weights [K] of the min-norm point; for two tasks clamp((g2 - g1) . g2 / |g1 - g2|^2, 0, 1) and the rest.

    Args:
        gramian: inner products of the gradients [K, K].
    """
    products: list[list[float]] = gramian.tolist()
    k = len(products)
    scale = sum(products[i][i] for i in range(k)) / k
    if scale <= 0:
        weights = [1 / k] * k
    elif k == 2:
        (a, b), (_, c) = products
        length = a + c - 2 * b
        first = 0.5 if length <= 0 else min(max((c - b) / length, 0.0), 1.0)
        weights = [first, 1 - first]
    else:
        weights = minimise_on_simplex([[x / scale for x in row] for row in products], [0.0] * k, 1.0, 0.0)
    return torch.tensor(weights, dtype=gramian.dtype)
