"""A piece of a table of events, whatever holds it, and the DuckDB that reads some of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import duckdb
import pyarrow as pa

from seqdata.fields import is_list

BATCH_ROWS = 1 << 17


class Part:
    """A piece of a table: its name for messages, its columns, its rows if known, the number of its first row."""

    where: str
    schema: pa.Schema
    rows: int | None = None
    first_row: int = 0

    def read(
        self, columns: Sequence[str], kinds: Mapping[str, pa.DataType], rows: int = BATCH_ROWS
    ) -> Iterator[pa.RecordBatch]:
        """Batches of some columns, of about `rows` rows; `kinds` says which columns of text files must stay text."""
        raise NotImplementedError

    def width(self, columns: Sequence[str]) -> float:
        """About how many bytes a row of some columns takes in memory."""
        return float(sum(_guess(self.schema.field(column).type) for column in columns))

    def fingerprint(self) -> dict[str, Any] | None:
        """What identifies the input on disk; None for what lives in memory."""
        return None


def connect(memory_limit: int | None = None, folder: str | os.PathLike | None = None) -> duckdb.DuckDBPyConnection:
    """An in-memory DuckDB that keeps input order, stays within the limit [bytes] and spills to `folder`."""
    config: dict[str, Any] = {"preserve_insertion_order": True}
    if memory_limit is not None:
        config["memory_limit"] = f"{max(memory_limit >> 20, 64)}MiB"
    if folder is not None:
        config["temp_directory"] = os.fspath(folder)
    connection = duckdb.connect(config=config)
    connection.execute("SET enable_progress_bar = false")
    return connection


def schema_of(relation: duckdb.DuckDBPyRelation) -> pa.Schema:
    return reader_of(relation.limit(0)).schema


def reader_of(relation: duckdb.DuckDBPyRelation, rows: int = BATCH_ROWS) -> pa.RecordBatchReader:
    # the method's name changed between versions of DuckDB
    read = getattr(relation, "to_arrow_reader", None) or relation.fetch_record_batch
    return read(rows)


@contextlib.contextmanager
def reading(place: str, hint: str = "") -> Iterator[None]:
    """Names the place in what Arrow and DuckDB raise while it is being read.

    Args:
        place: what is read
        hint: what to do, added to the message

    Raises:
        ValueError: it cannot be read; an error of the system itself is passed on as it is
    """
    try:
        yield
    except (duckdb.Error, pa.ArrowException, OSError) as error:
        # what DuckDB says while it streams arrives as an OSError without a number
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{place}: {first_lines(error)}{hint}") from None


def quoted(columns: Sequence[str]) -> str:
    return ", ".join('"' + name.replace('"', '""') + '"' for name in columns)


def first_lines(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines()[:3] if line.strip())


def _guess(kind: pa.DataType) -> int:
    if pa.types.is_fixed_size_list(kind):
        return kind.list_size * _guess(kind.value_type)
    if is_list(kind):
        return 16 * _guess(kind.value_type)
    return kind.bit_width // 8 if pa.types.is_primitive(kind) else 32
