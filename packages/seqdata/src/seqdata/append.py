"""New days of a log into a store that is there already, and many shards back into one."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from seqdata import layout
from seqdata.checksums import seal
from seqdata.engines import run_local
from seqdata.fields import Categorical, Field, Hashed, ItemTable, Numeric, Quantiles, Vector
from seqdata.generations import clean
from seqdata.index import write_index
from seqdata.items import extend_items
from seqdata.job import Job
from seqdata.part import Part
from seqdata.plan import check_items, parse_bytes, plan_build
from seqdata.publish import locked, raise_if_full
from seqdata.store import Store, open_store
from seqdata.times import event_range, format_time, parse_cutoff, parse_moment

COMPACT_ROWS = 1 << 20


def append(
    store: Store,
    sources: Any,
    *,
    items: Mapping[str, ItemTable] | None = None,
    fit_before: Any = None,
    taken: str = "refuse",
    memory_limit: int | str | None = None,
    progress: bool = True,
) -> Store:
    """Adds events to a store as one more shard and opens the result; nothing already there is rebuilt.

    Users, ids and vectors of the store keep their numbers. Events may have any time; where times tie, earlier events
    stay first. A reader that holds the store open keeps seeing what it opened, and a crash leaves the store as it was.

    Args:
        store: as it is now; one that has changed since it was opened is a ValueError
        sources: as for `build`; a mapping of tables where the store has an event field. Columns may be fewer than the
            store's: missing ones are missing values.
        items: {field: ItemTable} with properties of ids that are new; ids that had properties keep them.
        fit_before: values first counted among the new events before this time join the vocabularies behind the old
            ones; None adds no value, so new ones are unknown.
        taken: what becomes of files whose events are in the store: "refuse" is an error, "skip" leaves them out, which
            makes an append that is tried again harmless, "again" adds their events once more.
        memory_limit: as for `build`.
        progress: draw a progress bar when standard error is a terminal.

    Returns:
        The longer store, opened; the store itself where no source was left to add.

    Raises:
        ValueError: a source is in the store already, or does not fit it.
        FileExistsError: another process is changing the store.
        OSError: the disk is full; the store is untouched.
    """
    if taken not in ("refuse", "skip", "again"):
        raise ValueError(f"taken={taken!r}: needs 'refuse', 'skip' or 'again'")
    schema = store.schema
    cutoff = None if fit_before is None else parse_cutoff(fit_before, "fit_before")
    if cutoff is not None and schema["fit_before"] is not None and cutoff < schema["fit_before"]:
        raise ValueError(
            f"fit_before={fit_before!r} is before the store's {schema['fit_before_text']}; vocabularies only move"
            " forward"
        )
    if (schema["event_field"] is not None) != isinstance(sources, Mapping):
        need = "a mapping {table name: source}" if schema["event_field"] else "one source, not a mapping"
        raise ValueError(
            f"append: this store was built from {'tables' if schema['event_field'] else 'one table'}; needs {need}"
        )
    budget = parse_bytes(memory_limit)
    options = schema["options"]
    plan = plan_build(
        sources,
        user=schema["user"]["column"],
        time=schema["time"]["column"],
        fields={name: entry for name, entry in store_fields(store).items() if name != schema["event_field"]},
        kinds={name: entry["values"] for name, entry in schema["fields"].items() if "values" in entry},
        text_users=store.text_users,
        event_field=schema["event_field"],
        types=options["types"],
        fit_before=cutoff if cutoff is not None else schema["fit_before"],
        null_user=options["null_user"],
        dedup=options.get("dedup", False),
        time_unit=options["time_unit"],
        time_format=options["time_format"],
        shards=1,
        budget=budget,
    )
    check_items(items or {}, plan)
    plan = replace(plan, parts=_fresh(plan.parts, schema, taken))
    if not plan.parts:
        return store
    with locked(store.path), _workshop(store.path) as folder:
        current = open_store(store.path)
        if current.key != store.key:
            raise ValueError("append: the store has changed since it was opened; open it again")
        job = Job(plan, folder, previous=current, grow=cutoff is not None)
        job.prepare(resume=False)
        made = run_local(job, progress)
        if fit_before is not None:
            parse_moment(fit_before, "fit_before", *event_range(made["shards"]))
        made["items"] = extend_items(job.fitted, current, items or {}, made, budget)
        name = f"{1 + max(int(shard['folder']) for shard in schema['shards']):05d}"
        target = store.path / "shards" / name
        # a shard that schema.json does not name is the leftover of a crash
        shutil.rmtree(target, ignore_errors=True)
        (folder / "shards" / "00000").rename(target)
        shards = [*schema["shards"], made["shards"][0] | {"folder": name}]
        folders = [store.path / "shards" / shard["folder"] for shard in shards]
        users, events = write_index(folders, job.fitted / "index", budget // 3)
        merged = schema | {key: made[key] for key in ("generation", "fields", "items")}
        merged |= {"shards": shards, "num_users": users, "num_events": events}
        zones = {
            table: sorted({*made["time"]["zones"].get(table, ()), *schema["time"].get("zones", {}).get(table, ())})
            for table in made["time"]["zones"] | schema["time"].get("zones", {})
        }
        merged |= {"time": schema["time"] | {"zones": zones}}
        merged["rows"] = _add(schema["rows"], made["rows"])
        merged["tables"] = _add(schema["tables"], made["tables"])
        if cutoff is not None and schema["fit_before"] is not None:
            merged |= {"fit_before": cutoff, "fit_before_text": format_time(cutoff)}
        _switch(store.path, job.fitted, merged)
    return open_store(store.path)


def compact(store: Store) -> Store:
    """Rewrites a store of many shards as one, so that reading it needs no merging; the contents stay the same.

    Args:
        store: as it is now

    Returns:
        The rewritten store, opened

    Raises:
        ValueError: the store has changed since it was opened
        FileExistsError: another process is changing the store
        OSError: the disk is full; the store is untouched
    """
    schema = store.schema
    if len(schema["shards"]) == 1:
        return store
    with locked(store.path), _workshop(store.path) as folder:
        if open_store(store.path).key != store.key:
            raise ValueError("compact: the store has changed since it was opened; open it again")
        name = f"{1 + max(int(shard['folder']) for shard in schema['shards']):05d}"
        made = folder / "shard"
        made.mkdir()
        for field, entry in schema["fields"].items():
            with layout.ArrayWriter(made / f"{entry['file']}.npy", np.dtype(entry["dtype"])) as writer:
                for start in range(0, store.num_events, COMPACT_ROWS):
                    writer.append(store.take(field, np.arange(start, min(start + COMPACT_ROWS, store.num_events))))
        index = store.fitted / "index"
        for path in index.iterdir():
            if path.name != "order.npy":
                shutil.copyfile(path, made / path.name)
        generation = schema["generation"] + 1
        fitted = folder / "fitted"
        shutil.copytree(store.fitted, fitted, ignore=shutil.ignore_patterns("index"))
        target = store.path / "shards" / name
        shutil.rmtree(target, ignore_errors=True)
        made.rename(target)
        shard = {
            "folder": name,
            "users": store.num_users,
            "events": store.num_events,
            "time_min": min(one["time_min"] for one in schema["shards"]),
            "time_max": max(one["time_max"] for one in schema["shards"]),
        }
        _switch(store.path, fitted, schema | {"generation": generation, "shards": [shard]})
    return open_store(store.path)


def store_fields(store: Store) -> dict[str, Field]:
    """The fields of a store as they were asked for."""
    fields: dict[str, Field] = {}
    for name, entry in store.schema["fields"].items():
        if entry["kind"] == "categorical":
            values = store.vocabulary(name).values.tolist() if entry["fixed"] else None
            fields[name] = Categorical(entry["min_count"], entry["max_size"], values, entry["oov_buckets"])
        elif entry["kind"] == "hashed":
            fields[name] = Hashed(entry["buckets"], entry["seed"])
        elif entry["kind"] == "numeric":
            fields[name] = Numeric(entry["dtype"])
        elif entry["kind"] == "quantiles":
            fields[name] = Quantiles(entry["n"])
        else:
            fields[name] = Vector(entry["width"], entry["vector_dtype"])
    return fields


def _fresh(parts: list[tuple[str, Part]], schema: dict[str, Any], taken: str) -> list[tuple[str, Part]]:
    """The parts whose files are not in the store."""
    if taken == "again":
        return parts
    known = {_mark(part) for table in schema["tables"].values() for part in table["parts"]} - {None}
    # empty files are all alike and add nothing
    old = [part.rows != 0 and _mark(part.fingerprint() or {}) in known for _, part in parts]
    if any(old) and taken == "refuse":
        name = parts[old.index(True)][1].where
        raise ValueError(
            f"append: the events of {name} are in the store already; taken='skip' leaves such files out, 'again' adds"
            " them once more"
        )
    return [one for one, left in zip(parts, old, strict=True) if not left]


def _mark(fingerprint: dict[str, Any]) -> Any:
    """What tells files apart, whatever they are called now; the name and time of one that was read without a digest."""
    if "digest" in fingerprint:
        return fingerprint["bytes"], fingerprint["digest"]
    return tuple(fingerprint.get(key) for key in ("name", "bytes", "modified_ns")) if "bytes" in fingerprint else None


@contextlib.contextmanager
def _workshop(store: Path) -> Iterator[Path]:
    """A hidden folder inside a store to work in; it goes when the block ends, however it ends."""
    folder = store / ".work"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    except OSError as error:
        raise_if_full(error, f"changing {store}")
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _switch(store: Path, fitted: Path, schema: dict[str, Any]) -> None:
    target = layout.fitted(store, schema["generation"])
    shutil.rmtree(target, ignore_errors=True)
    fitted.rename(target)
    # from here on readers see the new state
    seal(store, schema, schema["generation"] - 1)
    clean(store, schema)


def _add(one: Any, other: Any) -> Any:
    """Sums the numbers and joins the lists of two nested dicts."""
    if not isinstance(one, dict):
        return one + other
    return {
        key: _add(one[key], other[key]) if key in one and key in other else (one | other)[key] for key in one | other
    }
