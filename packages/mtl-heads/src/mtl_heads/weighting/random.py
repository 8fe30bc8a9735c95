"""Random loss weighting: the litmus test any weighting has to beat."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import LossWeighting


class RandomWeighting(LossWeighting):
    """m = softmax of standard normals, drawn anew for each batch over the tasks that take part; sums to 1.

    The draws come from an own seeded generator, the same in every process; its state is saved and resumed.

    Args:
        tasks: task names or their number.
        static: the user's weights.
        seed: of the generator.

    Source: Lin et al. 2022, "Reasonable effectiveness of random weighting", algorithm 2.
    """

    def __init__(self, tasks: int | Sequence[str], static: Mapping[str, float] | None = None, seed: int = 0) -> None:
        super().__init__(tasks, static)
        self.generator = torch.Generator().manual_seed(seed)

    def _combine(self, values: Tensor, seen: Tensor, present: Tensor, shared: object, scaler: object) -> Tensor:
        draw = torch.randn(len(self.tasks), generator=self.generator).to(self.static.device)
        weights = torch.where(present, draw, -torch.inf).softmax(0)
        return self._weigh(values, torch.where(present, weights, 0.0), present)

    def get_extra_state(self) -> Any:
        return self.generator.get_state()

    def set_extra_state(self, state: Any) -> None:
        self.generator.set_state(state.cpu())
