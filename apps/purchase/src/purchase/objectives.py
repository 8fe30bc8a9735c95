"""What the network is asked: which item is viewed, put into the cart, bought next; and what a wrong answer costs."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mtl_heads import FrequencySampler
from mtl_heads.losses import focal_loss, sampled_softmax_loss
from mtl_heads.losses.sampled import item_scores
from purchase.config import EVENTS, Train
from purchase.network import Recommender
from purchase.prepare import FIRST
from seqdata import Batch


def inputs(batch: Batch) -> dict[str, Tensor]:
    """A torch batch of a store as the network takes it: item, event, seconds [T], offsets [B + 1]."""
    return {
        "item": batch.jagged["item_id"].long() - FIRST,
        "event": batch.jagged["event_type"].long() - FIRST,
        "seconds": batch.jagged["timestamp"],
        "offsets": batch.jagged.offsets,
    }


def next_items(batch: Mapping[str, Tensor], event: str, horizon: float) -> Tensor:
    """For each event the item of its user's next event of a type within ``horizon`` seconds, -1 without one [T]."""
    item, seconds, offsets = batch["item"], batch["seconds"], batch["offsets"]
    places = (batch["event"] == EVENTS.index(event)).nonzero()[:, 0]
    here = torch.arange(len(item), device=item.device)
    if not len(places):
        return torch.full_like(item, -1)
    at = torch.searchsorted(places, here, right=True)
    following = places[at.clamp_max(len(places) - 1)]
    end = torch.repeat_interleave(offsets[1:], offsets.diff())
    valid = (at < len(places)) & (following < end) & (seconds[following] - seconds <= horizon)
    return torch.where(valid, item[following], -1)


def terms(
    network: Recommender, batch: Mapping[str, Tensor], sampler: FrequencySampler, settings: Train, horizon: float
) -> dict[str, Tensor]:
    """The loss of every objective, unweighted: summed over the events that have a target, over the batch's events.

    So a rare objective has a small term, and its weight says how much of the whole it shall be.
    """
    table = network.item_vectors()
    hidden = network(**batch)
    negatives = sampler.sample((settings.negatives,), table.device)
    found = {}
    for objective in network.heads:
        target = next_items(batch, objective, horizon)
        rows = (target >= 0).nonzero()[:, 0]
        queries = network.queries(hidden[rows], objective)
        loss = _loss(queries, table, target[rows], negatives, sampler, settings)
        found[objective] = loss / len(target)
    return found


def total(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The weighted sum: a weight multiplies its own term and nothing else."""
    return torch.stack([weights[name] * term for name, term in terms.items()]).sum()


def _loss(
    queries: Tensor, table: Tensor, positives: Tensor, negatives: Tensor, sampler: FrequencySampler, settings: Train
) -> Tensor:
    """Summed over the rows [N]. A score less log Q of its item (and log S for the focal loss) is that of its chance."""

    def log_q(items: Tensor) -> Tensor:
        return sampler.log_q(items) if settings.log_q else torch.zeros(len(items), device=items.device)

    if settings.loss == "softmax":
        return sampled_softmax_loss(
            queries,
            table,
            positives,
            negatives,
            log_q_positives=log_q(positives),
            log_q_negatives=log_q(negatives),
            reduction="sum",
        )
    positive = (queries * table[positives]).sum(-1) - log_q(positives)
    negative = item_scores(queries, table, negatives) - log_q(negatives)
    logits = torch.cat([positive[:, None], negative], 1)
    labels = torch.zeros_like(logits)
    labels[:, 0] = 1.0
    present = torch.ones_like(logits, dtype=torch.bool)
    # A negative that is the positive says nothing.
    present[:, 1:] = positives[:, None] != negatives
    if settings.log_q:
        logits = logits - math.log(len(negatives))
    alpha, gamma = settings.focal_alpha, settings.focal_gamma
    return focal_loss(logits, labels, gamma=gamma, alpha=alpha, mask=present, reduction="sum")
