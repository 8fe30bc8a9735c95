"""Where some values stand among others: the join of unsorted arrays."""

from __future__ import annotations

import numpy as np


def positions_of(wanted: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Finds each wanted value among others, in any order, in O((n + m) log m).

    Args:
        wanted: values [n], numbers or text; NaN is never found
        among: values [m] of the same kind; of a value that stands there twice the first place counts

    Returns:
        int64 positions in `among` [n], -1 where it has no such value
    """
    wanted, among = np.asarray(wanted), np.asarray(among)
    if not len(among) or not len(wanted):
        return np.full(len(wanted), -1, np.int64)
    order = np.argsort(among, kind="stable")
    ordered = among[order]
    place = np.minimum(np.searchsorted(ordered, wanted), len(among) - 1)
    return np.where(ordered[place] == wanted, order[place], -1).astype(np.int64)
