"""Whatever holds a table of events, as parts that yield Arrow record batches in a fixed order."""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from seqdata.fields import is_list, is_text

BATCH_ROWS = 1 << 17
PART_ROWS = 4 << 20
CODED_BYTES = 8
PARQUET = (".parquet", ".pq", ".parq")
TEXT = (".csv", ".tsv", ".txt", ".csv.gz", ".tsv.gz", ".txt.gz", ".csv.zst", ".tsv.zst")


@dataclass(frozen=True)
class Sql:
    """A source given as a DuckDB query, which may name files: Sql("SELECT * FROM 'log/*.parquet' WHERE ...")."""

    query: str


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


def open_source(source: Any, where: str = "source", memory_limit: int | None = None) -> list[Part]:
    """The parts of a source in order: files as listed, globs sorted; in-memory tables and queries are one part."""
    if isinstance(source, str | os.PathLike):
        return [part for path in _expand(source) for part in _open_file(path)]
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
    if hasattr(source, "iloc") and hasattr(source, "columns"):
        return [TablePart(where, _from_pandas(source, where))]
    if hasattr(source, "collect") and hasattr(source, "lazy"):
        # a lazy polars frame has no Arrow stream of its own
        source = source.collect()
    if hasattr(source, "__arrow_c_stream__"):
        return [StreamPart(where, pa.RecordBatchReader.from_stream(source))]
    raise TypeError(
        f"{where}: cannot read a {type(source).__name__}; needs a path, a glob, a list of paths, a pyarrow Table or"
        " RecordBatchReader, a pandas or polars frame, a DuckDB relation, or anything with __arrow_c_stream__"
    )


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


class ParquetPart(Part):
    """Some row groups of a Parquet file."""

    def __init__(
        self, path: Path, schema: pa.Schema, groups: range, rows: int, first_row: int, widths: dict[str, float]
    ) -> None:
        self.path, self.schema, self.groups, self.rows, self.first_row = path, schema, groups, rows, first_row
        self.where, self.widths = str(path), widths

    def width(self, columns: Sequence[str]) -> float:
        return sum(self.widths.get(column, 0.0) for column in columns)

    def read(
        self, columns: Sequence[str], kinds: Mapping[str, pa.DataType], rows: int = BATCH_ROWS
    ) -> Iterator[pa.RecordBatch]:
        # a column of many distinct texts has more bytes than codes would; coding it while reading costs twice
        coded = [name for name in columns if is_text(self.schema.field(name).type) and self.width([name]) < CODED_BYTES]
        try:
            # pre_buffer=True, the default, would hold the whole file in memory, no buffer size a whole column chunk
            with pq.ParquetFile(self.path, pre_buffer=False, buffer_size=1 << 20, read_dictionary=coded) as file:
                yield from file.iter_batches(rows, columns=list(columns), row_groups=list(self.groups))
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{self.where}: corrupt or truncated Parquet file: {error}") from None

    def fingerprint(self) -> dict[str, Any]:
        return _stat(self.path) | {"rows": self.rows, "row_groups": [self.groups.start, self.groups.stop]}


class CsvPart(Part):
    """A CSV file, read by DuckDB, which finds out separator, quotes and types."""

    def __init__(self, path: Path) -> None:
        self.path, self.where = path, str(path)
        try:
            relation = connect().read_csv(self.where, header=True)
            self.schema = _schema(relation)
            self.types = dict(zip(relation.columns, map(str, relation.types), strict=True))
        except duckdb.Error as error:
            raise ValueError(f"{path}: not a readable CSV file with a header: {_first_lines(error)}") from None

    def read(
        self, columns: Sequence[str], kinds: Mapping[str, pa.DataType], rows: int = BATCH_ROWS
    ) -> Iterator[pa.RecordBatch]:
        # times are read as text, so that this package and not the sniffer decides what they mean
        types = self.types | {column: "VARCHAR" for column in self.types if kinds.get(column) == pa.string()}
        with _reading(f"{self.where}", " (types={column: 'string'} reads a column as text)"):
            # connection and relation must outlive the reader
            connection = connect()
            relation = connection.read_csv(self.where, header=True, dtype=types)
            yield from _reader(relation.project(_quoted(columns)), rows)

    def fingerprint(self) -> dict[str, Any]:
        return _stat(self.path)


class QueryPart(Part):
    """The result of a DuckDB query of its own."""

    def __init__(self, where: str, query: str, memory_limit: int | None) -> None:
        self.where, self.query, self.memory_limit = where, query, memory_limit
        try:
            self.schema = _schema(connect(memory_limit).sql(query))
        except duckdb.Error as error:
            raise ValueError(f"{where}: the query failed: {_first_lines(error)}") from None

    def read(
        self, columns: Sequence[str], kinds: Mapping[str, pa.DataType], rows: int = BATCH_ROWS
    ) -> Iterator[pa.RecordBatch]:
        with _reading(f"{self.where}: the query failed"):
            connection = connect(self.memory_limit)
            yield from _reader(connection.sql(self.query).project(_quoted(columns)), rows)

    def fingerprint(self) -> dict[str, Any]:
        return {"query": self.query}


