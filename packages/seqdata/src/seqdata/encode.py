"""Columns to fixed-width codes while the log streams by, and the ids those codes get once it has gone by.

While reading, the values of a batch are coded against the batch's own distinct values, its "entries", which go to a
temporary file with their number of occurrences before the fit cutoff. Fitting gives every entry its final id (fit.py);
the codes are translated batch by batch later. So one pass over the input is enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from seqdata.entries import Coded
from seqdata.fields import MISSING, Categorical, Field, Hashed, Numeric, Quantiles, Vector, is_text, is_uuid
from seqdata.fit import Old, Rules
from seqdata.hashing import hash_values, mix
from seqdata.texts import spread
from seqdata.vectors import parse_vectors

BLOCK_BYTES = 1 << 24
UUID_GROUPS = (8, 4, 4, 4, 12)


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

    def spread(self, coded: Coded, values: pa.Array | None) -> np.ndarray:
        """uint64 [rows], equal where values are."""
        return spread_entries(coded.codes, coded.entries)

    def rules(self) -> Rules:
        """Which values get ids."""
        spec = self.spec
        least = spec.min_count if self.known is None else 0
        return Rules("count", spec.first_value, least, spec.max_size, spec.oov_buckets)

    def old(self, previous: Old | None) -> Old | None:
        """The values that have ids before the entries are looked at: a fixed list, or those of the store so far."""
        if previous is not None:
            # table names are no data: a new one always gets an id
            return replace(previous, grow=self.spec.values is None and (previous.grow or self.known is not None))
        if self.spec.values is None:
            return None
        fixed = pa.record_batch(
            [pa.array(self.spec.values, self.kind), pa.array(np.zeros(len(self.spec.values), np.int64))],
            ["value", "count"],
        )
        return Old(len(fixed), lambda: [fixed], False)


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

    def spread(self, coded: Coded, values: pa.Array | None) -> np.ndarray:
        """uint64 [rows], equal where values are, which ids need not say."""
        if values is None:
            return np.zeros(len(coded.codes), np.uint64)
        return spread_entries(*code(values, self.values, f"column {self.name!r}"))


class UserCodec(CategoricalCodec):
    """Text user ids, coded as their rank among all user ids."""

    def __init__(self, name: str) -> None:
        super().__init__(name, Categorical(), pa.string())

    def rules(self) -> Rules:
        return Rules("value", 0, 0)


class VectorCodec:
    """One vector field; the distinct vectors seen before the cutoff come first, so that later ones cannot move them."""

    dtype = np.dtype(np.int32)
    kind = pa.binary()
    known = None
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
                {"uint8": "integers 0..255", "int64": "integers", "float32": "numbers"}[self.spec.dtype],
            )
            raise ValueError(
                f"{place}: {value!r} is not a vector of {matrix.shape[1]} {need} ({int(bad.sum())} such value(s) in"
                " this batch)"
            )
        self.width = matrix.shape[1]
        return Coded(codes, _blobs(matrix), _counts(codes, fit, len(distinct)))

    def spread(self, coded: Coded, values: pa.Array | None) -> np.ndarray:
        """uint64 [rows], equal where vectors are."""
        return spread_entries(coded.codes, coded.entries)

    def rules(self) -> Rules:
        """Every vector gets an id."""
        return Rules("seen", 1, 0)

    def blobs(self, matrix: np.ndarray) -> Iterator[pa.RecordBatch]:
        """(value, count 0) of the distinct vectors [n + 1, width] of a store, row 0 left out."""
        step = max(BLOCK_BYTES // max(matrix.shape[1] * matrix.dtype.itemsize, 1), 1)
        for start in range(1, len(matrix), step):
            rows = _blobs(np.array(matrix[start : start + step]))
            yield pa.record_batch([rows, pa.array(np.zeros(len(rows), np.int64))], ["value", "count"])


class NumericCodec:
    """Numbers, passed through."""

    kind = None
    missing = 0

    def __init__(self, name: str, spec: Numeric) -> None:
        self.name, self.spec, self.dtype = name, spec, np.dtype(spec.dtype)

    def ingest(self, values: pa.Array | None, fit: np.ndarray | None, rows: int, where: str) -> Coded:
        return Coded(numbers(values, self.dtype, rows, f"column {self.name!r} of {where}"))

    def spread(self, coded: Coded, values: pa.Array | None) -> np.ndarray:
        """uint64 [rows], equal where numbers are; missing ones are equal."""
        if self.dtype.kind != "f":
            return mix(coded.codes.astype(np.int64).view(np.uint64))
        found = np.where(np.isnan(coded.codes), np.nan, coded.codes + 0.0).astype(np.float64)
        return mix(found.view(np.uint64))


class QuantileCodec(NumericCodec):
    """Numbers that become ids of buckets once the borders are known, when a shard is sorted."""

    def __init__(self, name: str, spec: Quantiles) -> None:
        super().__init__(name, Numeric("float64"))
        self.n = spec.n


Codec = CategoricalCodec | HashedCodec | VectorCodec | NumericCodec


def make_codec(name: str, spec: Field, kind: pa.DataType, known: list[str] | None = None) -> Codec:
    """The codec of a field whose values arrive as `kind`."""
    if isinstance(spec, Categorical):
        return CategoricalCodec(name, spec, kind, known)
    if isinstance(spec, Hashed):
        return HashedCodec(name, spec, kind)
    if isinstance(spec, Quantiles):
        return QuantileCodec(name, spec)
    return NumericCodec(name, spec) if isinstance(spec, Numeric) else VectorCodec(name, spec)


def spread_entries(codes: np.ndarray, entries: pa.Array | None) -> np.ndarray:
    """uint64 hash [rows] of the entries that codes name."""
    return np.append(np.uint64(0), np.zeros(0, np.uint64) if entries is None else spread(entries))[codes]


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
    """An array cast to int64, string or a float type, with an error that names the place and the value.

    Args:
        values: [n]
        kind: what to cast to
        place: for the message

    Raises:
        ValueError: a value does not fit
    """
    source = values.type
    if pa.types.is_dictionary(source):
        values, source = values.cast(source.value_type), source.value_type
    if is_uuid(source) or pa.types.is_fixed_size_binary(source):
        values = _hexadecimal(values.storage, UUID_GROUPS) if is_uuid(source) else _hexadecimal(values, (1 << 30,))
        source = values.type
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
    """[rows] numbers of `dtype`; null is NaN, which integer dtypes refuse.

    Args:
        values: [rows], or None where the table lacks the column
        dtype: of the result
        rows: how many there are
        place: for the message

    Raises:
        ValueError: a value is missing from integers, or is no number of that type
    """
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


def _hexadecimal(values: pa.Array, groups: tuple[int, ...]) -> pa.Array:
    """Texts of fixed-size bytes, digits in groups that dashes part."""
    size = values.type.byte_width
    raw = np.frombuffer(values.buffers()[1], np.uint8)[values.offset * size : (values.offset + len(values)) * size]
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)[np.stack([raw >> 4, raw & 15], -1)].reshape(-1, 2 * size)
    borders = np.cumsum(groups)
    text = np.insert(digits, borders[borders < 2 * size], ord("-"), axis=1)
    offsets = np.arange(0, text.size + 1, text.shape[1], dtype=np.int32)
    made = pa.Array.from_buffers(pa.string(), len(text), [None, pa.py_buffer(offsets), pa.py_buffer(text.tobytes())])
    return pc.if_else(values.is_valid(), made, pa.scalar(None, pa.string())) if values.null_count else made


def _counts(codes: np.ndarray, fit: np.ndarray | None, size: int) -> np.ndarray:
    return np.bincount(codes if fit is None else codes[fit], minlength=size + 1)[1:]


def _blobs(matrix: np.ndarray) -> pa.Array:
    """A matrix [n, width] as n blobs."""
    size = matrix.shape[1] * matrix.dtype.itemsize
    offsets = pa.py_buffer(np.arange(0, (len(matrix) + 1) * size, size, dtype=np.int32))
    return pa.Array.from_buffers(pa.binary(), len(matrix), [None, offsets, pa.py_buffer(np.ascontiguousarray(matrix))])
