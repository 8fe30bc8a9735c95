"""Logs to a store: read once, fit the vocabularies, sort by user and time, publish as a whole."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from seqdata import layout
from seqdata.encode import CategoricalColumn, NumericColumn, TextUsers, VectorColumn, plain
from seqdata.fields import Categorical, Field, ItemTable, Numeric, describe, infer_field, is_text, parse_field
from seqdata.items import write_items
from seqdata.progress import Progress
from seqdata.sources import Part, connect, open_source
from seqdata.spool import Spool, sorted_runs
from seqdata.store import Store, open_store
from seqdata.times import TimeParser, format_time, parse_cutoff

DEFAULT_MEMORY = 512 << 20


def build(
    sources: Any,
    out: str | os.PathLike,
    *,
    user: str,
    time: str,
    fields: Mapping[str, Any] | None = None,
    items: Mapping[str, ItemTable] | None = None,
    event_field: str = "event_type",
    fit_before: Any = None,
    null_user: str = "error",
    time_unit: str | None = None,
    time_format: str | None = None,
    types: Mapping[str, str] | None = None,
    engine: str = "duckdb",
    memory_limit: int | str | None = None,
    progress: bool = True,
    overwrite: bool = False,
) -> Store:
    """Turns event logs into a store of one time-sorted run of events per user, and opens it.

    The log may be larger than memory. Events of equal time keep input order: tables as given, files as listed (globs
    sorted), rows as they stand. The store appears at `out` complete or not at all.

    sources: one source or {event table name: source}; a source is a path, a glob, a list of paths (Parquet, CSV), a
        pyarrow Table or RecordBatchReader, a pandas or polars frame, a DuckDB relation, `Sql(query)`, or anything with
        __arrow_c_stream__. Tables of a mapping may differ in columns and become one timeline per user.
    out: folder of the store.
    user, time: columns of the user id (integers or text) and the event time.
    fields: {column: Categorical | Numeric | Vector}; None infers every other column.
    items: {categorical field: ItemTable}: properties of that field's values.
    event_field: name of the categorical field that holds the table name, for a mapping of sources.
    fit_before: vocabularies count only events before this time; None counts all events. Recorded in the schema.
    null_user: "error", or "drop" to leave such rows out and record how many.
    time_unit: unit of integer times: "s", "ms", "us" or "ns". time_format: strptime format of text times.
    types: {column: "int64" | "string" | "float64"}: casts applied before anything else.
    engine: "duckdb", the embedded engine.
    memory_limit: bytes or text such as "512MB" that the build's buffers stay within; default 512 MB.
    progress: draw a progress bar when standard error is a terminal.
    overwrite: replace an existing store, atomically, once the new one is complete.

    Raises ValueError, KeyError, TypeError, FileNotFoundError or FileExistsError naming the argument, column, value or
    row at fault, and OSError when the disk is full.
    """
    if engine != "duckdb":
        raise ValueError(f"engine={engine!r}: needs 'duckdb'")
    if null_user not in ("error", "drop"):
        raise ValueError(f"null_user={null_user!r}: needs 'error' or 'drop'")
    budget = parse_bytes(memory_limit)
    cutoff = None if fit_before is None else parse_cutoff(fit_before, "fit_before")
    several = isinstance(sources, Mapping)
    if several and not sources:
        raise ValueError("sources={}: needs at least one event table")
    tables = (
        {str(name): open_source(source, str(name), budget // 2) for name, source in sources.items()}
        if several
        else {"events": open_source(sources, "source", budget // 2)}
    )
    plan = _plan(tables, several, user, time, fields, event_field, dict(types or {}))
    for name in items or {}:
        if not isinstance(plan.fields.get(name), Categorical):
            raise KeyError(
                f"items: {name!r} is not a categorical field; the categorical fields are"
                f" {[n for n, f in plan.fields.items() if isinstance(f, Categorical)]}"
            )

    with layout.new_folder(out, overwrite) as folder:
        work = folder / "work"
        work.mkdir()
        ingest = _Ingest(plan, work, cutoff, null_user, time_unit, time_format, budget)
        ingest.run(progress)
        if not ingest.spool.rows:
            raise ValueError(
                f"the log is empty: {ingest.rows_in:,} rows read, none"
                f" left{' after dropping null users' if ingest.dropped else ''}"
            )
        schema = ingest.write(folder, progress)
        schema["items"] = write_items(folder, items or {}, schema, budget)
        shutil.rmtree(work)
        layout.write_json(folder / "schema.json", schema)
    return open_store(out)


def parse_bytes(limit: int | str | None) -> int:
    """Bytes of a number or of text such as "512MB" or "2 GiB"; None is 512 MB."""
    if limit is None:
        return DEFAULT_MEMORY
    if isinstance(limit, str):
        match = re.fullmatch(r"\s*([\d.]+)\s*([kmgt]?)(i?)b?\s*", limit.lower())
        if not match:
            raise ValueError(f"memory_limit={limit!r}: needs bytes or text such as '512MB'")
        base = 1024 if match[3] else 1000
        limit = int(float(match[1]) * base ** " kmgt".index(match[2] or " "))
    if limit < 32_000_000:
        raise ValueError(f"memory_limit={limit}: needs at least 32 MB")
    return int(limit)


@dataclass(frozen=True)
class _Plan:
    tables: dict[str, list[Part]]
    user: str
    time: str
    text_users: bool
    fields: dict[str, Field]
    kinds: dict[str, pa.DataType]
    event_field: str | None
    types: dict[str, pa.DataType]


def _plan(
    tables: dict[str, list[Part]],
    several: bool,
    user: str,
    time: str,
    fields: Mapping[str, Any] | None,
    event_field: str,
    types: dict[str, str],
) -> _Plan:
    casts = {}
    for column, name in types.items():
        if name not in ("int64", "string", "float64"):
            raise ValueError(f"types={{{column!r}: {name!r}}}: needs 'int64', 'string' or 'float64'")
        casts[column] = {"int64": pa.int64(), "string": pa.string(), "float64": pa.float64()}[name]
    seen: dict[str, list[pa.DataType]] = {}
    for table, parts in tables.items():
        for part in parts:
            for role, column in (("user", user), ("time", time)):
                if column not in part.schema.names:
                    raise KeyError(
                        f"{role} column {column!r} is not in {part.where}{f' (table {table!r})' if several else ''}; it"
                        f" has {part.schema.names}"
                    )
            repeated = sorted({name for name in part.schema.names if part.schema.names.count(name) > 1})
            if repeated:
                raise ValueError(f"{part.where}: columns {repeated} appear twice")
            for column in part.schema:
                seen.setdefault(column.name, []).append(casts.get(column.name, column.type))
    for column in types:
        if column not in seen:
            raise KeyError(f"types: column {column!r} is in no table; there are {list(seen)}")
    if several and event_field in seen:
        raise ValueError(
            f"event_field={event_field!r} is also a column of the log; choose another name for the field that holds the"
            " table name"
        )
    others = [column for column in seen if column not in (user, time)]
    if fields is None:
        chosen = {column: infer_field(column, _common(column, seen[column])) for column in others}
    else:
        chosen = {column: parse_field(column, spec) for column, spec in fields.items()}
        for column in chosen:
            if several and column == event_field:
                raise ValueError(f"fields: {column!r} is the event_field, which is made from the table names")
            if column in (user, time):
                raise ValueError(
                    f"fields: {column!r} is the {'user' if column == user else 'time'} column, which is always kept"
                )
            if column not in seen:
                raise KeyError(f"fields: column {column!r} is in no table; there are {others}")
    if "timestamp" in chosen and time != "timestamp":
        raise ValueError("fields: the name 'timestamp' is taken by the event times in batches; rename the column")
    kinds = {column: _kind(column, spec, seen[column]) for column, spec in chosen.items()}
    text_users = any(is_text(_value_type(kind)) for kind in seen[user])
    for kind in map(_value_type, seen[user]):
        if not (is_text(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
            raise ValueError(f"user column {user!r} has type {kind}; needs integers or text")
    if several:
        chosen = {event_field: Categorical(), **chosen}
        kinds[event_field] = pa.string()
    return _Plan(tables, user, time, text_users, chosen, kinds, event_field if several else None, casts)


def _value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _common(column: str, kinds: Sequence[pa.DataType]) -> pa.DataType:
    kinds = [_value_type(kind) for kind in kinds]
    for test in (is_text, pa.types.is_floating):
        for kind in kinds:
            if test(kind):
                return kind
    return next((kind for kind in kinds if not pa.types.is_null(kind)), kinds[0])


def _kind(column: str, spec: Field, kinds: Sequence[pa.DataType]) -> pa.DataType:
    if not isinstance(spec, Categorical):
        return pa.float64()
    kinds = [_value_type(kind) for kind in kinds if not pa.types.is_null(_value_type(kind))]
    if spec.values and all(isinstance(value, str) for value in spec.values):
        return pa.string()
    if spec.values and all(isinstance(value, int | np.integer) for value in spec.values):
        return pa.int64()
    if any(is_text(kind) for kind in kinds) or not kinds:
        return pa.string()
    for kind in kinds:
        if not (pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_floating(kind)):
            raise ValueError(
                f"column {column!r} has type {kind}; a Categorical needs integers or text: cast it with"
                f" types={{{column!r}: 'string'}}"
            )
    return pa.int64()


class _Ingest:
    """The state of one build between reading and publishing."""

    def __init__(
        self,
        plan: _Plan,
        work: Path,
        cutoff: int | None,
        null_user: str,
        unit: str | None,
        format: str | None,
        budget: int,
    ) -> None:
        self.plan, self.work, self.cutoff, self.null_user, self.budget = plan, work, cutoff, null_user, budget
        self.unit, self.format = unit, format
        self.rows_in = self.dropped = 0
        self.per_table: dict[str, dict[str, int]] = {}
        self.columns: dict[str, CategoricalColumn | NumericColumn | VectorColumn] = {}
        for i, (name, spec) in enumerate(plan.fields.items()):
            if isinstance(spec, Categorical):
                names = list(plan.tables) if name == plan.event_field else None
                self.columns[name] = CategoricalColumn(name, spec, plan.kinds[name], work, i, names)
            elif isinstance(spec, Numeric):
                self.columns[name] = NumericColumn(name, spec)
            else:
                self.columns[name] = VectorColumn(name, spec, work, i)
        self.users = (
            TextUsers(plan.user, Categorical(), pa.string(), work, len(plan.fields)) if plan.text_users else None
        )
        keys = {"user": np.dtype(np.int32 if plan.text_users else np.int64), "time": np.dtype(np.int64)}
        # spool columns are numbered, since a field may be called "user" or "time"
        self.slots = {name: f"field_{i}" for i, name in enumerate(self.columns)}
        self.spool = Spool(work, keys | {self.slots[name]: column.dtype for name, column in self.columns.items()})

    def run(self, progress: bool) -> None:
        sizes = [part.rows for parts in self.plan.tables.values() for part in parts]
        total = None if any(size is None for size in sizes) else sum(size or 0 for size in sizes)
        bar = Progress("read", total, "rows", progress)
        for table, parts in self.plan.tables.items():
            before = self.rows_in, self.dropped
            for part in parts:
                self._part(table, part, bar)
            read, dropped = self.rows_in - before[0], self.dropped - before[1]
            self.per_table[table] = {"rows_in": read, "rows_out": read - dropped, "dropped_null_user": dropped}
        self.spool.close()
        bar.close(self.rows_in)

    def _part(self, table: str, part: Part, bar: Progress) -> None:
        plan = self.plan
        parser = TimeParser(plan.time, self.unit, self.format)
        names = list(
            dict.fromkeys([plan.user, plan.time, *(name for name in self.columns if name in part.schema.names)])
        )
        kinds = {plan.time: pa.string()} | plan.types
        first = 0
        for batch in part.read(names, kinds):
            if not batch.num_rows:
                continue
            values = {name: self._cast(name, batch.column(i), part.where) for i, name in enumerate(names)}
            time = parser.parse(values[plan.time], first, part.where)
            keep = self._keep(values[plan.user], first, part.where)
            if keep is not None:
                chosen = pa.array(keep)
                values = {name: array.filter(chosen) for name, array in values.items()}
                time = time[keep]
                self.dropped += len(keep) - len(time)
            self._batch(table, part.where, values, time, first)
            first += batch.num_rows
            self.rows_in += batch.num_rows
            bar.update(self.rows_in)

    def _cast(self, name: str, array: pa.Array, where: str) -> pa.Array:
        kind = self.plan.types.get(name)
        if kind is None or array.type == kind:
            return array
        if pa.types.is_dictionary(array.type):
            array = array.cast(array.type.value_type)
        return plain(array, kind, f"column {name!r} of {where}")

    def _keep(self, users: pa.Array, first: int, where: str) -> np.ndarray | None:
        if pa.types.is_floating(users.type):
            users = pc.if_else(pc.is_nan(users), pa.scalar(None, users.type), users)
        if not users.null_count:
            return None
        valid = users.is_valid().to_numpy(zero_copy_only=False)
        if self.null_user == "error":
            raise ValueError(
                f"user column {self.plan.user!r} of {where}: {users.null_count} null value(s), the first at row"
                f" {first + int(np.argmin(valid))}; pass null_user='drop' to leave such rows out"
            )
        return valid

    def _batch(self, table: str, where: str, values: dict[str, pa.Array], time: np.ndarray, first: int) -> None:
        plan, rows = self.plan, len(time)
        fit = None if self.cutoff is None else time < self.cutoff
        users = values[plan.user]
        if self.users is not None:
            keys = self.users.ingest(users, None, rows, where)
        else:
            keys = plain(
                users.cast(users.type.value_type) if pa.types.is_dictionary(users.type) else users,
                pa.int64(),
                f"user column {plan.user!r} of {where}",
            ).to_numpy(zero_copy_only=False)
            if rows and int(keys.min()) < 0:
                at = int(np.argmax(keys < 0))
                raise ValueError(
                    f"user column {plan.user!r} of {where}: negative id {keys[at]} at row {first + at}; ids need to be"
                    f" >= 0 (or text: types={{{plan.user!r}: 'string'}})"
                )
        spooled = {"user": keys, "time": time}
        for name, column in self.columns.items():
            if name == plan.event_field:
                source = pa.DictionaryArray.from_arrays(np.zeros(rows, np.int32), pa.array([table]))
            else:
                source = values.get(name)
            spooled[self.slots[name]] = column.ingest(source, fit, rows, where)
        self.spool.append(spooled)

    def write(self, folder: Path, progress: bool) -> dict[str, Any]:
        schema = self._fit(folder)
        columns = {self.slots[name]: column for name, column in self.columns.items()}

        def translate(name: str, batch: int, values: np.ndarray) -> np.ndarray:
            if name == "user":
                return values if self.users is None else self.users.final(batch, values)
            return values if name == "time" else columns[name].final(batch, values)

        shard = folder / "shards" / "00000"
        shard.mkdir(parents=True)
        rows = self.spool.rows
        writers = {"time": layout.ArrayWriter(shard / "time.npy", np.int64, rows)}
        for name, column in self.columns.items():
            writers[self.slots[name]] = layout.ArrayWriter(
                shard / f"{schema['fields'][name]['file']}.npy", column.dtype, rows
            )
        bar = Progress("sort", rows, "events", progress)
        users, lengths, low, high = [], [], [], []
        for ids, counts, time, column in sorted_runs(self.spool, translate, self.work, self.budget // 3, bar.update):
            users.append(ids)
            lengths.append(counts)
            low.append(int(time.min()))
            high.append(int(time.max()))
            writers["time"].append(time)
            for slot in self.slots.values():
                writers[slot].append(column(slot))
        for writer in writers.values():
            writer.close()
        bar.close(rows)
        self._write_users(shard, np.concatenate(users))
        layout.write_array(
            shard / "offsets.npy", np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
        )
        count = sum(map(len, users))
        schema["shards"] = [
            {"folder": "00000", "users": count, "events": rows, "time_min": min(low), "time_max": max(high)}
        ]
        schema["num_users"], schema["num_events"] = count, rows
        return schema

    def _fit(self, folder: Path) -> dict[str, Any]:
        (folder / "vocabularies").mkdir()
        (folder / "vectors").mkdir()
        described: dict[str, Any] = {}
        connection = connect(self.budget // 2, self.work)
        for i, (name, column) in enumerate(self.columns.items()):
            entry = describe(column.spec) | {"file": layout.file_name(i, name), "dtype": column.dtype.name}
            if isinstance(column, CategoricalColumn):
                table = column.fit(connection)
                layout.write_table(
                    folder / "vocabularies" / f"{entry['file']}.arrow", _vocabulary_table(table, column.kind)
                )
                entry |= {"size": len(table) + 2, "values": "int64" if column.kind == pa.int64() else "string"}
            elif isinstance(column, VectorColumn):
                matrix = column.matrix(column.fit(connection))
                layout.write_array(folder / "vectors" / f"{entry['file']}.npy", matrix)
                entry |= {"size": len(matrix), "width": matrix.shape[1], "vector_dtype": column.spec.dtype}
            described[name] = entry
        if self.users is not None:
            self.user_values = self.users.fit(connection).column(0)
        connection.close()
        return {
            "format": layout.FORMAT,
            "version": layout.VERSION,
            "user": {"column": self.plan.user, "dtype": "int64" if self.users is None else "string"},
            "time": {"column": self.plan.time, "unit": "us"},
            "event_field": self.plan.event_field,
            "fields": described,
            "fit_before": self.cutoff,
            "fit_before_text": None if self.cutoff is None else format_time(self.cutoff),
            "rows": {"in": self.rows_in, "out": self.spool.rows, "dropped": {"null_user": self.dropped}},
            "tables": {
                name: self.per_table[name] | {"parts": [part.fingerprint for part in parts]}
                for name, parts in self.plan.tables.items()
            },
        }

    def _write_users(self, shard: Path, ids: np.ndarray) -> None:
        if self.users is None:
            layout.write_array(shard / "users.npy", ids)
        else:
            layout.write_table(shard / "users.arrow", pa.table({"user": self.user_values.take(pa.array(ids))}))


def _vocabulary_table(table: pa.Table, kind: pa.DataType) -> pa.Table:
    return pa.table({"value": table.column(0).cast(kind), "count": table.column(1).cast(pa.int64())})
