"""Arrow columns as numbers and text, and what their types say."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Floats = npt.NDArray[np.float64]


def column_numbers(array: pa.Array | pa.ChunkedArray) -> Floats:
    """A flat column as float64, NaN for null; times become unix seconds, booleans 0 and 1, text is parsed or NaN."""
    return array_numbers(one_chunk(array))


def label_numbers(array: pa.Array | pa.ChunkedArray, name: str) -> Floats:
    """A column of labels as float64, NaN for null and for NaN [N].

    Raises:
        ValueError: a label that is there but no finite number; names the column, how many, and one of them. A payer
            must not be lost because an amount was written in another way.
    """
    array = one_chunk(array)
    values = column_numbers(array)
    present = np.asarray(array.is_valid())
    if pa.types.is_floating(array.type):
        present &= ~np.isnan(values)
    lost = np.flatnonzero(present & ~np.isfinite(values))
    if len(lost):
        raise ValueError(
            f"label {name}: {len(lost)} of {len(values)} values are no finite numbers, e.g. {array[int(lost[0])]} "
            f"(Arrow type {array.type}); null is for an outcome that is not known"
        )
    return values


def array_numbers(array: pa.Array) -> Floats:
    """A flat array as float64, as `column_numbers` reads it."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        return array_numbers(array.dictionary_decode())
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        micros = np.asarray(array.cast(pa.timestamp("us")).cast(pa.int64()).fill_null(0)).astype(np.float64) / 1e6
        return np.where(np.asarray(pc.is_valid(array)), micros, np.nan)
    if pa.types.is_null(kind):
        return np.full(len(array), np.nan)
    if is_text(kind):
        text = as_text(array)
        number = pc.match_substring_regex(text, r"^\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*$")
        text = pc.utf8_trim_whitespace(pc.if_else(number, text, None))
        # Arrow's parser takes no leading plus.
        array = pc.replace_substring_regex(text, r"^\+", "").cast(pa.float64())
    elif not (pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        array = array.cast(pa.float64()) if pa.types.is_decimal(kind) else pa.nulls(len(array), pa.float64())
    elif pa.types.is_boolean(kind):
        array = array.cast(pa.uint8())
    if array.null_count:
        array = array.cast(pa.float64(), safe=False).fill_null(np.nan)
    return np.ascontiguousarray(array.to_numpy(zero_copy_only=False), dtype=np.float64)


def as_text(array: pa.Array) -> pa.Array:
    """A flat column as large_string; numbers take their decimal form."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    return array.cast(pa.large_string())


def struct_as_map(array: pa.StructArray) -> pa.MapArray:
    """A struct column as a map from the names of its `number_fields` to their values; a null field is no entry [N]."""
    names = number_fields(array.type)
    fields = array.flatten()
    kept = [array_numbers(fields[array.type.get_field_index(name)]) for name in names]
    values = np.column_stack(kept) if kept else np.empty((len(array), 0))
    there = ~np.isnan(values)
    ends = np.cumsum(there.sum(axis=1), dtype=np.int32)
    offsets = pa.array(np.concatenate([np.zeros(1, np.int32), ends]))
    keys = pa.array(np.array(names, dtype=object)[np.nonzero(there)[1]].tolist(), pa.string())
    return pa.MapArray.from_arrays(offsets, keys, pa.array(values[there]), mask=array.is_null())


def is_nested(kind: pa.DataType) -> bool:
    """Whether a column of this Arrow type holds several entries a row."""
    return pa.types.is_map(kind) or _is_list(kind)


def number_fields(kind: pa.DataType) -> list[str]:
    """Names of a struct's fields that hold numbers or times."""
    numbers = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal)
    checks = (*numbers, pa.types.is_timestamp, pa.types.is_date)
    fields = [kind.field(i) for i in range(kind.num_fields)] if pa.types.is_struct(kind) else []
    return [field.name for field in fields if any(check(field.type) for check in checks)]


def has_numbers(kind: pa.DataType) -> bool:
    """Whether values of this type are read as numbers or times."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    flat = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal, pa.types.is_null)
    return any(check(kind) for check in (*flat, pa.types.is_timestamp, pa.types.is_date))


def is_text(kind: pa.DataType) -> bool:
    """Whether values of this type are text."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def one_chunk(array: pa.Array | pa.ChunkedArray) -> pa.Array:
    """A column as one array, copied only where it has several chunks."""
    if not isinstance(array, pa.ChunkedArray):
        return array
    if array.num_chunks == 1:
        return array.chunk(0)
    return pa.concat_arrays(array.chunks) if array.num_chunks else pa.nulls(0, array.type)


def _is_list(kind: pa.DataType) -> bool:
    views = any(check(kind) for check in (pa.types.is_list_view, pa.types.is_large_list_view))
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind) or views
