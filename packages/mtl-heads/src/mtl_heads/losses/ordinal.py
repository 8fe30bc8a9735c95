"""Ordered levels 0 < 1 < ... < C - 1, one logit for each threshold."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..masks import check_mask, hide, reduce, widen


def ordinal_loss(logits: Tensor, targets: Tensor, *, mask: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """Sum over the thresholds j of the binary cross-entropy of "the level is above j".

    Args:
        logits: logit of p(level > j) for j = 0 .. C - 2 [..., C - 1].
        targets: levels 0 .. C - 1 [...].
        mask: bool [...]; True = present.
        reduction: "mean" over present labels, "sum" or "none".

    Source: Cao, Mirjalili, Raschka 2020, "Rank consistent ordinal regression" (CORAL), eq. 4 with equal weights.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"targets must have shape {tuple(logits.shape[:-1])}, got {tuple(targets.shape)}")
    mask = check_mask(mask, targets.shape)
    logits = hide(widen(logits), None if mask is None else mask[..., None])
    above = hide(targets, mask)[..., None] > torch.arange(logits.shape[-1], device=logits.device)
    values = F.binary_cross_entropy_with_logits(logits, above.to(logits.dtype), reduction="none").sum(-1)
    return reduce(hide(values, mask), mask, reduction)


def ordinal_probabilities(logits: Tensor) -> Tensor:
    """The probability of each level from the logits of "above j": differences of neighbours [..., C]."""
    above = widen(logits).sigmoid()
    ones = torch.ones_like(above[..., :1])
    return torch.cat([ones, above], -1) - torch.cat([above, torch.zeros_like(ones)], -1)
