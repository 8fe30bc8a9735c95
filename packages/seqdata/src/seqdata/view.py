"""Views: which events of which users, without copying any."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from seqdata.jagged import Jagged, to_tensor
from seqdata.order import Order
from seqdata.times import parse_cutoff

if TYPE_CHECKING:
    from seqdata.store import Store

CHUNK = 1 << 16


@dataclass(frozen=True)
class Batch:
    """Sequences of some users: ids [B], their positions in store.users [B], and the jagged fields."""

    users: Any
    user_index: Any
    jagged: Jagged

    def __len__(self) -> int:
        return len(self.user_index)

    def __repr__(self) -> str:
        return f"Batch({len(self)} users, {self.jagged})"

    def torch(self) -> Batch:
        """The same with torch tensors; text user ids stay numpy."""
        users = (
            self.users
            if isinstance(self.users, np.ndarray) and self.users.dtype.kind not in "iu"
            else _tensor(self.users)
        )
        return Batch(users, _tensor(self.user_index), self.jagged.torch())


class View:
    """Events with start <= time < end of some users; made by `Store.as_of`, `Store.all`, `window` and `select`."""

    def __init__(self, store: Store, start: int | None, end: int | None, rows: np.ndarray | None = None) -> None:
        self.store, self.start, self.end, self._rows = store, start, end, rows

    def __repr__(self) -> str:
        return f"View({self.store.path.name!r}, start={self.start}, end={self.end}, users={len(self):,})"

    def __len__(self) -> int:
        return self.store.num_users if self._rows is None else len(self._rows)

    @property
    def user_index(self) -> np.ndarray:
        """[U] positions of the view's users in store.users."""
        return np.arange(self.store.num_users) if self._rows is None else self._rows

    @property
    def users(self) -> np.ndarray:
        """[U] ids of the view's users."""
        return self.store.users if self._rows is None else self.store.users[self._rows]

    def as_of(self, cutoff: Any) -> View:
        """Only events before `cutoff`."""
        return self._narrow(None, parse_cutoff(cutoff))

    def window(self, start: Any, end: Any) -> View:
        """Only events with start <= time < end."""
        low, high = parse_cutoff(start, "start"), parse_cutoff(end, "end")
        if high < low:
            raise ValueError(f"window: start {start!r} is after end {end!r}")
        return self._narrow(low, high)

    def select(self, users: Iterable[Any]) -> View:
        """The same view of these user ids only, in this order; an unknown id is a KeyError."""
        rows = self.store.index_of(users)
        if self._rows is not None and not np.isin(rows, self._rows).all():
            raise KeyError(f"user id {self.store.users[rows[~np.isin(rows, self._rows)][0]]!r} is not in this view")
        return View(self.store, self.start, self.end, rows)

    def lengths(self) -> np.ndarray:
        """[U] int64 events per user."""
        return self.bounds[1] - self.bounds[0]

    @property
    def num_events(self) -> int:
        return int(self.lengths().sum())

    @functools.cached_property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """First and one-past-last event position of every user of the view, int64 [U] each."""
        offsets = self.store.offsets
        low, high = (
            (offsets[:-1], offsets[1:]) if self._rows is None else (offsets[self._rows], offsets[self._rows + 1])
        )
        first = low if self.start is None else _bisect(self.store.time, low, high, self.start)
        last = high if self.end is None else _bisect(self.store.time, first, high, self.end)
        return np.asarray(first), np.asarray(last)

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
        start: int = 0,
    ) -> Iterator[Batch]:
        """Jagged batches of the view's users, the same ones every time for the same arguments.

        batch_size: users per batch. max_tokens: most events per batch; one of the two is needed, both may be given.
        shuffle: order of users drawn from (seed, epoch); otherwise the view's order.
        fields: names to gather, item properties as "field.column"; None takes every event field. "timestamp", int64
            seconds [T], is always there.
        max_len: keeps the last events of longer sequences. drop_empty: leaves users without events out.
        start: number of batches to skip, which costs no gathering.
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
            start=start,
        ):
            yield self.batch(rows, gather, max_len)

    def batch(self, rows: np.ndarray, gather: Gather, max_len: int | None = None) -> Batch:
        """The batch of the view's users at `rows` [B]."""
        first, last = self.bounds[0][rows], self.bounds[1][rows]
        if max_len is not None:
            first = np.maximum(first, last - max_len)
        index = rows if self._rows is None else self._rows[rows]
        return Batch(self.store.users[index], index, gather(first, last))

    def plan(
        self,
        batch_size: int | None,
        *,
        max_tokens: int | None,
        shuffle: bool,
        seed: int,
        epoch: int,
        max_len: int | None,
        drop_empty: bool,
        start: int = 0,
    ) -> Iterator[np.ndarray]:
        """Rows of the view that make each batch, without touching an event."""
        _positive(batch_size=batch_size, max_tokens=max_tokens, max_len=max_len)
        if batch_size is None and max_tokens is None:
            raise ValueError("batches: needs batch_size (users) or max_tokens (events)")
        rows = np.flatnonzero(self.lengths()) if drop_empty else None
        order = Order(len(self) if rows is None else len(rows), seed, epoch, shuffle)
        if max_tokens is not None:
            lengths = self.lengths() if max_len is None else np.minimum(self.lengths(), max_len)
            yield from islice(self._by_tokens(order, rows, lengths, batch_size, max_tokens), start, None)
        elif batch_size is not None:
            yield from self._by_count(order, rows, batch_size, start)

    def _by_count(self, order: Order, rows: np.ndarray | None, batch_size: int, start: int = 0) -> Iterator[np.ndarray]:
        for begin in range(start * batch_size, len(order), batch_size):
            picked = order(begin, min(begin + batch_size, len(order)))
            yield picked if rows is None else rows[picked]

    def _by_tokens(
        self, order: Order, rows: np.ndarray | None, lengths: np.ndarray, batch_size: int | None, max_tokens: int
    ) -> Iterator[np.ndarray]:
        if len(lengths) and lengths.max() > max_tokens:
            longest = int(np.argmax(lengths))
            raise ValueError(
                f"max_tokens={max_tokens}: user {self.users[longest]} alone has {int(lengths[longest])} events; raise"
                f" it or pass max_len <= {max_tokens}"
            )
        held = np.zeros(0, np.int64)
        for begin in range(0, len(order), CHUNK):
            picked = order(begin, min(begin + CHUNK, len(order)))
            held = np.concatenate([held, picked if rows is None else rows[picked]])
            ends = np.cumsum(lengths[held])
            at, final = 0, begin + CHUNK >= len(order)
            while at < len(held):
                stop = int(np.searchsorted(ends, (ends[at - 1] if at else 0) + max_tokens, "right"))
                if batch_size is not None:
                    stop = min(stop, at + batch_size)
                if stop == len(held) and not final:
                    break
                yield held[at:stop]
                at = stop
            held = held[at:]

    def _narrow(self, start: int | None, end: int | None) -> View:
        low = self.start if start is None else start if self.start is None else max(start, self.start)
        high = self.end if end is None else end if self.end is None else min(end, self.end)
        return View(self.store, low, high, self._rows)


