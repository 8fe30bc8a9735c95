"""Events on their way from input order to one time-sorted run per user, in bounded memory.

A spool file holds batches of events, column after column within a batch, in input order. `sorted_runs` cuts the users
of a shard into ranges that fit the memory, scatters the spools into one spool per range and sorts each range, column by
column; both steps are stable, so equal times keep input order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from seqdata.layout import write_all

SAMPLE = 1 << 18
# users, time, order and one column, and what sorting them takes
BYTES_A_ROW = 56
UNITS = (1_000, 1_000_000, 60_000_000)


class SpoolWriter:
    """Appends batches of raw columns; `rows` lists their sizes. No file stays open, for there may be thousands."""

    def __init__(self, path: Path, columns: dict[str, np.dtype]) -> None:
        self.path, self.columns, self.rows = path, columns, list[int]()
        path.write_bytes(b"")

    def append(self, batch: dict[str, np.ndarray]) -> None:
        self.rows.append(len(batch["time"]))
        with open(self.path, "ab", buffering=0) as file:
            for name, dtype in self.columns.items():
                write_all(file, np.ascontiguousarray(batch[name], dtype))


@dataclass(frozen=True)
class Spool:
    """Spooled batches to read back: a file, its columns, rows per batch, and what turns codes into final values."""

    path: Path
    columns: dict[str, np.dtype]
    rows: list[int]
    translate: Callable[[int, str, np.ndarray], np.ndarray]

    def batches(self, *names: str) -> Iterator[dict[str, np.ndarray]]:
        """Some columns of every batch, in order."""
        with open(self.path, "rb", buffering=0) as file:
            for i, count in enumerate(self.rows):
                batch = {}
                for name, dtype in self.columns.items():
                    if name in names:
                        batch[name] = self.translate(i, name, np.fromfile(file, dtype, count))
                    else:
                        file.seek(count * dtype.itemsize, 1)
                yield batch


@dataclass(frozen=True)
class Run:
    """Events of a range of users: ids [u], events per user [u], and sorted columns, made when asked for."""

    users: np.ndarray
    lengths: np.ndarray
    time: np.ndarray
    column: Callable[[str], np.ndarray]

    def deduplicated(self, name: str) -> Run:
        """This without the events that repeat an earlier one in user, time and the column `name`."""
        owner, what = np.repeat(np.arange(len(self.users)), self.lengths), self.column(name)
        order = np.lexsort((what, self.time, owner))
        same = [key[order][1:] == key[order][:-1] for key in (owner, self.time, what)]
        keep = np.ones(len(owner), bool)
        keep[order[1:][np.logical_and.reduce(same)]] = False
        lengths = np.bincount(owner[keep], minlength=len(self.users))
        return Run(self.users, lengths, self.time[keep], lambda column: self.column(column)[keep])


def sorted_runs(spools: list[Spool], folder: Path, budget: int, tick: Callable[[int], None]) -> Iterator[Run]:
    """The events of some spools as runs of ascending users, each run sorted by user, time and input order.

    Args:
        spools: in input order
        folder: for temporary files
        budget: bytes this may hold at a time
        tick: called with numbers of rows that are done
    """
    rows = sum(sum(spool.rows) for spool in spools)
    ranges = -(-rows * BYTES_A_ROW // max(budget, 1))
    if ranges <= 1:
        yield _sorted(spools)
        tick(rows)
        return
    splitters = _splitters(spools, rows, ranges)
    files = [folder / f"range_{i}" for i in range(len(splitters) + 1)]
    sizes = _scatter(spools, splitters, files, budget // 4, lambda done: tick(done // 2))
    done = rows
    for file, size in zip(files, sizes, strict=True):
        if size:
            yield _sorted([Spool(file, spools[0].columns, size, _as_is)])
        file.unlink()
        done += sum(size)
        tick(done // 2)


def _scatter(
    spools: list[Spool], splitters: np.ndarray, files: list[Path], budget: int, tick: Callable[[int], None]
) -> list[list[int]]:
    columns = spools[0].columns
    writers = [SpoolWriter(file, columns) for file in files]
    done = 0
    for batch in _merged(spools, max(budget // sum(dtype.itemsize for dtype in columns.values()), 1)):
        target = np.searchsorted(splitters, batch["user"], "right").astype(np.uint16)
        ends = np.cumsum(np.bincount(target, minlength=len(files)))
        order = np.argsort(target, kind="stable")
        batch = {name: values[order] for name, values in batch.items()}
        for i, writer in enumerate(writers):
            piece = slice(ends[i - 1] if i else 0, ends[i])
            if piece.stop > piece.start:
                writer.append({name: values[piece] for name, values in batch.items()})
        done += len(order)
        tick(done)
    return [writer.rows for writer in writers]


def _merged(spools: list[Spool], rows: int) -> Iterator[dict[str, np.ndarray]]:
    # fewer, larger batches make fewer, larger writes
    held: list[dict[str, np.ndarray]] = []
    for spool in spools:
        for batch in spool.batches(*spool.columns):
            held.append(batch)
            if sum(len(one["user"]) for one in held) >= rows:
                yield {name: np.concatenate([one[name] for one in held]) for name in held[0]}
                held.clear()
    if held:
        yield {name: np.concatenate([one[name] for one in held]) for name in held[0]}


def _sorted(spools: list[Spool]) -> Run:
    def load(name: str) -> np.ndarray:
        return np.concatenate([batch[name] for spool in spools for batch in spool.batches(name)])

    time, users = load("time"), load("user")
    order = stable_order(time) if np.any(time[1:] < time[:-1]) else None
    order = stable_order(users) if order is None else order[stable_order(users[order])]
    time, users = time[order], users[order]
    starts = np.flatnonzero(np.concatenate([[True], users[1:] != users[:-1]])) if len(users) else np.zeros(0, np.int64)
    return Run(users[starts], np.diff(np.append(starts, len(users))), time, lambda name: load(name)[order])


def _splitters(spools: list[Spool], rows: int, ranges: int) -> np.ndarray:
    step = max(rows // SAMPLE, 1)
    sample = np.sort(
        np.concatenate([batch["user"][::step].copy() for spool in spools for batch in spool.batches("user")])
    )
    return np.unique(sample[np.arange(1, ranges) * len(sample) // ranges])


def stable_order(keys: np.ndarray) -> np.ndarray:
    """Positions [n] that sort int64 keys [n], equal keys in their order."""
    # keys and positions packed into one word sort several times faster than a stable argsort, where they fit; times are
    # often whole seconds, which makes them fit
    count = len(keys)
    if not count:
        return np.zeros(0, np.int64)
    low, high = int(keys.min()), int(keys.max())
    bits = max(count - 1, 1).bit_length()
    room = 63 - bits
    if (high - low).bit_length() > 63:
        return np.argsort(keys, kind="stable")
    packed = keys.astype(np.int64) - low
    if (high - low).bit_length() > room:
        unit = next((unit for unit in UNITS if ((high - low) // unit).bit_length() <= room), None)
        if unit is None or np.any(packed % unit):
            return np.argsort(keys, kind="stable")
        packed //= unit
    packed <<= bits
    packed |= np.arange(count)
    packed.sort()
    packed &= (1 << bits) - 1
    return packed


def _as_is(batch: int, name: str, values: np.ndarray) -> np.ndarray:
    return values
