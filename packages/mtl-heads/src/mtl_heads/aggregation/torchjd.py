"""Any aggregator of the torchjd package, under this package's masks, weights, scaling and processes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import GradientAggregator


class TorchJDAggregator(GradientAggregator):
    """Wraps a torchjd aggregator that weighs gradients, e.g. ``torchjd.aggregation.UPGrad()``.

    Args:
        tasks: task names or their number.
        aggregator: a torchjd aggregator with a weighting over the Gramian or over the Jacobian.
        static: the user's weights.

    Raises:
        ImportError: When torchjd is not installed.
        ValueError: When the aggregator does not express its result as weights of the gradients.
    """

    def __init__(self, tasks: int | Sequence[str], aggregator: Any, static: Mapping[str, float] | None = None) -> None:
        try:
            from torchjd.aggregation import Aggregator
        except ImportError as error:
            raise ImportError("TorchJDAggregator needs torchjd: pip install 'mtl-heads[torchjd]'") from error
        super().__init__(tasks, static)
        by_gramian = getattr(aggregator, "gramian_weighting", None)
        by_jacobian = None if by_gramian is not None else getattr(aggregator, "weighting", None)
        if not isinstance(aggregator, Aggregator) or (by_gramian is None and by_jacobian is None):
            raise ValueError(f"aggregator must be a torchjd aggregator that weighs gradients, got {aggregator!r}")
        self.aggregator = aggregator
        self._weighting: Any = by_gramian if by_gramian is not None else by_jacobian
        self._by_gramian = by_gramian is not None

    def _method(self, gramian: Tensor, matrices: Sequence[Tensor], here: Tensor) -> Tensor:
        inner = gramian if self._by_gramian else torch.cat([matrix[here].double() for matrix in matrices], 1)
        weights: Tensor = self._weighting(inner)
        return weights
