"""Item side tables: properties of the values of a categorical field, one row per id."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from seqdata import layout
from seqdata.encode import code, numbers, plain
from seqdata.fields import (
    FIRST_VALUE,
    MISSING,
    UNKNOWN,
    Categorical,
    ItemTable,
    Numeric,
    describe,
    infer_field,
    is_text,
    parse_field,
)
from seqdata.sources import open_source
from seqdata.vectors import parse_vectors
from seqdata.vocabulary import Vocabulary


def write_items(folder: Path, items: Mapping[str, ItemTable], schema: dict[str, Any], budget: int) -> dict[str, Any]:
    """Writes the item tables of a store under construction; returns their part of the schema."""
    if items:
        (folder / "items").mkdir()
    return {field: _write_table(folder, field, table, schema, budget) for field, table in items.items()}


def _write_table(folder: Path, field: str, table: ItemTable, schema: dict[str, Any], budget: int) -> dict[str, Any]:
    where = f"items[{field!r}]"
    parts = open_source(table.source, where, budget // 2)
    columns: dict[str, pa.DataType] = {}
    for part in parts:
        for column in part.schema:
            columns.setdefault(column.name, column.type)
        if table.key not in part.schema.names:
            raise KeyError(f"{where}: key column {table.key!r} is not in {part.where}; it has {part.schema.names}")
    if table.fields is None:
        specs = {
            name: infer_field(name, kind.value_type if pa.types.is_dictionary(kind) else kind)
            for name, kind in columns.items()
            if name != table.key
        }
    else:
        specs = {name: parse_field(name, spec) for name, spec in table.fields.items()}
        for name in specs:
            if name not in columns or name == table.key:
                raise KeyError(
                    f"{where}: column {name!r} is not in the table; it has {[c for c in columns if c != table.key]}"
                )
    vocabulary = Vocabulary(
        folder / "vocabularies" / f"{schema['fields'][field]['file']}.arrow", schema["fields"][field]
    )
    names = [table.key, *specs]
    ids, values, read = _read(parts, names, vocabulary, where)
    kept = ids >= FIRST_VALUE
    ids = ids[kept]
    repeated = np.flatnonzero(np.bincount(ids, minlength=len(vocabulary)) > 1)
    if len(repeated):
        raise ValueError(
            f"{where}: {len(repeated)} key(s) appear more than once, such as {vocabulary.decode(repeated[:1])[0]!r};"
            " every value needs one row"
        )
    chosen = pa.array(kept)
    described = {}
    for i, (name, spec) in enumerate(specs.items()):
        file = layout.file_name(i, f"{field}.{name}")
        array = values[name].filter(chosen)
        place = f"{where}: column {name!r}"
        entry = describe(spec) | {"file": file}
        if isinstance(spec, Categorical):
            kind = (
                pa.string()
                if is_text(array.type)
                or (spec.values and isinstance(spec.values[0], str))
                or pa.types.is_null(array.type)
                else pa.int64()
            )
            out, entry["size"] = _categorical(folder, file, spec, kind, ids, array, len(vocabulary), place)
            entry["values"] = str(kind)
        elif isinstance(spec, Numeric):
            dtype = np.dtype(spec.dtype)
            out = np.full(len(vocabulary), np.nan if dtype.kind == "f" else 0, dtype)
            out[ids] = numbers(array, dtype, len(array), place)
        else:
            valid = array.is_valid()
            matrix, bad = parse_vectors(array.drop_null(), spec, spec.width, place)
            if bad.any():
                raise ValueError(
                    f"{place}: {array.drop_null()[int(np.argmax(bad))].as_py()!r} is not a vector of {matrix.shape[1]}"
                    f" {spec.dtype} numbers"
                )
            out = np.zeros((len(vocabulary), matrix.shape[1]), spec.dtype)
            out[ids[valid.to_numpy(zero_copy_only=False)]] = matrix
            entry["width"] = matrix.shape[1]
        entry["dtype"] = out.dtype.name
        layout.write_array(folder / "items" / f"{file}.npy", out)
        described[name] = entry
    rows = {"in": read, "out": len(ids), "dropped": {"not_in_vocabulary": read - len(ids)}}
    return {"key": table.key, "rows": rows, "columns": described, "parts": [part.fingerprint for part in parts]}


def _read(
    parts: list, names: list[str], vocabulary: Vocabulary, where: str
) -> tuple[np.ndarray, dict[str, pa.Array], int]:
    # properties of values that the vocabulary lacks are dropped batch by batch, so memory holds known items only
    tables, ids, read = [], [], 0
    for part in parts:
        present = [name for name in names if name in part.schema.names]
        for batch in part.read(present, {}):
            read += batch.num_rows
            found = vocabulary.encode(
                plain(_dense(batch.column(0)), vocabulary.kind, f"{where}: key column {names[0]!r}")
            )
            keep = found >= FIRST_VALUE
            tables.append(
                pa.table({name: _dense(batch.column(i)).filter(pa.array(keep)) for i, name in enumerate(present)})
            )
            ids.append(found[keep])
    merged = (
        pa.concat_tables(tables, promote_options="permissive").combine_chunks()
        if tables
        else pa.table({name: pa.array([]) for name in names})
    )
    columns = {name: _one(merged.column(name)) for name in names}
    return np.concatenate(ids) if ids else np.zeros(0, np.int32), columns, read


def _categorical(
    folder: Path,
    file: str,
    spec: Categorical,
    kind: pa.DataType,
    ids: np.ndarray,
    array: pa.Array,
    size: int,
    place: str,
) -> tuple[np.ndarray, int]:
    codes, distinct = code(array, kind, place)
    counts = np.bincount(codes, minlength=len(distinct) + 1)[1:]
    table = pa.table({"value": distinct, "count": counts})
    if spec.values is None:
        table = table.filter(pa.array(counts >= spec.min_count)).sort_by(
            [("count", "descending"), ("value", "ascending")]
        )
        if spec.max_size is not None:
            table = table.slice(0, spec.max_size)
    else:
        known = dict(zip(distinct.to_pylist(), counts.tolist(), strict=True))
        table = pa.table(
            {
                "value": pa.array(spec.values, kind),
                "count": pa.array([known.get(v, 0) for v in spec.values], pa.int64()),
            }
        )
    layout.write_table(folder / "vocabularies" / f"{file}.arrow", table)
    translate = np.full(len(distinct) + 1, UNKNOWN, np.int32)
    translate[0] = MISSING
    position = pa.compute.index_in(distinct, _one(table.column("value")))
    found = position.is_valid().to_numpy(zero_copy_only=False)
    translate[1:][found] = position.drop_null().to_numpy() + FIRST_VALUE
    out = np.zeros(size, np.int32)
    out[ids] = translate[codes]
    return out, len(table) + FIRST_VALUE


def _dense(array: pa.Array) -> pa.Array:
    return array.cast(array.type.value_type) if pa.types.is_dictionary(array.type) else array


def _one(column: pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks()
    return pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array
