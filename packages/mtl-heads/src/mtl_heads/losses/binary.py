"""Losses of yes/no labels: one logit per label."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..masks import check_mask, hide, reduce, widen


def binary_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    pos_weight: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Binary cross-entropy on logits, the positive term times ``pos_weight``.

    Args:
        logits: [N] or [N, C].
        targets: 0, 1 or a probability, same shape.
        mask: bool, the targets' shape or [N]; True = present.
        pos_weight: factor of the positive term, a number or [C].
        label_smoothing: e in [0, 1): the target becomes t (1 - e) + e / 2.
        weight: factor of each label's loss, broadcast to the targets; does not enter the mean's denominator.
        reduction: "mean" over present labels, "sum" or "none".
    """
    logits, targets, mask = _prepare(logits, targets, mask)
    targets = targets * (1 - label_smoothing) + 0.5 * label_smoothing
    factor = None if pos_weight is None else torch.as_tensor(pos_weight, dtype=logits.dtype, device=logits.device)
    values = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=factor, reduction="none")
    return _finish(values, mask, weight, reduction)


def focal_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    gamma: float = 2.0,
    alpha: float | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    normalise: str = "labels",
    reduction: str = "mean",
) -> Tensor:
    """Binary focal loss -a_t (1 - p_t)^gamma log p_t on logits; gamma = 0 with alpha None is the cross-entropy.

    Args:
        logits: [N] or [N, C].
        targets: 0 or 1 (a probability gives the expected loss), same shape.
        gamma: focusing exponent >= 0.
        alpha: weight of positives, 1 - alpha that of negatives; None weighs neither.
        mask: bool, the targets' shape or [N]; True = present.
        weight: factor of each label's loss, broadcast to the targets.
        normalise: what "mean" divides by: "labels" (present labels) or "positives" (present positives, as in the
            paper).
        reduction: "mean", "sum" or "none".

    Source: Lin et al. 2017, "Focal loss for dense object detection", eq. 5.
    """
    logits, targets, mask = _prepare(logits, targets, mask)
    # Both terms from log-sigmoids: exact where p rounds to 0 or 1.
    positive = -((gamma * F.logsigmoid(-logits)).exp() * F.logsigmoid(logits))
    negative = -((gamma * F.logsigmoid(logits)).exp() * F.logsigmoid(-logits))
    if alpha is not None:
        positive, negative = alpha * positive, (1 - alpha) * negative
    values = targets * positive + (1 - targets) * negative
    return _finish(values, mask, weight, reduction, focal_denominator(targets, mask, normalise))


def focal_denominator(targets: Tensor, mask: Tensor | None, normalise: str) -> Tensor | None:
    """What a focal loss's mean divides by; None is the number of present labels []."""
    if normalise == "labels":
        return None
    if normalise == "positives":
        return hide(targets, mask).sum()
    raise ValueError(f'normalise must be "labels" or "positives", got {normalise!r}')


def class_balanced_weights(counts: Tensor | Sequence[float], beta: float = 0.999) -> Tensor:
    """Class weights (1 - b) / (1 - b^n), scaled to sum to the number of classes [C].

    Args:
        counts: labels of each class in the training data [C]; a class never seen gets weight 0.
        beta: in [0, 1): 0 weighs all classes alike, towards 1 it weighs by 1 / n.

    Source: Cui et al. 2019, "Class-balanced loss based on effective number of samples".
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be in [0, 1), got {beta}")
    number = torch.as_tensor(counts, dtype=torch.float64)
    weights = torch.where(number > 0, (1 - beta) / (1 - beta ** number.clamp_min(1)), 0.0)
    return (weights * len(number) / weights.sum()).float()


def product_logit(logits: Sequence[Tensor]) -> Tensor:
    """The logit of the product of the probabilities behind the logits: p = prod sigmoid(z_i) [N].

    This is ESMM's pCTCVR = pCTR pCVR in a form every loss on logits takes, computed in log space.

    Source: Ma et al. 2018, "Entire space multi-task model", eq. 2.
    """
    log_p = sum((F.logsigmoid(widen(z)) for z in logits[1:]), F.logsigmoid(widen(logits[0])))
    # At p = 1 the logit is infinite: stop one step before.
    log_p = log_p.clamp_max(-torch.finfo(log_p.dtype).tiny)
    return log_p - torch.log(-torch.expm1(log_p))


def _prepare(logits: Tensor, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    if logits.shape != targets.shape:
        raise ValueError(f"targets must have the logits' shape {tuple(logits.shape)}, got {tuple(targets.shape)}")
    mask = check_mask(mask, targets.shape)
    logits = hide(widen(logits), mask)
    return logits, hide(targets.to(logits.dtype), mask), mask


def _finish(
    values: Tensor, mask: Tensor | None, weight: Tensor | None, reduction: str, denominator: Tensor | None = None
) -> Tensor:
    if weight is not None:
        values = values * weight
    return reduce(hide(values, mask), mask, reduction, denominator)
