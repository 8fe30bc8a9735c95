"""How much of the catalogue is ever recommended."""

import torch
from torch import Tensor

from ..masks import check_mask
from .base import Metric
from .ranking import top_items


class CatalogueCoverage(Metric):
    """The share of items that appear in at least one row's top k.

    Args:
        num_items: items in the catalogue.
        k: length of a list.
    """

    def __init__(self, num_items: int, k: int = 10) -> None:
        super().__init__()
        self.num_items, self.k = num_items, min(k, num_items)
        self._sum_state("shown", num_items)

    @torch.no_grad()
    def update(self, scores: Tensor, mask: Tensor | None = None) -> None:
        """Take in scores over the catalogue [N, I]; ties go to the smaller item number. ``mask`` bool [N]."""
        mask = check_mask(mask, scores.shape[:1])
        if mask is not None:
            scores = scores[mask]
        top = top_items(scores, self.k)
        self.get_buffer("shown").index_add_(0, top.reshape(-1), torch.ones_like(top, dtype=torch.float64).reshape(-1))

    def compute(self) -> float:
        """The share of the catalogue shown, in [0, 1]."""
        return float((self._summed("shown") > 0).double().mean())