class RelationPart(Part):
    """A relation on the caller's DuckDB connection."""

    def __init__(self, where: str, relation: duckdb.DuckDBPyRelation) -> None:
        self.where, self.relation, self.schema = where, relation, _schema(relation)

    def read(
        self, columns: Sequence[str], kinds: Mapping[str, pa.DataType], rows: int = BATCH_ROWS
    ) -> Iterator[pa.RecordBatch]:
        with _reading(f"{self.where}: the query failed"):
            yield from _reader(self.relation.project(_quoted(columns)), rows)


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


def _expand(path: str | os.PathLike) -> list[Path]:
    text = os.fspath(path)
    if glob.has_magic(text) and not os.path.exists(text):
        found = sorted(name for name in glob.glob(text, recursive=True) if os.path.isfile(name))
        if not found:
            raise FileNotFoundError(f"no file matches {text!r}")
        return [Path(name) for name in found]
    if os.path.isdir(text):
        names = (str(name) for name in Path(text).rglob("*") if name.is_file())
        found = sorted(name for name in names if name.lower().endswith(PARQUET + TEXT))
        if not found:
            raise FileNotFoundError(f"folder {text!r} holds no Parquet or CSV file")
        return [Path(name) for name in found]
    if not os.path.exists(text):
        raise FileNotFoundError(f"no such file: {text!r}")
    return [Path(text)]


def _open_file(path: Path) -> list[Part]:
    name = path.name.lower()
    if name.endswith(PARQUET):
        return _open_parquet(path)
    if name.endswith(TEXT):
        return [CsvPart(path)]
    raise ValueError(f"{path}: unknown kind of file; needs a name that ends in {', '.join(PARQUET + TEXT)}")


def _open_parquet(path: Path) -> list[Part]:
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow.remove_metadata()
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            sizes, widths = [group.num_rows for group in groups], _widths(groups)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file: {error}") from None
    # a large file is several parts, so that a build resumes, and is dealt out, in pieces
    parts: list[Part] = []
    begin, first, rows = 0, 0, 0
    for i, size in enumerate(sizes):
        rows += size
        if rows >= PART_ROWS:
            parts.append(ParquetPart(path, schema, range(begin, i + 1), rows, first, widths))
            begin, first, rows = i + 1, first + rows, 0
    if rows or not parts:
        parts.append(ParquetPart(path, schema, range(begin, len(sizes)), rows, first, widths))
    return parts


def _widths(groups: list[Any]) -> dict[str, float]:
    """Bytes a row of every column of a Parquet file."""
    sizes: dict[str, float] = {}
    rows = max(sum(group.num_rows for group in groups), 1)
    for group in groups:
        for i in range(group.num_columns):
            chunk = group.column(i)
            # a nested column is several chunks, named a.b.c
            name = chunk.path_in_schema.split(".")[0]
            sizes[name] = sizes.get(name, 0.0) + chunk.total_uncompressed_size / rows
    return sizes


def _guess(kind: pa.DataType) -> int:
    if pa.types.is_fixed_size_list(kind):
        return kind.list_size * _guess(kind.value_type)
    if is_list(kind):
        return 16 * _guess(kind.value_type)
    return kind.bit_width // 8 if pa.types.is_primitive(kind) else 32


def _from_pandas(frame: Any, where: str) -> pa.Table:
    try:
        return pa.Table.from_pandas(frame, preserve_index=False)
    except (pa.ArrowException, TypeError) as error:
        raise ValueError(f"{where}: the pandas frame has a column that Arrow cannot hold: {error}") from None


def _stat(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {"name": str(path), "bytes": status.st_size, "modified_ns": status.st_mtime_ns}


def _schema(relation: duckdb.DuckDBPyRelation) -> pa.Schema:
    return _reader(relation.limit(0)).schema


def _reader(relation: duckdb.DuckDBPyRelation, rows: int = BATCH_ROWS) -> pa.RecordBatchReader:
    # the method's name changed between versions of DuckDB
    read = getattr(relation, "to_arrow_reader", None) or relation.fetch_record_batch
    return read(rows)


@contextlib.contextmanager
def _reading(place: str, hint: str = "") -> Iterator[None]:
    try:
        yield
    except (duckdb.Error, pa.ArrowException, OSError) as error:
        # what DuckDB says while it streams arrives as an OSError without a number
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{place}: {_first_lines(error)}{hint}") from None


def _quoted(columns: Sequence[str]) -> str:
    return ", ".join('"' + name.replace('"', '""') + '"' for name in columns)


def _first_lines(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines()[:3] if line.strip())
