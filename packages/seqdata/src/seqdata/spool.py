"""Events on their way from input order to one time-sorted run per user, in bounded memory.

The spool holds one raw file per column in input order. `sorted_runs` cuts the users into ranges that fit the memory,
scatters the spool into one file per range, and sorts each range; both steps are stable, so equal times keep input order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from seqdata.layout import write_all

SAMPLE = 1 << 16


class Spool:
    """Raw columns in input order; `columns` maps each name to its dtype, "user" and "time" being int64."""

    def __init__(self, folder: Path, columns: dict[str, np.dtype]) -> None:
        self.columns, self.rows, self.batches = columns, 0, []
        self.sample: list[np.ndarray] = []
        self._stride = 1
        self._paths = {name: folder / f"spool_{i}" for i, name in enumerate(columns)}
        self._files = {name: open(path, "wb", buffering=0) for name, path in self._paths.items()}  # noqa: SIM115

    def append(self, batch: dict[str, np.ndarray]) -> None:
        for name, dtype in self.columns.items():
            write_all(self._files[name], np.ascontiguousarray(batch[name], dtype))
        rows = len(batch["time"])
        self.rows += rows
        self.batches.append(rows)

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def read(self, name: str, start: int = 0, rows: int = -1) -> np.ndarray:
        dtype = self.columns[name]
        return np.fromfile(self._paths[name], dtype, rows, offset=start * dtype.itemsize)

    def delete(self) -> None:
        for path in self._paths.values():
            path.unlink(missing_ok=True)


def sorted_runs(
    spool: Spool,
    translate: Callable[[str, int, np.ndarray], np.ndarray],
    folder: Path,
    budget: int,
    tick: Callable[[int], None],
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, Callable[[str], np.ndarray]]]:
    """Yields (users, lengths, time, column) of ascending ranges of users, each range sorted by user, time and input order.

    translate(name, batch, codes): final values of a spooled batch.
    budget: bytes this may hold at a time. tick(rows): progress.
    """
    names = [name for name in spool.columns if name != "user"]
    record = np.dtype([("user", np.int64)] + [(name, spool.columns[name]) for name in names])
    per_row = record.itemsize + 40
    parts = -(-spool.rows * per_row // max(budget, 1))
    if parts <= 1:
        users = (
            np.concatenate([translate("user", i, c) for i, c in _batches(spool, "user")])
            if spool.rows
            else np.zeros(0, np.int64)
        )
        time = spool.read("time")
        order, users, lengths = _order(users, time)
        tick(spool.rows)

        def column(name: str) -> np.ndarray:
            return np.concatenate([translate(name, i, c) for i, c in _batches(spool, name)])[order]

        yield users, lengths, time[order], column
        return
    splitters = _splitters(spool, translate, int(parts))
    files = [open(folder / f"range_{i}", "wb", buffering=0) for i in range(len(splitters) + 1)]  # noqa: SIM115
    try:
        start = 0
        for i, rows in enumerate(spool.batches):
            batch = np.empty(rows, record)
            for name in ("user", *names):
                batch[name] = translate(name, i, spool.read(name, start, rows))
            start += rows
            target = np.searchsorted(splitters, batch["user"], "right").astype(np.uint16)
            order = np.argsort(target, kind="stable")
            batch = batch[order]
            ends = np.cumsum(np.bincount(target, minlength=len(files)))
            for j, file in enumerate(files):
                piece = batch[ends[j - 1] if j else 0 : ends[j]]
                if len(piece):
                    write_all(file, piece)
            tick(start // 2)
    finally:
        for file in files:
            file.close()
    spool.delete()
    done = 0
    for file in files:
        records = np.fromfile(file.name, record)
        Path(file.name).unlink()
        if not len(records):
            continue
        order, users, lengths = _order(records["user"], records["time"])
        done += len(records)
        tick((spool.rows + done) // 2)
        yield users, lengths, records["time"][order], lambda name, records=records, order=order: records[name][order]
        del records, order


def _batches(spool: Spool, name: str) -> Iterator[tuple[int, np.ndarray]]:
    start = 0
    for i, rows in enumerate(spool.batches):
        yield i, spool.read(name, start, rows)
        start += rows


def _splitters(spool: Spool, translate: Callable[[str, int, np.ndarray], np.ndarray], parts: int) -> np.ndarray:
    step = max(spool.rows // (SAMPLE * 4), 1)
    sample = np.sort(np.concatenate([translate("user", i, codes)[::step] for i, codes in _batches(spool, "user")]))
    return np.unique(sample[np.arange(1, parts) * len(sample) // parts])


def _order(users: np.ndarray, time: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stable order by (user, time), the distinct users and their lengths."""
    order = _stable(time) if np.any(time[1:] < time[:-1]) else None
    by_user = _stable(users if order is None else users[order])
    order = by_user if order is None else order[by_user]
    ranked = users[order]
    starts = (
        np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]])) if len(ranked) else np.zeros(0, np.int64)
    )
    return order, ranked[starts], np.diff(np.append(starts, len(ranked)))


def _stable(keys: np.ndarray) -> np.ndarray:
    """Stable argsort of int64 keys: keys and positions packed into one word sort several times faster where they fit."""
    count = len(keys)
    if not count:
        return np.zeros(0, np.int64)
    low, high = int(keys.min()), int(keys.max())
    bits = max(count - 1, 1).bit_length()
    if (high - low).bit_length() + bits > 63:
        return np.argsort(keys, kind="stable")
    packed = keys - low
    packed <<= bits
    packed |= np.arange(count)
    packed.sort()
    packed &= (1 << bits) - 1
    return packed
