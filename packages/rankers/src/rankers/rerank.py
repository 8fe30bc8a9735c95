"""A LightGBM LambdaRank model that orders candidates by features the caller gives."""

from __future__ import annotations

from typing import Any

import lightgbm
import numpy as np
from numpy.typing import NDArray

from .ranker import ordered_lists
from .union import Candidates


class LambdaRank:
    """Gradient-boosted trees trained on NDCG@k of each user's candidates.

    Features must be known as of the time of recommending: nothing here can see that they are not. Users without a
    relevant candidate teach nothing and are left out of the fit. Deterministic; one thread.

    Args:
        k: NDCG's cut.
        rounds: trees.
        learning_rate: of each tree.
        leaves: of each tree.
        min_leaf: rows a leaf needs.
        seed: of LightGBM.

    Source: Burges 2010, "From RankNet to LambdaRank to LambdaMART"; LightGBM's objective "lambdarank".
    """

    def __init__(
        self,
        k: int = 10,
        rounds: int = 200,
        learning_rate: float = 0.05,
        leaves: int = 31,
        min_leaf: int = 50,
        seed: int = 0,
    ) -> None:
        if k < 1 or rounds < 1:
            raise ValueError(f"k, rounds: got {k}, {rounds}, needs 1 or more")
        self.rounds = rounds
        self.settings: dict[str, Any] = {
            "objective": "lambdarank",
            "lambdarank_truncation_level": max(k, 1) + 3,
            "learning_rate": learning_rate,
            "num_leaves": leaves,
            "min_data_in_leaf": min_leaf,
            "seed": seed,
            "deterministic": True,
            "force_col_wise": True,
            "num_threads": 1,
            "verbosity": -1,
        }

    def fit(self, candidates: Candidates, features: NDArray[Any], relevance: NDArray[Any]) -> LambdaRank:
        """Learn from candidates and which of them were taken.

        Args:
            candidates: [P].
            features: [P, F], NaN = missing.
            relevance: 0 or 1, or whole grades [P].

        Raises:
            ValueError: On shapes that do not fit, or when no candidate is relevant.
        """
        features = _checked(candidates, features)
        if relevance.shape != (len(candidates),):
            raise ValueError(f"relevance: got shape {relevance.shape}, needs ({len(candidates)},)")
        hits = np.bincount(candidates.row, relevance > 0, minlength=len(candidates.users))
        kept = hits[candidates.row] > 0
        if not kept.any():
            raise ValueError("relevance: got no relevant candidate, needs one at least")
        sizes = np.bincount(candidates.row[kept], minlength=len(candidates.users))
        data = lightgbm.Dataset(features[kept], np.asarray(relevance)[kept], group=sizes[sizes > 0])
        self.model = lightgbm.train(self.settings, data, self.rounds)
        return self

    def recommend(
        self, candidates: Candidates, features: NDArray[Any], k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The best candidates of each user, best first; equal scores by the smaller item number.

        Args:
            candidates: [P].
            features: [P, F], the columns of ``fit``.
            k: length of a list.

        Returns:
            Items [U, k], -1 behind the end of a list, and their scores [U, k], -inf there.

        Raises:
            ValueError: Before ``fit``, or on shapes that do not fit.
        """
        if not hasattr(self, "model"):
            raise ValueError("LambdaRank: got recommend before fit, needs fit first")
        features = _checked(candidates, features)
        score = np.asarray(self.model.predict(features)) if len(candidates) else np.zeros(0)
        return ordered_lists(candidates.row, candidates.item, score, len(candidates.users), k)


def _checked(candidates: Candidates, features: NDArray[Any]) -> NDArray[np.float64]:
    if features.ndim != 2 or len(features) != len(candidates):
        raise ValueError(f"features: got shape {features.shape}, needs [{len(candidates)}, F]")
    return np.asarray(features, np.float64)
