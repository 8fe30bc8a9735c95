"""What all metrics share: sums in buffers or kept rows, updates without a graph, a result over all processes."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed import all_reduce_sum, world_size
from ..precision import ExactBuffers


class Metric(ExactBuffers):
    """``update`` takes a batch, ``compute`` gives the result so far over all processes, ``reset`` starts anew.

    ``state_dict`` saves the state. All processes must call ``compute``, however many batches each has seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self._rows: dict[str, list[Tensor]] = {}

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Take in one batch."""
        raise NotImplementedError

    def compute(self) -> Any:
        """The result over everything taken in; NaN when that is nothing."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget everything taken in."""
        for name, buffer in self.named_buffers(recurse=False):
            if name not in self._non_persistent_buffers_set:
                buffer.zero_()
        for pieces in self._rows.values():
            pieces.clear()

    def _sum_state(self, name: str, *shape: int) -> None:
        self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))

    def _summed(self, name: str) -> Tensor:
        return all_reduce_sum(self.get_buffer(name))

    def _keep(self, **rows: Tensor) -> None:
        """Keep rows of a batch for a result that cannot be had from sums."""
        for name, piece in rows.items():
            self._rows.setdefault(name, []).append(piece)

    def _kept(self, name: str) -> Tensor:
        """All rows kept under a name, of all processes in their order; empty [0] when there are none."""
        pieces = self._rows.get(name, [])
        own = torch.cat(pieces) if pieces else None
        if world_size() > 1:
            parts: list[Any] = [None] * world_size()
            dist.all_gather_object(parts, None if own is None else own.cpu())
            found = [part for part in parts if part is not None]
            own = torch.cat(found) if found else None
        return torch.zeros(0) if own is None else own

    def get_extra_state(self) -> Any:
        return {name: torch.cat(pieces) for name, pieces in self._rows.items() if pieces}

    def set_extra_state(self, state: Any) -> None:
        self._rows = {name: [rows] for name, rows in state.items()}
