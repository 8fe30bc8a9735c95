"""The mean loss of each task over an epoch, whatever batches and processes its labels came in."""

from collections.abc import Sequence

import torch

from ..tasks import TaskLosses
from .base import Metric


class MeanLosses(Metric):
    """Mean loss of each task over all labels taken in: batches count by their labels, in float64.

    Args:
        tasks: the tasks' names, in the losses' order.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self._sum_state("sums", 2, len(self.tasks))

    @torch.no_grad()
    def update(self, losses: TaskLosses) -> None:
        """Take in the losses of one batch, made without a graph or in ``eval()``: each process's own."""
        if losses.names != self.tasks:
            raise ValueError(f"losses: got tasks {losses.names}, needs {self.tasks} in this order")
        counts = losses.counts.double()
        sums = torch.where(counts > 0, losses.values.double() * counts, 0.0)
        self.get_buffer("sums").add_(torch.stack([sums, counts]))

    def compute(self) -> dict[str, float]:
        """Mean loss by task; NaN for a task without a label."""
        sums, counts = self._summed("sums")
        return dict(zip(self.tasks, (sums / counts).tolist(), strict=True))
