"""Matrix factorisation through the `implicit` library: weighted least squares and logistic."""

from __future__ import annotations

from typing import Any

import numpy as np
from implicit.cpu.als import AlternatingLeastSquares
from implicit.cpu.lmf import LogisticMatrixFactorization
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from threadpoolctl import threadpool_limits

from .interactions import Interactions
from .ranker import Ranker, Scores


class _Factors(Ranker):
    """Scores are products of a user's and an item's vector; a user without a history has no candidates.

    One thread, so that a seed means the same everywhere.
    """

    def _model(self) -> Any:
        raise NotImplementedError

    def _fit(self, interactions: Interactions) -> None:
        matrix = csr_matrix(interactions.matrix(), dtype=np.float32)
        self.known_users = np.diff(matrix.indptr) > 0
        self.known_items = np.bincount(matrix.indices, minlength=self.num_items) > 0
        # implicit asks for one BLAS thread, and warns where it finds more.
        with threadpool_limits(1):
            model = self._model()
            model.fit(matrix, show_progress=False)
        self.user_factors = np.asarray(model.user_factors, np.float64)
        self.item_factors = np.asarray(model.item_factors, np.float64)

    def _scores(self, users: NDArray[np.int64]) -> Scores:
        scores = self.user_factors[users] @ self.item_factors.T
        scores[~self.known_users[users]] = -np.inf
        scores[:, ~self.known_items] = -np.inf
        return scores


class IALS(_Factors):
    """Implicit alternating least squares: confidence alpha w in preference 1 where w > 0, 1 in preference 0 elsewhere.

    Give event types their weights by ``Interactions.weighted``; below 1 / alpha they count less than an absence.

    Args:
        factors: width of the vectors.
        regularization: ridge.
        alpha: how much more an observed event counts.
        iterations: sweeps over users and items.
        seed: of the starting vectors.

    Source: Hu, Koren, Volinsky 2008, "Collaborative filtering for implicit feedback datasets"; implicit's solver.
    """

    def __init__(
        self,
        factors: int = 64,
        regularization: float = 0.01,
        alpha: float = 1.0,
        iterations: int = 15,
        seed: int = 0,
    ) -> None:
        self.options = {
            "factors": factors,
            "regularization": regularization,
            "alpha": alpha,
            "iterations": iterations,
            "random_state": seed,
        }

    def _model(self) -> Any:
        return AlternatingLeastSquares(**self.options, num_threads=1)


class LogisticMF(_Factors):
    """Logistic matrix factorisation: p(user takes item) = sigmoid(x_u y_i + b_u + b_i), positives weighed by w.

    Give event types their weights by ``Interactions.weighted``.

    Args:
        factors: width of the vectors.
        learning_rate: of the gradient steps.
        regularization: ridge.
        iterations: sweeps.
        neg_prop: negatives drawn for each positive.
        seed: of the starting vectors and the negatives.

    Source: Johnson 2014, "Logistic matrix factorization for implicit feedback data"; implicit's solver.
    """

    def __init__(
        self,
        factors: int = 32,
        learning_rate: float = 1.0,
        regularization: float = 0.6,
        iterations: int = 30,
        neg_prop: int = 30,
        seed: int = 0,
    ) -> None:
        self.options = {
            "factors": factors,
            "learning_rate": learning_rate,
            "regularization": regularization,
            "iterations": iterations,
            "neg_prop": neg_prop,
            "random_state": seed,
        }

    def _model(self) -> Any:
        return LogisticMatrixFactorization(**self.options, num_threads=1)
