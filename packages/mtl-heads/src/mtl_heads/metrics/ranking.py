"""Ranking metrics over the full catalogue, with the tie rule spelled out."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..masks import check_mask
from .base import Metric

TIES = ("index", "middle", "worst", "best")
# Scores held at a time while ranking against an item table.
CHUNK_BYTES = 1 << 27


def ranks(scores: Tensor, rows: Tensor, items: Tensor, *, exclude: Tensor | None = None, ties: str = "index") -> Tensor:
    """The rank (0 = first) of each (row, item) pair among all items of its row [P].

    Args:
        scores: [N, I].
        rows: row of each pair [P].
        items: item of each pair [P].
        exclude: bool [N, I]; True = not a candidate (already known); a pair's own item always is one.
        ties: among equal scores the pair's item comes by "index" (smaller item number first), in the "middle" (a half
            rank where the number is odd), "worst" (last) or "best" (first).

    Raises:
        ValueError: On a NaN score, which has no rank.
    """
    if ties not in TIES:
        raise ValueError(f"ties must be one of {', '.join(TIES)}, got {ties!r}")
    scores = scores if scores.is_floating_point() else scores.double()
    result = torch.empty(len(rows), dtype=torch.float64, device=scores.device)
    step = max(1, CHUNK_BYTES // (4 * max(1, scores.shape[1])))
    number = torch.arange(scores.shape[1], device=scores.device)
    for first in range(0, len(rows), step):
        row, item = rows[first : first + step], items[first : first + step, None]
        line = scores[row]
        if exclude is not None:
            # Below everything, whatever stands there; only another item at the bottom could be its equal.
            candidate = ~exclude[row] | (number == item)
            line = line.masked_fill(~candidate, -torch.inf)
        if bool(line.isnan().any()):
            raise ValueError("scores must not hold NaN: it has no rank")
        own = line.gather(1, item)
        above, equal = line > own, line == own
        if exclude is not None:
            equal = equal & candidate
        if ties == "index":
            behind = (equal & (number < item)).sum(1).double()
        elif ties == "best":
            behind = torch.zeros(len(row), dtype=torch.float64, device=scores.device)
        else:
            behind = (equal.sum(1) - 1).double() / (2 if ties == "middle" else 1)
        result[first : first + step] = above.sum(1) + behind
    return result


def catalogue_ranks(
    queries: Tensor,
    table: Tensor,
    rows: Tensor,
    items: Tensor,
    *,
    exclude: tuple[Tensor, Tensor] | None = None,
    ties: str = "index",
) -> Tensor:
    """:func:`ranks` of items by the product with an item table, a block of queries at a time: [N, I] is never held.

    Args:
        queries: [N, D].
        table: item vectors [I, D].
        rows: query of each pair [P], non-decreasing.
        items: item of each pair [P].
        exclude: (rows, items) pairs that are no candidates, e.g. what a user already bought.
        ties: see :func:`ranks`.
    """
    if len(rows) > 1 and bool((rows[1:] < rows[:-1]).any()):
        raise ValueError("rows must be non-decreasing; sort the pairs by row")
    step = max(1, CHUNK_BYTES // (4 * len(table)))
    parts = []
    for first in range(0, len(queries), step):
        scores = queries[first : first + step] @ table.T
        low, high = torch.searchsorted(rows, torch.tensor([first, first + step], device=rows.device)).tolist()
        hidden = None
        if exclude is not None:
            here = (exclude[0] >= first) & (exclude[0] < first + len(scores))
            hidden = torch.zeros_like(scores, dtype=torch.bool)
            hidden[exclude[0][here] - first, exclude[1][here]] = True
        parts.append(ranks(scores, rows[low:high] - first, items[low:high], exclude=hidden, ties=ties))
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64, device=queries.device)


class RankingMetrics(Metric):
    """NDCG, Recall, MRR and PHR at k, averaged over the rows that have a relevant item.

    NDCG has binary gains 1 / log2(rank + 2) over the ideal for min(relevant, k); Recall is hits over all relevant;
    MRR is 1 / (rank + 1) of the best hit within k; PHR (personal hit ratio) is the share of rows with a hit. A row
    without a relevant item has no label: it is counted in ``skipped`` only.

    Args:
        ks: list lengths.
        ties: see :func:`ranks`; "middle" gives the value of a mid-rank, not the mean over the orders.
    """

    NAMES = ("ndcg", "recall", "mrr", "phr")

    def __init__(self, ks: Sequence[int] = (10,), ties: str = "index") -> None:
        super().__init__()
        if not ks or min(ks) < 1:
            raise ValueError(f"ks must be list lengths >= 1, got {ks}")
        if ties not in TIES:
            raise ValueError(f"ties must be one of {', '.join(TIES)}, got {ties!r}")
        self.ks, self.ties = tuple(ks), ties
        self._sum_state("sums", len(self.ks), len(self.NAMES))
        self._sum_state("rows", 2)

    @torch.no_grad()
    def update(
        self, scores: Tensor, relevant: Tensor, *, mask: Tensor | None = None, exclude: Tensor | None = None
    ) -> None:
        """Take in scores over the catalogue.

        Args:
            scores: [N, I].
            relevant: bool or 0/1 multi-hot [N, I], or one item a row [N].
            mask: bool [N]; False = the row has no label.
            exclude: bool [N, I]; True = not a candidate.
        """
        mask = check_mask(mask, scores.shape[:1])
        if relevant.shape != scores.shape[: relevant.dim()]:
            raise ValueError(f"relevant must be {list(scores.shape)} or [N], got {tuple(relevant.shape)}")
        if mask is not None:
            scores, relevant = scores[mask], relevant[mask]
            exclude = None if exclude is None else exclude[mask]
        if relevant.dim() == 1:
            rows, items = torch.arange(len(relevant), device=scores.device), relevant.long()
        else:
            rows, items = (relevant > 0).nonzero(as_tuple=True)
        self.update_ranks(ranks(scores, rows, items, exclude=exclude, ties=self.ties), rows, len(scores))

    @torch.no_grad()
    def update_ranks(self, ranks: Tensor, rows: Tensor, num_rows: int) -> None:
        """Take in the ranks of the relevant items, e.g. from :func:`catalogue_ranks`.

        Args:
            ranks: 0 = first [P].
            rows: row of each [P].
            num_rows: rows of the batch that count, those without a relevant item included.
        """
        _, place = rows.unique(return_inverse=True)
        size = int(place.max()) + 1 if len(place) else 0
        state = self.get_buffer("sums")
        ranks = ranks.to(torch.float64)
        per_row = torch.zeros(size, dtype=torch.float64, device=ranks.device)
        relevant = per_row.index_add(0, place, torch.ones_like(ranks))
        for i, k in enumerate(self.ks):
            hit = (ranks < k).double()
            gain = per_row.index_add(0, place, hit / torch.log2(ranks + 2))
            hits = per_row.index_add(0, place, hit)
            best = per_row.scatter_reduce(0, place, hit / (ranks + 1), "amax")
            ideal = (1 / torch.log2(torch.arange(k, device=ranks.device, dtype=torch.float64) + 2)).cumsum(0)
            top = ideal[relevant.clamp_max(k).long() - 1] if size else per_row
            values = [gain / top, hits / relevant, best, (hits > 0).double()]
            state[i] += torch.stack([v.sum() for v in values]).to(state)
        self.get_buffer("rows").add_(torch.tensor([size, num_rows - size], dtype=torch.float64, device=state.device))

    def compute(self) -> dict[str, float]:
        """``{"ndcg@10": ..., "rows": ..., "skipped": ...}``; NaN without a row that has a relevant item."""
        sums, rows = self._summed("sums"), self._summed("rows").tolist()
        means = (sums / rows[0] if rows[0] else sums * torch.nan).tolist()
        named = {
            f"{name}@{k}": value
            for k, line in zip(self.ks, means, strict=True)
            for name, value in zip(self.NAMES, line, strict=True)
        }
        return {**named, "rows": rows[0], "skipped": rows[1]}


def top_items(scores: Tensor, k: int) -> Tensor:
    """The k best items of each row, equal scores by the smaller item number [N, k]."""
    return scores.sort(stable=True, dim=-1, descending=True).indices[:, :k]
