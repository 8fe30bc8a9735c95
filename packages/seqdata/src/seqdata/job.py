"""The steps of a build: ingest every part, fit, sort every shard. Each step leaves a marker, so none is done twice.

The steps only share a folder, so `ingest` of different parts and `sort` of different shards may run at the same time,
in other processes or on other machines that see the folder. The result does not depend on who ran what.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from seqdata import layout
from seqdata.encode import CategoricalCodec, HashedCodec, QuantileCodec, VectorCodec
from seqdata.entries import Entries, read_remap
from seqdata.fields import describe
from seqdata.fit import Old, Rules, fit_ids
from seqdata.ingest import ROW, Ingest
from seqdata.plan import Plan
from seqdata.publish import LOCK
from seqdata.quantiles import bucket_ids, fit_borders
from seqdata.spool import Spool, sorted_runs
from seqdata.tables import VocabularyWriter, read_batch, read_batches
from seqdata.times import format_time

# kinds of times (TimeParser.zone) that one table cannot hold: typed times without a zone beside UTC are UTC
MIXED = (("text", "utc"), ("text", "zone"), ("bare", "zone"))


def _quiet(rows: int) -> None:
    pass


class Job:
    """One build in `folder`, which becomes the store; `previous` is the store that the events are appended to."""

    def __init__(self, plan: Plan, folder: Path, previous: Any = None, grow: bool = True) -> None:
        self.plan, self.folder, self.previous, self.grow = plan, folder, previous, grow
        self.work = folder / "work"
        self.generation = 0 if previous is None else previous.schema["generation"] + 1
        self.fitted = layout.fitted(folder, self.generation)
        self.codecs = plan.codecs()
        # columns are numbered on disk, since a field may be called "user" or "time"
        self.slots = {name: f"f{i:03d}" for i, name in enumerate(self.codecs)}
        keys: dict[str, np.dtype] = {"user": np.dtype("i4" if plan.text_users else "i8"), "time": np.dtype("i8")}
        if plan.dedup:
            keys[ROW] = np.dtype("u8")
        self.columns = keys | {slot: self.codecs[name].dtype for name, slot in self.slots.items()}

    def prepare(self, resume: bool) -> None:
        """Keeps the finished steps of an earlier attempt at the same build if `resume`, else starts anew."""
        signature = self.plan.signature()
        found = _read(self.work / "job.json")
        if not (resume and signature is not None and found == json.loads(json.dumps(signature))):
            for leftover in self.folder.iterdir():
                if leftover.name != LOCK:
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        for path in (
            self.work / "parts",
            self.work / "remap",
            self.folder / "shards",
            self.fitted / "vocabularies",
            self.fitted / "vectors",
        ):
            path.mkdir(parents=True, exist_ok=True)
        layout.write_json(self.work / "job.json", signature)

    def ingest(self, number: int, tick: Callable[[int], None] = _quiet) -> dict[str, Any]:
        """Reads one part of the input into spools and entries; returns what it counted."""
        marker = self.work / "parts" / f"{number:05d}.json"
        if (done := _read(marker)) is not None:
            return done
        folder = marker.with_suffix("")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        result = Ingest(self.plan, number, folder, self.slots, self.columns).run(tick)
        layout.write_json(marker, result)
        pa.default_memory_pool().release_unused()
        return result

    def fit(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        """Fits vocabularies and distinct vectors over all parts; returns the described fields."""
        marker = self.work / "fit.json"
        if (done := _read(marker)) is not None:
            return done
        _zones(self.plan, parts, {} if self.previous is None else self.previous.schema["time"].get("zones", {}))
        described = self._fit(parts)
        # only what is recorded as done may go: an end before the record begins the fit again
        layout.write_json(marker, described)
        for number in range(len(parts)):
            for path in (self.work / "parts" / f"{number:05d}").glob("*.arrow"):
                path.unlink()
        return described

    def _fit(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        described: dict[str, Any] = {}
        for i, (name, codec) in enumerate(self.codecs.items()):
            file = layout.file_name(i, name)
            entry = describe(self.plan.fields[name]) | {"file": file, "dtype": codec.dtype.name}
            if isinstance(codec, CategoricalCodec):
                entry |= {"size": self._fit_values(name, codec, file, parts), "values": str(codec.kind)}
            elif isinstance(codec, HashedCodec):
                entry |= {"size": codec.spec.buckets + 2, "values": str(codec.values)}
            elif isinstance(codec, QuantileCodec):
                entry |= {"dtype": "int32", "size": codec.n + 2, "borders": self._borders(name, codec, parts)}
            elif isinstance(codec, VectorCodec):
                size, width = self._fit_vectors(name, codec, file, parts)
                entry |= {"size": size, "width": width, "vector_dtype": codec.spec.dtype}
            described[name] = entry
        if (users := self.plan.user_codec()) is not None:
            schema = pa.schema([("user", pa.string())])
            with pa.OSFile(str(self.work / "users.arrow"), "wb") as out, pa.ipc.new_file(out, schema) as writer:
                for batch in self._ids("user", users, parts, users.rules(), None):
                    writer.write_batch(pa.record_batch([batch.column(0)], schema=schema))
        return described

    def _fit_values(self, name: str, codec: CategoricalCodec, file: str, parts: list[dict[str, Any]]) -> int:
        previous = None
        if self.previous is not None:
            old = self.previous.schema["fields"][name]
            path = self.previous.fitted / "vocabularies" / f"{old['file']}.arrow"
            previous = Old(old["size"] - codec.spec.first_value, lambda: read_batches(path), self.grow)
        with VocabularyWriter(self.fitted / "vocabularies" / f"{file}.arrow", codec.kind) as writer:
            for batch in self._ids(self.slots[name], codec, parts, codec.rules(), codec.old(previous)):
                writer.append(batch)
        return writer.rows + codec.spec.first_value

    def _fit_vectors(self, name: str, codec: VectorCodec, file: str, parts: list[dict[str, Any]]) -> tuple[int, int]:
        previous, width = None, self._width(name, codec, parts)
        if self.previous is not None:
            matrix = self.previous.vectors(name)
            previous = Old(len(matrix) - 1, lambda: codec.blobs(matrix), True)
        with layout.ArrayWriter(self.fitted / "vectors" / f"{file}.npy", codec.spec.dtype, width) as writer:
            writer.append(np.zeros((1, width), codec.spec.dtype))
            for batch in self._ids(self.slots[name], codec, parts, codec.rules(), previous):
                column = batch.column(0)
                _, offsets, data = column.buffers()
                begin, end = np.frombuffer(offsets, np.int32)[[column.offset, column.offset + len(column)]]
                values = np.frombuffer(data, np.uint8)[begin:end] if end > begin else np.zeros(0, np.uint8)
                writer.append(values.view(codec.spec.dtype).reshape(-1, width))
        return writer.length, width

    def _borders(self, name: str, codec: QuantileCodec, parts: list[dict[str, Any]]) -> list[float]:
        if self.previous is not None:
            return self.previous.schema["fields"][name]["borders"]
        slot, fit = self.slots[name], self.plan.fit_before
        spools = [
            self._spool(number, shard, parts, {}) for number in range(len(parts)) for shard in range(self.plan.shards)
        ]
        batches = (
            batch[slot] if fit is None else np.where(batch["time"] < fit, batch[slot], np.nan)
            for spool in spools
            for batch in spool.batches("time", slot)
        )
        return fit_borders(batches, sum(sum(spool.rows) for spool in spools), codec.n)

    def _ids(
        self, slot: str, codec: Any, parts: list[dict[str, Any]], rules: Rules, old: Old | None
    ) -> Iterator[pa.RecordBatch]:
        """Numbers the entries of a column and yields its fitted table."""
        counted = [part["entries"][slot] for part in parts]
        files = [self.work / "parts" / f"{number:05d}" / f"{slot}.arrow" for number in range(len(parts))]
        extra = None if codec.known is None else pa.array(codec.known, codec.kind)
        entries = Entries(
            codec.kind, files, sum(n for n, _ in counted), sum(n for _, n in counted), self.work / "remap" / slot, extra
        )
        scratch = self.work / "fit"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        yield from fit_ids(entries, rules, scratch, self.plan.budget // 2, old)
        shutil.rmtree(scratch)

    def sort(
        self, shard: int, parts: list[dict[str, Any]], described: dict[str, Any], tick: Callable[[int], None] = _quiet
    ) -> dict[str, Any]:
        """Writes one shard, its events sorted by user, time and input order; returns what schema.json says of it."""
        marker = self.work / f"shard_{shard:05d}.json"
        if (done := _read(marker)) is not None:
            return done
        out = self.folder / "shards" / f"{shard:05d}"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        scratch = self.work / f"scratch_{shard:05d}"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        spools = [self._spool(number, shard, parts, described) for number in range(len(parts))]
        count = rows = repeated = 0
        low, high = np.iinfo(np.int64).max, np.iinfo(np.int64).min
        with ExitStack() as stack:
            files = {"time": "time", "offsets": "offsets"}
            files |= {slot: described[name]["file"] for name, slot in self.slots.items()}
            dtypes = self.columns | {slot: np.dtype(described[name]["dtype"]) for name, slot in self.slots.items()}
            dtypes["offsets"] = np.dtype(np.int64)
            writers = {
                name: stack.enter_context(layout.ArrayWriter(out / f"{file}.npy", dtypes[name]))
                for name, file in files.items()
            }
            users = self._user_writer(out, stack)
            offsets = writers.pop("offsets")
            offsets.append(np.zeros(1, np.int64))
            for run in sorted_runs(spools, scratch, self.plan.budget // 4, tick):
                if self.plan.dedup:
                    repeated += len(run.time)
                    run = run.deduplicated(ROW)
                    repeated -= len(run.time)
                users(run.users)
                offsets.append(rows + np.cumsum(run.lengths))
                for name, writer in writers.items():
                    writer.append(run.time if name == "time" else run.column(name))
                count, rows = count + len(run.users), rows + len(run.time)
                low, high = min(low, int(run.time.min(initial=low))), max(high, int(run.time.max(initial=high)))
                # the next run is made while this name would still hold the last one
                del run
        shutil.rmtree(scratch)
        result = {"folder": f"{shard:05d}", "users": count, "events": rows, "time_min": low, "time_max": high}
        if self.plan.dedup:
            result["repeated"] = repeated
        layout.write_json(marker, result)
        return result

    def _user_writer(self, out: Path, stack: ExitStack) -> Callable[[np.ndarray], None]:
        if not self.plan.text_users:
            return stack.enter_context(layout.ArrayWriter(out / "users.npy", np.int64)).append
        schema = pa.schema([("user", pa.string())])
        file = stack.enter_context(pa.OSFile(str(out / "users.arrow"), "wb"))
        writer = stack.enter_context(pa.ipc.new_file(file, schema))
        names = _Names(self.work / "users.arrow")
        return lambda ranks: writer.write_table(pa.Table.from_batches(list(names.take(ranks)), schema).combine_chunks())

    def schema(
        self, parts: list[dict[str, Any]], described: dict[str, Any], shards: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """What schema.json says of the finished build."""
        plan = self.plan
        tables: dict[str, Any] = {}
        for (table, part), counted in zip(plan.parts, parts, strict=True):
            entry = tables.setdefault(table, {"rows_in": 0, "rows_out": 0, "dropped_null_user": 0, "parts": []})
            entry["rows_in"] += counted["rows_in"]
            entry["dropped_null_user"] += counted["dropped"]
            entry["rows_out"] += counted["rows_in"] - counted["dropped"]
            entry["parts"].append(part.fingerprint() or {"memory": part.where})
        rows_in, dropped = sum(part["rows_in"] for part in parts), {"null_user": sum(part["dropped"] for part in parts)}
        if plan.dedup:
            dropped["repeated"] = sum(shard.pop("repeated") for shard in shards)
        return {
            "format": layout.FORMAT,
            "version": layout.VERSION,
            "generation": self.generation,
            "user": {"column": plan.user, "dtype": "string" if plan.text_users else "int64"},
            "time": {"column": plan.time, "unit": "us", "zones": _zones(plan, parts, {})},
            "event_field": plan.event_field,
            "fields": described,
            "fit_before": plan.fit_before,
            "fit_before_text": None if plan.fit_before is None else format_time(plan.fit_before),
            "rows": {"in": rows_in, "out": rows_in - sum(dropped.values()), "dropped": dropped},
            "options": {
                "null_user": plan.null_user,
                "dedup": plan.dedup,
                "time_unit": plan.time_unit,
                "time_format": plan.time_format,
                "types": {name: str(kind) for name, kind in plan.types.items()},
            },
            "tables": tables,
            "items": {},
            "shards": shards,
            "num_users": sum(shard["users"] for shard in shards),
            "num_events": sum(shard["events"] for shard in shards),
        }

    def _spool(self, number: int, shard: int, parts: list[dict[str, Any]], described: dict[str, Any]) -> Spool:
        path = self.work / "parts" / f"{number:05d}" / f"spool_{shard:05d}"
        return Spool(path, self.columns, parts[number]["rows"][shard], self._translator(number, parts, described))

    def _translator(
        self, number: int, parts: list[dict[str, Any]], described: dict[str, Any]
    ) -> Callable[[int, str, np.ndarray], np.ndarray]:
        borders = {self.slots[name]: entry["borders"] for name, entry in described.items() if "borders" in entry}
        coded = {self.slots[name]: codec.missing for name, codec in self.codecs.items() if codec.kind is not None}
        if self.plan.text_users:
            coded["user"] = 0
        counted = parts[number]
        begin = {slot: sum(part["entries"][slot][0] for part in parts[:number]) for slot in coded}

        def translate(batch: int, slot: str, codes: np.ndarray) -> np.ndarray:
            if slot in borders:
                return bucket_ids(codes, borders[slot])
            if slot not in coded:
                return codes
            starts = [*counted["starts"][slot], counted["entries"][slot][0]]
            start, end = starts[batch], starts[batch + 1]
            ids = read_remap(self.work / "remap" / slot, begin[slot] + start, end - start)
            return np.append(np.int32(coded[slot]), ids)[codes]

        return translate

    def _width(self, name: str, codec: VectorCodec, parts: list[dict[str, Any]]) -> int:
        widths = {part["widths"].get(name) for part in parts} - {None}
        if self.previous is not None:
            widths.add(self.previous.schema["fields"][name]["width"])
        if len(widths) > 1:
            raise ValueError(
                f"column {name!r}: vectors of different widths {sorted(widths)}; name one with Vector(width)"
            )
        return widths.pop() if widths else codec.spec.width or 1


class _Names:
    """Text user ids by their rank, read as they are asked for, in rising order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.starts = np.cumsum([0, *(batch.num_rows for batch in read_batches(path))])

    def take(self, ranks: np.ndarray) -> Iterator[pa.RecordBatch]:
        borders = np.searchsorted(ranks, self.starts)
        for i in np.flatnonzero(np.diff(borders)):
            here = ranks[borders[i] : borders[i + 1]] - self.starts[i]
            yield read_batch(self.path, int(i)).take(pa.array(here))


def _zones(plan: Plan, parts: list[dict[str, Any]], known: dict[str, list[str]]) -> dict[str, list[str]]:
    """{table: how its times name zones}; times whose zones cannot all be meant are an error."""
    zones = {table: dict.fromkeys(found, "the store") for table, found in known.items()}
    for (table, part), counted in zip(plan.parts, parts, strict=True):
        zone = counted["zone"]
        if zone is None:
            continue
        before = zones.setdefault(table, {})
        before.setdefault(zone, part.where)
        for bare, named in MIXED:
            if bare in before and named in before:
                raise ValueError(
                    f"time column {plan.time!r} of table {table!r}: {before[named]} names a zone and {before[bare]}"
                    " does not; times without a zone are read as UTC, so say so in the data or cast them with Sql(...)"
                )
    return {table: sorted(found) for table, found in zones.items()}


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
