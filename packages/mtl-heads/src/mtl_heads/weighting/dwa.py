"""Dynamic weight average: tasks whose loss falls slowly weigh more."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .base import LossWeighting


class DWA(LossWeighting):
    """m_k = K softmax(r / T)_k with r_k = L_k(t-1) / L_k(t-2), L(t) the mean loss of epoch t; ones for two epochs.

    Call ``end_epoch()`` after each epoch. A batch without a label of a task does not count for it; a task without a
    label in a whole epoch keeps its history and takes part with r = 1 until it has two epochs. After an epoch of loss 0
    there is no rate: r = 1.

    Args:
        tasks: task names or their number.
        static: the user's weights.
        temperature: T; larger is more even.

    Source: Liu, Johns, Davison 2019, "End-to-end multi-task learning with attention", eq. 7.
    """

    total: Tensor
    batches: Tensor
    history: Tensor
    epochs: Tensor

    def __init__(
        self, tasks: int | Sequence[str], static: Mapping[str, float] | None = None, temperature: float = 2.0
    ) -> None:
        super().__init__(tasks, static)
        if temperature <= 0:
            raise ValueError(f"temperature must be > 0, got {temperature}")
        self.temperature = temperature
        k = len(self.tasks)
        self.register_buffer("total", torch.zeros(k, dtype=torch.float64))
        self.register_buffer("batches", torch.zeros(k, dtype=torch.float64))
        self.register_buffer("history", torch.zeros(2, k, dtype=torch.float64))
        self.register_buffer("epochs", torch.zeros(k, dtype=torch.long))

    def _combine(self, values: Tensor, seen: Tensor, present: Tensor, shared: object, scaler: object) -> Tensor:
        # An overflowing step of a loss scaler is skipped; it must not poison the epoch's mean either.
        counted = present & seen.isfinite()
        self.total += torch.where(counted, seen.double(), 0.0)
        self.batches += counted
        return self._weigh(values, self.method_weights(present), present)

    def method_weights(self, present: Tensor | None = None) -> Tensor:
        """m [K] over the tasks that take part; 0 for the others."""
        present = torch.ones_like(self.epochs, dtype=torch.bool) if present is None else present
        rate = self.history[1] / self.history[0]
        rate = torch.where((self.epochs >= 2) & rate.isfinite(), rate, 1.0)
        weights = torch.where(present, rate / self.temperature, -torch.inf).softmax(0) * present.sum()
        return torch.where(present & (self.epochs >= 2).any(), weights, present.double()).to(self.static.dtype)

    def end_epoch(self) -> None:
        """Close the epoch: its mean losses become the latest of the history."""
        had = self.batches > 0
        mean = self.total / self.batches.clamp_min(1)
        self.history.copy_(torch.where(had, torch.stack([self.history[1], mean]), self.history))
        self.epochs += had
        self.total.zero_()
        self.batches.zero_()
