"""Logs to a store: read once, fit the vocabularies, sort by user and time, publish as a whole."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seqdata.checksums import seal
from seqdata.engines import Mapper, run_dask, run_local, run_mapped
from seqdata.fields import ItemTable
from seqdata.index import write_index
from seqdata.items import write_items
from seqdata.job import Job
from seqdata.plan import check_items, parse_bytes, plan_build
from seqdata.publish import new_folder
from seqdata.store import Store, open_store
from seqdata.times import event_range, parse_cutoff, parse_moment


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
    dedup: bool = False,
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

    Args:
        sources: one source or {event table name: source}; a source is a path, a folder, a glob, a list of paths
            (Parquet, CSV), a pyarrow Table, RecordBatchReader or Dataset, a pandas or polars frame, a Hugging Face
            dataset, a DuckDB relation, `Sql(query)`, or anything with __arrow_c_stream__. Tables of a mapping may
            differ in columns and become one timeline per user. Where times are lists, a row is a user.
        out: folder of the store.
        user: column of the user id, integers or text.
        time: column of the event time.
        fields: {column: Categorical | Hashed | Numeric | Vector}; None infers every other column.
        items: {categorical field: ItemTable}: properties of that field's values.
        event_field: name of the categorical field that holds the table name, for a mapping of sources.
        fit_before: vocabularies count only events before this time; None counts all events. Recorded in the schema.
        null_user: "error", or "drop" to leave such rows out and record how many.
        dedup: leave out events that repeat an earlier one in user, time and every field, and record how many.
        time_unit: unit of integer times: "s", "ms", "us" or "ns".
        time_format: strptime format of text times, or of integers such as 20060410.
        types: {column: "int64" | "string" | "float64"}: casts applied before anything else.
        engine: "duckdb", the embedded engine, or "dask" to ingest parts and sort shards on the workers of a cluster,
            or a function (step, numbers) -> results that maps a picklable step wherever it likes; the bytes are the
            same.
        scheduler: address of the Dask scheduler; None starts a local cluster.
        memory_limit: bytes or text such as "512MB" that the buffers of each building process stay within; default
            512 MB.
        shards: number of shards that users are dealt to by hash.
        progress: draw a progress bar when standard error is a terminal.
        overwrite: replace an existing store, atomically, once the new one is complete.
        resume: keep the finished steps of a build that fails, and continue an earlier one of the same input; files
            only.

    Returns:
        The store, opened.

    Raises:
        ValueError, KeyError, TypeError: names the argument, column, value or row at fault.
        FileNotFoundError: a source is missing.
        FileExistsError: something is at `out` that may not be replaced, or another process builds it.
        OSError: the disk is full; what stood at `out` is untouched.
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
        dedup=dedup,
        time_unit=time_unit,
        time_format=time_format,
        shards=shards,
        budget=budget,
    )
    check_items(items or {}, plan)
    if resume and plan.signature() is None:
        raise ValueError("resume=True: needs sources on disk; a table or stream in memory cannot be recognised again")
    with new_folder(out, overwrite, keep=resume) as folder:
        job = Job(plan, folder)
        job.prepare(resume)
        if engine == "dask":
            schema = run_dask(job, scheduler, progress)
        elif callable(engine):
            schema = run_mapped(job, engine)
        else:
            schema = run_local(job, progress)
        if fit_before is not None:
            # only now is it known when the events were
            parse_moment(fit_before, "fit_before", *event_range(schema["shards"]))
        schema["items"] = write_items(job.fitted, items or {}, schema, budget)
        if shards > 1:
            folders = [folder / "shards" / shard["folder"] for shard in schema["shards"]]
            write_index(folders, job.fitted / "index", budget // 3)
        finish(folder, schema)
    return open_store(out)


def finish(folder: Path, schema: dict[str, Any]) -> None:
    """Writes checksums and schema.json, which makes the folder a store."""
    seal(folder, schema)
