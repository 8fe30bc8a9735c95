"""FAMO: all losses fall at about the same rate, at the price of one extra forward pass."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..tasks import TaskLosses
from .base import LossWeighting
from .task_adam import TaskAdam

EPSILON = 1e-8


class FAMO(LossWeighting):
    """sum c_k z_k c log(L_k - b_k), z = softmax(logits), c = 1 / sum z_k / (L_k - b_k) held constant.

    After the optimiser's step call ``update`` with the losses of the same batch again: it moves the logits by Adam
    along the change of log-losses. Losses must not fall below ``min_losses``: one that may
    be negative, as ZILN's, needs a bound of its own there.

    Args:
        tasks: task names or their number.
        static: the user's weights.
        min_losses: lower bound b of each loss; zeros by default.
        lr: Adam's step on the logits.
        weight_decay: on the logits; 1e-3 is the paper's, the authors' code has 1e-5.

    Source: Liu et al. 2023, "FAMO: fast adaptive multitask optimization", algorithm 1.
    """

    logits: Tensor
    min_losses: Tensor
    before: Tensor
    took_part: Tensor

    def __init__(
        self,
        tasks: int | Sequence[str],
        static: Mapping[str, float] | None = None,
        min_losses: Mapping[str, float] | None = None,
        lr: float = 0.025,
        weight_decay: float = 1e-3,
    ) -> None:
        super().__init__(tasks, static)
        low = dict(min_losses or {})
        if unknown := set(low) - set(self.tasks):
            raise ValueError(f"min_losses names unknown tasks {sorted(unknown)}, known tasks: {', '.join(self.tasks)}")
        k = len(self.tasks)
        self.register_buffer("logits", torch.zeros(k))
        self.register_buffer("min_losses", torch.tensor([float(low.get(task, 0.0)) for task in self.tasks]))
        self.register_buffer("before", torch.zeros(k))
        self.register_buffer("took_part", torch.zeros(k, dtype=torch.bool))
        self.adam = TaskAdam(k, lr, weight_decay)
        self._called = False

    def _combine(self, values: Tensor, seen: Tensor, present: Tensor, shared: object, scaler: object) -> Tensor:
        self._called = True
        self._check_above(seen, present)
        self.before.copy_(torch.where(present, seen, self.before))
        self.took_part.copy_(present)
        z = torch.where(present, self.logits, -torch.inf).softmax(0)
        height = torch.where(present, seen.to(z.dtype) - self.min_losses + EPSILON, 1.0)
        scale = 1 / torch.where(present, z / height, 0.0).sum()
        # The gradient of c z log(L - b) is c z / (L - b) times that of L: these are the weights applied.
        method = torch.where(present, z * scale / height, 0.0)
        self._weigh(values, method, present)
        # Over several processes a process's own loss may be anywhere: its gradient is weighed, its log never taken.
        own = torch.where(present, values, values * 0) - torch.where(present, seen, 0.0).to(values.dtype)
        logs = torch.where(present, self.static * z * scale * height.log(), 0.0).to(values.dtype)
        return (self.last_weights.to(values.dtype) * own).sum() + logs.sum()

    @torch.no_grad()
    def update(self, losses: TaskLosses | Tensor) -> None:
        """Learn from how the step changed the losses.

        Args:
            losses: the losses of the same batch after the optimiser's step [K].

        Raises:
            ValueError: When called before the weighting itself, or a loss lies below its bound.
        """
        if not self._called and not bool(self.took_part.any()):
            raise ValueError("update must follow a call of the weighting on the same batch's losses, got none")
        _, seen, present = self._read(losses)
        present = present & self.took_part
        self._check_above(seen, present)
        fall = (self.before - self.min_losses + EPSILON).log() - (seen - self.min_losses + EPSILON).log()
        fall = torch.where(present, fall, 0.0).to(self.logits.dtype)
        # An overflow under a loss scaler teaches nothing.
        if not bool(fall.isfinite().all()):
            return
        z = torch.where(present, self.logits, -torch.inf).softmax(0)
        self.adam(self.logits, z * (fall - (z * fall).sum()), present)

    def _check_above(self, seen: Tensor, present: Tensor) -> None:
        below = present & (seen - self.min_losses + EPSILON <= 0)
        if bool(below.any()):
            k = int(below.int().argmax())
            raise ValueError(
                f"loss of task {self.tasks[k]!r}: got {float(seen[k]):g}, FAMO needs losses not below "
                f"{float(self.min_losses[k]):g}; give min_losses={{{self.tasks[k]!r}: a lower bound}}"
            )
