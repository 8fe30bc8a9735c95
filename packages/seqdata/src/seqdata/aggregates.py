"""Aggregates of users' pasts as of a cutoff: how many, how recent, how different, how much.

    past = aggregates.Past(view, cutoff, ["event_type", "sku", "sku.price"])
    past.counts(), past.since_last(), past.where("event_type", ["buy"]).within(week).sums("sku.price")

Every aggregate has one row per user of the view, in its order, and no event at or after the cutoff counts. Nothing
loops over users. `parts` does the same in bounded memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from seqdata.fields import MISSING
from seqdata.gather import Events, Gather, ids_of
from seqdata.join import positions_of
from seqdata.times import parse_cutoff, parse_span
from seqdata.view import View, session_starts

SECOND = 1_000_000


class Past:
    """The events of a view's users before a cutoff.

    Args:
        view: users and events; what it has at or after the cutoff never counts
        cutoff: moment as of which to look back
        fields: to aggregate, item properties as "field.column"
    """

    def __init__(self, view: View, cutoff: Any, fields: Sequence[str] = ()) -> None:
        end = parse_cutoff(cutoff)
        before = view.window(None, cutoff)
        places = before.positions()
        self._events = _Events(
            store=view.store,
            users=len(view),
            end=end,
            row=np.repeat(np.arange(len(view)), before.lengths()),
            time=view.store.time[places],
            values=Gather(view.store, fields).values(places),
        )

    def __len__(self) -> int:
        return self._events.users

    def __repr__(self) -> str:
        return f"Past({len(self)} users, {len(self.row):,} events, fields {list(self._events.values)})"

    def __getitem__(self, field: str) -> np.ndarray:
        """[T, ...] stored values of a field of the events."""
        if field not in self._events.values:
            raise KeyError(f"no field {field!r} in this Past; it has {list(self._events.values)}")
        return self._events.values[field]

    @property
    def row(self) -> np.ndarray:
        """int64 [T]: which of the users each event is of."""
        return self._events.row

    @property
    def age(self) -> np.ndarray:
        """int64 [T] whole seconds from each event to the cutoff, both rounded down to the second."""
        return self._events.end // SECOND - self._events.time // SECOND

    def only(self, mask: np.ndarray) -> Past:
        """The same with only the events where `mask` [T] is True; the users stay.

        Args:
            mask: bool [T]
        """
        past = object.__new__(Past)
        past._events = self._events.only(np.asarray(mask, bool))
        return past

    def where(self, field: str, values: Iterable[Any]) -> Past:
        """The same with only the events that have one of these values.

        Args:
            field: one of the fields named when the Past was made
            values: as they were in the log

        Raises:
            KeyError: the Past has no such field, or the field's vocabulary no such value
        """
        return self.only(np.isin(self[field], ids_of(self._events.store, field, values)))

    def within(self, span: Any) -> Past:
        """The same with only the events of the last `span` before the cutoff: age <= span, in whole seconds.

        Args:
            span: timedelta or integer microseconds, more than 0
        """
        return self.only(self.age * SECOND <= parse_span(span, "span"))

    def counts(self) -> np.ndarray:
        """int64 [U] events."""
        return self._bincount(self.row)

    def counts_of(self, field: str, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """int64 [U, C] events with each of some stored values, such as ids that `Vocabulary.encode` gave.

        Ids that mean missing or unknown count nothing; one that is named twice has two equal columns.

        Args:
            field: one of the fields named when the Past was made
            ids: C stored values
        """
        ids = np.asarray(ids)
        distinct, column = np.unique(ids, return_inverse=True)
        place = positions_of(self[field], distinct)
        known = distinct >= self._first_value(field)
        hit = (place >= 0) & known[place] if len(known) else place >= 0
        width = len(distinct)
        table = self._bincount(self.row[hit] * width + place[hit], width).reshape(len(self), width)
        return table[:, column]

    def distinct(self, field: str | np.ndarray) -> np.ndarray:
        """int64 [U] different values of a field, or of values [T]; missing ones (id 0, NaN) are none.

        Args:
            field: one of the fields named when the Past was made, or values [T]

        Raises:
            ValueError: there are not as many values as events
        """
        rows, _, _ = self._pairs(field)
        return self._bincount(rows)

    def top_shares(self, field: str, k: int) -> np.ndarray:
        """float64 [U, k] share of a user's events that have the most frequent value, the second, ...; 0 beyond.

        Events without a value are left out of the share.

        Args:
            field: one of the fields named when the Past was made
            k: how many values, 1 or more

        Raises:
            ValueError: `k` is less than 1
        """
        if k < 1:
            raise ValueError(f"top_shares: k={k}; needs an integer >= 1")
        rows, _, counts = self._pairs(field)
        order = np.lexsort((-counts, rows))
        rows, counts = rows[order], counts[order]
        rank = np.arange(len(rows)) - np.searchsorted(rows, rows)
        shares = np.zeros((len(self), k))
        kept = rank < k
        total = np.bincount(rows, counts, minlength=len(self))
        shares[rows[kept], rank[kept]] = counts[kept] / total[rows[kept]]
        return shares

    def since_last(self) -> np.ndarray:
        """float64 [U] whole seconds from the last event to the cutoff, NaN without one."""
        return self._extreme(np.fmin)

    def since_first(self) -> np.ndarray:
        """float64 [U] whole seconds from the first event to the cutoff, NaN without one."""
        return self._extreme(np.fmax)

    def sums(self, field: str | np.ndarray) -> np.ndarray:
        """float64 [U] or [U, W] sum of a numeric field, or of numbers [T] or [T, W]; NaN counts nothing.

        Args:
            field: one of the fields named when the Past was made, or numbers

        Raises:
            ValueError: the field is not numeric, or there are not as many numbers as events
        """
        numbers = np.nan_to_num(self._numbers(field), nan=0.0)
        if numbers.ndim == 1:
            return np.bincount(self.row, numbers, minlength=len(self))
        columns = [np.bincount(self.row, numbers[:, i], minlength=len(self)) for i in range(numbers.shape[1])]
        return np.stack(columns, axis=1)

    def means(self, field: str | np.ndarray) -> np.ndarray:
        """float64 [U] or [U, W] mean of the same numbers where they are not NaN; NaN for a user without any.

        Args:
            field: as for `sums`

        Raises:
            ValueError: as for `sums`
        """
        numbers = self._numbers(field)
        there = ~np.isnan(numbers)
        count = self.sums(there.astype(np.float64))
        return np.divide(self.sums(numbers), count, out=np.full(count.shape, np.nan), where=count > 0)

    def decayed(self, half_life: Any, weights: str | np.ndarray | None = None) -> np.ndarray:
        """float64 [U] sum of weight * 0.5 ** (age / half life); weights: a numeric field or [T], 1 if None.

        Args:
            half_life: timedelta or integer microseconds
            weights: of the events; NaN counts nothing
        """
        decay = 0.5 ** (self.age / (parse_span(half_life, "half_life") / SECOND))
        return self.sums(decay if weights is None else decay * self._numbers(weights))

    def sessions(self, gap: Any) -> np.ndarray:
        """int64 [U] sessions: runs of events with at most `gap` between one and the next.

        Args:
            gap: timedelta or integer microseconds
        """
        starts = session_starts(self.counts(), self._events.time, parse_span(gap, "gap"))
        return self._bincount(self.row[starts])

    def _first_value(self, field: str) -> float:
        entry = self._events.store.entry(field)
        return (
            1
            if entry["kind"] in ("vector", "quantiles")
            else entry.get("oov_buckets", 1) + 1
            if "values" in entry
            else -np.inf
        )

    def _pairs(self, field: str | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """User, value and number of events of every pair that comes, in order."""
        values = self[field] if isinstance(field, str) else np.asarray(field)
        if values.shape != self.row.shape:
            raise ValueError(f"{field!r} has values {values.shape}; needs one for each of {len(self.row)} events")
        there = np.ones(len(values), bool)
        if values.dtype.kind == "f":
            there = ~np.isnan(values)
        elif isinstance(field, str) and field != "timestamp" and self._events.store.entry(field)["kind"] != "numeric":
            there = values != MISSING
        row, values = self.row[there], values[there]
        order = np.lexsort((values, row))
        row, values = row[order], values[order]
        new = np.ones(len(row), bool)
        new[1:] = (row[1:] != row[:-1]) | (values[1:] != values[:-1])
        starts = np.flatnonzero(new)
        return row[starts], values[starts], np.diff(np.append(starts, len(row)))

    def _numbers(self, field: str | np.ndarray) -> np.ndarray:
        if not isinstance(field, str):
            numbers = np.asarray(field, np.float64)
            if len(numbers) != len(self.row):
                raise ValueError(f"got numbers {numbers.shape}; needs one for each of the {len(self.row)} events")
            return numbers
        kind = self._events.store.entry(field)["kind"]
        if kind != "numeric" and self[field].ndim == 1:
            raise ValueError(f"{field!r} is {kind}; needs a numeric field")
        return self[field].astype(np.float64)

    def _extreme(self, choose: np.ufunc) -> np.ndarray:
        found = np.full(len(self), np.nan)
        choose.at(found, self.row, self.age)
        return found

    def _bincount(self, places: np.ndarray, width: int = 1) -> np.ndarray:
        return np.bincount(places, minlength=len(self) * width).astype(np.int64)


def parts(view: View, cutoff: Any, fields: Sequence[str] = (), events: int = 2_000_000) -> Iterator[tuple[slice, Past]]:
    """Yields (rows of the view, Past of these users) for users side by side with about `events` events together.

    Args:
        view: users and events
        cutoff: moment as of which to look back
        fields: to aggregate, as for `Past`
        events: about as many events a part; one user's are never divided
    """
    ends = np.cumsum(view.window(None, cutoff).lengths())
    low = 0
    while low < len(ends):
        done = int(ends[low - 1]) if low else 0
        high = max(int(np.searchsorted(ends, done + events, "right")), low + 1)
        yield slice(low, high), Past(view.at(np.arange(low, high)), cutoff, fields)
        low = high


@dataclass(frozen=True)
class _Events:
    """Events [T] of users, each user's in time order; times are microseconds."""

    store: Events
    users: int
    end: int
    row: np.ndarray
    time: np.ndarray
    values: dict[str, np.ndarray]

    def only(self, mask: np.ndarray) -> _Events:
        values = {name: one[mask] for name, one in self.values.items()}
        return replace(self, row=self.row[mask], time=self.time[mask], values=values)
