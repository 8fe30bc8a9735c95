"""Distinct values to ids, in bounded memory.

Entries that do not fit the memory together are dealt to partitions by a hash of their value. Each partition is grouped
and sorted on its own; the sorted runs are merged, which numbers the values; then every entry gets the number of its
value, in the order the entries came in. What lies between the steps is on disk and is read front to back.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from seqdata.entries import Entries
from seqdata.hashing import bucket
from seqdata.layout import one_chunk, write_all
from seqdata.spool import stable_order
from seqdata.tables import read_batch
from seqdata.texts import spread, text_order

MOST_IDS = np.iinfo(np.int32).max
MOST_PARTS = 1 << 12
BLOCK_ROWS = 1 << 17


@dataclass(frozen=True)
class Rules:
    """Which values get ids, and in which order.

    order: "count": by falling count, ties by value; "seen": counted values first, each group by value; "value".
    first: id of the first value. least: a value counted less often gets none. room: how many values may have one.
    buckets: a value without an id gets one of the ids 1..buckets, by its hash.
    """

    order: str = "count"
    first: int = 2
    least: int = 1
    room: int | None = None
    buckets: int = 1

    def sorted(self, values: pa.Array, counts: np.ndarray) -> np.ndarray:
        """Positions [n] that put values and their counts into this order."""
        order = text_order(values)
        if self.order == "count":
            return order[stable_order(-counts[order])]
        return order if self.order == "value" else order[np.argsort(counts[order] == 0, kind="stable")]

    def key(self, values: pa.Array, counts: np.ndarray, at: int) -> tuple[int, Any]:
        """What the value at a place is compared by."""
        rank = {"count": -int(counts[at]), "seen": int(counts[at] == 0), "value": 0}[self.order]
        return rank, values[at].as_py()


@dataclass(frozen=True)
class Old:
    """Values that have their ids already: how many, what reads their (value, count), whether others may follow."""

    size: int
    batches: Callable[[], Iterable[pa.RecordBatch]]
    grow: bool


def fit_ids(
    entries: Entries, rules: Rules, folder: Path, budget: int, old: Old | None = None
) -> Iterator[pa.RecordBatch]:
    """Numbers the values of some entries; once it is exhausted, `entries.remap` holds the id of every entry.

    Args:
        entries: What was read of one column.
        rules: Which values get ids.
        folder: An empty folder to work in.
        budget: Bytes to stay within.
        old: Values that keep the ids first, first + 1, ...; new ones come behind them.

    Yields:
        Batches of (value, count) in the order of the ids.

    Raises:
        ValueError: There are more values than int32 ids, or entries than the budget can deal out.
    """
    fit = _Fit(entries, rules, folder, budget, old)
    fit.group()
    yield from fit.recounted()
    yield from fit.merge()
    fit.number()


class _Fit:
    def __init__(self, entries: Entries, rules: Rules, folder: Path, budget: int, old: Old | None) -> None:
        self.entries, self.rules, self.folder, self.budget, self.old = entries, rules, folder, budget, old
        self.parts = max(-(-entries.weight // budget), 1)
        if self.parts > MOST_PARTS:
            raise ValueError(
                f"memory_limit: {entries.count:,} values a batch apart, {entries.bytes:,} bytes, are too many to number"
                f" within it; needs about {entries.weight * 2 // MOST_PARTS >> 20:,} MB"
            )
        self.found = np.zeros(0 if old is None else old.size, np.int64)
        self.runs = [_Run(folder / f"run_{i:05d}", rules) for i in range(self.parts)]

    def group(self) -> None:
        """Deals the entries out, groups every partition and writes its values as a sorted run."""
        fresh = _Dealt(self.entries.batches, self.entries.schema, self.folder / "entries", self.parts, self.budget)
        known = None
        if self.old is not None:
            kind = pa.schema([("value", self.entries.kind), ("place", pa.int64())])
            known = _Dealt(self._placed, kind, self.folder / "old", self.parts, self.budget)
        for part, run in enumerate(self.runs):
            self._group(fresh.part(part), None if known is None else known.part(part), run)
        fresh.drop()

    def _placed(self) -> Iterator[pa.RecordBatch]:
        place = 0
        for batch in () if self.old is None else self.old.batches():
            places = np.arange(place, place := place + batch.num_rows)
            yield pa.record_batch([batch.column(0), pa.array(places)], ["value", "place"])

    def _group(self, table: pa.Table, known: pa.Table | None, run: _Run) -> None:
        rules, fit = self.rules, table.column("fit").to_numpy()
        coded = one_chunk(table.column("value")).dictionary_encode()
        codes, distinct = coded.indices.to_numpy(), coded.dictionary
        counts = np.bincount(codes, weights=fit, minlength=len(distinct)).astype(np.int64)
        # a value whose id is settled has it below zero, one that is yet to be numbered its place in the run
        place, settled = np.zeros(len(distinct), np.int32), np.zeros(len(distinct), bool)
        keep = counts >= rules.least
        if known is not None:
            at = pc.index_in(distinct, one_chunk(known.column("value")))
            settled = at.is_valid().to_numpy(zero_copy_only=False)
            ids = known.column("place").take(at.drop_null()).to_numpy()
            self.found[ids] += counts[settled]
            place[settled] = -(ids + rules.first)
            keep &= ~settled
        if self.old is not None and not self.old.grow:
            keep[:] = False
        lost = ~keep & ~settled
        if lost.any():
            place[lost] = -bucket(distinct.filter(pa.array(lost)), rules.buckets)
        kept = np.flatnonzero(keep)
        kept = kept[rules.sorted(distinct.take(pa.array(kept)), counts[kept])]
        place[kept] = np.arange(len(kept), dtype=np.int32)
        run.write(distinct.take(pa.array(kept)), counts[kept], place[codes], self._block())

    def _block(self) -> int:
        width = self.entries.bytes // max(self.entries.count, 1) + 32
        return int(min(max(self.budget // 16 // self.parts // width, 64), BLOCK_ROWS))

    def recounted(self) -> Iterator[pa.RecordBatch]:
        """The old values with what was counted of them now."""
        done = 0
        for batch in () if self.old is None else self.old.batches():
            counts = batch.column(1).to_numpy() + self.found[done : done + batch.num_rows]
            done += batch.num_rows
            yield pa.record_batch([batch.column(0), pa.array(counts)], ["value", "count"])

    def merge(self) -> Iterator[pa.RecordBatch]:
        """Merges the runs into one order; leaves with every run the ids of its values."""
        rules, place = self.rules, len(self.found)
        room = MOST_IDS - rules.first if rules.room is None else max(rules.room, place)
        for run in self.runs:
            run.advance()
        while pieces := _next_pieces(self.runs):
            values = pa.concat_arrays([values for _, values, _ in pieces])
            counts = np.concatenate([counts for _, _, counts in pieces])
            order = rules.sorted(values, counts) if len(pieces) > 1 else np.arange(len(values))
            some = min(room - place, len(values))
            if some < len(values) and rules.room is None:
                raise ValueError(f"more than {MOST_IDS:,} distinct values: ids are int32; Hashed(buckets) has no limit")
            chosen, rest = pa.array(order[:some]), order[some:]
            ids = np.empty(len(values), np.int32)
            ids[order[:some]] = np.arange(rules.first + place, rules.first + place + some)
            if len(rest):
                ids[rest] = bucket(values.take(pa.array(rest)), rules.buckets)
            for (run, names, _), end in zip(pieces, np.cumsum([len(names) for _, names, _ in pieces]), strict=True):
                run.give(ids[end - len(names) : end])
            place += some
            yield pa.record_batch([values.take(chosen), pa.array(counts[order[:some]])], ["value", "count"])

    def number(self) -> None:
        """Writes the id of every entry, in the order of the entries."""
        for run in self.runs:
            run.number()
        total, step = self.entries.total, max(self.budget // 128, 1 << 14)
        done = np.zeros(self.parts, np.int64)
        with open(self.entries.remap, "wb", buffering=0) as out:
            for start in range(0, total, step):
                rows = min(step, total - start)
                if self.parts == 1:
                    write_all(out, self.runs[0].numbers(start, rows))
                    continue
                part = np.fromfile(self.folder / "entries.parts", np.uint16, rows, offset=2 * start)
                sizes = np.bincount(part, minlength=self.parts)
                ids = np.empty(rows, np.int32)
                ids[np.argsort(part, kind="stable")] = np.concatenate(
                    [self.runs[i].numbers(done[i], sizes[i]) for i in np.flatnonzero(sizes)]
                )
                done += sizes
                write_all(out, ids)


class _Dealt:
    """Rows dealt to partitions by a hash of their value, which comes first; `folder`.parts says to which each went."""

    def __init__(
        self, batches: Callable[[], Iterable[pa.RecordBatch]], schema: pa.Schema, folder: Path, parts: int, budget: int
    ) -> None:
        self.read, self.schema, self.parts, self.rounds = batches, schema, parts, list[Path]()
        if parts == 1:
            return
        folder.mkdir()
        with open(folder.with_suffix(".parts"), "wb", buffering=0) as which:
            for i, table in enumerate(_gathered(batches(), schema, budget // 16)):
                part = (spread(one_chunk(table.column(0))) % np.uint64(parts)).astype(np.uint16)
                write_all(which, part)
                self.rounds.append(folder / f"{i:05d}")
                self._write(table, part)

    def _write(self, table: pa.Table, part: np.ndarray) -> None:
        # one file a round with one batch a partition, so that one file is open at a time
        batch = table.take(pa.array(np.argsort(part, kind="stable"))).combine_chunks()
        ends = np.cumsum(np.bincount(part, minlength=self.parts))
        with pa.OSFile(str(self.rounds[-1]), "wb") as file, pa.ipc.new_file(file, self.schema) as writer:
            for i, end in enumerate(ends):
                start = ends[i - 1] if i else 0
                rows = [column.chunk(0).slice(start, end - start) for column in batch.columns]
                writer.write_batch(pa.record_batch(rows, schema=self.schema))

    def part(self, number: int) -> pa.Table:
        """The rows of a partition, in order."""
        batches = self.read() if self.parts == 1 else (read_batch(path, number) for path in self.rounds)
        return pa.Table.from_batches([batch for batch in batches if batch is not None], self.schema)

    def drop(self) -> None:
        """Removes the rows, not what says where they went."""
        for path in self.rounds:
            path.unlink()


class _Run:
    """The sorted values of one partition, handed out block by block, and the places of its entries."""

    def __init__(self, path: Path, rules: Rules) -> None:
        self.path, self.rules = path, rules
        self._codes, self._ids = path.with_suffix(".codes"), path.with_suffix(".ids")
        self.values, self.counts, self.at = pa.nulls(0), np.zeros(0, np.int64), 0
        self._blocks = self._block = 0

    def write(self, values: pa.Array, counts: np.ndarray, codes: np.ndarray, block: int) -> None:
        table = pa.table({"value": values, "count": counts})
        with pa.OSFile(str(self.path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=block)
        self._blocks = -(-len(values) // block)
        for path, content in ((self._codes, codes), (self._ids, np.zeros(0, np.int32))):
            with open(path, "wb", buffering=0) as file:
                write_all(file, content)

    @property
    def left(self) -> int:
        """Values of the present block that are not handed out."""
        return len(self.values) - self.at

    @property
    def more(self) -> bool:
        """Whether there is another block."""
        return self._block < self._blocks

    def key(self, at: int) -> tuple[int, Any]:
        return self.rules.key(self.values, self.counts, at)

    def advance(self) -> None:
        """Loads the next block once the present one is used up."""
        if not self.left and self.more:
            batch = read_batch(self.path, self._block)
            self.values, self.counts, self.at = batch.column(0), batch.column(1).to_numpy(), 0
            self._block += 1

    def take(self, end: int) -> tuple[pa.Array, np.ndarray]:
        """Values and counts of the present block up to `end`."""
        start, self.at = self.at, end
        return self.values.slice(start, end - start), self.counts[start:end]

    def give(self, ids: np.ndarray) -> None:
        """Keeps the ids of the values handed out last."""
        with open(self._ids, "ab", buffering=0) as file:
            write_all(file, ids)

    def number(self) -> None:
        """Puts the ids of the entries in the place of their codes."""
        codes, ids = np.fromfile(self._codes, np.int32), np.fromfile(self._ids, np.int32)
        fresh = codes >= 0
        codes[fresh] = ids[codes[fresh]]
        codes[~fresh] *= -1
        with open(self._codes, "wb", buffering=0) as file:
            write_all(file, codes)

    def numbers(self, start: int, count: int) -> np.ndarray:
        """Ids of some entries of this partition."""
        return np.fromfile(self._codes, np.int32, int(count), offset=4 * int(start))


def _next_pieces(runs: list[_Run]) -> list[tuple[_Run, pa.Array, np.ndarray]]:
    """From every run the values up to the lowest last one of a block with blocks behind it: none can come before."""
    active = [run for run in runs if run.left]
    ends = [run.key(len(run.values) - 1) for run in active if run.more]
    pieces = []
    for run in active:
        end = len(run.values)
        if ends:
            end = bisect_right(range(len(run.values)), min(ends), run.at, key=run.key)
        if end > run.at:
            pieces.append((run, *run.take(end)))
            run.advance()
    return pieces


def _gathered(batches: Iterable[pa.RecordBatch], schema: pa.Schema, size: int) -> Iterator[pa.Table]:
    """The rows of some batches in tables of about `size` bytes."""
    held: list[pa.RecordBatch] = []
    for batch in batches:
        held.append(batch)
        if sum(one.nbytes for one in held) >= size:
            yield pa.Table.from_batches(held, schema).combine_chunks()
            held = []
    if held:
        yield pa.Table.from_batches(held, schema).combine_chunks()
