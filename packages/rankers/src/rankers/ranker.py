"""The contract of all rankers, and the rule by which equal scores are ordered."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array, sparray

from .interactions import Interactions

# Scores held at a time.
BLOCK_BYTES = 1 << 27
Scores: TypeAlias = NDArray[np.float64] | csr_array


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
        step = max(1, BLOCK_BYTES // (8 * max(1, self._width())))
        for first in range(0, len(numbers), step):
            block = numbers[first : first + step]
            found = _without(self._scores(block), None if hidden is None else hidden[block])
            items[first : first + step], scores[first : first + step] = top_items(found, k)
        return items, scores

    def _width(self) -> int:
        """Numbers held at a time for each user, for the size of a block."""
        return self.num_items

    @abstractmethod
    def _fit(self, interactions: Interactions) -> None: ...

    @abstractmethod
    def _scores(self, users: NDArray[np.int64]) -> Scores:
        """Scores [U, num_items], a new array; an item at -inf, or not stored where it is sparse, is no candidate."""


def top_items(scores: Scores, k: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The k best items of each row, equal scores by the smaller item number.

    Args:
        scores: [U, I]; -inf is no candidate. Sparse: what is not stored is no candidate.
        k: length of a list.

    Returns:
        Items [U, k], -1 behind the end of a list, and their scores [U, k], -inf there.

    Raises:
        ValueError: On a NaN, which has no rank.
    """
    if np.isnan(scores.data if isinstance(scores, csr_array) else scores).any():
        raise ValueError("scores: got NaN, needs numbers (-inf for no candidate)")
    row, item, value = _stored(scores) if isinstance(scores, csr_array) else _at_the_top(scores, k)
    return ordered_lists(row, item, value, scores.shape[0], k)


def ordered_lists(
    row: NDArray[np.int64], item: NDArray[np.int64], score: NDArray[np.float64], rows: int, k: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Items and scores [rows, k] from scored pairs [P], best first, equal scores by the smaller item number."""
    order = np.lexsort((item, -score, row))
    row, item, score = row[order], item[order], score[order]
    place = np.arange(len(row)) - np.searchsorted(row, np.arange(rows))[row]
    top = place < k
    items, scores = np.full((rows, k), -1, np.int64), np.full((rows, k), -np.inf)
    items[row[top], place[top]], scores[row[top], place[top]] = item[top], score[top]
    return items, scores


def positive(scores: sparray) -> csr_array:
    """What is above 0 of sparse scores, as the candidates."""
    found = csr_array(scores)
    found.data[found.data < 0] = 0.0
    found.eliminate_zeros()
    return found


def _stored(scores: csr_array) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    row = np.repeat(np.arange(scores.shape[0]), np.diff(scores.indptr))
    kept = scores.data > -np.inf
    return row[kept], scores.indices[kept].astype(np.int64), scores.data[kept]


def _at_the_top(
    scores: NDArray[np.float64], k: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """All pairs that are not below the k-th best of their row: those that equal it come in too."""
    width = min(k, scores.shape[1])
    least = (
        np.partition(scores, scores.shape[1] - width, axis=1)[:, scores.shape[1] - width, None] if width else -np.inf
    )
    row, item = np.nonzero((scores >= least) & (scores > -np.inf))
    return row, item, scores[row, item]


def _without(scores: Scores, hidden: csr_array | None) -> Scores:
    if hidden is None:
        return scores
    row = np.repeat(np.arange(hidden.shape[0]), np.diff(hidden.indptr))
    if not isinstance(scores, csr_array):
        scores[row, hidden.indices] = -np.inf
        return scores
    width = scores.shape[1]
    own = np.repeat(np.arange(scores.shape[0]), np.diff(scores.indptr)) * width + scores.indices
    scores = scores.copy()
    scores.data[np.isin(own, row * width + hidden.indices)] = -np.inf
    return scores
