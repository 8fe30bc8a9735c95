"""Parquet and CSV files as parts, with the columns that folder names of the form name=value add."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from seqdata.fields import is_text
from seqdata.part import BATCH_ROWS, Part, connect, first_lines, quoted, reader_of, reading, schema_of

PART_ROWS = 4 << 20
CODED_BYTES = 8
PARQUET = (".parquet", ".pq", ".parq")
TEXT = (".csv", ".tsv", ".txt", ".csv.gz", ".tsv.gz", ".txt.gz", ".csv.zst", ".tsv.zst")
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"
DIGEST_BLOCK, DIGEST_BLOCKS = 1 << 16, 18


def open_files(path: str | os.PathLike) -> list[Part]:
    """The parts of a file, a folder or a glob; folders name=value below the folder or the glob add columns."""
    files = _expand(path)
    keys = [_partition(file, root) for file, root in files]
    kinds = {name: _kind([one[name] for one in keys if name in one]) for one in keys for name in one}
    parts: list[Part] = []
    for (file, _), key in zip(files, keys, strict=True):
        for part in _open_file(file):
            added = {name: pa.scalar(key[name]).cast(kind) for name, kind in kinds.items() if name in key}
            # a column of the file itself wins over the name of its folder
            added = {name: value for name, value in added.items() if name not in part.schema.names}
            parts.append(PartitionPart(part, added) if added else part)
    return parts


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
            relation = connect().read_csv(self.where, header=True, hive_partitioning=False)
            self.schema = schema_of(relation)
            self.types = dict(zip(relation.columns, map(str, relation.types), strict=True))
        except duckdb.Error as error:
            raise ValueError(f"{path}: not a readable CSV file with a header: {first_lines(error)}") from None

    def read(
        self, columns: Sequence[str], kinds: Mapping[str, pa.DataType], rows: int = BATCH_ROWS
    ) -> Iterator[pa.RecordBatch]:
        # times are read as text, so that this package and not the sniffer decides what they mean
        types = self.types | {column: "VARCHAR" for column in self.types if kinds.get(column) == pa.string()}
        with reading(f"{self.where}", " (types={column: 'string'} reads a column as text)"):
            # connection and relation must outlive the reader
            connection = connect()
            relation = connection.read_csv(self.where, header=True, dtype=types, hive_partitioning=False)
            yield from reader_of(relation.project(quoted(columns)), rows)

    def fingerprint(self) -> dict[str, Any]:
        return _stat(self.path)


class PartitionPart(Part):
    """A part of a file with the columns that its folders' names add."""

    def __init__(self, part: Part, added: dict[str, pa.Scalar]) -> None:
        self.part, self.added, self.where, self.rows, self.first_row = (
            part,
            added,
            part.where,
            part.rows,
            part.first_row,
        )
        self.schema = part.schema
        for name, value in added.items():
            self.schema = self.schema.append(pa.field(name, value.type))

    def read(
        self, columns: Sequence[str], kinds: Mapping[str, pa.DataType], rows: int = BATCH_ROWS
    ) -> Iterator[pa.RecordBatch]:
        own = [name for name in columns if name not in self.added]
        # a batch without columns would not know its rows
        for batch in self.part.read(own or self.part.schema.names[:1], kinds, rows):
            arrays = [
                _repeated(self.added[name], batch.num_rows) if name in self.added else batch.column(name)
                for name in columns
            ]
            yield pa.record_batch(arrays, list(columns))

    def width(self, columns: Sequence[str]) -> float:
        return self.part.width([name for name in columns if name not in self.added]) + 4 * len(self.added)

    def fingerprint(self) -> dict[str, Any] | None:
        return self.part.fingerprint()


def _expand(path: str | os.PathLike) -> list[tuple[Path, Path]]:
    """Files in order, each with the folder below which the names of folders count."""
    text = os.fspath(path)
    if glob.has_magic(text) and not os.path.exists(text):
        found = sorted(name for name in glob.glob(text, recursive=True) if os.path.isfile(name))
        if not found:
            raise FileNotFoundError(f"no file matches {text!r}")
        fixed = Path(text)
        while glob.has_magic(str(fixed)):
            fixed = fixed.parent
        return [(Path(name), fixed) for name in found]
    if os.path.isdir(text):
        names = (str(name) for name in Path(text).rglob("*") if name.is_file())
        found = sorted(name for name in names if name.lower().endswith(PARQUET + TEXT))
        if not found:
            raise FileNotFoundError(f"folder {text!r} holds no Parquet or CSV file")
        return [(Path(name), Path(text)) for name in found]
    if not os.path.exists(text):
        raise FileNotFoundError(f"no such file: {text!r}")
    return [(Path(text), Path(text).parent)]


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


def _partition(file: Path, root: Path) -> dict[str, str | None]:
    folders = [folder.partition("=") for folder in file.relative_to(root).parts[:-1] if "=" in folder]
    return {name: None if value == NO_VALUE else unquote(value) for name, _, value in folders if name}


def _kind(values: list[str | None]) -> pa.DataType:
    # numbers are numbers only if all of them are, and are written as numbers are: 007 is a text
    known = [value for value in values if value is not None]
    whole = all(value.removeprefix("-").isdecimal() and str(int(value)) == value for value in known)
    return pa.int64() if known and whole and all(len(value) < 19 for value in known) else pa.string()


def _repeated(value: pa.Scalar, rows: int) -> pa.Array:
    if not pa.types.is_string(value.type) or not value.is_valid:
        return pa.repeat(value, rows)
    return pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, pa.int32()), rows), pa.array([value.as_py()]))


def _stat(path: Path) -> dict[str, Any]:
    status = path.stat()
    found = {"name": str(path), "bytes": status.st_size, "modified_ns": status.st_mtime_ns}
    return found | {"digest": _digest(path, status.st_size)}


def _digest(path: Path, size: int) -> str:
    """Of a file's size and of blocks spread over it from its first byte to its last; all of it where it is small."""
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    step = max((size - DIGEST_BLOCK) / (DIGEST_BLOCKS - 1), DIGEST_BLOCK)
    with open(path, "rb") as file:
        for i in range(min(DIGEST_BLOCKS, -(-size // DIGEST_BLOCK))):
            file.seek(int(i * step))
            digest.update(file.read(DIGEST_BLOCK))
    return digest.hexdigest()
