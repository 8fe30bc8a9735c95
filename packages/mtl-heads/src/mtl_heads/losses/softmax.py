"""Losses of one class out of C."""

import torch
from torch import Tensor

from ..masks import check_mask, hide, reduce, widen


def softmax_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of a softmax over the last axis.

    Args:
        logits: [..., C].
        targets: class numbers [...]; anything may stand where the mask is False.
        mask: bool [...]; True = present.
        label_smoothing: e in [0, 1): the target distribution becomes (1 - e) one-hot + e / C.
        class_weights: factor of each class's loss [C], e.g. from :func:`class_balanced_weights`.
        reduction: "mean" over present labels (not over their weights), "sum" or "none".
    """
    log_p, targets, mask = _prepare(logits, targets, mask)
    values = -log_p.gather(-1, targets[..., None])[..., 0]
    if label_smoothing:
        values = (1 - label_smoothing) * values - label_smoothing * log_p.mean(-1)
    if class_weights is not None:
        values = values * class_weights.to(values)[targets]
    return reduce(hide(values, mask), mask, reduction)


def softmax_focal_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    gamma: float = 2.0,
    alpha: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Focal loss of a softmax, -a_y (1 - p_y)^gamma log p_y; gamma = 0 is the cross-entropy.

    Args:
        logits: [..., C].
        targets: class numbers [...].
        gamma: focusing exponent >= 0.
        alpha: weight of each class [C]; None weighs all alike.
        mask: bool [...]; True = present.
        reduction: "mean" over present labels, "sum" or "none".

    Source: Lin et al. 2017, eq. 5, with the softmax's probability of the true class as p_t.
    """
    log_p, targets, mask = _prepare(logits, targets, mask)
    log_p_y = log_p.gather(-1, targets[..., None])[..., 0]
    # expm1 keeps 1 - p exact near p = 1; the floor keeps the power's gradient finite at p = 1.
    miss = (-torch.expm1(log_p_y)).clamp_min(torch.finfo(log_p_y.dtype).tiny)
    values = -(miss**gamma) * log_p_y
    if alpha is not None:
        values = values * alpha.to(values)[targets]
    return reduce(hide(values, mask), mask, reduction)


def _prepare(logits: Tensor, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"targets must have shape {tuple(logits.shape[:-1])}, got {tuple(targets.shape)}")
    mask = check_mask(mask, targets.shape)
    targets = hide(targets, mask).long()
    logits = hide(widen(logits), None if mask is None else mask[..., None])
    return logits.log_softmax(-1), targets, mask