class Gather:
    """Takes events out of a store: a call with first and last positions [B] gives a Jagged of the chosen fields."""

    def __init__(self, store: Store, fields: Sequence[str] | None = None) -> None:
        self.store = store
        self.fields = list(store.fields if fields is None else fields)
        for name in self.fields:
            if name != "timestamp":
                store.entry(name)

    def __call__(self, first: np.ndarray, last: np.ndarray) -> Jagged:
        store = self.store
        lengths = np.maximum(last - first, 0)
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        positions = np.repeat(first - offsets[:-1], lengths) + np.arange(offsets[-1])
        values: dict[str, np.ndarray] = {}
        keys: dict[str, np.ndarray] = {}
        for name in self.fields:
            if name == "timestamp":
                continue
            if name in store.schema["fields"]:
                if name not in keys:
                    keys[name] = store.take(name, positions)
                values[name] = keys[name]
            else:
                field, column = store.item_columns[name]
                if field not in keys:
                    keys[field] = store.take(field, positions)
                values[name] = store.item_column(field, column)[keys[field]]
        values["timestamp"] = store.time[positions] // 1_000_000
        return Jagged(values, offsets)


def _bisect(time: np.ndarray, low: np.ndarray, high: np.ndarray, limit: int) -> np.ndarray:
    """For every range low:high of sorted times the first position with time >= limit."""
    low, high = np.array(low), np.array(high)
    active = np.flatnonzero(low < high)
    while len(active):
        middle = (low[active] + high[active]) >> 1
        before = time[middle] < limit
        low[active[before]] = middle[before] + 1
        high[active[~before]] = middle[~before]
        active = active[low[active] < high[active]]
    return low


def _positive(**arguments: int | None) -> None:
    for name, value in arguments.items():
        if value is not None and (not isinstance(value, int | np.integer) or value < 1):
            raise ValueError(f"{name}={value!r}: needs an integer >= 1")


def _tensor(array: Any) -> Any:
    return to_tensor(array) if isinstance(array, np.ndarray) else array
