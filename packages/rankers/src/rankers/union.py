"""Several rankers' candidates side by side: what a re-ranker chooses from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import sparray

from .ranker import Ranker


@dataclass(frozen=True)
class Candidates:
    """Pairs of a user and an item that at least one ranker recommends, sorted by user (as asked) and item.

    Args:
        users: the users asked for [U].
        row: which of ``users`` [P], non-decreasing.
        item: int64 [P].
        names: the rankers' names [G].
        scores: score of each ranker [P, G]; NaN where it does not recommend the item.
        ranks: place in each ranker's list, 0 = first [P, G]; NaN where it does not recommend the item.
    """

    users: NDArray[np.int64]
    row: NDArray[np.int64]
    item: NDArray[np.int64]
    names: tuple[str, ...]
    scores: NDArray[np.float64]
    ranks: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.item)

    def features(self) -> NDArray[np.float64]:
        """Scores and ranks side by side [P, 2 G], NaN where a ranker is silent: LightGBM reads that as missing."""
        return np.concatenate([self.scores, self.ranks], 1)

    def relevance(self, users: ArrayLike, items: ArrayLike) -> NDArray[np.int64]:
        """1 where a pair is among the targets (user, item) [T], else 0 [P].

        Args:
            users: user number of each target [T].
            items: item of each target [T].
        """
        wanted = np.stack([np.asarray(users, np.int64), np.asarray(items, np.int64)], 1)
        pairs = np.stack([self.users[self.row], self.item], 1)
        _, place = np.unique(np.concatenate([wanted, pairs]), axis=0, return_inverse=True)
        place = place.ravel()
        return np.isin(place[len(wanted) :], place[: len(wanted)]).astype(np.int64)


def union(rankers: Mapping[str, tuple[Ranker, int]], users: ArrayLike, exclude: sparray | None = None) -> Candidates:
    """The candidates of several fitted rankers.

    Args:
        rankers: by name, each with the number of candidates it gives.
        users: user numbers [U], each once.
        exclude: sparse [num_users, num_items]; what is stored there is no candidate.

    Returns:
        Every recommended pair once, with all rankers' scores and ranks.

    Raises:
        ValueError: Without a ranker, or on a user asked for twice.
    """
    numbers = np.asarray(users, np.int64)
    if not rankers:
        raise ValueError("rankers: got none, needs at least one")
    if len(np.unique(numbers)) != len(numbers):
        raise ValueError("users: got a user twice, needs each once")
    rows, items, scores, ranks, whose = [], [], [], [], []
    for g, (ranker, k) in enumerate(rankers.values()):
        found, score = ranker.recommend(numbers, k, exclude)
        row, place = np.nonzero(found >= 0)
        rows.append(row)
        items.append(found[row, place])
        scores.append(score[row, place])
        ranks.append(place)
        whose.append(np.full(len(row), g))
    pairs = np.stack([np.concatenate(rows), np.concatenate(items)], 1).astype(np.int64)
    distinct, place = np.unique(pairs, axis=0, return_inverse=True)
    place = place.ravel()
    shape = (len(distinct), len(rankers))
    wide = {name: np.full(shape, np.nan) for name in ("scores", "ranks")}
    for name, values in (("scores", scores), ("ranks", ranks)):
        wide[name][place, np.concatenate(whose)] = np.concatenate(values)
    return Candidates(numbers, distinct[:, 0], distinct[:, 1], tuple(rankers), wide["scores"], wide["ranks"])
