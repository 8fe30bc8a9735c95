"""Hand-made features of each user's events before a moment, without a loop over users."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone

import numpy as np
from numpy.typing import NDArray

from runkit.progress import progress
from seqdata import Batch
from ubt.prepare import Prepared

BATCH_EVENTS = 2_000_000
TOP = 10
DAY = 86400.0
# Families whose values are counted, in the order of the organisers' code.
COUNTED = ("item", "category", "price", "url")


@dataclass
class Features:
    """Features of some users.

    Args:
        rows: positions of the users among those asked for [n]
        values: [n, F]
        names: of the features
    """

    rows: NDArray[np.int64]
    values: NDArray[np.float32]
    names: list[str]


def official_features(prepared: Prepared, before: datetime, windows_days: list[float]) -> Iterator[Features]:
    """Yield the features of the challenge's own baseline, in parts of the users who have a history.

    Per event type: how many events (of searches too, which the organisers do not count); per window and per column
    (sku, category, price, url, whichever these events have) how many of them hold each of the ten most frequent
    values. A window ends at the last event of its type. Mean query vector. Raw numbers. Source: Synerise/recsys2025,
    baseline/aggregated_features_baseline.

    Args:
        prepared: the log
        before: events at or after this moment do not count, UTC
        windows_days: lengths of the windows
    """
    for rows, part in _official_parts(prepared, before, windows_days, "baseline"):
        yield part.features(rows)


def aggregates(prepared: Prepared, before: datetime, windows_days: list[float]) -> Iterator[Features]:
    """Yield the baseline's features as logarithms, and more, in parts of the users who have a history.

    Per event type and window: number of events. Per event type: days since the first and the last one. Distinct
    skus, URLs and days. Per target category and target sku: number of events, ever; per target category also in the
    longest window. Share of the events in each tenth of the distinct prices. Mean price, name and query vectors.

    Args:
        prepared: the log
        before: events at or after this moment do not count, UTC
        windows_days: lengths of the windows that end at `before`
    """
    for rows, part in _official_parts(prepared, before, windows_days, "aggregates"):
        part.columns = [
            (name, column if name.startswith("mean") else np.log1p(column)) for name, column in part.columns
        ]
        part.more()
        yield part.features(rows)


def _official_parts(
    prepared: Prepared, before: datetime, windows_days: list[float], what: str
) -> Iterator[tuple[NDArray[np.int64], _Part]]:
    counts = _Counts(prepared)
    for _, batch in _batches(prepared, before, "most frequent values"):
        counts.add(batch)
    top = counts.top()
    for rows, batch in _batches(prepared, before, what):
        part = _Part(prepared, batch, before, windows_days)
        part.official(top, counts.last)
        yield rows, part


def _batches(prepared: Prepared, before: datetime, what: str) -> Iterator[tuple[NDArray[np.int64], Batch]]:
    view = prepared.history(before)
    longest = max(int(view.lengths().max(initial=0)), 1)
    row = 0
    with progress(len(view), what, unit="user") as bar:
        for batch in view.batches(max_tokens=max(BATCH_EVENTS, longest), fields=list(prepared.families.values())):
            yield prepared.known[row : row + len(batch)], batch
            row += len(batch)
            bar.update(len(batch))


class _Counts:
    """How often every event type goes with every value, and when each type was last seen, among the users asked."""

    def __init__(self, prepared: Prepared):
        self.prepared = prepared
        families = prepared.families
        self.types = len(prepared.store.vocabulary(families["event_type"]))
        self.last = np.zeros(self.types, np.int64)
        self.counts = {
            family: np.zeros((self.types, len(prepared.store.vocabulary(families[family]))), np.int64)
            for family in COUNTED
            if family in families
        }

    def add(self, batch: Batch) -> None:
        jagged, families = batch.jagged, self.prepared.families
        event = jagged[families["event_type"]].astype(np.int64)
        np.maximum.at(self.last, event, jagged["timestamp"])
        for family, counts in self.counts.items():
            pairs = event * counts.shape[1] + jagged[families[family]]
            values, number = np.unique(pairs, return_counts=True)
            counts.reshape(-1)[values] += number

    def top(self) -> dict[tuple[int, str], NDArray[np.int64]]:
        """The most frequent values of every event type (in the order of types) and family that go together."""
        result = {}
        for event in range(2, self.types):
            for family, counts in self.counts.items():
                # Values 0 and 1 are missing and unknown.
                known = counts[event, 2:]
                order = 2 + np.argsort(-known, kind="stable")[:TOP]
                if known.any():
                    result[event, family] = order[counts[event, order] > 0]
        return result


@dataclass
class _Part:
    """The features of one batch of users, built column by column."""

    prepared: Prepared
    batch: Batch
    before: datetime
    windows: list[float]
    columns: list[tuple[str, NDArray]] = field(default_factory=list)

    def __post_init__(self) -> None:
        jagged, families = self.batch.jagged, self.prepared.families
        self.users = len(self.batch)
        self.user = np.repeat(np.arange(self.users), jagged.lengths)
        now = int(self.before.replace(tzinfo=timezone.utc).timestamp())
        self.days = (now - jagged["timestamp"]) / DAY
        self.event = jagged[families["event_type"]]

    def features(self, rows: NDArray[np.int64]) -> Features:
        values = np.stack([column for _, column in self.columns], 1).astype(np.float32)
        return Features(rows, values, [name for name, _ in self.columns])

    def official(self, top: dict[tuple[int, str], NDArray[np.int64]], last: NDArray[np.int64]) -> None:
        """Add the features of the challenge's baseline."""
        jagged, families = self.batch.jagged, self.prepared.families
        vocabulary = self.prepared.store.vocabulary(families["event_type"])
        for code in range(2, len(vocabulary)):
            name = str(vocabulary.decode([code])[0])
            here = np.flatnonzero(self.event == code)
            user = self.user[here]
            self.columns.append((f"{name}: count", np.bincount(user, minlength=self.users)))
            age = last[code] - jagged["timestamp"][here]
            for window in self.windows:
                recent = age <= window * DAY
                for family, chosen in ((f, ids) for (e, f), ids in top.items() if e == code):
                    values = jagged[families[family]][here]
                    labels = self.prepared.store.vocabulary(families[family]).decode(chosen)
                    counts = self._table(user[recent], values[recent], chosen)
                    self.columns += [
                        (f"{name}: {family} {label} in {window:g} days", counts[:, i]) for i, label in enumerate(labels)
                    ]
        if "query" in families:
            codes = jagged[families["query"]]
            self._mean("query", self.prepared.store.vectors(families["query"])[codes], codes > 0)

    def more(self) -> None:
        """Add what the baseline does not look at."""
        jagged, families = self.batch.jagged, self.prepared.families
        event = self.event
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
        if "category" in families:
            self._targets("category", jagged[families["category"]], recent=True)
        if "item" in families:
            self._targets("sku", jagged[families["item"]], recent=False)
        if "price" in families:
            prices = np.asarray(self.prepared.store.vocabulary(families["price"]).values, np.float64)
            tenths = np.argsort(np.argsort(prices)) * 10 // max(len(prices), 1)
            ids = jagged[families["price"]]
            self._mean("price", np.r_[0.0, 0.0, prices][ids][:, None], ids > 1)
            self._mean("price tenth", np.r_[0, 0, tenths][ids][:, None] == np.arange(10), ids > 1)
        if "name" in families:
            names = jagged[families["name"]]
            if "." not in families["name"]:
                names = self.prepared.store.vectors(families["name"])[names]
            self._mean("name", names, (names != 0).any(1))

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

    def _targets(self, what: str, values: NDArray, recent: bool) -> None:
        family = {"category": "category", "sku": "item"}[what]
        ids = self.prepared.store.vocabulary(self.prepared.families[family]).encode(self.prepared.targets[what].ids)
        spans = [("", np.inf)] + ([(f" in {self.windows[-1]:g} days", self.windows[-1])] if recent else [])
        for label, days in spans:
            where = self.days <= days
            counts = np.log1p(self._table(self.user[where], values[where], np.asarray(ids)))
            self.columns += [(f"target {what} {i}{label}", counts[:, i]) for i in range(len(ids))]

    def _table(self, user: NDArray, values: NDArray, chosen: NDArray) -> NDArray[np.int64]:
        """How often every user goes with every chosen value [users, len(chosen)]; ids 0 and 1 never count."""
        slot = np.full(max(int(values.max(initial=0)), int(chosen.max(initial=0))) + 1, -1)
        known = chosen > 1
        slot[chosen[known]] = np.flatnonzero(known)
        place = slot[values]
        hit = place >= 0
        size = self.users * len(chosen)
        return np.bincount(user[hit] * len(chosen) + place[hit], minlength=size).reshape(self.users, -1)

    def _mean(self, name: str, values: NDArray, where: NDArray) -> None:
        number = np.maximum(np.bincount(self.user[where], minlength=self.users), 1)
        for i in range(values.shape[1]):
            mean = np.bincount(self.user[where], values[where, i], minlength=self.users) / number
            self.columns.append((f"mean {name} {i}", mean))
