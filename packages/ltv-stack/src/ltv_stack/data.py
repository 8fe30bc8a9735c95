"""Datasets: partitions read as a stream of Arrow record batches, the same rows whatever the chunk size."""

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from .errors import PartitionError, WindowError
from .parquet import PIECE_ROWS, file_tables, first_doubled, footer, read_through, viewless, without_views

log = logging.getLogger(__name__)

_HOUR = re.compile(r"^(\d{4})-(\d{2})-(\d{2})(?:[-T ](\d{2})[-:](\d{2}))?(?:[-:](\d{2}))?$")


@dataclass(frozen=True)
class Partition:
    """A stretch of rows that is read as one: its name, time, files (or an in-memory table) and rows that survive.

    Args:
        name: what errors call it, and what its row sample is drawn from.
        time: the hour of its rows, or None where the rows carry their own time.
        files: its Parquet files in order; empty for a table in memory.
        table: the rows themselves, for data in memory.
        total: rows before sampling.
        rows: rows after sampling and the row limit.
    """

    name: str
    time: datetime | None
    files: tuple[str, ...]
    table: pa.Table | None
    total: int
    rows: int


@dataclass(frozen=True)
class Dataset:
    """An iterable of record batches over partitions in order of time.

    Args:
        partitions: what is read, in this order.
        chunk_size: most rows a batch; None for one batch a partition.
        sample_frac: share of rows kept, by a hash of (seed, partition, row number).
        seed: seed of that hash.
        time_column: the column added from the partition's hour, or None.
        skipped: files left out because they could not be read, with the reason.
    """

    partitions: tuple[Partition, ...]
    chunk_size: int | None = 50_000
    sample_frac: float = 1.0
    seed: int = 0
    time_column: str | None = None
    skipped: tuple[str, ...] = ()

    @property
    def num_rows(self) -> int:
        """Rows that iterating yields."""
        return sum(partition.rows for partition in self.partitions)

    @property
    def schema(self) -> pa.Schema:
        """Arrow schema over all partitions: the first typed (non-null) field of each name."""
        fields: dict[str, pa.Field] = {}
        for partition in self.partitions:
            for one in _partition_schema(partition):
                known = fields.get(one.name)
                if known is None or (pa.types.is_null(known.type) and not pa.types.is_null(one.type)):
                    fields[one.name] = one
        if self.time_column:
            fields.setdefault(self.time_column, pa.field(self.time_column, pa.timestamp("us")))
        return pa.schema(list(fields.values()))

    @property
    def column_names(self) -> list[str]:
        """Names of all columns, the added time column included."""
        return self.schema.names

    def fields(self) -> Iterator[tuple[str, pa.Field]]:
        """The Arrow field of every column of every file, and the file (the partition, for a table in memory)."""
        for partition in self.partitions:
            yield from _fields(partition)

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Record batches in order; a column that a partition lacks is left out of its batches."""
        for partition in self.partitions:
            yield from self.partition_batches(partition, columns)

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        return self.batches()

    def partition_batches(self, partition: Partition, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The record batches of one partition of this dataset."""
        left = partition.rows
        if left == 0:
            return
        size = self.chunk_size or max(partition.rows, 1)
        pending: list[pa.Table] = []
        held = 0
        for table in self._sampled(partition, columns):
            table = table.slice(0, left)
            left -= table.num_rows
            pending.append(table)
            held += table.num_rows
            while held >= size:
                joined = pa.concat_tables(pending, promote_options="permissive")
                yield self._batch(partition, joined.slice(0, size))
                rest = joined.slice(size)
                pending, held = [rest], rest.num_rows
            if left == 0:
                break
        if held:
            yield self._batch(partition, pa.concat_tables(pending, promote_options="permissive"))

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Everything as one table, for data that fits in memory."""
        batches = [pa.Table.from_batches([batch]) for batch in self.batches(columns)]
        if not batches:
            return self.schema.empty_table()
        return pa.concat_tables(batches, promote_options="permissive")

    def with_options(self, *, chunk_size: int | None = 50_000) -> "Dataset":
        """The same rows in chunks of another size."""
        _check_chunk_size(chunk_size)
        return replace(self, chunk_size=chunk_size)

    def window(self, start: "datetime | str | None" = None, end: "datetime | str | None" = None) -> "Dataset":
        """Only the partitions whose hour lies in start..end, both included.

        Raises:
            ValueError: a partition has no time.
        """
        first, last = parse_time(start, "start"), parse_time(end, "end")
        untimed = [p.name for p in self.partitions if p.time is None]
        if untimed:
            raise ValueError(f"window: partitions {untimed[:3]} have no time; open the data with open_partitions")
        kept = [
            p
            for p in self.partitions
            if p.time and (first is None or p.time >= first) and (last is None or p.time <= last)
        ]
        return replace(self, partitions=tuple(kept))

    def _sampled(self, partition: Partition, columns: Sequence[str] | None) -> Iterator[pa.Table]:
        row = 0
        for table in _tables(partition, columns, self.time_column):
            if self.sample_frac < 1.0:
                keep = _keep(self.seed, partition.name, row, table.num_rows, self.sample_frac)
                row += table.num_rows
                table = table.filter(pa.array(keep))
            if table.num_rows:
                yield table

    def _batch(self, partition: Partition, table: pa.Table) -> pa.RecordBatch:
        columns = [_single(column) for column in table.columns]
        names = list(table.column_names)
        if self.time_column and partition.time is not None and self.time_column in names:
            columns[names.index(self.time_column)] = _constant_time(partition.time, table.num_rows)
        return pa.RecordBatch.from_arrays(columns, names=names)


def open_partitions(
    root: str | Path,
    *,
    start: datetime | str | None = None,
    end: datetime | str | None = None,
    sample_frac: float = 1.0,
    max_partitions: int | None = None,
    limit_rows: int | None = None,
    chunk_size: int | None = 50_000,
    seed: int = 0,
    time_column: str = "datetime",
    on_error: Literal["raise", "skip"] = "raise",
) -> Dataset:
    """Hourly partitions `root/datetime=YYYY-MM-DD-HH-MM/*.parquet` as a dataset; only footers are read here.

    The window is applied first, then the number of partitions, then the row sample, then the row limit. Which rows a
    sample keeps depends on the seed, the partition's name and the row's number in it, on nothing else.

    Args:
        root: folder that holds the partition folders.
        start: first hour, included; a datetime, "YYYY-MM-DD-HH-MM" or ISO text.
        end: last hour, included.
        sample_frac: share of rows kept, in (0, 1].
        max_partitions: the first so many of the window.
        limit_rows: the first so many rows after sampling.
        chunk_size: most rows a batch; None for a whole partition at once.
        seed: seed of the row sample.
        time_column: name of the column added from the partition's hour.
        on_error: what an unreadable file does: raise, or be left out as a whole, logged and listed in `skipped`. To
            tell before any row is used, "skip" reads every file of the window through once more.

    Raises:
        ValueError: an option has no sense; it is named.
        WindowError: no partitions in the folder or in the window.
        PartitionError: a file that is unreadable or has a column twice; it is named.
    """
    root = Path(root)
    _check_chunk_size(chunk_size)
    if not 0.0 < sample_frac <= 1.0:
        raise ValueError(f"sample_frac: got {sample_frac}, needs a number in (0, 1]")
    for name, limit in (("max_partitions", max_partitions), ("limit_rows", limit_rows)):
        if limit is not None and limit < 1:
            raise ValueError(f"{name}: got {limit}, needs at least 1, or None for no limit")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error: got {on_error!r}, needs 'raise' or 'skip'")
    if not root.is_dir():
        raise WindowError(f"root: {root} is not a folder")
    first, last = parse_time(start, "start"), parse_time(end, "end")
    if first and last and first > last:
        raise ValueError(f"start: got {start}, which is after end {end}")
    found = [(parse_time(p.name.split("=", 1)[1], p.name), p) for p in root.glob("datetime=*") if p.is_dir()]
    folders = sorted((time, path) for time, path in found if time is not None)
    if not folders:
        raise WindowError(f"root: {root} holds no folders datetime=YYYY-MM-DD-HH-MM")
    chosen = [(t, p) for t, p in folders if (first is None or t >= first) and (last is None or t <= last)]
    if not chosen:
        span = f"{folders[0][1].name} .. {folders[-1][1].name}"
        raise WindowError(f"start, end: no partition lies in {start} .. {end}; {root} holds {span}")
    partitions: list[Partition] = []
    skipped: list[str] = []
    left = limit_rows
    for time, folder in chosen[:max_partitions]:
        files: list[str] = []
        total = 0
        for path in sorted(folder.glob("*.parquet")):
            try:
                if on_error == "skip":
                    read_through(str(path))
                with footer(str(path)) as file:
                    total += file.metadata.num_rows
                files.append(str(path))
            except PartitionError as error:
                if on_error == "raise":
                    raise
                log.warning("skipped %s", error)
                skipped.append(str(error))
        if not total:
            log.warning("partition %s holds no rows", folder.name)
        rows = _count_kept(seed, folder.name, total, sample_frac)
        if left is not None:
            rows = min(rows, left)
            left -= rows
        partitions.append(Partition(folder.name, time, tuple(files), None, total, rows))
        if left == 0:
            break
    data = Dataset(tuple(partitions), chunk_size, sample_frac, seed, time_column, tuple(skipped))
    log.info("%d partitions, %d of %d rows", len(partitions), data.num_rows, sum(p.total for p in partitions))
    return data


def from_table(
    source: Any,
    *,
    chunk_size: int | None = 50_000,
    sample_frac: float = 1.0,
    limit_rows: int | None = None,
    seed: int = 0,
    partition_rows: int | None = None,
) -> Dataset:
    """Data in memory as a dataset; its rows should be in order of time.

    Args:
        source: pyarrow Table or RecordBatch, an iterable of record batches, or a pandas DataFrame.
        chunk_size: most rows a batch; None for all of a partition at once.
        sample_frac: share of rows kept, by hash of the row's number.
        limit_rows: the first so many rows after sampling.
        seed: seed of the row sample.
        partition_rows: rows a partition; None puts everything in one.

    Raises:
        ValueError: two columns share a name.
    """
    _check_chunk_size(chunk_size)
    if not 0.0 < sample_frac <= 1.0:
        raise ValueError(f"sample_frac: got {sample_frac}, needs a number in (0, 1]")
    table = _as_table(source)
    if twice := first_doubled(table.schema):
        raise ValueError(f"source: got the column {twice!r} more than once, needs names that differ")
    size = partition_rows or max(table.num_rows, 1)
    partitions = []
    left = limit_rows if limit_rows is not None else table.num_rows
    for number, begin in enumerate(range(0, table.num_rows, size)):
        part = table.slice(begin, size)
        rows = min(_count_kept(seed, f"rows-{number}", part.num_rows, sample_frac), left)
        left -= rows
        partitions.append(Partition(f"rows-{number}", None, (), part, part.num_rows, rows))
    if not partitions:
        partitions = [Partition("rows-0", None, (), table, 0, 0)]
    return Dataset(tuple(partitions), chunk_size, sample_frac, seed)


def parse_time(value: datetime | str | None, name: str) -> datetime | None:
    """A naive UTC datetime from a datetime, "YYYY-MM-DD-HH-MM" or ISO text.

    Raises:
        ValueError: text that is neither; `name` says what it was.
    """
    if value is None:
        return None
    if isinstance(value, datetime):
        return value.astimezone(timezone.utc).replace(tzinfo=None) if value.tzinfo else value
    found = _HOUR.match(str(value).strip())
    if not found:
        raise ValueError(f"{name}: got {value!r}, needs YYYY-MM-DD-HH-MM or ISO time")
    return datetime(*(int(part or 0) for part in found.groups()))  # type: ignore[arg-type]


def row_hashes(seed: int, name: str, start: int, rows: int) -> npt.NDArray[np.uint64]:
    """A uniform 64-bit hash of (seed, partition name, row number) for rows start .. start+rows [rows]."""
    base = np.uint64(0xCBF29CE484222325)
    with np.errstate(over="ignore"):
        for byte in f"{seed}:{name}".encode():
            base = (base ^ np.uint64(byte)) * np.uint64(0x100000001B3)
        # splitmix64
        x = base + np.arange(start, start + rows, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def drawn(hashes: npt.NDArray[np.uint64], share: float) -> npt.NDArray[np.bool_]:
    """Which hashes fall in the lowest share of all [N]."""
    return hashes <= np.uint64(min(int(share * 2.0**64), 2**64 - 1))


def _keep(seed: int, name: str, start: int, rows: int, frac: float) -> npt.NDArray[np.bool_]:
    return drawn(row_hashes(seed, name, start, rows), frac)


def _count_kept(seed: int, name: str, total: int, frac: float) -> int:
    return total if frac >= 1.0 else int(_keep(seed, name, 0, total, frac).sum())


def _check_chunk_size(chunk_size: int | None) -> None:
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: got {chunk_size}, needs at least 1, or None for whole partitions")


def _tables(partition: Partition, columns: Sequence[str] | None, time_column: str | None) -> Iterator[pa.Table]:
    if partition.table is not None:
        table = partition.table
        wanted = table.column_names if columns is None else [c for c in columns if c in table.column_names]
        table = table.select(wanted)
        for begin in range(0, table.num_rows, PIECE_ROWS):
            yield without_views(table.slice(begin, PIECE_ROWS))
        return
    for path in partition.files:
        yield from file_tables(path, columns, time_column)


def _partition_schema(partition: Partition) -> Iterable[pa.Field]:
    return [field for _, field in _fields(partition)]


def _fields(partition: Partition) -> Iterator[tuple[str, pa.Field]]:
    if partition.table is not None:
        schemas = [(f"partition {partition.name}", partition.table.schema)]
    else:
        schemas = []
        for path in partition.files:
            with footer(path) as file:
                schemas.append((path, file.schema_arrow))
    for place, schema in schemas:
        for field in schema:
            yield place, field.with_type(viewless(field.type))


def _single(column: pa.ChunkedArray) -> pa.Array:
    if column.num_chunks == 1:
        return column.chunk(0)
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.nulls(0, column.type)


def _constant_time(time: datetime, rows: int) -> pa.Array:
    micros = int(time.replace(tzinfo=timezone.utc).timestamp() * 1_000_000)
    return pa.array(np.full(rows, micros, dtype=np.int64)).cast(pa.timestamp("us"))


def _as_table(source: Any) -> pa.Table:
    if isinstance(source, pa.Table):
        return source
    if isinstance(source, pa.RecordBatch):
        return pa.Table.from_batches([source])
    if hasattr(source, "columns") and hasattr(source, "iloc"):
        return pa.Table.from_pandas(source, preserve_index=False)
    if isinstance(source, Iterable):
        batches = list(source)
        if not batches:
            raise ValueError("source: got no record batches, needs at least one")
        return pa.Table.from_batches(batches)
    raise TypeError(f"source: got {type(source).__name__}, needs a pyarrow Table, record batches or a pandas DataFrame")
