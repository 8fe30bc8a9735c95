"""To and from other tools: Parquet lists, RecBole's atomic files, torch.nested."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from seqdata.fields import Categorical, Field, ItemTable, Numeric, Vector
from seqdata.jagged import Jagged
from seqdata.sources import Sql
from seqdata.view import View

RECBOLE: dict[str, Field] = {
    "token": Categorical(),
    "float": Numeric("float32"),
    "token_seq": Categorical(),
    "float_seq": Vector(dtype="float32"),
}
ROWS = 1 << 16


def to_parquet(view: View, path: str | os.PathLike, *, fields: Sequence[str] | None = None, ids: bool = False) -> int:
    """Writes one row a user: its id, a list of timestamps and a list for every field; returns the number of rows.

    Args:
        view: users and events
        path: the file to write
        fields: names, item properties as "field.column"; None takes every event field
        ids: keep ids instead of values

    Raises:
        ValueError: the view has no users
    """
    store = view.store
    names = list(store.fields if fields is None else fields)
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    writer = None
    if not len(view):
        raise ValueError("to_parquet: the view has no users")
    try:
        for start in range(0, len(view), ROWS):
            rows = np.arange(start, min(start + ROWS, len(view)))
            positions, lengths = view.positions(rows), view.lengths()[rows]
            offsets = pa.array(np.append(0, np.cumsum(lengths)), pa.int64())
            stamps = pa.array(store.time[positions], pa.timestamp("us", "UTC"))
            columns = {
                store.schema["user"]["column"]: pa.array(view.users[rows]),
                store.schema["time"]["column"]: pa.LargeListArray.from_arrays(offsets, stamps),
            }
            for name, values in view.values_at(names, positions).items():
                if name != "timestamp":
                    columns[name] = pa.LargeListArray.from_arrays(offsets, _values(store, name, values, ids))
            table = pa.table(columns)
            writer = writer or pq.ParquetWriter(temporary, table.schema, compression="zstd")
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()
    temporary.replace(path)
    return len(view)


def to_recbole(view: View, folder: str | os.PathLike, *, fields: Sequence[str] | None = None, ids: bool = False) -> int:
    """Writes RecBole's atomic files, FOLDER/NAME.inter and a NAME.item for the first item table; returns the rows.

    Times are seconds. Missing values are empty, which RecBole reads as missing.

    Args:
        view: users and events
        folder: where the files go; its last part is their NAME
        fields: names; None takes every event field
        ids: keep ids instead of values

    Raises:
        ValueError: a field is a vector
    """
    store, folder = view.store, Path(folder)
    names = list(store.fields if fields is None else fields)
    for name in names:
        if store.entry(name)["kind"] == "vector":
            raise ValueError(f"to_recbole: {name!r} is a vector field; leave it out with fields=")
    folder.mkdir(parents=True, exist_ok=True)
    path, rows = folder / f"{folder.name}.inter", 0
    heads = [f"{store.schema['user']['column']}:token", "timestamp:float"]
    heads += [f"{name}:{'float' if store.entry(name)['kind'] == 'numeric' else 'token'}" for name in names]
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "wb") as file:
        file.write(("\t".join(heads) + "\n").encode())
        for batch in view.batches(batch_size=ROWS, fields=names):
            owner = np.repeat(batch.users, batch.jagged.lengths)
            columns = [pa.array(owner), pa.array(batch.jagged["timestamp"])]
            columns += [_values(store, name, batch.jagged[name], ids) for name in names]
            _write_rows(file, columns)
            rows += len(owner)
    temporary.replace(path)
    for field in list(store.schema["items"])[:1]:
        _write_recbole_items(view, field, folder / f"{folder.name}.item", ids)
    return rows


def read_recbole(folder: str | os.PathLike) -> dict[str, Any]:
    """Arguments for `build` from a RecBole data set: FOLDER/NAME.inter, and NAME.item as an item table where it is.

    Gives sources, user, time, time_unit, fields and items; the user and time columns are the usual user_id and
    timestamp, and the types written in the header (token, float, token_seq, float_seq) decide the fields. A token_seq
    stays one text.

    Args:
        folder: of the data set; its last part is the NAME of the files

    Raises:
        ValueError: the file has no column user_id or timestamp
    """
    folder = Path(folder)
    inter, items = folder / f"{folder.name}.inter", folder / f"{folder.name}.item"
    types = _recbole_header(inter)
    if "user_id" not in types or "timestamp" not in types:
        raise ValueError(f"{inter}: has columns {list(types)}; needs user_id and timestamp")
    made: dict[str, Any] = {
        "sources": _recbole_source(inter, types, "timestamp"),
        "user": "user_id",
        "time": "timestamp",
        "time_unit": "us",
        "fields": {name: RECBOLE[kind] for name, kind in types.items() if name not in ("user_id", "timestamp")},
    }
    if items.exists():
        columns = _recbole_header(items)
        key = "item_id" if "item_id" in columns else next(iter(columns))
        fields = {name: RECBOLE[kind] for name, kind in columns.items() if name != key}
        made["items"] = {key: ItemTable(_recbole_source(items, columns, None), key, fields)}
    return made


def to_nested(view: View, fields: Sequence[str] | None = None) -> dict[str, Any]:
    """{field: torch.nested tensor of jagged layout} of all users of a view at once, timestamps included.

    Args:
        view: users and events
        fields: names, item properties as "field.column"; None takes every event field
    """
    names = list(view.store.fields if fields is None else fields)
    return Jagged(view.gather(names).values, view.gather([]).offsets).to_nested()


def _values(store: Any, name: str, values: np.ndarray, ids: bool) -> pa.Array:
    entry = store.entry(name)
    if values.ndim == 2:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    if entry["kind"] == "numeric" and values.dtype.kind == "f":
        return pa.array(values, mask=np.isnan(values))
    if entry["kind"] == "vector" and not ids:
        vectors = store.vectors(name)
        width = vectors.shape[1]
        return pa.FixedSizeListArray.from_arrays(
            pa.array(vectors[values].reshape(-1)), width, mask=pa.array(values == 0)
        )
    if entry["kind"] == "categorical" and not ids:
        return store.vocabulary(name).take(values)
    return pa.array(values)


def _write_rows(file: Any, columns: Sequence[pa.Array]) -> None:
    """Writes rows of tab-separated values as they are: RecBole's files know no quotes."""
    texts = [_text(column) for column in columns]
    lines = pc.binary_join_element_wise(
        *texts, pa.scalar("\t", pa.large_string()), null_handling="replace", null_replacement=""
    )
    for start in range(0, len(lines), ROWS):
        file.write(("\n".join(lines[start : start + ROWS].to_pylist()) + "\n").encode())


