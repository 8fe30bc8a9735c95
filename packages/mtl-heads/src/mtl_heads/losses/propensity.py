"""Trainable ingredients of the propensity score of RecSys Challenge 2025 (Synerise): novelty and diversity.

The official metrics are ``Novelty = (1 - novelty_loss)^100`` and ``Diversity = 1 - diversity_loss`` of the same logits.
"""

import math

import torch
from torch import Tensor

from ..masks import check_mask, hide, reduce, widen

TOP_K = 10
EPSILON = 1e-9


def novelty_loss(
    logits: Tensor, popularity: Tensor, *, k: int = TOP_K, mask: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """Popularity of what is predicted: the sum over a row's top k of sigmoid(z_i) w_i, w = pop / sum of the top k pop.

    Lies in [0, 1]; scaling all popularities changes nothing. Minimising it raises the official Novelty, whose 100th
    power has no useful gradient far from 1 and is therefore left to the metric.

    Args:
        logits: [N, C].
        popularity: popularity of each label [C], any positive scale.
        k: top labels a row; all C when C < k.
        mask: bool [N]; True = the row counts.
        reduction: "mean" over present rows, "sum" or "none".

    Source: Synerise/recsys2025, metric Novelty, without its power.
    """
    if logits.dim() != 2 or popularity.shape != logits.shape[1:]:
        shapes = f"{tuple(popularity.shape)}, {tuple(logits.shape)}"
        raise ValueError(f"popularity must be [C] for logits [N, C], got {shapes}")
    mask = check_mask(mask, logits.shape[:1])
    scores = hide(widen(logits), None if mask is None else mask[:, None]).sigmoid()
    k = min(k, logits.shape[1])
    weights = popularity.to(scores)
    weights = weights / weights.topk(k).values.sum()
    top, places = scores.topk(k, -1)
    values = (top * weights[places]).sum(-1)
    return reduce(hide(values, mask), mask, reduction)


def diversity_loss(logits: Tensor, *, mask: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """One minus the entropy of a row's normalised sigmoids, relative to its maximum log2 C.

    Args:
        logits: [N, C], C >= 2.
        mask: bool [N]; True = the row counts.
        reduction: "mean" over present rows, "sum" or "none".

    Source: Synerise/recsys2025, metric Diversity: -sum p log2(p + 1e-9) / log2 C with p = sigmoid(z) / sum sigmoid(z).
    """
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits must be [N, C] with C >= 2, got {tuple(logits.shape)}")
    mask = check_mask(mask, logits.shape[:1])
    scores = hide(widen(logits), None if mask is None else mask[:, None]).sigmoid()
    p = scores / scores.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
    entropy = -(p * torch.log2(p + EPSILON)).sum(-1)
    values = 1 - entropy / math.log2(logits.shape[1])
    return reduce(hide(values, mask), mask, reduction)
