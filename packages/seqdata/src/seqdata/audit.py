"""Leaks and rot in a store, found in one pass over it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from seqdata.fields import MISSING
from seqdata.hashing import mix
from seqdata.layout import StoreError
from seqdata.report import Finding, Report
from seqdata.store import Store
from seqdata.structure import faults
from seqdata.times import format_time

CHUNK = 1 << 20
DAY = 86_400_000_000
MOST_DAYS = 200_000


def audit(
    store: Store,
    *,
    cutoff: Any = None,
    labels: tuple[Any, Any] | None = None,
    inputs_before: Any = None,
    statistics: Mapping[str, Any] | None = None,
) -> Report:
    """Checks a store for damaged files, for leaks across a cutoff and for rot in the data, in bounded memory.

    Errors are leaks: something fitted or fed as input that reaches past the cutoff or into the label window; and
    damage: files that are not as they were written. If they make no sense, nothing else is looked at. Warnings are rot:
    duplicates, clock jumps, unknown or missing values that are most of a field. The rest are notes.

    Args:
        store: to read, once for the checksums and once for the events
        cutoff: moment that training must not look past; the store's own fit cutoff if None
        labels: (start, end) of the window the labels come from
        inputs_before: moment up to which the model's inputs reach; None says that they are the whole store
        statistics: {name: moment} of other things that were fitted, and up to when they saw events

    Returns:
        A Report of findings, each an error, a warning or a note
    """
    edge = store.schema["fit_before"] if cutoff is None else store.all().moment(cutoff, "cutoff")
    report = Report(f"Audit of {store.path.name}: {store.num_events:,} events of {store.num_users:,} users")
    damage, broken = _damage(store)
    report.findings += damage
    if broken:
        return report
    scan = _Scan(store, edge)
    for first, last in _chunks(store):
        scan.add(first, last)
    report.per_day, report.first_day, report.lengths = scan.per_day, scan.day, _powers(store.all().lengths())
    report.nulls = {name: count / store.num_events for name, count in scan.missing.items()}
    report.findings += _fitted(store, edge, scan, statistics or {})
    report.findings += _labels(store, labels, inputs_before)
    report.findings += _cold(store, edge, scan)
    report.findings += _rows(store, scan)
    report.findings += _clock(store, scan)
    report.findings += _nulls(store, scan)
    return report


def _damage(store: Store) -> tuple[list[Finding], bool]:
    """Files that are not as they were written, and whether what they hold cannot be read."""
    found, broken = store.verify(), list[str]()
    findings = [Finding("error" if store.sealed() else "warning", "damage", message) for message in found]
    if found:
        broken = list(faults(store))
        findings += [Finding("error", "damage", message) for message in broken]
    return findings or [Finding("ok", "damage", "every file is as it was written")], bool(broken)


class _Scan:
    """Counts that need every event."""

    def __init__(self, store: Store, edge: int | None) -> None:
        self.store, self.edge = store, edge
        low = min(shard["time_min"] for shard in store.schema["shards"])
        high = max(shard["time_max"] for shard in store.schema["shards"])
        self.day = low // DAY
        days = high // DAY - self.day + 1
        # a single event in the year 9999 must not cost memory
        self.per_day = np.zeros(min(days, MOST_DAYS), np.int64)
        self.low, self.high = low, high
        self.duplicates = self.alike = self.ties = self.after = 0
        self.missing = dict.fromkeys(store.fields, 0)
        self.unknown_after = dict.fromkeys(store.fields, 0)
        self.filled_after = dict.fromkeys(store.fields, 0)
        self.counts: dict[str, np.ndarray] = {}
        for name, entry in store.schema["fields"].items():
            if entry["kind"] == "categorical":
                self.counts[name] = np.zeros(entry["size"], np.int64)
        self.busiest, self.busiest_at = 0, 0

    def add(self, first: int, last: int) -> None:
        store = self.store
        places = np.arange(first, last)
        time = store.time[first:last]
        owner = np.searchsorted(store.offsets, places, "right")
        same = (owner[1:] == owner[:-1]) & (time[1:] == time[:-1])
        self.ties += int(same.sum())
        days = np.minimum(time // DAY - self.day, len(self.per_day) - 1)
        self.per_day += np.bincount(days, minlength=len(self.per_day))
        moments, counts = np.unique(time, return_counts=True)
        if len(counts) and counts.max() > self.busiest:
            self.busiest, self.busiest_at = int(counts.max()), int(moments[np.argmax(counts)])
        fit = None if store.schema["fit_before"] is None else time < store.schema["fit_before"]
        after = None if self.edge is None else time >= self.edge
        self.after += 0 if after is None else int(after.sum())
        # equal rows share user and moment, so only rows that tie can be equal
        tied = np.zeros(len(time), bool)
        tied[1:] |= same
        tied[:-1] |= same
        blurred = np.zeros(int(tied.sum()), bool)
        keys = mix(owner[tied].view(np.uint64) * np.uint64(31) + time[tied].view(np.uint64))
        for name, entry in store.schema["fields"].items():
            values = store.take(name, places)
            empty = (
                np.isnan(values)
                if values.dtype.kind == "f"
                else values == MISSING
                if entry["kind"] != "numeric"
                else None
            )
            self.missing[name] += 0 if empty is None else int(empty.sum())
            if tied.any():
                keys = mix(keys ^ mix(_words(values[tied])))
            if entry["kind"] == "categorical":
                # what these rows were may have differed
                blurred |= (values[tied] > MISSING) & (values[tied] <= entry["oov_buckets"])
            if name in self.counts:
                self.counts[name] += np.bincount(
                    values if fit is None else values[fit], minlength=len(self.counts[name])
                )
                if after is not None:
                    unknown = (values > MISSING) & (values < entry["oov_buckets"] + 1)
                    self.unknown_after[name] += int((unknown & after).sum())
                    self.filled_after[name] += int(((values > MISSING) & after).sum())
        for found, mine in (("duplicates", keys[~blurred]), ("alike", keys[blurred])):
            setattr(self, found, getattr(self, found) + len(mine) - len(np.unique(mine)))


def _fitted(store: Store, edge: int | None, scan: _Scan, statistics: Mapping[str, Any]) -> Iterator[Finding]:
    fit = store.schema["fit_before"]
    names = list(scan.counts)
    if edge is None:
        note = "no cutoff is recorded or given: vocabularies saw every event; pass cutoff= to check against one"
        yield Finding("warning" if names else "note", "vocabulary", note)
    elif (fit is None or fit > edge) and scan.after and names:
        seen = "every event" if fit is None else f"events before {format_time(fit)}"
        yield Finding(
            "error",
            "vocabulary",
            f"vocabularies of {names} saw {seen}, past the cutoff {format_time(edge)}",
            scan.after,
        )
    else:
        yield Finding("ok", "vocabulary", f"vocabularies saw no event at or after {format_time(edge)}")
    for name, counted in scan.counts.items():
        vocabulary, fixed = store.vocabulary(name), store.schema["fields"][name]["fixed"]
        found = counted[vocabulary.first_value :]
        wrong = int((vocabulary.counts != found).sum())
        never = int((found == 0).sum())
        if fixed or name == store.schema["event_field"]:
            continue
        if never and fit is not None:
            yield Finding(
                "error",
                "vocabulary",
                f"{name}: {never:,} value(s) have an id but no event before {format_time(fit)}",
                never,
            )
        elif wrong:
            # an append moves the cutoff without counting again what the store already held
            level = "note" if store.schema["generation"] else "warning"
            yield Finding(level, "vocabulary", f"{name}: counts of {wrong:,} value(s) differ from the events", wrong)
    for name, until in statistics.items():
        reach = store.all().moment(until, f"statistics[{name!r}]")
        if edge is not None and reach > edge:
            yield Finding(
                "error",
                "statistic",
                f"{name} was fitted on events up to {format_time(reach)}, past {format_time(edge)}",
            )
        else:
            yield Finding("ok", "statistic", f"{name} was fitted on events up to {format_time(reach)}")


def _labels(store: Store, labels: tuple[Any, Any] | None, inputs_before: Any) -> Iterator[Finding]:
    if labels is None:
        return
    start, end = (store.all().moment(one, "labels") for one in labels)
    inputs = store.all() if inputs_before is None else store.as_of(inputs_before)
    inside = inputs.window(start, end).num_events
    beyond = inputs.window(end, max(end, np.iinfo(np.int64).max)).num_events
    if inside:
        message = (
            f"{inside:,} events of the label window {format_time(start)} .. {format_time(end)} are among the inputs"
        )
        yield Finding("error", "label window", message, inside)
    else:
        yield Finding("ok", "label window", "no event of the label window is among the inputs")
    if beyond:
        yield Finding("error", "label window", f"{beyond:,} events after the label window are among the inputs", beyond)
    if not store.all().window(start, end).num_events and inputs_before is not None:
        yield Finding("warning", "label window", "the store has no event in the label window")


def _cold(store: Store, edge: int | None, scan: _Scan) -> Iterator[Finding]:
    if edge is None or not scan.after:
        return
    before, total = store.all().window(None, edge).lengths(), store.all().lengths()
    later = total > before
    cold = int((later & (before == 0)).sum())
    share = cold / max(int(later.sum()), 1)
    yield Finding(
        "note", "cold users", f"{share:.1%} of the users with events after the cutoff have none before it", share
    )
    for name, unknown in scan.unknown_after.items():
        filled = scan.filled_after[name]
        share = unknown / max(filled, 1)
        if name in scan.counts and share >= 0.001:
            level = "warning" if share > 0.5 else "note"
            yield Finding(
                level, "cold values", f"{name}: {share:.1%} of the events after the cutoff have an unknown value", share
            )


def _rows(store: Store, scan: _Scan) -> Iterator[Finding]:
    share = scan.duplicates / store.num_events
    level = "ok" if not scan.duplicates else "warning" if share > 0.001 else "note"
    yield Finding(
        level, "duplicates", f"{scan.duplicates:,} rows ({share:.2%}) are stored exactly as another one", share
    )
    if scan.alike:
        message = f"{scan.alike:,} more rows are equal but for values that are unknown: they may have differed"
        yield Finding("note", "duplicates", message, scan.alike / store.num_events)
    share = scan.ties / store.num_events
    yield Finding(
        "note" if scan.ties else "ok", "ties", f"{share:.1%} of the events tie with the user's previous one", share
    )
    for reason, count in store.schema["rows"]["dropped"].items():
        if count:
            share = count / store.schema["rows"]["in"]
            yield Finding("note", "dropped rows", f"{count:,} rows ({share:.1%}) were left out: {reason}", share)
    longest = int(store.all().lengths().max())
    if longest > 0.01 * store.num_events and longest > 10_000:
        share = longest / store.num_events
        yield Finding(
            "warning",
            "huge user",
            f"one user has {longest:,} events, {share:.1%} of all: a bot, or a default id?",
            share,
        )


def _clock(store: Store, scan: _Scan) -> Iterator[Finding]:
    found = False
    busy = np.flatnonzero(scan.per_day)
    holes = np.diff(busy) - 1
    if len(holes):
        at = int(np.argmax(holes))
        hole = int(holes[at])
        early = int(scan.per_day[: busy[at] + 1].sum())
        few = min(early, store.num_events - early)
        typical = max(int(np.quantile(holes, 0.9)), 1)
        if hole > max(7 * typical, 30) or (hole > 3 * typical and few < 0.001 * store.num_events):
            found = True
            day = np.datetime64(int(scan.day + busy[at]), "D")
            message = (
                f"no event for {hole:,} days after {day}, with {few:,} events on the smaller side: did a clock jump?"
            )
            yield Finding("warning", "clock jump", message, hole)
    if scan.low < 0 or scan.low // DAY == 0:
        found = True
        yield Finding(
            "warning", "clock jump", f"the first event is at {format_time(scan.low)}: a missing time read as zero?"
        )
    if scan.busiest > max(0.01 * store.num_events, 100):
        found = True
        share = scan.busiest / store.num_events
        message = f"{share:.1%} of all events are at {format_time(scan.busiest_at)}: a default time, or a bulk import?"
        yield Finding("warning", "clock jump", message, share)
    if not found:
        yield Finding(
            "ok", "clock jump", f"events run from {format_time(scan.low)} to {format_time(scan.high)} without a jump"
        )


def _nulls(store: Store, scan: _Scan) -> Iterator[Finding]:
    for name, count in scan.missing.items():
        if count:
            share = count / store.num_events
            several = store.schema["event_field"] is not None
            level = "warning" if share > 0.95 and not several else "note"
            yield Finding(level, "missing values", f"{name}: {share:.1%} of the events have none", share)


def _chunks(store: Store) -> Iterator[tuple[int, int]]:
    # borders fall between users, so that equal rows are in one chunk
    first = 0
    while first < store.num_events:
        row = int(np.searchsorted(store.offsets, first + CHUNK, "left"))
        last = int(store.offsets[min(row, store.num_users)])
        if last <= first:
            raise StoreError(f"{store.path}: offsets do not rise after {first:,} events; see Store.verify()")
        yield first, last
        first = last


def _words(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind == "f":
        return (values.astype(np.float64) + 0.0).view(np.uint64)
    return values.astype(np.int64).view(np.uint64)


def _powers(lengths: np.ndarray) -> np.ndarray:
    """Users with 1, 2, 3..4, 5..8, ... events."""
    return np.bincount(np.ceil(np.log2(lengths[lengths > 0])).astype(np.int64))
