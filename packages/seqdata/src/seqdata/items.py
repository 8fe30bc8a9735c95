"""Item side tables: properties of the values of a categorical field, one row per id."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from seqdata import layout
from seqdata.encode import code, hashed_ids, numbers, plain
from seqdata.fields import (
    MISSING,
    Categorical,
    Field,
    Hashed,
    ItemTable,
    Numeric,
    Quantiles,
    Vector,
    describe,
    infer_field,
    is_key,
    parse_field,
)
from seqdata.hashing import bucket
from seqdata.layout import one_chunk
from seqdata.part import Part
from seqdata.plan import categorical_kind, value_type
from seqdata.quantiles import bucket_ids, fit_borders
from seqdata.sources import open_source
from seqdata.vectors import parse_vectors
from seqdata.vocabulary import Vocabulary


def write_items(folder: Path, items: Mapping[str, ItemTable], schema: dict[str, Any], budget: int) -> dict[str, Any]:
    """Writes the item tables of a store under construction into its folder of fitted things; returns their schema.

    Only values of the field's vocabulary have properties, and properties' own vocabularies count those values only, so
    that nothing is learnt from items first seen after the fit cutoff.
    """
    if items:
        (folder / "items").mkdir(exist_ok=True)
    return {field: _write_table(folder, field, table, schema, budget) for field, table in items.items()}


def _write_table(folder: Path, field: str, table: ItemTable, schema: dict[str, Any], budget: int) -> dict[str, Any]:
    where = f"items[{field!r}]"
    parts = open_source(table.source, where, budget // 2)
    specs = _specs(where, table, parts)
    entry = schema["fields"][field]
    vocabulary = Vocabulary(folder / "vocabularies" / f"{entry['file']}.arrow", entry)
    ids, values, read = _read(parts, [table.key, *specs], vocabulary, where)
    repeated = np.flatnonzero(np.bincount(ids, minlength=len(vocabulary)) > 1)
    if len(repeated):
        example = vocabulary.decode(repeated[:1])[0]
        raise ValueError(
            f"{where}: {len(repeated)} key(s) appear more than once, such as {example!r}; each needs one row"
        )
    described = {}
    for i, (name, spec) in enumerate(specs.items()):
        file, place = layout.file_name(i, f"{field}.{name}"), f"{where}: column {name!r}"
        made, extra = _column(
            folder / "vocabularies" / f"{file}.arrow", name, spec, ids, values[name], len(vocabulary), place
        )
        layout.write_array(folder / "items" / f"{file}.npy", made)
        described[name] = describe(spec) | {"file": file, "dtype": made.dtype.name} | extra
    return {
        "key": table.key,
        "rows": {"in": read, "out": len(ids), "dropped": {"not_in_vocabulary": read - len(ids)}},
        "columns": described,
        "parts": [part.fingerprint() or {"memory": part.where} for part in parts],
    }


def extend_items(
    folder: Path, store: Any, items: Mapping[str, ItemTable], schema: dict[str, Any], budget: int
) -> dict[str, Any]:
    """The item tables of a store, longer by its new ids; their properties come from `items`, coded as the old ones.

    Raises:
        KeyError: the store has no item table of a field that is named
    """
    described = {}
    (folder / "items").mkdir(exist_ok=True)
    for field, table in store.schema["items"].items():
        entry = schema["fields"][field]
        vocabulary = Vocabulary(folder / "vocabularies" / f"{entry['file']}.arrow", entry)
        old = len(store.vocabulary(field))
        ids, values = np.zeros(0, np.int32), dict[str, pa.Array]()
        if field in items:
            where = f"items[{field!r}]"
            parts = open_source(items[field].source, where, budget // 2)
            _specs(where, ItemTable(None, items[field].key, {}), parts)
            names = [name for name in table["columns"] if any(name in part.schema.names for part in parts)]
            ids, values, _ = _read(parts, [items[field].key, *names], vocabulary, where)
        fresh = ids >= old
        for name, column in table["columns"].items():
            made = store.item_column(field, name)
            fill = np.nan if column["kind"] == "numeric" and made.dtype.kind == "f" else 0
            made = np.concatenate([made, np.full((len(vocabulary) - old, *made.shape[1:]), fill, made.dtype)])
            if name in values and fresh.any():
                given = values[name].filter(pa.array(fresh))
                made[ids[fresh]] = _code_again(store, f"{field}.{name}", column, given)
            layout.write_array(folder / "items" / f"{column['file']}.npy", made)
            if column["kind"] == "categorical":
                layout.write_table(
                    folder / "vocabularies" / f"{column['file']}.arrow", store.vocabulary(f"{field}.{name}").table
                )
        described[field] = table
    for field in items:
        if field not in described:
            raise KeyError(f"items: the store has no item table of {field!r}; it has {list(described)}")
    return described


def _code_again(store: Any, name: str, column: dict[str, Any], values: pa.Array) -> np.ndarray:
    place = f"item column {name!r}"
    if column["kind"] in ("categorical", "hashed"):
        vocabulary = store.vocabulary(name)
        return vocabulary.encode(plain(values, vocabulary.kind, place))
    if column["kind"] == "numeric":
        return numbers(values, np.dtype(column["dtype"]), len(values), place)
    if column["kind"] == "quantiles":
        return bucket_ids(numbers(values, np.dtype(np.float64), len(values), place), column["borders"])
    spec = Vector(column["width"], column["dtype"])
    made, _ = _vectors(spec, np.arange(len(values)), values, len(values), place)
    return made


def _specs(where: str, table: ItemTable, parts: list[Part]) -> dict[str, Field]:
    columns: dict[str, pa.DataType] = {}
    for part in parts:
        if table.key not in part.schema.names:
            raise KeyError(f"{where}: key column {table.key!r} is not in {part.where}; it has {part.schema.names}")
        for column in part.schema:
            columns.setdefault(column.name, value_type(column.type))
    kind = columns.pop(table.key)
    if not (is_key(kind) or pa.types.is_floating(kind)):
        raise ValueError(f"{where}: key column {table.key!r} has type {kind}; needs integers or text")
    if table.fields is None:
        return {name: infer_field(name, kind) for name, kind in columns.items()}
    for name in table.fields:
        if name not in columns:
            raise KeyError(f"{where}: column {name!r} is not in the table; it has {list(columns)}")
    return {name: parse_field(name, spec) for name, spec in table.fields.items()}


def _read(
    parts: list[Part], names: list[str], vocabulary: Vocabulary, where: str
) -> tuple[np.ndarray, dict[str, pa.Array], int]:
    # rows whose key the vocabulary lacks go at once, so memory holds known items only
    tables, ids, read = [], [np.zeros(0, np.int32)], 0
    for part in parts:
        present = [name for name in names if name in part.schema.names]
        for batch in part.read(present, {}):
            read += batch.num_rows
            keys = plain(batch.column(0), vocabulary.kind, f"{where}: key column {names[0]!r}")
            found = vocabulary.encode(keys)
            keep = found >= vocabulary.first_value
            ids.append(found[keep])
            chosen = pa.array(keep)
            tables.append(pa.table({name: _dense(batch.column(i)).filter(chosen) for i, name in enumerate(present)}))
    if not tables:
        return ids[0], {name: pa.nulls(0) for name in names}, 0
    merged = pa.concat_tables(tables, promote_options="permissive")
    return np.concatenate(ids), {name: one_chunk(merged.column(name)) for name in names}, read


def _column(
    vocabulary: Path, name: str, spec: Field, ids: np.ndarray, values: pa.Array, size: int, place: str
) -> tuple[np.ndarray, dict[str, Any]]:
    if isinstance(spec, Numeric):
        dtype = np.dtype(spec.dtype)
        made = np.full(size, np.nan if dtype.kind == "f" else 0, dtype)
        made[ids] = numbers(values, dtype, len(values), place)
        return made, {}
    if isinstance(spec, Quantiles):
        found = numbers(values, np.dtype(np.float64), len(values), place)
        borders = fit_borders([found], len(found), spec.n)
        made = np.full(size, MISSING, np.int32)
        made[ids] = bucket_ids(found, borders)
        return made, {"size": spec.n + 2, "borders": borders}
    if isinstance(spec, Vector):
        return _vectors(spec, ids, values, size, place)
    kind = categorical_kind(name, spec, [values.type])
    codes, distinct = code(values, kind, place)
    made = np.full(size, MISSING, np.int32)
    if isinstance(spec, Hashed):
        made[ids] = np.append(np.int32(MISSING), hashed_ids(distinct, spec))[codes]
        return made, {"size": spec.buckets + 2, "values": str(kind)}
    table = _vocabulary(spec, distinct, np.bincount(codes, minlength=len(distinct) + 1)[1:])
    layout.write_table(vocabulary, table)
    found = pc.fill_null(pc.index_in(distinct, one_chunk(table.column("value"))), -1).to_numpy(zero_copy_only=False)
    translated = np.where(found < 0, bucket(distinct, spec.oov_buckets), found + spec.first_value)
    made[ids] = np.append(np.int32(MISSING), translated)[codes]
    return made, {"size": len(table) + spec.first_value, "values": str(kind)}


def _vocabulary(spec: Categorical, distinct: pa.Array, counts: np.ndarray) -> pa.Table:
    if spec.values is not None:
        known = dict(zip(distinct.to_pylist(), counts.tolist(), strict=True))
        fixed = [known.get(value, 0) for value in spec.values]
        return pa.table({"value": pa.array(spec.values, distinct.type), "count": pa.array(fixed, pa.int64())})
    table = pa.table({"value": distinct, "count": pa.array(counts, pa.int64())}).filter(
        pa.array(counts >= spec.min_count)
    )
    return table.sort_by([("count", "descending"), ("value", "ascending")]).slice(0, spec.max_size)


def _vectors(
    spec: Vector, ids: np.ndarray, values: pa.Array, size: int, place: str
) -> tuple[np.ndarray, dict[str, Any]]:
    known = values.drop_null()
    if not len(known):
        return np.zeros((size, spec.width or 1), spec.dtype), {"width": spec.width or 1}
    matrix, bad = parse_vectors(known, spec, spec.width, place)
    if bad.any():
        example = known[int(np.argmax(bad))].as_py()
        raise ValueError(f"{place}: {example!r} is not a vector of {matrix.shape[1]} {spec.dtype} numbers")
    made = np.zeros((size, matrix.shape[1]), spec.dtype)
    made[ids[values.is_valid().to_numpy(zero_copy_only=False)]] = matrix
    return made, {"width": matrix.shape[1]}


def _dense(array: pa.Array) -> pa.Array:
    return array.cast(array.type.value_type) if pa.types.is_dictionary(array.type) else array
