"""Hand-made features of each user's events before a moment, without a loop over users."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import numpy as np
from numpy.typing import NDArray

from runkit.progress import progress
from seqdata import View
from seqdata.aggregates import Past, parts
from ubt.prepare import Prepared, seconds

BATCH_EVENTS = 2_000_000
TOP = 10
DAY = 86400.0
# Families whose values are counted, in the order of the organisers' code.
COUNTED = ("item", "category", "price", "url")

Column = tuple[str, NDArray]


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
    types = _event_types(prepared, before)
    for rows, past in _known(prepared, before, "baseline"):
        yield _features(rows, _official(prepared, past, types, windows_days))


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
    types = _event_types(prepared, before)
    for rows, past in _known(prepared, before, "aggregates"):
        columns = [
            (name, values if name.startswith("mean") else np.log1p(values))
            for name, values in _official(prepared, past, types, windows_days)
        ]
        yield _features(rows, [*columns, *_more(prepared, past, before, windows_days)])


def pasts(view: View, before: datetime, fields: Sequence[str], what: str) -> Iterator[tuple[slice, Past]]:
    """Yield rows of a view and the past of these users, with a bar that says what is being done."""
    with progress(len(view), what, "user") as bar:
        for rows, past in parts(view, before, fields, BATCH_EVENTS):
            yield rows, past
            bar.update(len(past))


@dataclass
class _EventType:
    """What the baseline needs to know of one event type among the users asked for.

    Args:
        name: of the type
        code: its id in the store
        youngest: seconds from its last event to the moment
        top: family -> ids of the most frequent values that go with it
    """

    name: str
    code: int
    youngest: int
    top: dict[str, NDArray[np.int64]]


def _known(prepared: Prepared, before: datetime, what: str) -> Iterator[tuple[NDArray[np.int64], Past]]:
    for rows, past in pasts(prepared.history(before), before, list(prepared.families.values()), what):
        yield prepared.known[rows], past


def _features(rows: NDArray[np.int64], columns: Iterable[Column]) -> Features:
    names, values = zip(*columns, strict=True)
    return Features(rows, np.stack(values, 1).astype(np.float32), list(names))


def _event_types(prepared: Prepared, before: datetime) -> list[_EventType]:
    families, store = prepared.families, prepared.store
    vocabulary = store.vocabulary(families["event_type"])
    counts = {
        family: np.zeros((len(vocabulary), len(store.vocabulary(families[family]))), np.int64)
        for family in COUNTED
        if family in families
    }
    youngest = np.full(len(vocabulary), np.iinfo(np.int64).max)
    for _, past in _known(prepared, before, "most frequent values"):
        event = past[families["event_type"]].astype(np.int64)
        np.minimum.at(youngest, event, past.age)
        for family, table in counts.items():
            values, number = np.unique(event * table.shape[1] + past[families[family]], return_counts=True)
            table.reshape(-1)[values] += number
    # Ids 0 and 1 are missing and unknown.
    return [
        _EventType(
            str(vocabulary.decode([code])[0]),
            code,
            int(youngest[code]),
            {family: _most_frequent(table[code]) for family, table in counts.items() if table[code, 2:].any()},
        )
        for code in range(2, len(vocabulary))
    ]


def _most_frequent(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    order = 2 + np.argsort(-counts[2:], kind="stable")[:TOP]
    return order[counts[order] > 0]


def _official(prepared: Prepared, past: Past, types: list[_EventType], windows: list[float]) -> Iterator[Column]:
    """Yield the features of the challenge's baseline."""
    families, store = prepared.families, prepared.store
    for kind in types:
        events = past.only(past[families["event_type"]] == kind.code)
        yield f"{kind.name}: count", events.counts()
        for window in windows:
            recent = events.only(events.age - kind.youngest <= window * DAY)
            for family, ids in kind.top.items():
                counts = recent.counts_of(families[family], ids)
                for i, label in enumerate(store.vocabulary(families[family]).decode(ids)):
                    yield f"{kind.name}: {family} {label} in {window:g} days", counts[:, i]
    if "query" in families:
        codes = past[families["query"]]
        yield from _mean("query", past, store.vectors(families["query"])[codes], codes > 0)


def _more(prepared: Prepared, past: Past, before: datetime, windows: list[float]) -> Iterator[Column]:
    """Yield what the baseline does not look at."""
    families, store = prepared.families, prepared.store
    vocabulary, event = store.vocabulary(families["event_type"]), past[families["event_type"]]
    yield from _activity("any", past, windows)
    for code in range(2, len(vocabulary)):
        yield from _activity(str(vocabulary.decode([code])[0]), past.only(event == code), windows)
    yield "distinct days", np.log1p(past.distinct((seconds(before) - past.age) // int(DAY)))
    for family in ("item", "url"):
        if family in families:
            yield f"distinct {family}", np.log1p(past.distinct(families[family]))
    if "category" in families:
        yield from _targets(prepared, past, "category", "category", "")
        recent = past.within(timedelta(days=windows[-1]))
        yield from _targets(prepared, recent, "category", "category", f" in {windows[-1]:g} days")
    if "item" in families:
        yield from _targets(prepared, past, "sku", "item", "")
    if "price" in families:
        prices = np.asarray(store.vocabulary(families["price"]).values, np.float64)
        tenths = np.argsort(np.argsort(prices)) * 10 // max(len(prices), 1)
        ids = past[families["price"]]
        yield from _mean("price", past, np.r_[0.0, 0.0, prices][ids][:, None], ids > 1)
        yield from _mean("price tenth", past, np.r_[0, 0, tenths][ids][:, None] == np.arange(10), ids > 1)
    if "name" in families:
        names = past[families["name"]]
        if "." not in families["name"]:
            names = store.vectors(families["name"])[names]
        yield from _mean("name", past, names, (names != 0).any(1))


def _activity(name: str, events: Past, windows: list[float]) -> Iterator[Column]:
    for window in windows:
        yield f"{name}: events in {window:g} days", np.log1p(events.within(timedelta(days=window)).counts())
    yield f"{name}: events", np.log1p(events.counts())
    # Users without such an event get a value beyond all others.
    yield f"{name}: days since last", np.log1p(np.fmin(events.since_last() / DAY, 1e3))
    yield f"{name}: days since first", np.log1p(np.fmax(events.since_first() / DAY, 0.0))


def _targets(prepared: Prepared, past: Past, what: str, family: str, when: str) -> Iterator[Column]:
    ids = prepared.store.vocabulary(prepared.families[family]).encode(prepared.targets[what].ids)
    counts = np.log1p(past.counts_of(prepared.families[family], ids))
    for i in range(len(ids)):
        yield f"target {what} {i}{when}", counts[:, i]


def _mean(name: str, past: Past, values: NDArray, where: NDArray[np.bool_]) -> Iterator[Column]:
    """Yield the mean of values [T, W] over the events `where` [T], 0 for users without any."""
    events = past.only(where)
    means = events.sums(values[where]) / np.maximum(events.counts(), 1)[:, None]
    for i in range(values.shape[1]):
        yield f"mean {name} {i}", means[:, i]
