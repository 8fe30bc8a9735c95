"""What a column of a log becomes in a store: ids, numbers or vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

MISSING = 0
UNKNOWN = 1


@dataclass(frozen=True)
class Categorical:
    """Values become int32 ids: 0 missing, 1 unknown, 2.. by falling frequency before the fit cutoff, ties by value.

    min_count: values seen less often than this before the cutoff are unknown.
    max_size: keep at most this many values (the most frequent ones).
    values: a fixed list of values in this order; nothing is fitted then.
    oov_buckets: ids that unknown values share by their hash; with k of them values start at id 1 + k.
    """

    min_count: int = 1
    max_size: int | None = None
    values: Sequence[Any] | None = None
    oov_buckets: int = 1

    def __post_init__(self) -> None:
        if self.min_count < 1:
            raise ValueError(f"Categorical(min_count={self.min_count}): needs an integer >= 1")
        if self.max_size is not None and self.max_size < 0:
            raise ValueError(f"Categorical(max_size={self.max_size}): needs an integer >= 0 or None")
        if self.values is not None:
            if len(set(self.values)) != len(self.values):
                raise ValueError("Categorical(values=...): holds a value twice")
            object.__setattr__(self, "values", tuple(self.values))
        if self.oov_buckets < 1:
            raise ValueError(f"Categorical(oov_buckets={self.oov_buckets}): needs an integer >= 1")

    @property
    def first_value(self) -> int:
        """Id of the first value."""
        return UNKNOWN + self.oov_buckets


@dataclass(frozen=True)
class Hashed:
    """Values become int32 ids 2..buckets + 1 by their hash, 0 missing; nothing is fitted and nothing can be decoded."""

    buckets: int
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.buckets < 2**31 - 2:
            raise ValueError(f"Hashed(buckets={self.buckets}): needs an integer from 1 to 2**31 - 3")


@dataclass(frozen=True)
class Numeric:
    """Numbers kept as they are; a missing value is NaN, so integer dtypes accept no missing values."""

    dtype: str = "float32"

    def __post_init__(self) -> None:
        try:
            known = np.dtype(self.dtype).kind in "fiu"
        except TypeError:
            known = False
        if not known:
            raise ValueError(f"Numeric(dtype={self.dtype!r}): needs a float or integer dtype name such as 'float32'")


@dataclass(frozen=True)
class Vector:
    """Text such as "[109 77 98]" or a list column, kept once per distinct vector.

    An event holds an int32 code into the table of distinct vectors; 0 is missing.

    width: numbers per vector; None takes the width of the first vector read.
    dtype: "uint8" (0..255), "int64" or "float32".
    """

    width: int | None = None
    dtype: str = "uint8"

    def __post_init__(self) -> None:
        if self.width is not None and self.width < 1:
            raise ValueError(f"Vector(width={self.width}): needs an integer >= 1 or None")
        if self.dtype not in ("uint8", "int64", "float32"):
            raise ValueError(f"Vector(dtype={self.dtype!r}): needs 'uint8', 'int64' or 'float32'")


@dataclass(frozen=True)
class Quantiles:
    """Numbers become int32 ids of n buckets that were about equally full before the fit cutoff: 0 missing, 2..n + 1.

    `store.entry(name)["borders"]` are the n - 1 borders; a number on a border is in the upper bucket.
    """

    n: int

    def __post_init__(self) -> None:
        if not 2 <= self.n <= 1 << 16:
            raise ValueError(f"Quantiles(n={self.n}): needs an integer from 2 to 65536")


Field = Categorical | Hashed | Numeric | Vector | Quantiles


@dataclass(frozen=True)
class ItemTable:
    """Properties of the values of one categorical field, kept in a side table and gathered per batch.

    source: anything `build` reads.
    key: column of `source` that holds the field's values; every value once.
    fields: {column: Categorical | Numeric | Vector}; None infers every other column.
    """

    source: Any
    key: str
    fields: Mapping[str, Field] | None = field(default=None)


def infer_field(name: str, kind: pa.DataType) -> Field:
    """The field a column gets when none is named: strings, integers and booleans are categorical, floats numeric.

    Args:
        name: of the column
        kind: its Arrow type

    Raises:
        ValueError: no field holds that type
    """
    if is_key(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind):
        return Categorical()
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return Numeric()
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return Numeric("float64")
    if is_list(kind) and not is_name(kind.value_type):
        inner = kind.value_type
        if inner in (pa.uint8(), pa.bool_()):
            return Vector(dtype="uint8")
        return Vector(dtype="int64" if pa.types.is_integer(inner) else "float32")
    raise ValueError(f"column {name!r} has type {kind}, which no field holds: name it in fields= or leave it out there")


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_name(kind: pa.DataType) -> bool:
    """Whether values are kept as text: text, UUIDs and binary ids."""
    return is_text(kind) or is_uuid(kind) or _is_binary(kind)


def is_key(kind: pa.DataType) -> bool:
    """Whether values are ids by their type: names, integers, decimals without a fraction."""
    return is_name(kind) or pa.types.is_integer(kind) or (pa.types.is_decimal(kind) and kind.scale == 0)


def is_uuid(kind: pa.DataType) -> bool:
    return getattr(kind, "extension_name", None) == "arrow.uuid"


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def describe(spec: Field) -> dict[str, Any]:
    """A field as plain data for schema.json."""
    if isinstance(spec, Categorical):
        return {
            "kind": "categorical",
            "min_count": spec.min_count,
            "max_size": spec.max_size,
            "fixed": spec.values is not None,
            "oov_buckets": spec.oov_buckets,
        }
    if isinstance(spec, Hashed):
        return {"kind": "hashed", "buckets": spec.buckets, "seed": spec.seed}
    if isinstance(spec, Numeric):
        return {"kind": "numeric", "dtype": np.dtype(spec.dtype).name}
    if isinstance(spec, Quantiles):
        return {"kind": "quantiles", "n": spec.n}
    return {"kind": "vector", "width": spec.width, "dtype": spec.dtype}


def parse_field(name: str, spec: Any) -> Field:
    """A field from configuration: a Field, its kind as a word, or {"kind": ..., options}.

    Args:
        name: of the column, for messages
        spec: what the configuration says

    Raises:
        ValueError: that is no field
    """
    if isinstance(spec, Field):
        return spec
    if isinstance(spec, str):
        spec = {"kind": spec}
    kinds: dict[str, type[Field]] = {"categorical": Categorical, "hashed": Hashed, "numeric": Numeric}
    kinds |= {"vector": Vector, "quantiles": Quantiles}
    if not isinstance(spec, Mapping) or spec.get("kind") not in kinds:
        raise ValueError(
            f"field {name!r}: got {spec!r}; needs Categorical, Hashed, Numeric, Quantiles, Vector or {{'kind': one of"
            f" {sorted(kinds)}, ...}}"
        )
    options = {key: value for key, value in spec.items() if key != "kind"}
    try:
        return kinds[spec["kind"]](**options)
    except TypeError as error:
        raise ValueError(f"field {name!r}: {error}") from None
