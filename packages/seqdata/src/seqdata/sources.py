"""Whatever holds a table of events, as parts that yield Arrow record batches in a fixed order."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa

from seqdata.files import open_files
from seqdata.part import BATCH_ROWS, Part, connect, first_lines, quoted, reader_of, reading, schema_of


@dataclass(frozen=True)
class Sql:
    """A source given as a DuckDB query, which may name files: Sql("SELECT * FROM 'log/*.parquet' WHERE ...")."""

    query: str


def open_source(source: Any, where: str = "source", memory_limit: int | None = None) -> list[Part]:
    """The parts of a source in order: files as listed, globs sorted; in-memory tables and queries are one part.

    Args:
        source: as for `build`
        where: what the source is called in messages
        memory_limit: bytes that reading may take; None leaves it to the engine

    Raises:
        TypeError: nothing that can be read
        ValueError: an empty list of files
    """
    if isinstance(source, str | os.PathLike):
        return open_files(source)
    if isinstance(source, list | tuple):
        if not source:
            raise ValueError(f"{where}: an empty list of files")
        return [part for one in source for part in open_source(one, where, memory_limit)]
    if isinstance(source, Sql):
        return [QueryPart(where, source.query, memory_limit)]
    if isinstance(source, duckdb.DuckDBPyRelation):
        return [RelationPart(where, source)]
    if isinstance(source, pa.Table):
        return [TablePart(where, source)]
    if isinstance(source, pa.RecordBatch):
        return [TablePart(where, pa.Table.from_batches([source]))]
    if isinstance(source, pa.RecordBatchReader):
        return [StreamPart(where, source)]
    if hasattr(source, "scanner") and hasattr(source, "to_batches"):
        return [DatasetPart(where, source)]
    if hasattr(source, "with_format") and hasattr(source, "iter"):
        return [HuggingFacePart(where, source)]
    if hasattr(source, "iloc") and hasattr(source, "columns"):
        return [TablePart(where, _from_pandas(source, where))]
    if hasattr(source, "collect") and hasattr(source, "lazy"):
        # a lazy polars frame has no Arrow stream of its own
        source = source.collect()
    if hasattr(source, "__arrow_c_stream__"):
        return [StreamPart(where, pa.RecordBatchReader.from_stream(source))]
    raise TypeError(
        f"{where}: cannot read a {type(source).__name__}; needs a path, a glob, a list of paths, a pyarrow Table,"
        " RecordBatchReader or dataset, a pandas or polars frame, a Hugging Face dataset, a DuckDB relation, or"
        " anything with __arrow_c_stream__"
    )


class QueryPart(Part):
    """The result of a DuckDB query of its own."""

    def __init__(self, where: str, query: str, memory_limit: int | None) -> None:
        self.where, self.query, self.memory_limit = where, query, memory_limit
        try:
            self.schema = schema_of(connect(memory_limit).sql(query))
        except duckdb.Error as error:
            raise ValueError(f"{where}: the query failed: {first_lines(error)}") from None

    def read(
        self, columns: Sequence[str], kinds: Mapping[str, pa.DataType], rows: int = BATCH_ROWS
    ) -> Iterator[pa.RecordBatch]:
        with reading(f"{self.where}: the query failed"):
            connection = connect(self.memory_limit)
            yield from reader_of(connection.sql(self.query).project(quoted(columns)), rows)

    def fingerprint(self) -> dict[str, Any]:
        return {"query": self.query}


class RelationPart(Part):
    """A relation on the caller's DuckDB connection."""

    def __init__(self, where: str, relation: duckdb.DuckDBPyRelation) -> None:
        self.where, self.relation, self.schema = where, relation, schema_of(relation)

    def read(
        self, columns: Sequence[str], kinds: Mapping[str, pa.DataType], rows: int = BATCH_ROWS
    ) -> Iterator[pa.RecordBatch]:
        with reading(f"{self.where}: the query failed"):
            yield from reader_of(self.relation.project(quoted(columns)), rows)


class TablePart(Part):
    """An Arrow table in memory."""

    def __init__(self, where: str, table: pa.Table) -> None:
        self.where, self.table, self.schema, self.rows = where, table, table.schema.remove_metadata(), table.num_rows

    def read(
        self, columns: Sequence[str], kinds: Mapping[str, pa.DataType], rows: int = BATCH_ROWS
    ) -> Iterator[pa.RecordBatch]:
        yield from self.table.select(list(columns)).to_batches(max_chunksize=rows)

    def width(self, columns: Sequence[str]) -> float:
        return self.table.select(list(columns)).nbytes / max(self.rows or 0, 1)


class StreamPart(Part):
    """An Arrow stream, which can be read once."""

    def __init__(self, where: str, reader: pa.RecordBatchReader) -> None:
        self.where, self.reader, self.schema = where, reader, reader.schema.remove_metadata()

    def read(
        self, columns: Sequence[str], kinds: Mapping[str, pa.DataType], rows: int = BATCH_ROWS
    ) -> Iterator[pa.RecordBatch]:
        for batch in self.reader:
            for start in range(0, batch.num_rows, rows):
                yield batch.select(list(columns)).slice(start, rows)


class DatasetPart(Part):
    """A pyarrow dataset, in the order of its fragments."""

    def __init__(self, where: str, dataset: Any) -> None:
        self.where, self.dataset, self.schema = where, dataset, dataset.schema.remove_metadata()

    def read(
        self, columns: Sequence[str], kinds: Mapping[str, pa.DataType], rows: int = BATCH_ROWS
    ) -> Iterator[pa.RecordBatch]:
        with reading(self.where):
            # reading ahead, the default, would hold many row groups
            yield from self.dataset.to_batches(
                columns=list(columns), batch_size=rows, batch_readahead=1, fragment_readahead=1
            )


class HuggingFacePart(Part):
    """A Hugging Face dataset, streamed or not; what it selects, filters or shuffles holds."""

    def __init__(self, where: str, dataset: Any) -> None:
        self.where, self.dataset = where, dataset.with_format("arrow")
        first = next(iter(self.dataset.iter(batch_size=1)), None)
        if first is None:
            raise ValueError(f"{where}: the dataset has no rows")
        self.schema = first.schema.remove_metadata()

    def read(
        self, columns: Sequence[str], kinds: Mapping[str, pa.DataType], rows: int = BATCH_ROWS
    ) -> Iterator[pa.RecordBatch]:
        for table in self.dataset.iter(batch_size=rows):
            yield from table.select(list(columns)).to_batches()


def _from_pandas(frame: Any, where: str) -> pa.Table:
    try:
        return pa.Table.from_pandas(frame, preserve_index=False)
    except (pa.ArrowException, TypeError) as error:
        raise ValueError(f"{where}: the pandas frame has a column that Arrow cannot hold: {error}") from None
