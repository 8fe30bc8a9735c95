"""What is known of a user and an item at a moment, for the re-ranker."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from purchase.config import EVENTS
from purchase.prepare import Prepared
from rankers import Candidates, Interactions

DAY = 86_400
WINDOWS = (1, 7, 30)


def pair_features(past: Interactions, candidates: Candidates, prepared: Prepared, moment: int) -> NDArray[np.float64]:
    """Counts and ages as of a moment [P, F]; ages are in days, NaN where nothing happened.

    Args:
        past: events before the moment, unweighted, with their types
        candidates: the pairs
        prepared: brand and category of the items
        moment: seconds since 1970
    """
    if len(past) and past.time.max() >= moment:
        raise ValueError(f"past: got an event at {past.time.max()}, needs events before {moment} only")
    assert past.event is not None
    user, item = candidates.users[candidates.row], candidates.item
    columns = []
    for kind in range(len(EVENTS)):
        here = past.where(past.event == kind)
        columns += [_looked_up(here.matrix(), user, item), np.bincount(here.user, minlength=past.num_users)[user]]
        for days in WINDOWS:
            recent = here.item[here.time >= moment - days * DAY]
            columns.append(np.bincount(recent, minlength=past.num_items)[item])
    for code in (prepared.brand, prepared.category):
        shape = (past.num_users, int(code.max()) + 1)
        own = csr_array((np.ones(len(past)), (past.user, code[past.item])), shape=shape)
        own.sum_duplicates()
        columns.append(_looked_up(own, user, code[item]))
    columns += [
        _age(past, past.user, past.num_users, moment)[user],
        _age(past, past.item, past.num_items, moment)[item],
    ]
    columns.append(_pair_age(past, user, item, moment))
    return np.stack([np.asarray(one, np.float64) for one in columns], 1)


def _looked_up(matrix: csr_array, row: NDArray[np.int64], column: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.asarray(matrix[row, column]).ravel() if len(row) else np.zeros(0)


def _age(past: Interactions, number: NDArray[np.int64], size: int, moment: int) -> NDArray[np.float64]:
    last = np.full(size, -1, np.int64)
    np.maximum.at(last, number, past.time)
    return np.where(last < 0, np.nan, (moment - last) / DAY)


def _pair_age(past: Interactions, user: NDArray[np.int64], item: NDArray[np.int64], moment: int) -> NDArray[np.float64]:
    keys, wanted = past.user * past.num_items + past.item, user * past.num_items + item
    distinct, place = np.unique(keys, return_inverse=True)
    last = np.zeros(len(distinct), np.int64)
    np.maximum.at(last, place.ravel(), past.time)
    at = np.searchsorted(distinct, wanted).clip(max=max(len(distinct) - 1, 0))
    known = distinct[at] == wanted if len(distinct) else np.zeros(len(wanted), bool)
    ages = np.full(len(wanted), np.nan)
    ages[known] = (moment - last[at[known]]) / DAY
    return ages
