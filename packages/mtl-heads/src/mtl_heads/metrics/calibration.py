"""Do predicted probabilities happen as often as they say?"""

import torch
from torch import Tensor

from ..masks import check_mask
from .base import Metric

NORMS = ("l1", "l2", "max")


class CalibrationError(Metric):
    """Expected calibration error of yes/no probabilities over bins of equal width.

    Bin b holds p in (b / B, (b + 1) / B], the first one 0 too; a bin's gap is |mean p - share of positives|. "l1" is
    the mean gap weighed by the bins' sizes (ECE), "l2" its root mean square, "max" the largest.

    Args:
        bins: B.
        norm: "l1", "l2" or "max".

    Source: Naeini et al. 2015; Guo et al. 2017, eq. 3, on p itself rather than on the confidence of a decision.
    """

    def __init__(self, bins: int = 15, norm: str = "l1") -> None:
        super().__init__()
        if bins < 1:
            raise ValueError(f"bins must be >= 1, got {bins}")
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
        self.bins, self.norm = bins, norm
        self._sum_state("state", 3, bins)

    @torch.no_grad()
    def update(self, probabilities: Tensor, targets: Tensor, mask: Tensor | None = None) -> None:
        """Take in one batch.

        Args:
            probabilities: in [0, 1], any shape.
            targets: 0 or 1, same shape.
            mask: bool, same shape or its first axes; True = present.

        Raises:
            ValueError: When a present probability lies outside [0, 1].
        """
        if probabilities.shape != targets.shape:
            raise ValueError(f"targets must have shape {tuple(probabilities.shape)}, got {tuple(targets.shape)}")
        mask = check_mask(mask, targets.shape)
        p, y = (x.double().reshape(-1) if mask is None else x[mask].double() for x in (probabilities, targets))
        if bool(((p < 0) | (p > 1) | p.isnan()).any()):
            raise ValueError("probabilities must lie in [0, 1]; pass logits through sigmoid first")
        place = (p * self.bins).ceil().long().sub(1).clamp(0, self.bins - 1)
        self.get_buffer("state").index_add_(1, place, torch.stack([torch.ones_like(p), p, y]))

    def table(self) -> Tensor:
        """Labels, mean probability and share of positives of each bin [3, B]; NaN in an empty bin."""
        count, p, y = self._summed("state")
        return torch.stack([count, p / count, y / count])

    def compute(self) -> float:
        """The error in [0, 1]; NaN without labels."""
        count, p, y = self.table()
        gap = (p - y).abs().nan_to_num(0.0)
        if not count.sum() > 0:
            return float("nan")
        if self.norm == "max":
            return float(gap.max())
        share = count / count.sum()
        return float((share * gap).sum() if self.norm == "l1" else (share * gap**2).sum().sqrt())
