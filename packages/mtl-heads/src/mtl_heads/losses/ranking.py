"""Losses of order: pairs of scores, chains of events."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..masks import check_mask, hide, reduce, widen


def bpr_loss(
    positive_scores: Tensor,
    negative_scores: Tensor,
    *,
    candidates: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """-log sigmoid(s+ - s-), averaged over each row's negatives; a row without a negative adds 0.

    Args:
        positive_scores: [N].
        negative_scores: [N] or [N, S].
        candidates: bool [N, S]; False leaves a negative out of the row. None leaves out none.
        mask: bool [N]; True = the row has a positive.
        reduction: "mean" over present rows, "sum" or "none".

    Source: Rendle et al. 2009, "BPR: Bayesian personalized ranking from implicit feedback".
    """
    mask = check_mask(mask, positive_scores.shape)
    positive = hide(widen(positive_scores), mask)[:, None]
    negative = widen(negative_scores).reshape(len(positive), -1)
    negative = hide(negative, None if mask is None else mask[:, None])
    values = F.softplus(negative - positive)
    if candidates is None:
        values = values.mean(-1)
    else:
        values = torch.where(candidates, values, 0.0).sum(-1) / candidates.sum(-1).clamp_min(1)
    return reduce(hide(values, mask), mask, reduction)


def order_penalty(logits: Sequence[Tensor], *, mask: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """How far the probabilities of a chain of events rise along it: sum over t of max(p_t - p_(t-1), 0).

    Args:
        logits: the events in order, e.g. click, cart, purchase, each [N].
        mask: bool [N]; True = the row counts.
        reduction: "mean" over present rows, "sum" or "none".

    Source: Xi et al. 2021, "Modeling the sequential dependence among audience multi-step conversions" (AITM), eq. 7.
    """
    p = torch.stack([widen(z) for z in logits], -1)
    mask = check_mask(mask, p.shape[:-1])
    p = hide(p, None if mask is None else mask[..., None]).sigmoid()
    values = (p[..., 1:] - p[..., :-1]).clamp_min(0).sum(-1)
    return reduce(hide(values, mask), mask, reduction)
