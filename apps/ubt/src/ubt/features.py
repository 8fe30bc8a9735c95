"""The rival: hand-made aggregates of each user's events before a moment, without a loop over users."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timezone

import numpy as np
from numpy.typing import NDArray

from seqdata import Batch
from ubt.prepare import Prepared
from ubt.progress import progress

BATCH_EVENTS = 2_000_000
TOP = 10
DAY = 86400.0


@dataclass
class Aggregates:
    """Features [U, F] of the users asked for, and their names; users without events have zeros and no recency."""

    values: NDArray[np.float32]
    names: list[str]


def aggregates(prepared: Prepared, before: datetime, windows_days: list[float]) -> Aggregates:
    """Count, date and average what every user did before a moment, as the challenge's own baseline does, and more.

    Per event type and window: number of events. Per event type: days since the first and the last one. Distinct
    skus, URLs and days. Per target category and per each of the ten most frequent values of category, price and URL:
    number of events, in the longest window and ever. Mean price, name and query vectors.

    Args:
        prepared: the log
        before: events at or after this moment do not count, UTC
        windows_days: lengths of the windows that end at `before`
    """
    view = prepared.history(before)
    now = int(before.replace(tzinfo=timezone.utc).timestamp())
    fields = list(prepared.families.values())
    longest = max(int(view.lengths().max(initial=0)), 1)
    batches = view.batches(max_tokens=max(BATCH_EVENTS, longest), fields=fields)
    total, names, row = None, [], 0
    with progress(len(view), "aggregates", unit="user") as bar:
        for batch in batches:
            part = _Part(prepared, batch, now, windows_days)
            if total is None:
                names = [name for name, _ in part.columns]
                total = np.zeros((len(prepared.users), len(names)), np.float32)
            rows = prepared.known[row : row + len(batch)]
            total[rows] = np.stack([column for _, column in part.columns], 1)
            row += len(batch)
            bar.update(len(batch))
    if total is None:
        raise ValueError("log: none of the users asked for has an event")
    return Aggregates(total, names)


@dataclass
class _Part:
    """The features of one batch of users, built column by column."""

    prepared: Prepared
    batch: Batch
    now: int
    windows: list[float]
    columns: list[tuple[str, NDArray]] = field(default_factory=list)

    def __post_init__(self) -> None:
        jagged, families = self.batch.jagged, self.prepared.families
        self.users = len(self.batch)
        self.user = np.repeat(np.arange(self.users), jagged.lengths)
        self.days = (self.now - jagged["timestamp"]) / DAY
        event = jagged[families["event_type"]]
        vocabulary = self.prepared.store.vocabulary(families["event_type"])
        everything = np.ones(len(self.user), bool)
        self._activity("any", everything)
        for code in range(2, len(vocabulary)):
            self._activity(str(vocabulary.decode([code])[0]), event == code)
        self._distinct("days", (jagged["timestamp"] // 86400), everything)
        for family in ("item", "url"):
            if family in families:
                values = jagged[families[family]]
                self._distinct(family, values, values > 0)
        for family in ("category", "price", "url"):
            if family in families:
                # Ids 2, 3, ... are the values by falling frequency before the cutoff.
                self._values(family, jagged[families[family]], np.arange(2, 2 + TOP))
        if "category" in families:
            targets = self.prepared.store.vocabulary(families["category"]).encode(self.prepared.categories)
            self._values("target category", jagged[families["category"]], np.asarray(targets))
        if "price" in families:
            vocabulary = self.prepared.store.vocabulary(families["price"])
            price = np.r_[0.0, 0.0, np.asarray(vocabulary.values, np.float64)][jagged[families["price"]]]
            self._mean("price", price[:, None], jagged[families["price"]] > 1)
        if "name" in families:
            self._mean("name", jagged[families["name"]], (jagged[families["name"]] != 0).any(1))
        if "query" in families:
            codes = jagged[families["query"]]
            self._mean("query", self.prepared.store.vectors(families["query"])[codes], codes > 0)

    def _activity(self, name: str, where: NDArray) -> None:
        for window in self.windows:
            self._count(f"{name}: events in {window:g} days", where & (self.days <= window))
        self._count(f"{name}: events", where)
        # Days since; users without such an event get a value beyond all others.
        last, first = np.full(self.users, 1e3), np.zeros(self.users)
        np.minimum.at(last, self.user[where], self.days[where])
        np.maximum.at(first, self.user[where], self.days[where])
        self.columns += [(f"{name}: days since last", np.log1p(last)), (f"{name}: days since first", np.log1p(first))]

    def _count(self, name: str, where: NDArray) -> None:
        self.columns.append((name, np.log1p(np.bincount(self.user[where], minlength=self.users))))

    def _distinct(self, name: str, values: NDArray, where: NDArray) -> None:
        pairs = np.unique(np.stack([self.user[where], values[where]]), axis=1)[0]
        self.columns.append((f"distinct {name}", np.log1p(np.bincount(pairs, minlength=self.users))))

    def _values(self, name: str, values: NDArray, chosen: NDArray) -> None:
        slot = np.full(max(int(values.max(initial=0)), int(chosen.max(initial=0))) + 1, -1)
        slot[chosen] = np.arange(len(chosen))
        for label, where in (
            ("", self.days < np.inf),
            (f" in {self.windows[-1]:g} days", self.days <= self.windows[-1]),
        ):
            place = slot[values]
            hit = where & (place >= 0)
            size = self.users * len(chosen)
            counts = np.bincount(self.user[hit] * len(chosen) + place[hit], minlength=size).reshape(self.users, -1)
            self.columns += [(f"{name} {i}{label}", np.log1p(counts[:, i])) for i in range(len(chosen))]

    def _mean(self, name: str, values: NDArray, where: NDArray) -> None:
        number = np.maximum(np.bincount(self.user[where], minlength=self.users), 1)
        for i in range(values.shape[1]):
            mean = np.bincount(self.user[where], values[where, i], minlength=self.users) / number
            self.columns.append((f"mean {name} {i}", mean))
