"""The contract of all rankers, and the rule by which equal scores are ordered."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array, sparray

from .interactions import Interactions

# Scores held at a time.
BLOCK_BYTES = 1 << 27


class Ranker(ABC):
    """``fit`` on interactions, ``recommend`` the best items of some users. Nothing is random beyond a stated seed.

    An item a ranker knows nothing about for a user (a score of -inf inside) is no candidate: the list ends earlier.
    """

    num_users: int
    num_items: int

    def fit(self, interactions: Interactions) -> Ranker:
        """Learn from interactions; returns the ranker itself."""
        self.num_users, self.num_items = interactions.num_users, interactions.num_items
        self._fit(interactions)
        return self

    def recommend(
        self, users: ArrayLike, k: int, exclude: sparray | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The best items of each user, best first; equal scores by the smaller item number.

        Args:
            users: user numbers [U].
            k: length of a list, >= 1.
            exclude: sparse [num_users, num_items]; what is stored there, whatever its value, is no candidate.

        Returns:
            Items [U, k], -1 behind the end of a list, and their scores [U, k], -inf there.

        Raises:
            ValueError: Before ``fit``, on a user out of range, a k below 1, or an ``exclude`` of another shape.
        """
        if not hasattr(self, "num_items"):
            raise ValueError(f"{type(self).__name__}: got recommend before fit, needs fit first")
        numbers = np.asarray(users, np.int64)
        if numbers.ndim != 1 or (len(numbers) and not 0 <= numbers.min() <= numbers.max() < self.num_users):
            raise ValueError(f"users: got {numbers.shape} numbers, needs [U] in 0 .. {self.num_users - 1}")
        if k < 1:
            raise ValueError(f"k: got {k}, needs 1 or more")
        hidden = None
        if exclude is not None:
            if exclude.shape != (self.num_users, self.num_items):
                raise ValueError(f"exclude: got shape {exclude.shape}, needs {(self.num_users, self.num_items)}")
            hidden = csr_array(exclude)
        items = np.full((len(numbers), k), -1, np.int64)
        scores = np.full((len(numbers), k), -np.inf)
        step = max(1, BLOCK_BYTES // (8 * max(1, self.num_items)))
        for first in range(0, len(numbers), step):
            block = numbers[first : first + step]
            found = np.asarray(self._scores(block), np.float64)
            if hidden is not None:
                for row, user in enumerate(block):
                    found[row, hidden.indices[hidden.indptr[user] : hidden.indptr[user + 1]]] = -np.inf
            items[first : first + step], scores[first : first + step] = top_items(found, k)
        return items, scores

    @abstractmethod
    def _fit(self, interactions: Interactions) -> None: ...

    @abstractmethod
    def _scores(self, users: NDArray[np.int64]) -> NDArray[np.float64]:
        """Scores [U, num_items], a new array; -inf where an item is no candidate."""


def top_items(scores: NDArray[np.float64], k: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The k best items of each row, equal scores by the smaller item number; -inf is no candidate.

    Args:
        scores: [U, I].
        k: length of a list.

    Returns:
        Items [U, k], -1 behind the end of a list, and their scores [U, k].

    Raises:
        ValueError: On a NaN, which has no rank.
    """
    if np.isnan(scores).any():
        raise ValueError("scores: got NaN, needs numbers (-inf for no candidate)")
    items = np.full((len(scores), k), -1, np.int64)
    best = np.full((len(scores), k), -np.inf)
    width = min(k, scores.shape[1])
    if not width:
        return items, best
    least = np.partition(scores, scores.shape[1] - width, axis=1)[:, scores.shape[1] - width]
    for row, line in enumerate(scores):
        # All that equal the least one kept, then the smallest numbers among them.
        found = np.flatnonzero((line >= least[row]) & (line > -np.inf))
        found = found[np.argsort(-line[found], kind="stable")][:width]
        items[row, : len(found)], best[row, : len(found)] = found, line[found]
    return items, best


def where_stored(matrix: csr_array, users: NDArray[np.int64]) -> NDArray[np.float64]:
    """Rows of a sparse matrix, dense, with -inf where nothing is stored [U, I]."""
    scores = np.full((len(users), matrix.shape[1]), -np.inf)
    for row, user in enumerate(users):
        at = slice(matrix.indptr[user], matrix.indptr[user + 1])
        scores[row, matrix.indices[at]] = matrix.data[at]
    return scores
