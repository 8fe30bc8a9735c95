"""Whatever holds a table of events, as Arrow record batches in a fixed order."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from seqdata.fields import is_text

BATCH_ROWS = 1 << 17
PARQUET = (".parquet", ".pq", ".parq")
TEXT = (".csv", ".tsv", ".txt", ".csv.gz", ".tsv.gz", ".txt.gz", ".csv.zst", ".tsv.zst", ".inter")


@dataclass(frozen=True)
class Part:
    """One file or in-memory table: its name for messages, its columns, its rows if known, and how to read some columns."""

    where: str
    schema: pa.Schema
    rows: int | None
    read: Callable[[Sequence[str], Mapping[str, pa.DataType]], Iterator[pa.RecordBatch]]
    fingerprint: dict[str, Any]


@dataclass(frozen=True)
class Sql:
    """A source given as a DuckDB query, which may name files: Sql("SELECT * FROM 'log/*.parquet' WHERE ...")."""

    query: str


def open_source(source: Any, where: str = "source", memory_limit: int | None = None) -> list[Part]:
    """The parts of a source in order: files as listed, globs sorted; in-memory tables and queries are one part."""
    if isinstance(source, str | os.PathLike):
        return [_open_file(path) for path in _expand(source)]
    if isinstance(source, list | tuple):
        if not source:
            raise ValueError(f"{where}: an empty list of files")
        return [part for one in source for part in open_source(one, where, memory_limit)]
    if isinstance(source, Sql):
        connection = connect(memory_limit)
        try:
            return [_open_relation(connection.sql(source.query), where, connection)]
        except duckdb.Error as error:
            raise ValueError(f"{where}: the query failed: {error}") from None
    if isinstance(source, duckdb.DuckDBPyRelation):
        return [_open_relation(source, where, None)]
    if isinstance(source, pa.Table):
        return [_open_table(source, where)]
    if isinstance(source, pa.RecordBatch):
        return [_open_table(pa.Table.from_batches([source]), where)]
    if isinstance(source, pa.RecordBatchReader):
        return [_open_reader(source, where)]
    if hasattr(source, "iloc") and hasattr(source, "columns"):
        return [_open_table(_from_pandas(source), where)]
    if hasattr(source, "collect") and hasattr(source, "lazy"):
        source = source.collect()
    if hasattr(source, "__arrow_c_stream__"):
        return [_open_reader(pa.RecordBatchReader.from_stream(source), where)]
    raise TypeError(
        f"{where}: cannot read a {type(source).__name__}; needs a path, a glob, a list of paths, a pyarrow Table or"
        " RecordBatchReader, a pandas or polars frame, a DuckDB relation, or anything with __arrow_c_stream__"
    )


def connect(memory_limit: int | None = None, folder: str | os.PathLike | None = None) -> duckdb.DuckDBPyConnection:
    """An in-memory DuckDB that keeps input order, stays within the limit [bytes] and spills to `folder`."""
    config: dict[str, Any] = {"preserve_insertion_order": True, "TimeZone": "UTC"}
    if memory_limit is not None:
        config["memory_limit"] = f"{max(memory_limit >> 20, 64)}MiB"
    if folder is not None:
        config["temp_directory"] = os.fspath(folder)
    try:
        return duckdb.connect(config=config)
    except duckdb.Error:
        # the time zone needs the icu extension, which some builds of DuckDB leave out
        config.pop("TimeZone")
        return duckdb.connect(config=config)


def _expand(path: str | os.PathLike) -> list[Path]:
    text = os.fspath(path)
    if glob.has_magic(text) and not os.path.exists(text):
        found = sorted(name for name in glob.glob(text, recursive=True) if os.path.isfile(name))
        if not found:
            raise FileNotFoundError(f"no file matches {text!r}")
        return [Path(name) for name in found]
    if os.path.isdir(text):
        found = sorted(
            str(name) for name in Path(text).rglob("*") if name.is_file() and name.name.lower().endswith(PARQUET + TEXT)
        )
        if not found:
            raise FileNotFoundError(f"folder {text!r} holds no Parquet or CSV file")
        return [Path(name) for name in found]
    if not os.path.exists(text):
        raise FileNotFoundError(f"no such file: {text!r}")
    return [Path(text)]


def _open_file(path: Path) -> Part:
    name = path.name.lower()
    status = path.stat()
    fingerprint = {"name": str(path), "bytes": status.st_size, "modified_ns": status.st_mtime_ns}
    if name.endswith(PARQUET):
        return _open_parquet(path, fingerprint)
    if name.endswith(TEXT):
        return _open_csv(path, fingerprint)
    raise ValueError(f"{path}: unknown kind of file; needs a name that ends in {', '.join(PARQUET + TEXT)}")


def _open_parquet(path: Path, fingerprint: dict[str, Any]) -> Part:
    try:
        with pq.ParquetFile(path) as file:
            schema, rows = file.schema_arrow.remove_metadata(), file.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file: {error}") from None

    def read(columns: Sequence[str], kinds: Mapping[str, pa.DataType]) -> Iterator[pa.RecordBatch]:
        coded = [column for column in columns if is_text(schema.field(column).type)]
        try:
            # pre_buffer=True, the default, would hold the whole file in memory
            with pq.ParquetFile(path, pre_buffer=False, read_dictionary=coded) as file:
                yield from file.iter_batches(BATCH_ROWS, columns=list(columns), use_threads=True)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path}: corrupt or truncated Parquet file: {error}") from None

    return Part(str(path), schema, rows, read, {**fingerprint, "rows": rows})


def _open_csv(path: Path, fingerprint: dict[str, Any]) -> Part:
    connection = connect()
    try:
        relation = connection.read_csv(str(path), header=True)
        schema = _to_reader(relation.limit(0)).schema
    except duckdb.Error as error:
        raise ValueError(f"{path}: not a readable CSV file: {_first_line(error)}") from None

    def read(columns: Sequence[str], kinds: Mapping[str, pa.DataType]) -> Iterator[pa.RecordBatch]:
        # times are read as text, so that this package and not the sniffer decides what they mean
        types = {
            column: "VARCHAR" if kinds.get(column) == pa.string() else str(kind)
            for column, kind in zip(relation.columns, relation.types, strict=True)
        }
        try:
            wanted = connection.read_csv(str(path), header=True, dtype=types).project(
                ", ".join(_quote(c) for c in columns)
            )
            yield from _to_reader(wanted)
        except duckdb.Error as error:
            raise ValueError(f"{path}: {_first_line(error)}") from None

    return Part(str(path), schema, None, read, fingerprint)


def _open_relation(relation: duckdb.DuckDBPyRelation, where: str, keep: duckdb.DuckDBPyConnection | None) -> Part:
    schema = _to_reader(relation.limit(0)).schema

    def read(columns: Sequence[str], kinds: Mapping[str, pa.DataType]) -> Iterator[pa.RecordBatch]:
        try:
            yield from _to_reader(relation.project(", ".join(_quote(c) for c in columns)))
        except duckdb.Error as error:
            raise ValueError(f"{where}: the query failed: {error}") from None

    return Part(where, schema, None, read, {"name": where, "kind": "query", "connection": bool(keep)})


def _open_table(table: pa.Table, where: str) -> Part:
    def read(columns: Sequence[str], kinds: Mapping[str, pa.DataType]) -> Iterator[pa.RecordBatch]:
        yield from table.select(list(columns)).to_batches(max_chunksize=BATCH_ROWS)

    return Part(
        where,
        table.schema.remove_metadata(),
        table.num_rows,
        read,
        {"name": where, "kind": "table", "rows": table.num_rows},
    )


def _open_reader(reader: pa.RecordBatchReader, where: str) -> Part:
    def read(columns: Sequence[str], kinds: Mapping[str, pa.DataType]) -> Iterator[pa.RecordBatch]:
        for batch in reader:
            for start in range(0, batch.num_rows, BATCH_ROWS):
                yield batch.select(list(columns)).slice(start, BATCH_ROWS)

    return Part(where, reader.schema.remove_metadata(), None, read, {"name": where, "kind": "stream"})


def _from_pandas(frame: Any) -> pa.Table:
    try:
        return pa.Table.from_pandas(frame, preserve_index=False)
    except (pa.ArrowException, TypeError) as error:
        raise ValueError(f"the pandas frame has a column Arrow cannot hold: {error}") from None


def _to_reader(relation: duckdb.DuckDBPyRelation) -> pa.RecordBatchReader:
    if hasattr(relation, "to_arrow_reader"):
        return relation.to_arrow_reader(BATCH_ROWS)
    return relation.fetch_record_batch(BATCH_ROWS)


def _quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _first_line(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines()[:3] if line.strip())
