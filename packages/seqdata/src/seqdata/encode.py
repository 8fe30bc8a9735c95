"""Columns to fixed-width codes while the log streams by, and the vocabularies fitted once it has gone by.

While reading, a batch's values are coded against the batch's own distinct values ("entries"), which go to a temporary
file with their number of occurrences before the fit cutoff. Fitting groups the entries of all batches by value and
gives every entry its final id; the spooled codes are translated batch by batch later. So one pass over the input is
enough, and memory holds one batch and what DuckDB needs to group the entries.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from seqdata.fields import FIRST_VALUE, MISSING, UNKNOWN, Categorical, Numeric, Vector, is_text
from seqdata.vectors import parse_vectors


class Entries:
    """Distinct values of each batch with their fit counts, in a temporary Parquet file."""

    def __init__(self, path: Path, kind: pa.DataType) -> None:
        self.path, self.kind, self.count = path, kind, 0
        self.starts: list[int] = []
        self.remap: np.ndarray | None = None
        self._writer = pq.ParquetWriter(
            path,
            pa.schema([("value", kind), ("fit", pa.int64())]),
            use_dictionary=False,
            compression="none",
            write_statistics=False,
        )

    def add(self, values: pa.Array, fit: np.ndarray) -> None:
        self.starts.append(self.count)
        self.count += len(values)
        if len(values):
            self._writer.write_table(
                pa.table([values.cast(self.kind), pa.array(fit, pa.int64())], schema=self._writer.schema)
            )

    def close(self) -> None:
        self._writer.close()

    def assign(self, connection: duckdb.DuckDBPyConnection, query: str, default: int) -> pa.Table:
        """Runs `query`, which makes (value, id, n) of the view `entries`; keeps the id of every entry; returns the query's table by id."""
        self.close()
        connection.execute(
            f"CREATE OR REPLACE TEMP VIEW entries AS SELECT * FROM read_parquet('{_escape(self.path)}',"
            " file_row_number=true)"
        )
        connection.execute(f"CREATE OR REPLACE TEMP TABLE ids AS {query}")
        target = self.path.with_suffix(".remap")
        with open(target, "wb") as file:
            rows = connection.sql(
                f"SELECT coalesce(ids.id, {default})::INTEGER AS id FROM entries LEFT JOIN ids ON entries.value ="
                " ids.value ORDER BY entries.file_row_number"
            )
            for batch in _reader(rows):
                file.write(
                    memoryview(np.ascontiguousarray(batch.column(0).to_numpy(zero_copy_only=False), np.int32)).cast("B")
                )
        self.remap = np.memmap(target, np.int32, "r", shape=(self.count,)) if self.count else np.zeros(0, np.int32)
        table = _reader(connection.sql("SELECT value, n FROM ids ORDER BY id")).read_all()
        connection.execute("DROP TABLE ids")
        self.path.unlink()
        return table

    def translate(self, batch: int, codes: np.ndarray, missing: int) -> np.ndarray:
        """Final ids of the codes of one batch; code 0 is missing, code 1 + i the batch's i-th entry."""
        start = self.starts[batch]
        end = self.starts[batch + 1] if batch + 1 < len(self.starts) else self.count
        table = np.empty(end - start + 1, np.int32)
        table[0] = missing
        table[1:] = self.remap[start:end]
        return table[codes]


