"""The distinct values of every batch of a column, on disk between reading the log and fitting it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from seqdata.tables import read_batches

# what coding and grouping an entry takes besides its value
BYTES_AN_ENTRY = 40


@dataclass(frozen=True)
class Coded:
    """One batch of one column: codes [rows], the entries that code 1 + i names, and their counts before the cutoff."""

    codes: np.ndarray
    entries: pa.Array | None = None
    counts: np.ndarray | None = None


class EntryWriter:
    """The entries of one column of one part of the input, as an Arrow file; `starts` says where each batch begins."""

    def __init__(self, path: Path, kind: pa.DataType) -> None:
        self.count, self.bytes, self.starts = 0, 0, list[int]()
        self.schema = _schema(kind)
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._file, self.schema)

    def add(self, coded: Coded) -> None:
        self.starts.append(self.count)
        if coded.entries is not None and len(coded.entries):
            self.count += len(coded.entries)
            self.bytes += coded.entries.nbytes
            counts = pa.array(coded.counts, pa.int64())
            self._writer.write_batch(pa.record_batch([coded.entries, counts], schema=self.schema))

    def close(self) -> None:
        # the file has to be closed whatever its footer met, such as a full disk
        try:
            self._writer.close()
        finally:
            self._file.close()


@dataclass(frozen=True)
class Entries:
    """The entries of one column over all parts, in the order of the parts; `remap` is where their ids go.

    extra: values that count as entries behind all others, met zero times.
    """

    kind: pa.DataType
    files: list[Path]
    count: int
    bytes: int
    remap: Path
    extra: pa.Array | None = None

    @property
    def schema(self) -> pa.Schema:
        return _schema(self.kind)

    @property
    def total(self) -> int:
        """Entries with the extra ones."""
        return self.count + (0 if self.extra is None else len(self.extra))

    @property
    def weight(self) -> int:
        """Bytes that holding and grouping all entries at once takes."""
        return 4 * self.bytes + BYTES_AN_ENTRY * self.count

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Batches of (value, fit) in order."""
        for file in self.files:
            yield from read_batches(file)
        if self.extra is not None:
            yield pa.record_batch([self.extra, pa.array(np.zeros(len(self.extra), np.int64))], schema=self.schema)


def read_remap(path: Path, start: int, count: int) -> np.ndarray:
    """Some of the ids that fitting wrote for the entries."""
    return np.fromfile(path, np.int32, count, offset=start * 4)


def _schema(kind: pa.DataType) -> pa.Schema:
    return pa.schema([("value", kind), ("fit", pa.int64())])
