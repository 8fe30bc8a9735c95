"""Arrow files written and read piece by piece, in little memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from seqdata.layout import write_all

# a vocabulary larger than this is several record batches, so that nobody has to hold it whole
BATCH_BYTES = 128_000_000


def read_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """The batches of an Arrow file, each read into memory and not mapped, so that it goes when it is let go."""
    with pa.OSFile(str(path)) as file:
        reader = pa.ipc.open_file(file)
        for i in range(reader.num_record_batches):
            yield reader.get_batch(i)


def read_batch(path: Path, number: int) -> pa.RecordBatch:
    """One batch of an Arrow file, read into memory."""
    with pa.OSFile(str(path)) as file:
        return pa.ipc.open_file(file).get_batch(number)


class VocabularyWriter:
    """Writes (value, count) as an Arrow file of one record batch, or of few large ones where it is long.

    A record batch is written from whole columns, so the columns wait in files beside it until one is full.
    """

    def __init__(self, path: Path, kind: pa.DataType) -> None:
        self.schema, self.rows = pa.schema([("value", kind), ("count", pa.int64())]), 0
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._file, self.schema)
        self._columns = [path.with_suffix(f".{name}") for name in ("lengths", "values", "counts")]
        self._waiting = [open(column, "wb", buffering=0) for column in self._columns]  # noqa: SIM115
        self._held = self._bytes = 0

    def append(self, batch: pa.RecordBatch) -> None:
        values, counts = batch.columns
        lengths, content = _parts(values)
        if self._held and self._bytes + content.nbytes + 12 * len(values) > BATCH_BYTES:
            self._flush()
        for file, column in zip(self._waiting, (lengths, content, counts.to_numpy()), strict=True):
            write_all(file, column)
        self._bytes += content.nbytes + 12 * len(values)
        self._held += len(values)
        self.rows += len(values)

    def _flush(self) -> None:
        lengths, content, counts = (
            np.fromfile(column, kind) for column, kind in zip(self._columns, ("i4", "u1", "i8"), strict=True)
        )
        buffers = [None, pa.py_buffer(content)]
        if pa.types.is_string(self.schema.field(0).type):
            buffers.insert(1, pa.py_buffer(np.append(0, np.cumsum(lengths)).astype(np.int32)))
        values = pa.Array.from_buffers(self.schema.field(0).type, self._held, buffers)
        self._writer.write_batch(pa.record_batch([values, pa.array(counts)], schema=self.schema))
        for file in self._waiting:
            file.seek(0)
            file.truncate()
        self._held = self._bytes = 0

    def __enter__(self) -> VocabularyWriter:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None:
                if self._held or not self.rows:
                    self._flush()
                self._writer.close()
        finally:
            for file in (*self._waiting, self._file):
                file.close()
            for column in self._columns:
                column.unlink(missing_ok=True)


def _parts(values: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Lengths [n] (empty for integers) and content of an array without nulls."""
    if pa.types.is_integer(values.type):
        return np.zeros(0, np.int32), values.to_numpy()
    _, offsets, data = values.buffers()
    ends = np.frombuffer(offsets, np.int32)[values.offset : values.offset + len(values) + 1]
    content = np.zeros(0, np.uint8) if data is None else np.frombuffer(data, np.uint8)[ends[0] : ends[-1]]
    return np.diff(ends), content
