"""Homoscedastic uncertainty: each task learns its own noise level."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .base import LossWeighting


class UncertaintyWeighting(LossWeighting):
    """sum c_k (exp(-s_k) L_k / 2 + s_k / 2) with trained log-variances s_k = log sigma_k^2.

    ``log_variance`` is a parameter: give it to the optimiser, without weight decay. At its optimum exp(s_k) = L_k. The
    user's c_k stands outside: inside it would only shift s_k and cancel.

    Args:
        tasks: task names or their number.
        static: the user's weights.
        init: starting value of every s_k; 0 is the official code's.

    Source: Kendall, Gal, Cipolla 2018, "Multi-task learning using uncertainty to weigh losses", eq. 7 with s = log
    sigma^2.
    """

    def __init__(
        self, tasks: int | Sequence[str], static: Mapping[str, float] | None = None, init: float = 0.0
    ) -> None:
        super().__init__(tasks, static)
        self.log_variance = nn.Parameter(torch.full((len(self.tasks),), float(init)))

    def _combine(self, values: Tensor, seen: Tensor, present: Tensor, shared: object, scaler: object) -> Tensor:
        s = self.log_variance
        penalty = torch.where(present, 0.5 * self.static * s, s * 0).sum()
        return self._weigh(values, 0.5 * torch.exp(-s), present) + penalty.to(values.dtype)
