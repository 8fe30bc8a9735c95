"""Columns to fixed-width codes while the log streams by, and the ids those codes get once it has gone by.

While reading, the values of a batch are coded against the batch's own distinct values, its "entries", which go to a
temporary file with their number of occurrences before the fit cutoff. Fitting groups the entries of all batches by
value and gives every entry its final id; the codes are translated batch by batch later. So one pass over the input is
enough, and memory holds one batch and what DuckDB needs to group the entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from seqdata.fields import MISSING, UNKNOWN, Categorical, Field, Hashed, Numeric, Vector, is_text
from seqdata.hashing import hash_values
from seqdata.layout import write_all
from seqdata.vectors import parse_vectors


@dataclass(frozen=True)
class Coded:
    """One batch of one column: codes [rows], the entries that code 1 + i names, and their counts before the cutoff."""

    codes: np.ndarray
    entries: pa.Array | None = None
    counts: np.ndarray | None = None


class CategoricalCodec:
    """One categorical field. `kind` is int64 or string; `known` are values that get an id even if never counted."""

    dtype = np.dtype(np.int32)
    missing = MISSING

    def __init__(self, name: str, spec: Categorical, kind: pa.DataType, known: list[str] | None = None) -> None:
        self.name, self.spec, self.kind, self.known = name, spec, kind, known

    def ingest(self, values: pa.Array | None, fit: np.ndarray | None, rows: int, where: str) -> Coded:
        """Codes one batch; `values` is None where the table lacks the column, `fit` marks rows before the cutoff."""
        if values is None:
            return Coded(np.zeros(rows, np.int32), pa.array([], self.kind), np.zeros(0, np.int64))
        codes, distinct = code(values, self.kind, f"column {self.name!r} of {where}")
        return Coded(codes, distinct, _counts(codes, fit, len(distinct)))

    def fit(self, entries: Entries, previous: pa.Table | None = None, grow: bool = True) -> pa.Table:
        """(value, n) of the vocabulary by id; `previous` (value, count) keeps its ids, `grow` may add to it."""
        spec = self.spec
        if previous is not None:
            return self._extend(entries, previous, grow)
        first = spec.first_value
        if spec.values is not None:
            ids = np.arange(first, first + len(spec.values))
            entries.connection.register("fixed", pa.table({"value": pa.array(spec.values, self.kind), "id": ids}))
            return entries.assign(
                "SELECT value, id, coalesce(n, 0)::BIGINT AS n FROM fixed LEFT JOIN counted USING (value)",
                spec.oov_buckets,
            )
        least, counted = spec.min_count, "counted"
        if self.known is not None:
            counted, least = self._with_known(entries), 0
        limit = "" if spec.max_size is None else f"WHERE id < {first + spec.max_size}"
        ranked = (
            f"SELECT value, {first - 1} + row_number() OVER (ORDER BY n DESC, value) AS id, n FROM {counted} WHERE n >="
            f" {least}"
        )
        return entries.assign(f"SELECT * FROM ({ranked}) {limit}", spec.oov_buckets)

    def _with_known(self, entries: Entries) -> str:
        entries.connection.register("known", pa.table({"value": pa.array(self.known, self.kind)}))
        return "(SELECT value, coalesce(n, 0)::BIGINT AS n FROM known FULL JOIN counted USING (value))"

    def _extend(self, entries: Entries, previous: pa.Table, grow: bool) -> pa.Table:
        spec, size = self.spec, len(previous)
        grow = grow or self.known is not None
        ids = np.arange(spec.first_value, spec.first_value + size)
        entries.connection.register("previous", previous.append_column("id", pa.array(ids)))
        old = "SELECT value, id, count + coalesce(n, 0)::BIGINT AS n FROM previous LEFT JOIN counted USING (value)"
        room = (
            size
            if not grow or spec.values is not None
            else np.iinfo(np.int32).max
            if spec.max_size is None
            else spec.max_size
        )
        counted, least = "counted", spec.min_count
        if self.known is not None:
            # table names are no data: a new one always gets an id
            counted, least = self._with_known(entries), 0
        fresh = (
            f"SELECT value, {spec.first_value - 1 + size} + row_number() OVER (ORDER BY n DESC, value) AS id, n"
            f" FROM {counted} ANTI JOIN previous USING (value) WHERE n >= {least}"
        )
        return entries.assign(
            f"{old} UNION ALL SELECT * FROM ({fresh}) WHERE id < {spec.first_value + max(room, size)}", spec.oov_buckets
        )


class HashedCodec:
    """One hashed field: its ids are final at once."""

    dtype = np.dtype(np.int32)
    kind = None
    missing = MISSING

    def __init__(self, name: str, spec: Hashed, kind: pa.DataType) -> None:
        self.name, self.spec, self.values = name, spec, kind

    def ingest(self, values: pa.Array | None, fit: np.ndarray | None, rows: int, where: str) -> Coded:
        if values is None:
            return Coded(np.zeros(rows, np.int32))
        codes, distinct = code(values, self.values, f"column {self.name!r} of {where}")
        return Coded(np.append(np.int32(MISSING), hashed_ids(distinct, self.spec))[codes].astype(np.int32))


class UserCodec(CategoricalCodec):
    """Text user ids, coded as their rank among all user ids."""

    def __init__(self, name: str) -> None:
        super().__init__(name, Categorical(), pa.string())

    def fit(self, entries: Entries, previous: pa.Table | None = None, grow: bool = True) -> pa.Table:
        return entries.assign("SELECT value, row_number() OVER (ORDER BY value) - 1 AS id, n FROM counted", 1)


class VectorCodec:
    """One vector field; the distinct vectors seen before the cutoff come first, so that later ones cannot move them."""

    dtype = np.dtype(np.int32)
    kind = pa.binary()
    missing = MISSING

    def __init__(self, name: str, spec: Vector) -> None:
        self.name, self.spec, self.width = name, spec, spec.width

    def ingest(self, values: pa.Array | None, fit: np.ndarray | None, rows: int, where: str) -> Coded:
        if values is None or values.null_count == len(values):
            return Coded(np.zeros(rows, np.int32), pa.array([], pa.binary()), np.zeros(0, np.int64))
        place = f"column {self.name!r} of {where}"
        if is_text(values.type) or pa.types.is_dictionary(values.type):
            codes, distinct = code(values, pa.string(), place)
        else:
            valid = values.is_valid().to_numpy(zero_copy_only=False)
            codes, distinct = np.where(valid, np.cumsum(valid), 0).astype(np.int32), values.drop_null()
        matrix, bad = parse_vectors(distinct, self.spec, self.width, place)
        if bad.any():
            value, need = (
                distinct[int(np.argmax(bad))].as_py(),
                ("integers 0..255" if self.spec.dtype == "uint8" else "numbers"),
            )
            raise ValueError(
                f"{place}: {value!r} is not a vector of {matrix.shape[1]} {need} ({int(bad.sum())} such value(s) in"
                " this batch)"
            )
        self.width = matrix.shape[1]
        size = matrix.shape[1] * matrix.dtype.itemsize
        offsets = pa.py_buffer(np.arange(0, (len(matrix) + 1) * size, size, dtype=np.int32))
        blobs = pa.Array.from_buffers(
            pa.binary(), len(matrix), [None, offsets, pa.py_buffer(np.ascontiguousarray(matrix))]
        )
        return Coded(codes, blobs, _counts(codes, fit, len(distinct)))

    def fit(self, entries: Entries, previous: pa.Table | None = None, grow: bool = True) -> pa.Table:
        if previous is None:
            return entries.assign("SELECT value, row_number() OVER (ORDER BY n = 0, value) AS id, n FROM counted", 1)
        ids = np.arange(1, len(previous) + 1)
        entries.connection.register("previous", previous.append_column("id", pa.array(ids)))
        return entries.assign(
            f"SELECT value, id, 0 AS n FROM previous UNION ALL SELECT value, {len(previous)} + row_number() OVER"
            " (ORDER BY n = 0, value) AS id, n FROM counted ANTI JOIN previous USING (value)",
            1,
        )

    def blobs(self, matrix: np.ndarray) -> pa.Table:
        """(value) of the distinct vectors of a store, as `fit` takes them for `previous`."""
        size = matrix.shape[1] * matrix.dtype.itemsize
        data = np.ascontiguousarray(matrix[1:]).tobytes()
        return pa.table({"value": pa.array([data[i : i + size] for i in range(0, len(data), size)], pa.binary())})

    def matrix(self, table: pa.Table, width: int | None) -> np.ndarray:
        """[n + 1, width] distinct vectors of a fitted table, row 0 zeros."""
        width = width or self.spec.width or 1
        rows = b"".join(value for chunk in table.column(0).chunks for value in chunk.to_pylist())
        known = np.frombuffer(rows, self.spec.dtype).reshape(-1, width)
        return np.concatenate([np.zeros((1, width), self.spec.dtype), known])


class NumericCodec:
    """Numbers, passed through."""

    kind = None
    missing = 0

    def __init__(self, name: str, spec: Numeric) -> None:
        self.name, self.spec, self.dtype = name, spec, np.dtype(spec.dtype)

    def ingest(self, values: pa.Array | None, fit: np.ndarray | None, rows: int, where: str) -> Coded:
        return Coded(numbers(values, self.dtype, rows, f"column {self.name!r} of {where}"))


Codec = CategoricalCodec | HashedCodec | VectorCodec | NumericCodec


def make_codec(name: str, spec: Field, kind: pa.DataType, known: list[str] | None = None) -> Codec:
    """The codec of a field whose values arrive as `kind`."""
    if isinstance(spec, Categorical):
        return CategoricalCodec(name, spec, kind, known)
    if isinstance(spec, Hashed):
        return HashedCodec(name, spec, kind)
    return NumericCodec(name, spec) if isinstance(spec, Numeric) else VectorCodec(name, spec)


class EntryWriter:
    """The entries of one column of one part of the input, as a Parquet file; `starts` says where each batch begins."""

    def __init__(self, path: Path, kind: pa.DataType) -> None:
        self.count, self.starts = 0, list[int]()
        schema = pa.schema([("value", kind), ("fit", pa.int64())])
        self._writer = pq.ParquetWriter(path, schema, use_dictionary=False, compression="none", write_statistics=False)

    def add(self, coded: Coded) -> None:
        self.starts.append(self.count)
        if coded.entries is not None and len(coded.entries):
            self.count += len(coded.entries)
            schema = self._writer.schema
            self._writer.write_table(pa.table([coded.entries, pa.array(coded.counts, pa.int64())], schema=schema))

    def close(self) -> None:
        self._writer.close()


class Entries:
    """The entries of one column over all parts, for one fit; `files` sort by name in the order of the parts."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, files: list[Path], count: int, remap: Path) -> None:
        self.connection, self.count, self.remap = connection, count, remap
        self._files = ["'" + str(path).replace("'", "''") + "'" for path in files]
        connection.execute(
            "CREATE OR REPLACE TEMP VIEW counted AS SELECT value, sum(fit)::BIGINT AS n"
            f" FROM read_parquet([{', '.join(self._files)}]) GROUP BY value"
        )

    def assign(self, query: str, buckets: int) -> pa.Table:
        """Runs `query`, which makes (value, id, n), writes the id of every entry to `remap`, returns (value, n) by id.

        buckets: an entry without an id gets one of the ids 1..buckets, by its hash.
        """
        self.connection.execute(f"CREATE OR REPLACE TEMP TABLE ids AS {query}")
        value = "e.value" if buckets > 1 else "NULL"
        with open(self.remap, "wb", buffering=0) as remap:
            # part by part, so that what is put back into order stays small
            for file in self._files:
                rows = self.connection.sql(
                    f"SELECT ids.id::INTEGER AS id, {value} AS value FROM read_parquet({file}, file_row_number=true) e"
                    " LEFT JOIN ids ON e.value = ids.value ORDER BY e.file_row_number"
                )
                for batch in _reader(rows):
                    ids = pc.fill_null(batch.column(0), UNKNOWN).to_numpy(zero_copy_only=False)
                    if buckets > 1:
                        unknown = batch.column(0).is_null()
                        ids = ids.copy()
                        ids[unknown.to_numpy(zero_copy_only=False)] = bucket(batch.column(1).filter(unknown), buckets)
                    write_all(remap, np.ascontiguousarray(ids, np.int32))
        table = _reader(self.connection.sql("SELECT value, n FROM ids ORDER BY id")).read_all()
        self.connection.execute("DROP TABLE ids")
        return table


