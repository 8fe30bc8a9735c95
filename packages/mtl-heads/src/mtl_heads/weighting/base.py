"""The common shape of all weightings."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..balancing import Balancer
from ..tasks import TaskLosses


class LossWeighting(Balancer):
    """Turns the losses of a batch into one scalar: sum over tasks of c_k m_k L_k, c the user's and m the method's
    weight."""

    def forward(
        self,
        losses: TaskLosses | Tensor,
        *,
        shared: Iterable[Tensor] | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Tensor:
        """The scalar to call ``backward`` on.

        Args:
            losses: the batch's losses [K], with their graph.
            shared: the last shared layer's parameters; only GradNorm needs them.
            scaler: the loss scaler in use, so that GradNorm's gradients do not underflow; the result is not scaled.
        """
        values, seen, present = self._read(losses)
        total = self._combine(values, seen, present, None if shared is None else list(shared), scaler)
        return total

    def end_epoch(self) -> None:
        """Tell the method that an epoch ended; only DWA listens."""

    def _combine(
        self,
        values: Tensor,
        seen: Tensor,
        present: Tensor,
        shared: list[Tensor] | None,
        scaler: torch.amp.GradScaler | None,
    ) -> Tensor:
        raise NotImplementedError

    def _weigh(self, values: Tensor, method: Tensor, present: Tensor) -> Tensor:
        """sum c_k m_k L_k over the tasks that take part; the others stay in the graph with weight 0."""
        weights = torch.where(present, self.static * method, 0.0).to(values.dtype)
        self.last_weights.copy_(weights.detach())
        return (weights * torch.where(present, values, values * 0)).sum()