def _text(column: pa.Array) -> pa.Array:
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    texts = column.cast(pa.large_string())
    for character in ("\t", "\n", "\r"):
        texts = pc.replace_substring(texts, character, " ")
    return texts


def _write_recbole_items(view: View, field: str, path: Path, ids: bool) -> None:
    store = view.store
    vocabulary = store.vocabulary(field)
    first = vocabulary.first_value
    names = [name for name, (owner, _) in store.item_columns.items() if owner == field]
    names = [name for name in names if store.entry(name)["kind"] != "vector"]
    keys = pa.array(np.arange(first, len(vocabulary))) if ids else vocabulary.table.column("value")
    columns, heads = [keys], [f"{field}:token"]
    for name in names:
        columns.append(_values(store, name, store.item_column(field, store.item_columns[name][1])[first:], ids))
        heads.append(f"{store.item_columns[name][1]}:{'float' if store.entry(name)['kind'] == 'numeric' else 'token'}")
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "wb") as file:
        file.write(("\t".join(heads) + "\n").encode())
        _write_rows(file, columns)
    temporary.replace(path)


def _recbole_header(path: Path) -> dict[str, str]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            head = next(csv.reader(file, delimiter="\t"), [])
    except FileNotFoundError:
        raise FileNotFoundError(f"no RecBole file {path}; the folder is named as its data set") from None
    types = {name: kind for name, _, kind in (column.rpartition(":") for column in head)}
    for name, kind in types.items():
        if kind not in RECBOLE:
            raise ValueError(f"{path}: column {name!r} has type {kind!r}; needs one of {sorted(RECBOLE)}")
    return types


def _recbole_source(path: Path, types: dict[str, str], time: str | None) -> Sql:
    columns = []
    for name, kind in types.items():
        value = '"' + f"{name}:{kind}".replace('"', '""') + '"'
        if name == time:
            # RecBole's times are floats of seconds
            value = f"round({value} * 1000000)::BIGINT"
        elif kind == "float":
            value = f"{value}::DOUBLE"
        columns.append(f'{value} AS "{name}"')
    kinds = ", ".join(
        f"'{name}:{kind}': '{'DOUBLE' if kind == 'float' else 'VARCHAR'}'" for name, kind in types.items()
    )
    file = str(path).replace("'", "''")
    return Sql(
        f"SELECT {', '.join(columns)} FROM read_csv('{file}', delim='\t', header=true, quote='', types={{{kinds}}})"
    )