def read_remap(path: Path, start: int, count: int) -> np.ndarray:
    """Some of the ids that `Entries.assign` wrote."""
    return np.fromfile(path, np.int32, count, offset=start * 4)


def bucket(values: pa.Array, buckets: int) -> np.ndarray:
    """Ids 1..buckets of values outside the vocabulary."""
    if buckets == 1:
        return np.full(len(values), UNKNOWN, np.int32)
    return (UNKNOWN + hash_values(values) % np.uint64(buckets)).astype(np.int32)


def hashed_ids(values: pa.Array, spec: Hashed) -> np.ndarray:
    """Ids 2..buckets + 1 of values of a hashed field."""
    return (2 + hash_values(values, spec.seed) % np.uint64(spec.buckets)).astype(np.int32)


def code(values: pa.Array, kind: pa.DataType, place: str) -> tuple[np.ndarray, pa.Array]:
    """int32 codes [n] (0 = null) of an array, and its distinct values, which code 1 + i names."""
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
    """An array cast to int64, string or a float type, with an error that names the place and the value."""
    source = values.type
    if pa.types.is_dictionary(source):
        values, source = values.cast(source.value_type), source.value_type
    if source == kind:
        return values
    if pa.types.is_boolean(source) and pa.types.is_integer(kind):
        return values.cast(pa.int8()).cast(kind)
    if (pa.types.is_timestamp(source) or pa.types.is_date(source)) and pa.types.is_floating(kind):
        seconds = pc.divide(values.cast(pa.timestamp("us")).cast(pa.int64()).cast(pa.float64()), 1e6)
        return seconds.cast(kind)
    if pa.types.is_floating(source) and pa.types.is_integer(kind):
        # pandas turns integers with gaps into floats, so NaN is null here
        values = pc.if_else(pc.is_nan(values), pa.scalar(None, source), values)
    try:
        return values.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"{place}: a value of type {source} is not {kind}: {error}") from None