class CategoricalColumn:
    """Codes one categorical field; `kind` is int64 or string, `known` are values that get an id even if never counted."""

    dtype = np.dtype(np.int32)

    def __init__(
        self, name: str, spec: Categorical, kind: pa.DataType, folder: Path, number: int, known: list[str] | None = None
    ) -> None:
        self.name, self.spec, self.kind, self.known = name, spec, kind, known
        self.entries = Entries(folder / f"entries_{number}.parquet", kind)

    def ingest(self, values: pa.Array | None, fit: np.ndarray | None, rows: int, where: str) -> np.ndarray:
        """int32 codes [rows] of one batch; `values` is None where the table lacks the column, `fit` marks rows before the cutoff."""
        if values is None:
            self.entries.add(pa.array([], self.kind), np.zeros(0, np.int64))
            return np.zeros(rows, np.int32)
        codes, distinct = code(values, self.kind, f"column {self.name!r} of {where}")
        counts = np.bincount(codes if fit is None else codes[fit], minlength=len(distinct) + 1)[1:]
        self.entries.add(distinct, counts)
        return codes

    def fit(self, connection: duckdb.DuckDBPyConnection) -> pa.Table:
        """(value, n) of the vocabulary in the order of its ids, the first one being id 2."""
        spec = self.spec
        least = spec.min_count
        if self.known is not None:
            self.entries.add(pa.array(self.known, self.kind), np.zeros(len(self.known), np.int64))
            least = 0
        if spec.values is not None:
            connection.register(
                "fixed",
                pa.table(
                    {
                        "value": pa.array(spec.values, self.kind),
                        "id": np.arange(FIRST_VALUE, FIRST_VALUE + len(spec.values)),
                    }
                ),
            )
            query = (
                "SELECT value, id, coalesce(n, 0)::BIGINT AS n FROM fixed LEFT JOIN (SELECT value, sum(fit) AS n FROM"
                " entries GROUP BY value) USING (value)"
            )
        else:
            limit = f"WHERE id < {FIRST_VALUE + spec.max_size}" if spec.max_size is not None else ""
            query = (
                f"SELECT * FROM (SELECT value, {FIRST_VALUE - 1} + row_number() OVER (ORDER BY n DESC, value) AS id, n"
                f" FROM (SELECT value, sum(fit)::BIGINT AS n FROM entries GROUP BY value HAVING sum(fit) >= {least}))"
                f" {limit}"
            )
        return self.entries.assign(connection, query, UNKNOWN)

    def final(self, batch: int, codes: np.ndarray) -> np.ndarray:
        return self.entries.translate(batch, codes, MISSING)


class TextUsers(CategoricalColumn):
    """Codes text user ids as their rank among all user ids."""

    def fit(self, connection: duckdb.DuckDBPyConnection) -> pa.Table:
        return self.entries.assign(
            connection,
            "SELECT value, row_number() OVER (ORDER BY value) - 1 AS id, 0 AS n FROM (SELECT DISTINCT value FROM"
            " entries)",
            0,
        )


class VectorColumn:
    """Codes one vector field; the distinct vectors seen before the cutoff come first, so that later ones cannot move them."""

    dtype = np.dtype(np.int32)

    def __init__(self, name: str, spec: Vector, folder: Path, number: int) -> None:
        self.name, self.spec, self.width = name, spec, spec.width
        self.entries = Entries(folder / f"entries_{number}.parquet", pa.binary())

    def ingest(self, values: pa.Array | None, fit: np.ndarray | None, rows: int, where: str) -> np.ndarray:
        if values is None or values.null_count == len(values):
            self.entries.add(pa.array([], pa.binary()), np.zeros(0, np.int64))
            return np.zeros(rows, np.int32)
        place = f"column {self.name!r} of {where}"
        if is_text(values.type) or pa.types.is_dictionary(values.type):
            codes, distinct = code(values, pa.string(), place)
        else:
            valid = values.is_valid().to_numpy(zero_copy_only=False)
            codes = np.where(valid, np.cumsum(valid), 0).astype(np.int32)
            distinct = values.drop_null()
        matrix, bad = parse_vectors(distinct, self.spec, self.width, place)
        if bad.any():
            at = int(np.argmax(bad))
            raise ValueError(
                f"{place}: {distinct[at].as_py()!r} is not a vector of {matrix.shape[1]}"
                f" {'integers 0..255' if self.spec.dtype == 'uint8' else 'numbers'} ({int(bad.sum())} such value(s) in"
                " this batch)"
            )
        self.width = matrix.shape[1]
        counts = np.bincount(codes if fit is None else codes[fit], minlength=len(distinct) + 1)[1:]
        size = matrix.shape[1] * matrix.dtype.itemsize
        offsets = pa.py_buffer(np.arange(0, (len(matrix) + 1) * size, size, dtype=np.int32))
        self.entries.add(
            pa.Array.from_buffers(
                pa.binary(), len(matrix), [None, offsets, pa.py_buffer(np.ascontiguousarray(matrix))]
            ),
            counts,
        )
        return codes

    def fit(self, connection: duckdb.DuckDBPyConnection) -> pa.Table:
        return self.entries.assign(
            connection,
            "SELECT value, row_number() OVER (ORDER BY n = 0, value) AS id, n FROM (SELECT value, sum(fit)::BIGINT AS n"
            " FROM entries GROUP BY value)",
            MISSING,
        )

    def matrix(self, table: pa.Table) -> np.ndarray:
        """[n + 1, width] of the fitted table, row 0 zeros."""
        width = self.width or 1
        out = np.zeros((len(table) + 1, width), self.spec.dtype)
        values = table.column(0).combine_chunks().cast(pa.binary()) if len(table) else None
        if values is not None:
            values = pa.concat_arrays(values.chunks) if isinstance(values, pa.ChunkedArray) else values
            out[1:] = np.frombuffer(b"".join(values.to_pylist()), self.spec.dtype).reshape(-1, width)
        return out

    def final(self, batch: int, codes: np.ndarray) -> np.ndarray:
        return self.entries.translate(batch, codes, MISSING)


