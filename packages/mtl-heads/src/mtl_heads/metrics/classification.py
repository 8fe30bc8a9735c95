"""AUROC and area under precision-recall, with absent labels left out."""

from typing import Any

import torch
from torch import Tensor

from ..masks import check_mask
from .base import Metric
from .roc import auroc


class _OfOrder(Metric):
    """A metric of the order of the scores of one or several yes/no labels.

    Args:
        num_labels: C; 1 for scores [N].
    """

    def __init__(self, num_labels: int = 1) -> None:
        super().__init__()
        if num_labels < 1:
            raise ValueError(f"num_labels must be >= 1, got {num_labels}")
        self.num_labels = num_labels

    @torch.no_grad()
    def update(self, scores: Tensor, targets: Tensor, mask: Tensor | None = None) -> None:
        """Take in one batch.

        Args:
            scores: probabilities or logits, only their order matters [N] or [N, C].
            targets: 0 or 1, same shape.
            mask: bool, the targets' shape or [N]; True = present.
        """
        if scores.shape != targets.shape or scores.numel() != len(scores) * self.num_labels:
            shapes = f"{tuple(scores.shape)}, {tuple(targets.shape)}"
            raise ValueError(f"scores and targets must both be [N, {self.num_labels}], got {shapes}")
        mask = check_mask(mask, targets.shape)
        here = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask
        wide = (-1, self.num_labels)
        self._keep(scores=scores.detach().reshape(wide), targets=targets.reshape(wide) > 0, here=here.reshape(wide))

    @torch.no_grad()
    def compute(self) -> dict[str, Any]:
        """``macro``: mean over the labels that have both classes; ``per_label`` float64 [C], NaN for the others."""
        scores, targets, here = (self._kept(name) for name in ("scores", "targets", "here"))
        if not len(scores):
            values = torch.full((self.num_labels,), torch.nan, dtype=torch.float64)
        else:
            values = self._values(scores, targets, here.bool())
        return {"macro": float(values.nanmean()), "per_label": values}

    def _values(self, scores: Tensor, targets: Tensor, here: Tensor) -> Tensor:
        """The metric of each column [C], NaN where a class is missing."""
        raise NotImplementedError


class AUROC(_OfOrder):
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting half; float64."""

    def _values(self, scores: Tensor, targets: Tensor, here: Tensor) -> Tensor:
        return auroc(scores, targets.double(), here)


class AveragePrecision(_OfOrder):
    """Area under the precision-recall curve, as average precision; by torchmetrics (the ``metrics`` extra)."""

    def __init__(self, num_labels: int = 1) -> None:
        super().__init__(num_labels)
        try:
            from torchmetrics.functional.classification import binary_average_precision
        except ImportError as error:
            raise ImportError("AveragePrecision needs torchmetrics: pip install 'mtl-heads[metrics]'") from error
        self._precision = binary_average_precision

    def _values(self, scores: Tensor, targets: Tensor, here: Tensor) -> Tensor:
        values = torch.full((self.num_labels,), torch.nan, dtype=torch.float64)
        for i in range(self.num_labels):
            chosen, labels = scores[here[:, i], i], targets[here[:, i], i]
            if bool(labels.any()) and not bool(labels.all()):
                # torchmetrics squeezes scores outside [0, 1] through a sigmoid, which ties large ones: hand it places
                # in the order instead, equal ones for equal scores.
                places = chosen.unique(return_inverse=True)[1].double()
                values[i] = self._precision(places / places.max().clamp_min(1), labels.long())
        return values
