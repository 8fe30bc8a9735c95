"""The user's weights and nothing else."""

import torch
from torch import Tensor

from .base import LossWeighting


class StaticWeighting(LossWeighting):
    """sum c_k L_k."""

    def _combine(self, values: Tensor, seen: Tensor, present: Tensor, shared: object, scaler: object) -> Tensor:
        return self._weigh(values, torch.ones_like(seen), present)
