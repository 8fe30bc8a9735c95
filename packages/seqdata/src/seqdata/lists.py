"""Tables with one row a user, whose times and fields are lists, as parts with one row an event."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from seqdata.fields import is_list
from seqdata.part import BATCH_ROWS, Part


def per_event(part: Part, time: str) -> Part:
    """A part as it is, or with one row an event where its times are lists."""
    return ListsPart(part, time) if time in part.schema.names and is_list(part.schema.field(time).type) else part


class ListsPart(Part):
    """A part whose column of times holds lists: lists as long as those are fields, all else holds for every event."""

    def __init__(self, part: Part, time: str) -> None:
        self.part, self.time, self.where = part, time, part.where
        fields = [
            pa.field(field.name, field.type.value_type if is_list(field.type) else field.type) for field in part.schema
        ]
        self.schema = pa.schema(fields)

    def read(
        self, columns: Sequence[str], kinds: Mapping[str, pa.DataType], rows: int = BATCH_ROWS
    ) -> Iterator[pa.RecordBatch]:
        done = 0
        for batch in self.part.read(columns, {}, max(rows >> 6, 1)):
            yield from self._events(batch, list(columns), done, rows)
            done += batch.num_rows

    def _events(self, batch: pa.RecordBatch, columns: list[str], done: int, rows: int) -> Iterator[pa.RecordBatch]:
        lengths = _lengths(batch.column(self.time))
        owner = np.repeat(np.arange(len(lengths)), lengths)
        flat = {}
        for name in columns:
            column = batch.column(name)
            if not is_list(self.part.schema.field(name).type):
                flat[name] = column.take(pa.array(owner))
                continue
            found = _lengths(column)
            if not np.array_equal(found, lengths):
                row = int(np.argmax(found != lengths))
                raise ValueError(
                    f"column {name!r} of {self.where}: a list of {found[row]} at row {done + row}, where"
                    f" {self.time!r} has {lengths[row]}; needs one value for every time"
                )
            flat[name] = column.flatten()
        events = pa.record_batch([flat[name] for name in columns], columns)
        for start in range(0, events.num_rows, rows):
            yield events.slice(start, rows)

    def width(self, columns: Sequence[str]) -> float:
        return sum(Part.width(self, [name]) for name in columns)

    def fingerprint(self) -> dict[str, Any] | None:
        return self.part.fingerprint()


def _lengths(lists: pa.Array) -> np.ndarray:
    return pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False).astype(np.int64)
