"""Views: which events of which users, without copying any."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from seqdata.batching import Batching
from seqdata.gather import Batch, Events, Gather, ids_of
from seqdata.jagged import Jagged
from seqdata.join import positions_of
from seqdata.times import event_range, parse_moment, parse_span


class View:
    """Some events of some users, by time, by place in the sequence or by value; nothing is copied.

    Made by `Store.as_of`, `Store.all` and the methods here; every method gives a new view.
    """

    def __init__(
        self,
        store: Events,
        start: int | None = None,
        end: int | None = None,
        rows: np.ndarray | None = None,
        cut: tuple[np.ndarray, np.ndarray] | None = None,
        kept: np.ndarray | None = None,
        born: int | None = None,
        named: bool = False,
    ) -> None:
        # rows: positions of the users in the store; None is everybody with an event before `born`. named: the caller
        # named them one by one. kept: the positions of the chosen events where they do not lie side by side; cut:
        # first and one-past-last place of every user's events, among `kept` if that is given, else in the store
        self.store, self.start, self.end, self._rows, self._cut, self._kept = store, start, end, rows, cut, kept
        self._born, self._named = born, named

    def __repr__(self) -> str:
        return f"View({self.store.path.name!r}, start={self.start}, end={self.end}, users={len(self):,})"

    def __getstate__(self) -> dict[str, Any]:
        # whoever unpickles this finds them again
        return {name: value for name, value in self.__dict__.items() if name not in ("bounds", "user_index")}

    def __len__(self) -> int:
        return self.store.num_users if self._rows is None and self._born is None else len(self.user_index)

    @functools.cached_property
    def user_index(self) -> np.ndarray:
        """[U] positions of the view's users in store.users."""
        if self._rows is not None:
            return self._rows
        if self._born is None:
            return np.arange(self.store.num_users)
        return np.flatnonzero(self.store.time[self.store.offsets[:-1]] < self._born)

    @property
    def users(self) -> np.ndarray:
        """[U] ids of the view's users."""
        return self.store.users if self._rows is None and self._born is None else self.store.users[self.user_index]

    def as_of(self, cutoff: Any) -> View:
        """Only events before `cutoff`, and only users who have one in the store by then, of whatever kind.

        Users that `select` named stay, with an empty sequence if need be.
        """
        end = self.moment(cutoff, "cutoff")
        view = self._narrow(None, end)
        if self._named:
            return view
        if self._rows is None and self._cut is None:
            view._born = end if self._born is None else min(end, self._born)
            return view
        born = self.store.time[self.store.offsets[self.user_index]] < end
        if self._rows is not None:
            return view.at(born)
        cut = None if self._cut is None else (self._cut[0][born], self._cut[1][born])
        return view._like(cut=cut, born=end if self._born is None else min(end, self._born))

    def window(self, start: Any, end: Any) -> View:
        """Only events with start <= time < end; None leaves a side open. All users of the view stay.

        Args:
            start: first moment, included: datetime, ISO text or integer microseconds
            end: moment that is no longer included

        Raises:
            ValueError: start is after end
        """
        low = None if start is None else self.moment(start, "start")
        high = None if end is None else self.moment(end, "end")
        if low is not None and high is not None and high < low:
            raise ValueError(f"window: start {start!r} is after end {end!r}")
        return self._narrow(low, high)

    def ahead(self, horizon: Any) -> View:
        """All events of the same users, in the same order, within `horizon` from the view's end on: their future.

        What `where` or a split chose of the past says nothing of the future, so all events of that time are there.

        Args:
            horizon: timedelta or integer microseconds

        Raises:
            ValueError: the view has no end
        """
        if self.end is None:
            raise ValueError("ahead: this view has no end; needs one of `as_of` or `window`")
        end = self.end + parse_span(horizon, "horizon")
        return View(self.store, self.end, end, self.user_index, named=True)

    def select(self, users: Iterable[Any]) -> View:
        """The same view of these user ids only, in this order; an unknown id is a KeyError.

        Out of everybody's view any user of the store may be named, of whom there may be nothing before the cutoff.

        Raises:
            KeyError: an id is unknown or not in this view
        """
        index = self.store.index_of(users)
        if self._rows is None and self._cut is None:
            return self._like(rows=index, born=None, named=True)
        rows = positions_of(index, self.user_index)
        if self._rows is not None:
            if (rows < 0).any():
                raise KeyError(f"user id {self.store.users[index[np.argmax(rows < 0)]]!r} is not in this view")
            return self.at(rows)._like(named=True)
        first, last = (np.append(border, 0)[rows] for border in self._cut or ())
        return self._like(rows=index, cut=(first, last), born=None, named=True)

    def at(self, rows: np.ndarray) -> View:
        """The same view of its users at `rows`, positions [u] or a mask [U]."""
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        cut = None if self._cut is None else (self._cut[0][rows], self._cut[1][rows])
        return self._like(rows=self.user_index[rows], cut=cut, born=None)

    def at_least(self, events: int) -> View:
        """Only users with that many events in this view."""
        return self.at(self.lengths() >= events)

    def where(self, field: str, values: Iterable[Any]) -> View:
        """Only events whose field, or item property "field.column", has one of these values.

        Args:
            field: its name
            values: as they were in the log; one that the vocabulary lacks is a KeyError
        """
        ids = ids_of(self.store, field, values)
        gather = Gather(self.store, [field])
        return self._masked(np.isin(gather.values(self.positions())[field], ids))

    def k_core(self, field: str, k: int) -> View:
        """Only users and ids of a field that keep at least `k` events each, as often removed as it takes.

        Events whose field is missing or unknown go first.

        Args:
            field: a categorical or hashed field
            k: least events, 1 or more

        Raises:
            ValueError: the field is of another kind, or k less than 1
        """
        if self.store.entry(field)["kind"] not in ("categorical", "hashed"):
            raise ValueError(f"k_core: {field!r} is {self.store.entry(field)['kind']}; needs a categorical field")
        if k < 1:
            raise ValueError(f"k_core: k={k}; needs an integer >= 1")
        vocabulary = self.store.vocabulary(field)
        least = 2 if vocabulary.hashed is not None else vocabulary.first_value
        view = self._masked(self.store.take(field, self.positions()) >= least)
        while True:
            counts = view.lengths()
            ids = self.store.take(field, view.positions())
            often = np.bincount(ids, minlength=len(vocabulary)) >= k
            users = counts >= k
            if users.all() and often[ids].all():
                return view
            view = view._masked(np.repeat(users, counts) & often[ids]).at_least(1)

    def leave_last(self, events: int = 1) -> tuple[View, View]:
        """(all but the last events of every user, the last events); a user with fewer has all of them in the second."""
        first, last = self.bounds
        middle = np.maximum(last - events, first)
        return self._sliced(first, middle), self._sliced(middle, last)

    def ratio(self, *shares: float) -> tuple[View, ...]:
        """Views of successive shares of every user's events, such as ratio(0.8, 0.1, 0.1); borders are rounded down.

        Raises:
            ValueError: the shares are negative or do not sum to 1
        """
        if not shares or min(shares) < 0 or abs(sum(shares) - 1) > 1e-9:
            raise ValueError(f"ratio{shares}: needs shares >= 0 that sum to 1")
        first, last = self.bounds
        # a hair more than the sum, so that 0.1 + 0.2 of ten events are three
        borders = [
            first + np.floor((last - first) * min(share + 1e-12, 1)).astype(np.int64) for share in np.cumsum(shares)
        ]
        borders[-1] = last
        return tuple(self._sliced(low, high) for low, high in zip([first, *borders], borders, strict=False))

    def rolling(self, start: Any, end: Any, step: Any, horizon: Any = None) -> Iterator[tuple[View, View]]:
        """Yields back-tests: (events before the cutoff, events in the horizon after it).

        The second view has all users; `history.ahead(horizon)` has those of the first, in their order.

        Args:
            start: the first cutoff
            end: the moment by which the last horizon ends
            step: timedelta or integer microseconds from one cutoff to the next
            horizon: timedelta or integer microseconds; one step if None
        """
        low, high = self.moment(start, "start"), self.moment(end, "end")
        every = parse_span(step, "step")
        ahead = every if horizon is None else parse_span(horizon, "horizon")
        for cutoff in range(low, high - ahead + 1, every):
            yield self.as_of(cutoff), self.window(cutoff, cutoff + ahead)

    def lengths(self) -> np.ndarray:
        """[U] int64 events per user."""
        return self.bounds[1] - self.bounds[0]

    @property
    def num_events(self) -> int:
        return int(self.lengths().sum())

    @functools.cached_property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """First and one-past-last place of every user's events, int64 [U] each; `positions` are what lies between."""
        offsets = self.store.offsets
        if self._cut is not None:
            low, high = self._cut
        elif self._rows is None and self._born is None:
            low, high = offsets[:-1], offsets[1:]
        else:
            low, high = offsets[self.user_index], offsets[self.user_index + 1]
        time = self.store.time
        first = low if self.start is None else _bisect(time, low, high, self.start, self._kept)
        last = high if self.end is None else _bisect(time, first, high, self.end, self._kept)
        return np.asarray(first), np.asarray(last)

    def positions(self, rows: np.ndarray | None = None, max_len: int | None = None) -> np.ndarray:
        """Places in the store's columns [T] of the events of the users at `rows`, one user after the other."""
        first, last = self.bounds if rows is None else (self.bounds[0][rows], self.bounds[1][rows])
        if max_len is not None:
            first = np.maximum(first, last - max_len)
        lengths = last - first
        starts = np.cumsum(lengths) - lengths
        places = np.repeat(first - starts, lengths) + np.arange(int(lengths.sum()))
        return places if self._kept is None else self._kept[places]

    def values_at(self, fields: Sequence[str], positions: np.ndarray) -> dict[str, np.ndarray]:
        """{field: [n, ...]} at positions [n] of the store's columns."""
        return Gather(self.store, fields).values(positions)

    def gather(self, fields: Sequence[str]) -> Jagged:
        """Fields of all events of all users of the view at once."""
        return Gather(self.store, fields)(self.positions(), self.lengths())

    def batches(
        self,
        batch_size: int | None = None,
        *,
        max_tokens: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
        epoch: int = 0,
        fields: Sequence[str] | None = None,
        max_len: int | None = None,
        drop_empty: bool = False,
        length_pool: int | None = None,
        start: int = 0,
    ) -> Iterator[Batch]:
        """Jagged batches of the view's users, the same ones every time for the same arguments.

        Args:
            batch_size: most users of a batch
            max_tokens: most events of a batch; one of the two is needed, both may be given
            shuffle: order of users drawn from (seed, epoch); otherwise the view's order
            seed: of the order
            epoch: of the order too
            fields: names to gather, item properties as "field.column"; None takes every event field. "timestamp", int64
                seconds [T], is always there
            max_len: keeps the last events of longer sequences
            drop_empty: leaves users without events out
            length_pool: users that are put in order of length before they are cut into batches, so that a batch holds
                sequences of like length; the batches of a pool come in random order
            start: batches to skip, which costs no gathering
        """
        gather = Gather(self.store, fields)
        for rows in self.plan(
            batch_size,
            max_tokens=max_tokens,
            shuffle=shuffle,
            seed=seed,
            epoch=epoch,
            max_len=max_len,
            drop_empty=drop_empty,
            length_pool=length_pool,
            start=start,
        ):
            yield self.batch(rows, gather, max_len)

    def batch(self, rows: np.ndarray, gather: Gather, max_len: int | None = None) -> Batch:
        """The batch of the view's users at `rows` [B]."""
        lengths = self.bounds[1][rows] - self.bounds[0][rows]
        index = self.user_index[rows]
        jagged = gather(self.positions(rows, max_len), lengths if max_len is None else np.minimum(lengths, max_len))
        return Batch(self.store.users[index], index, jagged)

    def plan(
        self,
        batch_size: int | None = None,
        *,
        max_tokens: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
        epoch: int = 0,
        max_len: int | None = None,
        drop_empty: bool = False,
        length_pool: int | None = None,
        start: int = 0,
    ) -> Iterator[np.ndarray]:
        """Rows of the view that make each batch, without touching an event; arguments as for `batches`."""
        batching = Batching(batch_size, max_tokens, shuffle, seed, max_len, drop_empty, length_pool)
        return self.rows(batching, epoch, start)

    def rows(self, batching: Batching, epoch: int = 0, start: int = 0) -> Iterator[np.ndarray]:
        """Rows of the view that make each batch of an epoch, from batch `start` on."""
        lengths, most = self.lengths(), batching.max_tokens
        if most is not None and len(lengths):
            longest = int(np.argmax(lengths))
            events = int(lengths[longest])
            if batching.max_len is not None:
                events = min(events, batching.max_len)
            if events > most:
                raise ValueError(
                    f"max_tokens={most}: user {self.users[longest]} alone has {events} events; raise it or pass"
                    f" max_len <= {most}"
                )
        return batching.rows(lengths, epoch, start)

    def sessions(self, gap: Any) -> np.ndarray:
        """int64 [T] number of each event's session, 0 for a user's first: one begins after more than `gap` of silence.

        In the order of `gather`; `gap` is a timedelta or integer microseconds.
        """
        lengths = self.lengths()
        starts = session_starts(lengths, self.store.time[self.positions()], parse_span(gap, "gap"))
        total = np.cumsum(starts)
        first = np.cumsum(lengths) - lengths
        return total - np.repeat(total[np.minimum(first, len(total) - 1)], lengths) if len(total) else total

    def _narrow(self, start: int | None, end: int | None) -> View:
        low = self.start if start is None else start if self.start is None else max(start, self.start)
        high = self.end if end is None else end if self.end is None else min(end, self.end)
        return self._like(start=low, end=high)

    def moment(self, value: Any, name: str) -> int:
        """int64 microseconds of a moment; an integer that can only be seconds or milliseconds is a ValueError."""
        return parse_moment(value, name, *event_range(self.store.schema["shards"]))

    def _sliced(self, first: np.ndarray, last: np.ndarray) -> View:
        return self._like(cut=(first, last))

    def _masked(self, mask: np.ndarray) -> View:
        positions, lengths = self.positions(), self.lengths()
        counts = np.bincount(np.repeat(np.arange(len(self)), lengths)[mask], minlength=len(self)).astype(np.int64)
        ends = np.cumsum(counts)
        return self._like(cut=(ends - counts, ends), kept=positions[mask])

    def _like(self, **changes: Any) -> View:
        own = {"start": self.start, "end": self.end, "rows": self._rows, "cut": self._cut, "kept": self._kept}
        return View(self.store, **own | {"born": self._born, "named": self._named} | changes)


def session_starts(lengths: np.ndarray, time: np.ndarray, gap: int) -> np.ndarray:
    """bool [T]: whether an event of sequences of these lengths [U] is its user's first or follows more than `gap`."""
    starts = np.ones(len(time), bool)
    starts[1:] = np.diff(time) > gap
    starts[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
    return starts


def _bisect(time: np.ndarray, low: np.ndarray, high: np.ndarray, limit: int, kept: np.ndarray | None) -> np.ndarray:
    """For every range low:high of sorted times the first position with time >= limit."""
    low, high = np.array(low), np.array(high)
    active = np.flatnonzero(low < high)
    while len(active):
        middle = (low[active] + high[active]) >> 1
        before = time[middle if kept is None else kept[middle]] < limit
        low[active[before]] = middle[before] + 1
        high[active[~before]] = middle[~before]
        active = active[low[active] < high[active]]
    return low