class NumericColumn:
    """Passes numbers through."""

    def __init__(self, name: str, spec: Numeric) -> None:
        self.name, self.spec, self.dtype = name, spec, np.dtype(spec.dtype)

    def ingest(self, values: pa.Array | None, fit: np.ndarray | None, rows: int, where: str) -> np.ndarray:
        return numbers(values, self.dtype, rows, f"column {self.name!r} of {where}")

    def final(self, batch: int, values: np.ndarray) -> np.ndarray:
        return values


def code(values: pa.Array, kind: pa.DataType, place: str) -> tuple[np.ndarray, pa.Array]:
    """int32 codes [n] (0 = null) of an array and its distinct values, which code 1 + i names."""
    if pa.types.is_dictionary(values.type) and values.dictionary.null_count:
        values = values.cast(values.type.value_type)
    if not pa.types.is_dictionary(values.type):
        values = plain(values, kind, place).dictionary_encode()
    distinct = plain(values.dictionary, kind, place)
    codes = pc.fill_null(values.indices.cast(pa.int32()), -1).to_numpy(zero_copy_only=False) + np.int32(1)
    used = np.bincount(codes, minlength=len(distinct) + 1)[1:] > 0
    if not used.all():
        # dictionaries of files may name values that this batch does not hold
        packed = np.zeros(len(distinct) + 1, np.int32)
        packed[1:][used] = np.arange(1, used.sum() + 1, dtype=np.int32)
        codes, distinct = packed[codes], distinct.filter(pa.array(used))
    return codes, distinct


def plain(values: pa.Array, kind: pa.DataType, place: str) -> pa.Array:
    """An array cast to `kind` (int64, string or double) with an error that names the place and the value."""
    source = values.type
    if source == kind:
        return values
    if pa.types.is_boolean(source) and kind == pa.int64():
        return values.cast(pa.int8()).cast(kind)
    if (pa.types.is_timestamp(source) or pa.types.is_date(source)) and pa.types.is_floating(kind):
        return pc.divide(values.cast(pa.timestamp("us")).cast(pa.int64()).cast(pa.float64()), 1e6).cast(kind)
    try:
        return values.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"{place}: a value of type {source} is not {kind}: {error}") from None


def numbers(values: pa.Array | None, dtype: np.dtype, rows: int, place: str) -> np.ndarray:
    """[rows] numbers of `dtype`; null is NaN, which integer dtypes refuse."""
    if values is None:
        if dtype.kind != "f":
            raise ValueError(
                f"{place}: this table lacks the column, and {dtype.name} cannot say 'missing'; use Numeric('float32')"
            )
        return np.full(rows, np.nan, dtype)
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if is_text(values.type) or values.null_count == len(values):
        values = plain(values.cast(pa.string()), pa.float64(), place)
    if dtype.kind == "f":
        return (
            pc.fill_null(
                (
                    plain(values, pa.from_numpy_dtype(dtype) if dtype.itemsize > 2 else pa.float32(), place)
                    if not pa.types.is_integer(values.type)
                    else values.cast(pa.float64())
                ),
                np.nan,
            )
            .to_numpy(zero_copy_only=False)
            .astype(dtype, copy=False)
        )
    if values.null_count:
        raise ValueError(
            f"{place}: {values.null_count} missing value(s), and {dtype.name} cannot say 'missing'; use"
            " Numeric('float32')"
        )
    return plain(values, pa.from_numpy_dtype(dtype), place).to_numpy(zero_copy_only=False)


def _reader(relation: Any) -> pa.RecordBatchReader:
    return (
        relation.to_arrow_reader(1 << 20)
        if hasattr(relation, "to_arrow_reader")
        else relation.fetch_record_batch(1 << 20)
    )


def _escape(path: Path) -> str:
    return str(path).replace("'", "''")
