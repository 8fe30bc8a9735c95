"""Retrieval losses over a positive and sampled negatives: sampled softmax and noise-contrastive estimation."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..masks import check_mask, hide, reduce, wide_dtype
from .gather_dot import gather_dot


def sampled_softmax_loss(
    queries: Tensor,
    table: Tensor,
    positives: Tensor,
    negatives: Tensor,
    *,
    log_q_positives: Tensor | None = None,
    log_q_negatives: Tensor | None = None,
    mask_hits: bool = True,
    candidates: Tensor | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of the positive among itself and the negatives, on scores corrected by s' = s / t - log Q(item).

    Args:
        queries: [N, D].
        table: item vectors [I, D].
        positives: items [N].
        negatives: items shared by all rows [S], or own ones [N, S]; sampled, or the batch's other positives.
        log_q_positives: log of the probability with which the sampler draws each positive [N]; None corrects nothing.
        log_q_negatives: the same for the negatives, [S] or [N, S]. It is SUBTRACTED: a popular negative is drawn more
            often than it deserves, so each of its scores counts less.
        mask_hits: leave out negatives that equal the row's positive.
        candidates: bool [N, S]; False leaves a negative out of the row. None leaves out none.
        temperature: t > 0.
        mask: bool [N]; True = the row has a label.
        reduction: "mean" over present rows, "sum" or "none".

    Source: Bengio and Senecal 2008; Yi et al. 2019, "Sampling-bias-corrected neural modeling", eq. 3.
    """
    mask, positive, negative, hits = _scores(queries, table, positives, negatives, temperature, mask)
    if not mask_hits:
        hits = torch.zeros_like(hits)
    if candidates is not None:
        hits = hits | ~candidates
    if log_q_positives is not None:
        positive = positive - hide(log_q_positives, mask).to(positive)
    if log_q_negatives is not None:
        negative = negative - log_q_negatives.to(negative)
    if mask_hits or candidates is not None:
        negative = negative.masked_fill(hits, -math.inf)
    values = torch.logaddexp(positive, negative.logsumexp(-1)) - positive
    return reduce(hide(values, mask), mask, reduction)


def nce_loss(
    queries: Tensor,
    table: Tensor,
    positives: Tensor,
    negatives: Tensor,
    *,
    log_q_positives: Tensor,
    log_q_negatives: Tensor,
    mask_hits: bool = False,
    candidates: Tensor | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Noise-contrastive estimation: tell the positive from S noise items by logits s / t - log(S Q(item)).

    The noise distribution is part of the loss, so both ``log_q`` are required; hits stay in by default, as the theory
    asks.

    Args:
        queries: [N, D].
        table: item vectors [I, D].
        positives: items [N].
        negatives: noise items, shared [S] or own [N, S].
        log_q_positives: log Q of the positives [N].
        log_q_negatives: log Q of the negatives, [S] or [N, S].
        mask_hits: leave out noise items that equal the row's positive.
        candidates: bool [N, S]; False is no noise item of the row, which S does not count. None leaves out none.
        temperature: t > 0.
        mask: bool [N]; True = the row has a label.
        reduction: "mean" over present rows, "sum" or "none".

    Source: Gutmann and Hyvarinen 2010; Mnih and Teh 2012, eq. 8.
    """
    mask, positive, negative, hits = _scores(queries, table, positives, negatives, temperature, mask)
    number = torch.full_like(positive, negatives.shape[-1]) if candidates is None else candidates.sum(-1).to(positive)
    log_s = number.clamp_min(1).log()
    noise = F.softplus(negative - log_s[:, None] - log_q_negatives.to(negative))
    if mask_hits:
        noise = noise.masked_fill(hits, 0.0)
    if candidates is not None:
        noise = noise.masked_fill(~candidates, 0.0)
    values = F.softplus(log_s + hide(log_q_positives, mask).to(positive) - positive) + noise.sum(-1)
    return reduce(hide(values, mask), mask, reduction)


def item_scores(queries: Tensor, table: Tensor, items: Tensor) -> Tensor:
    """Scores [N, S] of queries [N, D] against items shared by all rows [S], or own ones [N, S]."""
    if items.dim() == 2:
        return gather_dot(queries, table, items)
    with torch.autocast(queries.device.type, enabled=False):
        dtype = torch.promote_types(wide_dtype(queries), table.dtype)
        return queries.to(dtype) @ table.index_select(0, items).to(dtype).T


def _scores(
    queries: Tensor, table: Tensor, positives: Tensor, negatives: Tensor, temperature: float, mask: Tensor | None
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Mask [N], scores of positives [N] and negatives [N, S], where a negative is the row's positive [N, S]."""
    if positives.shape != queries.shape[:1]:
        raise ValueError(f"positives must be [{len(queries)}], got {tuple(positives.shape)}")
    mask = check_mask(mask, positives.shape)
    queries = hide(queries, None if mask is None else mask[:, None])
    positives = hide(positives, mask)
    if mask is not None and negatives.dim() == 2:
        negatives = hide(negatives, mask[:, None])
    positive = gather_dot(queries, table, positives[:, None])[:, 0] / temperature
    negative = item_scores(queries, table, negatives) / temperature
    return mask, positive, negative, positives[:, None] == negatives
