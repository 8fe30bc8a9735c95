"""Collaborative vectors: who touched the same skus, categories and URLs, by a truncated SVD of one sparse matrix."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, vstack
from sklearn.preprocessing import normalize
from sklearn.utils.extmath import randomized_svd

from seqdata import View
from seqdata.aggregates import Past
from ubt.config import FeaturesConfig
from ubt.features import DAY, Features, pasts
from ubt.prepare import Prepared

FAMILIES = ("item", "category", "url")


def collaborative(prepared: Prepared, before: datetime, config: FeaturesConfig, seed: int) -> Iterator[Features]:
    """Yield collaborative vectors [n, cf_size], in parts of the users who have a history.

    The matrix has a row for a user and a column for each sku, category and URL. A cell is log(1 + sum of the events'
    weights), times the column's inverse document frequency; every row has length one. An event weighs the more the
    rarer its type, sqrt(1 / share of the type), and halves with every longest window that passed since. The SVD is
    fitted on users with two events or more, asked for or not; users are projected on its right vectors.

    Args:
        prepared: the log
        before: events at or after this moment do not count, UTC
        config: size of the vectors, most frequent values that have a column, most users that are fitted on
        seed: of the users that are fitted on, and of the SVD
    """
    matrix = _Matrix(prepared, before, config)
    fitted = prepared.store.as_of(before).at_least(2)
    if len(fitted) > config.cf_users:
        chosen = np.random.default_rng([seed, 3]).choice(len(fitted), config.cf_users, replace=False)
        fitted = fitted.select(fitted.users[np.sort(chosen)])
    counts = vstack([part for part, _ in matrix.parts(fitted, "co-occurrences")], format="csr")
    frequency = np.bincount(counts.indices, minlength=matrix.columns)
    weight = np.log((1 + counts.shape[0]) / (1 + frequency)).astype(np.float32)
    # A column that one user has alone connects nobody.
    weight[frequency < 2] = 0
    size = min(config.cf_size, min(counts.shape) - 1)
    axes = randomized_svd(_weighted(counts, weight), size, n_iter=3, random_state=seed)[2].T.astype(np.float32)
    names = [f"cf {i}" for i in range(size)]
    row = 0
    for part, users in matrix.parts(prepared.history(before), "collaborative"):
        yield Features(prepared.known[row : row + users], _weighted(part, weight) @ axes, names)
        row += users


class _Matrix:
    """Which column a value has, and what an event weighs."""

    def __init__(self, prepared: Prepared, before: datetime, config: FeaturesConfig):
        self.before, self.half_life = before, config.windows_days[-1] * DAY
        self.event = prepared.families["event_type"]
        counts = np.asarray(prepared.store.vocabulary(self.event).counts, np.float64)
        # Ids 0 and 1 are "missing" and "unknown".
        self.weight = np.r_[0.0, 0.0, np.sqrt(counts.sum() / np.maximum(counts, 1))]
        self.blocks: list[tuple[str, int, int]] = []
        self.columns = 0
        for family in FAMILIES:
            if family in prepared.families:
                name = prepared.families[family]
                # Ids are in the order of falling frequency: the first ones are the most frequent.
                size = min(len(prepared.store.vocabulary(name)), config.cf_values + 2)
                self.blocks.append((name, self.columns, size))
                self.columns += size

    def parts(self, view: View, what: str) -> Iterator[tuple[csr_array, int]]:
        """Yield log(1 + weight) of batches of users, sparse [n, columns], and n."""
        if not self.blocks:
            raise ValueError(
                "blocks: cf needs items, categories or URLs, and there are none; leave it out: --blocks hstu,aggregates"
            )
        fields = [self.event, *(name for name, _, _ in self.blocks)]
        for _, past in pasts(view, self.before, fields, what):
            yield self._part(past), len(past)

    def _part(self, past: Past) -> csr_array:
        weight = self.weight[past[self.event]] * 0.5 ** (past.age / self.half_life)
        places, weights = [], []
        for name, first, size in self.blocks:
            values = past[name]
            hit = (values > 1) & (values < size)
            places.append((past.row[hit], first + values[hit].astype(np.int64)))
            weights.append(weight[hit])
        rows, columns = (np.concatenate([place[i] for place in places]) for i in range(2))
        shape = (len(past), self.columns)
        # Events of one user and value are summed.
        counts = csr_array((np.concatenate(weights).astype(np.float32), (rows, columns)), shape=shape)
        counts.sum_duplicates()
        np.log1p(counts.data, out=counts.data)
        return counts


def _weighted(counts: csr_array, weight: NDArray[np.float32]) -> csr_array:
    weighted = counts.copy()
    weighted.data = weighted.data * weight[weighted.indices]
    return normalize(weighted, copy=False)
