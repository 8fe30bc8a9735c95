"""Logs to a store: read once, fit the vocabularies, sort by user and time, publish as a whole."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from seqdata import layout
from seqdata.fields import Categorical, ItemTable
from seqdata.index import write_index
from seqdata.items import write_items
from seqdata.job import Job
from seqdata.plan import Plan, make_plan
from seqdata.progress import Progress
from seqdata.sources import open_source
from seqdata.store import Store, open_store
from seqdata.times import parse_cutoff

Mapper = Callable[[Callable[[int], dict[str, Any]], Sequence[int]], Iterable[dict[str, Any]]]
DEFAULT_MEMORY = 512_000_000


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
    engine: str | Mapper = "duckdb",
    scheduler: str | None = None,
    memory_limit: int | str | None = None,
    shards: int = 1,
    progress: bool = True,
    overwrite: bool = False,
    resume: bool = False,
) -> Store:
    """Turns event logs into a store of one time-sorted run of events per user, and opens it.

    The log may be larger than memory. Events of equal time keep input order: tables as given, files as listed (globs
    sorted), rows as they stand. The store appears at `out` complete or not at all.

    sources: one source or {event table name: source}; a source is a path, a glob, a list of paths (Parquet, CSV), a
        pyarrow Table or RecordBatchReader, a pandas or polars frame, a DuckDB relation, `Sql(query)`, or anything with
        __arrow_c_stream__. Tables of a mapping may differ in columns and become one timeline per user.
    out: folder of the store.
    user, time: columns of the user id (integers or text) and the event time.
    fields: {column: Categorical | Hashed | Numeric | Vector}; None infers every other column.
    items: {categorical field: ItemTable}: properties of that field's values.
    event_field: name of the categorical field that holds the table name, for a mapping of sources.
    fit_before: vocabularies count only events before this time; None counts all events. Recorded in the schema.
    null_user: "error", or "drop" to leave such rows out and record how many.
    time_unit: unit of integer times: "s", "ms", "us" or "ns".
    time_format: strptime format of text times, or of integers such as 20060410.
    types: {column: "int64" | "string" | "float64"}: casts applied before anything else.
    engine: "duckdb", the embedded engine, or "dask" to ingest parts and sort shards on the workers of a cluster, or a
        function (step, numbers) -> results that maps a picklable step wherever it likes; the bytes are the same.
    scheduler: address of the Dask scheduler; None starts a local cluster.
    memory_limit: bytes or text such as "512MB" that the buffers of each building process stay within; default 512 MB.
    shards: number of shards that users are dealt to by hash.
    progress: draw a progress bar when standard error is a terminal.
    overwrite: replace an existing store, atomically, once the new one is complete.
    resume: keep the finished steps of a build that fails, and continue an earlier one of the same input; files only.

    Raises ValueError, KeyError, TypeError, FileNotFoundError or FileExistsError naming the argument, column, value or
    row at fault, and OSError when the disk is full.
    """
    if engine not in ("duckdb", "dask") and not callable(engine):
        raise ValueError(f"engine={engine!r}: needs 'duckdb', 'dask' or a function that maps a step over numbers")
    if scheduler is not None and engine != "dask":
        raise ValueError(f"scheduler={scheduler!r}: only engine='dask' has one")
    if shards < 1 or shards > 4096:
        raise ValueError(f"shards={shards}: needs an integer from 1 to 4096")
    budget = parse_bytes(memory_limit)
    plan = plan_build(
        sources,
        user=user,
        time=time,
        fields=fields,
        event_field=event_field,
        types=types or {},
        fit_before=None if fit_before is None else parse_cutoff(fit_before, "fit_before"),
        null_user=null_user,
        time_unit=time_unit,
        time_format=time_format,
        shards=shards,
        budget=budget,
    )
    check_items(items or {}, plan)
    if resume and plan.signature() is None:
        raise ValueError("resume=True: needs sources on disk; a table or stream in memory cannot be recognised again")
    with layout.new_folder(out, overwrite, keep=resume) as folder:
        job = Job(plan, folder)
        job.prepare(resume)
        if engine == "dask":
            from seqdata.scale import run_dask

            schema = run_dask(job, scheduler, progress)
        elif callable(engine):
            from seqdata.scale import run_mapped

            schema = run_mapped(job, engine)
        else:
            schema = run_local(job, progress)
        schema["items"] = write_items(job.fitted, items or {}, schema, budget)
        if shards > 1:
            folders = [folder / "shards" / shard["folder"] for shard in schema["shards"]]
            write_index(folders, job.fitted / "index", budget // 3)
        finish(folder, schema)
    return open_store(out)


def plan_build(sources: Any, *, event_field: str, null_user: str, budget: int, **options: Any) -> Plan:
    """Opens the sources of `build` and checks its arguments against their columns."""
    if null_user not in ("error", "drop"):
        raise ValueError(f"null_user={null_user!r}: needs 'error' or 'drop'")
    several = isinstance(sources, Mapping)
    if several and not sources:
        raise ValueError("sources={}: needs at least one event table")
    named = {str(name): source for name, source in sources.items()} if several else {"events": sources}
    tables = {name: open_source(source, name, budget // 2) for name, source in named.items()}
    return make_plan(
        tables, event_field=event_field if several else None, null_user=null_user, budget=budget, **options
    )


def run_local(job: Job, progress: bool) -> dict[str, Any]:
    """All steps of a job, one after the other; returns its schema."""
    plan = job.plan
    sizes = [part.rows for _, part in plan.parts]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    bar = Progress("read", total, "rows", progress)
    parts, done = [], 0
    for number in range(len(plan.parts)):
        parts.append(job.ingest(number, bar.after(done)))
        done += parts[-1]["rows_in"]
    bar.close(done)
    check_not_empty(parts)
    described = job.fit(parts)
    rows = sum(sum(map(sum, part["rows"])) for part in parts)
    bar = Progress("sort", rows, "events", progress)
    shards, done = [], 0
    for shard in range(plan.shards):
        shards.append(job.sort(shard, parts, described, bar.after(done)))
        done += shards[-1]["events"]
    bar.close(done)
    return job.schema(parts, described, shards)


def check_not_empty(parts: list[dict[str, Any]]) -> None:
    """Refuses a log without events."""
    read, dropped = sum(part["rows_in"] for part in parts), sum(part["dropped"] for part in parts)
    if read == dropped:
        raise ValueError(f"the log is empty: {read:,} rows read{', all dropped for a null user' if dropped else ''}")


def finish(folder: Any, schema: dict[str, Any]) -> None:
    """Drops the working files and writes schema.json, which makes the folder a store."""
    shutil.rmtree(folder / "work")
    layout.write_json(folder / "schema.json", schema)


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


def check_items(items: Mapping[str, ItemTable], plan: Plan) -> None:
    """Refuses an item table of a field that is not categorical."""
    for name in items:
        if not isinstance(plan.fields.get(name), Categorical):
            known = [field for field, spec in plan.fields.items() if isinstance(spec, Categorical)]
            raise KeyError(f"items: {name!r} is not a categorical field; the categorical fields are {known}")
