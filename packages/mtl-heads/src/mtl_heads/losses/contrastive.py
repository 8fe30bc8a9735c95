"""Contrastive losses over a batch, with any number of positives a row."""

import torch
from torch import Tensor

from ..masks import check_mask, reduce, widen


def info_nce_loss(
    queries: Tensor,
    keys: Tensor,
    positives: Tensor | None = None,
    *,
    candidates: Tensor | None = None,
    temperature: float = 0.1,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of finding a query's positives among the keys, averaged over its positives.

    For query i: -1/|P(i)| sum over p in P(i) of log( exp(q_i k_p / t) / sum over candidates a of exp(q_i k_a / t) ).
    A query without a positive has no label: it contributes nothing.

    Args:
        queries: [N, D]; normalise them for cosine.
        keys: [M, D].
        positives: bool [N, M]; None pairs query i with key i (N = M).
        candidates: bool [N, M], the keys each query chooses from; None is all. Positives must be among them.
        temperature: t > 0.
        mask: bool [N]; True = the query has a label.
        reduction: "mean" over queries with a label and a positive, "sum" or "none".

    Source: van den Oord et al. 2018 (InfoNCE), eq. 4; several positives as in Khosla et al. 2020, eq. 2.
    """
    queries, keys = widen(queries), widen(keys)
    if positives is None:
        if len(queries) != len(keys):
            raise ValueError(f"positives must be given when queries [{len(queries)}] and keys [{len(keys)}] differ")
        positives = torch.eye(len(queries), dtype=torch.bool, device=queries.device)
    if positives.shape != (len(queries), len(keys)):
        raise ValueError(f"positives must be [{len(queries)}, {len(keys)}], got {tuple(positives.shape)}")
    if candidates is not None and candidates.shape != positives.shape:
        raise ValueError(f"candidates must be {list(positives.shape)}, got {tuple(candidates.shape)}")
    mask = check_mask(mask, queries.shape[:1])
    present = positives.any(-1) if mask is None else positives.any(-1) & mask
    with torch.autocast(queries.device.type, enabled=False):
        scores = torch.where(present[:, None], queries, 0.0) @ keys.T / temperature
    if candidates is not None:
        scores = torch.where(candidates | ~present[:, None], scores, -torch.inf)
    log_p = scores.log_softmax(-1)
    number = positives.sum(-1).clamp_min(1)
    values = -torch.where(positives, log_p, 0.0).sum(-1) / number
    return reduce(torch.where(present, values, 0.0), present, reduction)


def supervised_contrastive_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    temperature: float = 0.1,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """SupCon: rows with the same label attract each other, all other labelled rows of the batch are negatives.

    Rows without a label are neither anchors nor negatives; an anchor alone in its class contributes nothing.

    Args:
        embeddings: [N, D]; normalise them for cosine.
        labels: class numbers [N].
        temperature: > 0.
        mask: bool [N]; True = the row has a label.
        reduction: "mean" over anchors with a positive, "sum" or "none".

    Source: Khosla et al. 2020, "Supervised contrastive learning", eq. 2 (L_out).
    """
    mask = check_mask(mask, labels.shape)
    present = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask
    embeddings = torch.where(present[:, None], widen(embeddings), 0.0)
    others = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device) & present[:, None] & present
    return info_nce_loss(
        embeddings,
        embeddings,
        others & (labels[:, None] == labels),
        candidates=others,
        temperature=temperature,
        mask=present,
        reduction=reduction,
    )
