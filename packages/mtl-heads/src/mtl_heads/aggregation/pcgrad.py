"""PCGrad: each gradient loses what points against another."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import GramianAggregator


class PCGrad(GramianAggregator):
    """sum_i of g_i projected, in random order over j, off every original g_j it conflicts with.

    The orders come from an own seeded generator, the same in every process; its state is saved and resumed.

    Args:
        tasks: task names or their number.
        static: the user's weights.
        seed: of the generator.

    Source: Yu et al. 2020, "Gradient surgery for multi-task learning", algorithm 1.
    """

    def __init__(self, tasks: int | Sequence[str], static: Mapping[str, float] | None = None, seed: int = 0) -> None:
        super().__init__(tasks, static)
        self.generator = torch.Generator().manual_seed(seed)

    def coefficients(self, gramian: Tensor, here: list[int]) -> Tensor:
        k = len(gramian)
        return pcgrad_weights(gramian, [torch.randperm(k, generator=self.generator).tolist() for _ in range(k)])

    def get_extra_state(self) -> Any:
        return self.generator.get_state()

    def set_extra_state(self, state: Any) -> None:
        self.generator.set_state(state.cpu())


def pcgrad_weights(gramian: Tensor, orders: Sequence[Sequence[int]]) -> Tensor:
    """Coefficients [K] of the projected gradients' sum, worked out on the Gramian.

    Args:
        gramian: inner products of the gradients [K, K].
        orders: for each i the order in which the other gradients are met; i itself is passed over.
    """
    products = gramian.tolist()
    k = len(products)
    total = [0.0] * k
    for i, order in enumerate(orders):
        own = [float(j == i) for j in range(k)]
        for j in order:
            if j != i:
                inner = sum(products[j][m] * own[m] for m in range(k))
                if inner < 0:
                    own[j] -= inner / products[j][j]
        total = [a + b for a, b in zip(total, own, strict=True)]
    return torch.tensor(total, dtype=gramian.dtype)
