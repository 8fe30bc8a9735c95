"""Losses of real-valued labels."""

import torch.nn.functional as F
from torch import Tensor

from ..masks import check_mask, hide, reduce, widen


def regression_loss(
    predictions: Tensor,
    targets: Tensor,
    *,
    kind: str = "mse",
    delta: float = 1.0,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Squared, absolute or Huber error of one number per label.

    Args:
        predictions: any shape.
        targets: same shape, same unit (the head's transform is applied before).
        kind: "mse", "mae" or "huber".
        delta: where Huber turns from squared to absolute, in the targets' unit.
        mask: bool, the targets' shape or its first axes; True = present.
        reduction: "mean" over present labels, "sum" or "none".
    """
    if predictions.shape != targets.shape:
        raise ValueError(f"targets must have shape {tuple(predictions.shape)}, got {tuple(targets.shape)}")
    mask = check_mask(mask, targets.shape)
    predictions = hide(widen(predictions), mask)
    targets = hide(targets.to(predictions.dtype), mask)
    if kind == "mse":
        values = (predictions - targets) ** 2
    elif kind == "mae":
        values = (predictions - targets).abs()
    elif kind == "huber":
        values = F.huber_loss(predictions, targets, reduction="none", delta=delta)
    else:
        raise ValueError(f'kind must be "mse", "mae" or "huber", got {kind!r}')
    return reduce(hide(values, mask), mask, reduction)


def vector_loss(
    predictions: Tensor, targets: Tensor, *, kind: str = "mse", mask: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """Distance between vectors: the mean squared difference of their entries, or 1 - cosine.

    Args:
        predictions: [..., D].
        targets: same shape; one label is one vector.
        kind: "mse" or "cosine".
        mask: bool [...]; True = present.
        reduction: "mean" over present vectors, "sum" or "none".
    """
    if predictions.shape != targets.shape:
        raise ValueError(f"targets must have shape {tuple(predictions.shape)}, got {tuple(targets.shape)}")
    mask = check_mask(mask, targets.shape[:-1])
    spread = None if mask is None else mask[..., None]
    predictions = hide(widen(predictions), spread)
    targets = hide(targets.to(predictions.dtype), spread)
    if kind == "mse":
        values = ((predictions - targets) ** 2).mean(-1)
    elif kind == "cosine":
        values = 1 - F.cosine_similarity(predictions, targets, dim=-1)
    else:
        raise ValueError(f'kind must be "mse" or "cosine", got {kind!r}')
    return reduce(hide(values, mask), mask, reduction)
