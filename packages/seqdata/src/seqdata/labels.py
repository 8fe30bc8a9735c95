"""Labels of users from the events of a window: what happened, how often, how much, what came next.

Every function takes a view of the window, as in `history.ahead(horizon)` for the users of a history in their order, or
`store.all().window(cutoff, cutoff + horizon)` for all, narrowed by `where` to the events that count, and gives one row
per user of that view, in its order. Nothing loops over users.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from seqdata.fields import MISSING
from seqdata.gather import ids_of
from seqdata.jagged import Jagged
from seqdata.join import positions_of
from seqdata.times import parse_cutoff, parse_span
from seqdata.view import View


def any_event(future: View) -> np.ndarray:
    """bool [U]: has the user an event in the window?"""
    return future.lengths() > 0


def churn(history: View, future: View) -> tuple[np.ndarray, np.ndarray]:
    """Rows [n] of the users active in the history, and bool [n]: 1 if they have no event in the window.

    The future has the users of the history, and maybe more, in any order; both are narrowed to the event that counts,
    such as purchases. The definition of the RecSys Challenge 2025's churn task.

    Args:
        history: users and what they did
        future: the window that they may be silent in

    Raises:
        ValueError: the future lacks users of the history
    """
    rows = np.flatnonzero(history.lengths())
    place = positions_of(history.user_index[rows], future.user_index)
    if (place < 0).any():
        raise ValueError(f"churn: the future lacks {(place < 0).sum()} users of the history; needs the same users")
    return rows, future.lengths()[place] == 0


def multi_hot(future: View, field: str, values: Iterable[Any]) -> np.ndarray:
    """bool [U, len(values)]: has the user an event with that value of a field or item property "field.column"?

    With the list of the hundred categories or items to predict, the propensity targets of the RecSys Challenge 2025.

    Args:
        future: view of the window
        field: its name, or an item property as "field.column"
        values: C values, one a column of the result

    Raises:
        KeyError: a value is not in the field's vocabulary
    """
    ids = ids_of(future.store, field, values)
    distinct, column = np.unique(ids, return_inverse=True)
    place = positions_of(future.gather([field])[field], distinct)
    out = np.zeros((len(future), len(distinct)), bool)
    out[_rows(future)[place >= 0], place[place >= 0]] = True
    return out[:, column]


def counts(view: View, start: Any, horizons: Sequence[Any]) -> np.ndarray:
    """int64 [U, H] events with start <= time < start + horizon, for every horizon (timedelta or microseconds).

    Args:
        view: users and events, of all times that the windows cover
        start: first moment of every window
        horizons: H lengths of windows
    """
    low = parse_cutoff(start, "start")
    return np.stack([view.window(low, low + parse_span(span, "horizon")).lengths() for span in horizons], axis=1)


def sums(view: View, field: str, start: Any, horizons: Sequence[Any]) -> np.ndarray:
    """float64 [U, H] sum of a numeric field or item property over those windows; missing values count nothing.

    Args:
        view: users and events, of all times that the windows cover
        field: numeric, an item property as "field.column"
        start: first moment of every window
        horizons: H lengths of windows

    Raises:
        ValueError: the field is of another kind
    """
    if view.store.entry(field)["kind"] != "numeric":
        raise ValueError(f"sums: {field!r} is {view.store.entry(field)['kind']}; needs a numeric field")
    low = parse_cutoff(start, "start")
    out = np.empty((len(view), len(horizons)))
    for i, span in enumerate(horizons):
        window = view.window(low, low + parse_span(span, "horizon"))
        numbers = np.nan_to_num(window.gather([field])[field].astype(np.float64), nan=0.0)
        out[:, i] = np.bincount(_rows(window), numbers, minlength=len(view))
    return out


def next_event(future: View, field: str) -> np.ndarray:
    """[U] stored value of the first event of the window; users without one get 0 (NaN of a float field).

    Args:
        future: view of the window
        field: of the events, or an item property as "field.column"
    """
    has = np.flatnonzero(future.lengths())
    first = future.positions()[np.cumsum(future.lengths())[has] - future.lengths()[has]]
    values = future.values_at([field], first)[field]
    missing = np.nan if values.dtype.kind == "f" else MISSING
    out = np.full((len(future), *values.shape[1:]), missing, values.dtype)
    out[has] = values
    return out


def next_basket(future: View, field: str, basket: str = "timestamp") -> Jagged:
    """Values of the window's events that share the first one's basket: a field, or the second they happened in.

    Args:
        future: view of the window
        field: whose values are given
        basket: what events of one basket share

    Returns:
        A Jagged of the field; users without an event have an empty sequence
    """
    found = future.gather([field, basket])
    lengths = future.lengths()
    has = lengths > 0
    first = np.zeros(len(future), found[basket].dtype)
    first[has] = found[basket][found.offsets[:-1][has]]
    same = found[basket] == np.repeat(first, lengths)
    kept = np.bincount(_rows(future)[same], minlength=len(future))
    return Jagged({field: found[field][same]}, np.append(np.int64(0), np.cumsum(kept)))


def _rows(view: View) -> np.ndarray:
    return np.repeat(np.arange(len(view)), view.lengths())
