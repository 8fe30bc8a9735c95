"""AUROC and area under precision-recall, by torchmetrics, with absent labels left out."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..masks import check_mask
from .base import Metric


class _OfOrder(Metric):
    """A metric of the order of the scores of one or several yes/no labels.

    :param num_labels: C; 1 for scores [N].
    """

    def __init__(self, num_labels: int = 1) -> None:
        super().__init__()
        if num_labels < 1:
            raise ValueError(f"num_labels must be >= 1, got {num_labels}")
        self.num_labels = num_labels
        self._function()

    @torch.no_grad()
    def update(self, scores: Tensor, targets: Tensor, mask: Tensor | None = None) -> None:
        """Take in one batch.

        :param scores: probabilities or logits, only their order matters [N] or [N, C].
        :param targets: 0 or 1, same shape.
        :param mask: bool, the targets' shape or [N]; True = present.
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
        """``macro``: mean over the labels that have both classes; ``per_label`` [C], NaN for the others."""
        scores, targets, here = (self._kept(name) for name in ("scores", "targets", "here"))
        values = torch.full((self.num_labels,), torch.nan, dtype=torch.float64)
        for i in range(self.num_labels if len(scores) else 0):
            chosen, labels = scores[here[:, i], i], targets[here[:, i], i]
            if bool(labels.any()) and not bool(labels.all()):
                # torchmetrics squeezes scores outside [0, 1] through a sigmoid, which ties large ones: hand it places
                # in the order instead, equal ones for equal scores.
                places = chosen.unique(return_inverse=True)[1].double()
                values[i] = self._function()(places / places.max().clamp_min(1), labels.long())
        return {"macro": float(values.nanmean()), "per_label": values}

    def _function(self) -> Callable[[Tensor, Tensor], Tensor]:
        raise NotImplementedError


class AUROC(_OfOrder):
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting half."""

    def _function(self) -> Callable[[Tensor, Tensor], Tensor]:
        return _torchmetrics("binary_auroc")


class AveragePrecision(_OfOrder):
    """Area under the precision-recall curve, as average precision."""

    def _function(self) -> Callable[[Tensor, Tensor], Tensor]:
        return _torchmetrics("binary_average_precision")


def _torchmetrics(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    try:
        from torchmetrics.functional import classification
    except ImportError as error:
        raise ImportError("this metric needs torchmetrics: pip install 'mtl-heads[metrics]'") from error
    function: Callable[[Tensor, Tensor], Tensor] = getattr(classification, name)
    return function
