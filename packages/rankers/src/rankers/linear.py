"""Item-to-item models: neighbours under BM25, and EASE's closed-form regression."""

from __future__ import annotations

import warnings

import numpy as np
from implicit.nearest_neighbours import BM25Recommender
from implicit.utils import ParameterWarning
from numpy.typing import NDArray
from scipy.sparse import csr_array, csr_matrix

from .interactions import Interactions
from .ranker import Ranker, Scores, positive


class ItemKNN(Ranker):
    """Sum over the user's items of their similarity to an item; similarities are products of BM25-weighted columns.

    Args:
        neighbours: nearest items kept for each item, itself among them.
        k1: BM25's saturation of repeated events.
        b: BM25's normalisation by an item's summed weight; a user with many items counts less (idf).

    Source: implicit's ``BM25Recommender``.
    """

    def __init__(self, neighbours: int = 100, k1: float = 1.2, b: float = 0.75) -> None:
        if neighbours < 1:
            raise ValueError(f"neighbours: got {neighbours}, needs 1 or more")
        self.neighbours, self.k1, self.b = neighbours, k1, b

    def _fit(self, interactions: Interactions) -> None:
        self.own = interactions.matrix()
        model = BM25Recommender(K=self.neighbours, K1=self.k1, B=self.b, num_threads=1)
        if self.own.nnz:
            with warnings.catch_warnings():
                # implicit warns of a conversion that it makes itself.
                warnings.simplefilter("ignore", ParameterWarning)
                model.fit(csr_matrix(self.own), show_progress=False)
            self.similarity = csr_array(model.similarity, dtype=np.float64)
        else:
            self.similarity = csr_array((self.num_items, self.num_items), dtype=np.float64)

    def _scores(self, users: NDArray[np.int64]) -> Scores:
        return positive(self.own[users] @ self.similarity)


class EASE(Ranker):
    """x_u B with the B of zero diagonal that minimises |X - X B|^2 + l2 |B|^2: B = I - P / diag P, P = (X'X + l2 I)^-1.

    Args:
        l2: ridge, > 0.
        max_items: refuse a larger catalogue: the inverse holds items^2 numbers.
        binary: count a user's item once, whatever its weight.

    Source: Steck 2019, "Embarrassingly shallow autoencoders for sparse data", eq. 8.
    """

    def __init__(self, l2: float = 200.0, max_items: int = 20_000, binary: bool = True) -> None:
        if not l2 > 0:
            raise ValueError(f"l2: got {l2}, needs a number above 0")
        self.l2, self.max_items, self.binary = l2, max_items, binary

    def fit(self, interactions: Interactions) -> Ranker:
        """Learn from interactions.

        Raises:
            ValueError: On a catalogue larger than ``max_items``.
        """
        if interactions.num_items > self.max_items:
            size = 3 * 8 * interactions.num_items**2 / 2**30
            raise ValueError(
                f"EASE: got {interactions.num_items:,} items, needs at most max_items = {self.max_items:,} "
                f"(this catalogue takes about {size:,.0f} GiB); take ItemKNN or IALS, or raise max_items"
            )
        return super().fit(interactions)

    def _fit(self, interactions: Interactions) -> None:
        self.own = interactions.matrix()
        if self.binary:
            self.own.data[:] = 1.0
        gram = (self.own.T @ self.own).toarray()
        gram[np.diag_indices(self.num_items)] += self.l2
        inverse = np.linalg.inv(gram)
        self.item_weights = -inverse / np.diag(inverse)
        np.fill_diagonal(self.item_weights, 0.0)

    def _scores(self, users: NDArray[np.int64]) -> Scores:
        rows = self.own[users]
        scores = rows @ self.item_weights
        # Nobody without a history has a taste.
        scores[np.diff(rows.indptr) == 0] = -np.inf
        return scores
