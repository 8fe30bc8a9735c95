"""What weightings and gradient aggregators share: task names, the user's static weights, who takes part in a batch.

One rule combines the user's weights with every method: the method looks at the raw losses and gradients and decides a
weight m_k for each task; the weight applied is c_k m_k with the user's c_k. So a preference is never cancelled by the
method, c = 1 changes nothing, and a task with c_k = 0 or without a label in the batch stays out of the method.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .distributed import all_reduce_sum, world_size
from .masks import widen
from .precision import ExactBuffers
from .tasks import TaskLosses


class Balancer(ExactBuffers):
    """Base of all weightings and aggregators.

    Args:
        tasks: the tasks' names in the losses' order, or their number.
        static: the user's weights by name; a task not named has 1.

    Raises:
        ValueError: On repeated or unknown names, or a weight that is not finite and >= 0.
    """

    static: Tensor
    last_weights: Tensor

    def __init__(self, tasks: int | Sequence[str], static: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.tasks = tuple(str(i) for i in range(tasks)) if isinstance(tasks, int) else tuple(tasks)
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"tasks must be at least one with distinct names, got {self.tasks}")
        static = dict(static or {})
        if unknown := set(static) - set(self.tasks):
            raise ValueError(f"static names unknown tasks {sorted(unknown)}, known tasks: {', '.join(self.tasks)}")
        weights = [float(static.get(task, 1.0)) for task in self.tasks]
        if not all(math.isfinite(w) and w >= 0 for w in weights):
            raise ValueError(f"static weights must be finite and >= 0, got {static}")
        self.register_buffer("static", torch.tensor(weights))
        self.register_buffer("last_weights", torch.zeros(len(weights)), persistent=False)

    def effective_weights(self) -> dict[str, float]:
        """The weights applied to the last batch, by task: user's times method's; 0 for a task that took no part."""
        return dict(zip(self.tasks, self.last_weights.tolist(), strict=True))

    def _read(self, losses: TaskLosses | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Losses with their graph [K]; without it and averaged over processes [K]; who takes part [K] bool.

        A :class:`TaskLosses` says how many labels stood behind each loss; a plain tensor means that all tasks had some.
        """
        if isinstance(losses, TaskLosses):
            if losses.names != self.tasks:
                raise ValueError(f"losses must be of tasks {self.tasks} in this order, got {losses.names}")
            values, counts = losses.values, losses.counts
        else:
            values, counts = losses, torch.ones_like(losses.detach())
        if values.shape != self.static.shape:
            raise ValueError(f"losses must be [{len(self.tasks)}], got {tuple(values.shape)}")
        values = widen(values)
        seen = all_reduce_sum(torch.stack([values.detach(), counts.to(values.dtype)]))
        return values, seen[0] / world_size(), (seen[1] > 0) & (self.static > 0)
