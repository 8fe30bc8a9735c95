"""Buckets of numbers by their quantiles before the fit cutoff."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

MOST = 4_000_000


def fit_borders(batches: Iterable[np.ndarray], rows: int, n: int) -> list[float]:
    """The borders between n buckets that hold about equally many of some numbers; none where there are no numbers.

    Args:
        batches: numbers, NaN where they do not count, float64 [b] each
        rows: how many there are in all; of more than four million an even sample is taken
        n: buckets

    Returns:
        n - 1 rising borders at the shares 1 / n, 2 / n, ..., interpolated as numpy's `quantile` does
    """
    step, place, kept = -(-max(rows, 1) // MOST), 0, [np.zeros(0)]
    for batch in batches:
        some = batch[-place % step :: step]
        kept.append(some[np.isfinite(some)])
        place += len(batch)
    values = np.concatenate(kept)
    return np.quantile(values, np.arange(1, n) / n).tolist() if len(values) else []


def bucket_ids(values: np.ndarray, borders: Sequence[float]) -> np.ndarray:
    """int32 ids [b] of numbers: 0 for NaN, else 2 + the number of borders that are not above it."""
    ids = np.searchsorted(np.asarray(borders, np.float64), values, "right") + 2
    return np.where(np.isnan(values), 0, ids).astype(np.int32)
