"""Events on their way from input order to one time-sorted run per user, in bounded memory.

A spool file holds the batches of one part of the input for one shard, column after column within a batch, in input
order. `sorted_runs` cuts the users of a shard into ranges that fit the memory, scatters the spools into one file per
range and sorts each range; both steps are stable, so equal times keep input order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from seqdata.layout import write_all

SAMPLE = 1 << 18
Batches = Callable[[], Iterator[np.ndarray]]


class SpoolWriter:
    """Appends batches of raw columns; `rows` lists their sizes."""

    def __init__(self, path: Path, columns: dict[str, np.dtype]) -> None:
        self.columns, self.rows = columns, list[int]()
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115

    def append(self, batch: dict[str, np.ndarray]) -> None:
        self.rows.append(len(batch["time"]))
        for name, dtype in self.columns.items():
            write_all(self._file, np.ascontiguousarray(batch[name], dtype))

    def close(self) -> None:
        self._file.close()


def read_spool(
    path: Path, columns: dict[str, np.dtype], rows: list[int], only: str | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """The batches of a spool file in order; `only` reads a single column."""
    with open(path, "rb", buffering=0) as file:
        for count in rows:
            batch = {}
            for name, dtype in columns.items():
                if only is None or name == only:
                    batch[name] = np.fromfile(file, dtype, count)
                else:
                    file.seek(count * dtype.itemsize, 1)
            yield batch


def sorted_runs(
    records: Batches,
    users: Batches,
    rows: int,
    record: np.dtype,
    folder: Path,
    budget: int,
    tick: Callable[[int], None],
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Yields (users, lengths, records, order) of ascending ranges of users; order sorts by user, time and input order.

    records: opens the events as structured arrays with "user" and "time" in input order. users: opens their users only.
    budget: bytes this may hold at a time. tick(rows): progress.
    """
    ranges = -(-rows * (record.itemsize + 40) // max(budget, 1))
    if ranges <= 1:
        whole, start = np.empty(rows, record), 0
        for batch in records():
            whole[start : start + len(batch)] = batch
            start += len(batch)
        yield _sorted(whole)
        tick(rows)
        return
    splitters = _splitters(users, rows, ranges)
    files = [open(folder / f"range_{i}", "wb", buffering=0) for i in range(len(splitters) + 1)]  # noqa: SIM115
    done = 0
    try:
        for batch in records():
            target = np.searchsorted(splitters, batch["user"], "right").astype(np.uint16)
            ends = np.cumsum(np.bincount(target, minlength=len(files)))
            batch = batch[np.argsort(target, kind="stable")]
            for i, file in enumerate(files):
                piece = batch[ends[i - 1] if i else 0 : ends[i]]
                if len(piece):
                    write_all(file, piece)
            done += len(batch)
            tick(done // 2)
    finally:
        for file in files:
            file.close()
    for file in files:
        whole = np.fromfile(file.name, record)
        Path(file.name).unlink()
        done += len(whole)
        if len(whole):
            yield _sorted(whole)
        tick(done // 2)


def _sorted(records: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    users, time = np.ascontiguousarray(records["user"]), np.ascontiguousarray(records["time"])
    by_time = _stable(time) if np.any(time[1:] < time[:-1]) else None
    by_user = _stable(users if by_time is None else users[by_time])
    order = by_user if by_time is None else by_time[by_user]
    ranked = users[order]
    starts = (
        np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]])) if len(ranked) else np.zeros(0, np.int64)
    )
    return ranked[starts], np.diff(np.append(starts, len(ranked))), records, order


def _splitters(users: Batches, rows: int, ranges: int) -> np.ndarray:
    step = max(rows // SAMPLE, 1)
    sample = np.sort(np.concatenate([batch[::step] for batch in users()]))
    return np.unique(sample[np.arange(1, ranges) * len(sample) // ranges])


def _stable(keys: np.ndarray) -> np.ndarray:
    # keys and positions packed into one word sort several times faster than a stable argsort, where they fit
    count = len(keys)
    if not count:
        return np.zeros(0, np.int64)
    low, high = int(keys.min()), int(keys.max())
    bits = max(count - 1, 1).bit_length()
    if (high - low).bit_length() + bits > 63:
        return np.argsort(keys, kind="stable")
    packed = keys.astype(np.int64) - low
    packed <<= bits
    packed |= np.arange(count)
    packed.sort()
    packed &= (1 << bits) - 1
    return packed