def numbers(values: pa.Array | None, dtype: np.dtype, rows: int, place: str) -> np.ndarray:
    """[rows] numbers of `dtype`; null is NaN, which integer dtypes refuse."""
    gap = f"{dtype.name} cannot say 'missing'; use Numeric('float32')"
    if values is None:
        if dtype.kind != "f":
            raise ValueError(f"{place}: this table lacks the column, and {gap}")
        return np.full(rows, np.nan, dtype)
    if dtype.kind == "f":
        if pa.types.is_integer(values.type):
            return (
                pc.fill_null(values.cast(pa.float64(), safe=False), np.nan).to_numpy(zero_copy_only=False).astype(dtype)
            )
        return pc.fill_null(plain(values, pa.float64(), place), np.nan).to_numpy(zero_copy_only=False).astype(dtype)
    values = plain(values, pa.from_numpy_dtype(dtype), place)
    if values.null_count:
        raise ValueError(f"{place}: {values.null_count} missing value(s), and {gap}")
    return values.to_numpy(zero_copy_only=False)


def _counts(codes: np.ndarray, fit: np.ndarray | None, size: int) -> np.ndarray:
    return np.bincount(codes if fit is None else codes[fit], minlength=size + 1)[1:]


def _reader(relation: Any) -> pa.RecordBatchReader:
    read = getattr(relation, "to_arrow_reader", None) or relation.fetch_record_batch
    return read(1 << 17)
