"""Lists from the network: exact best items of the whole catalogue, a block of users at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array, sparray
from torch import Tensor

from purchase.network import Recommender
from purchase.objectives import inputs
from purchase.prepare import FIRST
from rankers import Interactions, Ranker
from seqdata import View

FIELDS = ("item_id", "event_type")
# Scores held at a time.
BLOCK_NUMBERS = 1 << 24


class NetworkRanker(Ranker):
    """A trained network as a ranker: a list is what follows a user's history. Users without one have no candidates.

    Args:
        network: the network; it is used as it is, in evaluation mode
        history: what is known of the users; a user's number is the row of this view
        objective: the head that scores
        max_len: events of a history that are read
        batch_events: events read at a time
    """

    def __init__(
        self, network: Recommender, history: View, objective: str, max_len: int, batch_events: int = 1 << 15
    ) -> None:
        self.network, self.history, self.objective = network, history, objective
        self.max_len, self.batch_events = max_len, max(batch_events, max_len)
        self.num_users, self.num_items = len(history), len(network.brand)

    def recommend(
        self, users: ArrayLike, k: int, exclude: sparray | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """As `Ranker.recommend`, block by block, by torch's top-k."""
        numbers = np.asarray(users, np.int64)
        hidden = None if exclude is None else csr_array(exclude)
        items, scores = np.full((len(numbers), k), -1, np.int64), np.full((len(numbers), k), -np.inf)
        step = max(1, BLOCK_NUMBERS // self.num_items)
        for first in range(0, len(numbers), step):
            block = numbers[first : first + step]
            found = self._block(block)
            if hidden is not None:
                row, item = hidden[block].tocoo().coords
                found[torch.from_numpy(row.astype(np.int64)), torch.from_numpy(item.astype(np.int64))] = -torch.inf
            top, best = top_k(found, k)
            items[first : first + step, : top.shape[1]] = top.cpu().numpy()
            scores[first : first + step, : top.shape[1]] = best.double().cpu().numpy()
        return items, scores

    def _fit(self, interactions: Interactions) -> None:
        raise NotImplementedError("the network is trained by `purchase train`")

    def _scores(self, users: NDArray[np.int64]) -> NDArray[np.float64]:
        return self._block(users).double().cpu().numpy()

    @torch.no_grad()
    def _block(self, users: NDArray[np.int64]) -> Tensor:
        """Scores [U, I]; -inf for users without a history."""
        self.network.eval()
        device = self.network.brand.device
        found = torch.full((len(users), self.num_items), -torch.inf, device=device)
        table, at = self.network.item_vectors(), 0
        view = self.history.at(users)
        # Histories of like length lie together, so that little is padded.
        order = np.argsort(np.minimum(view.lengths(), self.max_len), kind="stable")
        place = torch.from_numpy(order).to(device)
        batches = view.at(order).batches(
            max_tokens=self.batch_events, fields=list(FIELDS), max_len=self.max_len, batch_size=len(users) or 1
        )
        for batch in batches:
            parts = {name: part.to(device) for name, part in inputs(batch.torch()).items()}
            some = (parts["offsets"].diff() > 0).nonzero()[:, 0]
            if len(some):
                hidden = self.network(**parts)[parts["offsets"][1:][some] - 1]
                found[place[at + some]] = self.network.queries(hidden, self.objective) @ table.T
            at += len(batch)
        return found


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best items of each row, best first, equal scores by the smaller number; -1 where a score is -inf.

    Args:
        scores: [U, I]
        k: length of a list

    Returns:
        Items and scores [U, min(k, I)].
    """
    width = min(k, scores.shape[1])
    values, items = scores.topk(min(width + 1, scores.shape[1]))
    if values.shape[1] > width:
        # Which of the items that equal the last one are among those is torch's choice: there the whole row is sorted.
        tied = (values[:, width - 1] == values[:, width]).nonzero()[:, 0]
        sorted_values, sorted_items = scores[tied].sort(dim=1, descending=True, stable=True)
        values[tied], items[tied] = sorted_values[:, : width + 1], sorted_items[:, : width + 1]
    items, order = items[:, :width].sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return items.gather(1, order).masked_fill(values == -torch.inf, -1), values


def excluded(history: View, events: Sequence[str], num_items: int) -> csr_array | None:
    """What the users had such an event with [users, items]; None without a rule."""
    if not events:
        return None
    past = history.where("event_type", list(events))
    item = past.gather(["item_id"])["item_id"].astype(np.int64) - FIRST
    row = np.repeat(np.arange(len(past)), past.lengths())
    return csr_array((np.ones(len(row)), (row, item)), shape=(len(past), num_items))
