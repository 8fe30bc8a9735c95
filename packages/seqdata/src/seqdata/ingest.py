"""One part of the input to spooled events and entries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from seqdata.encode import Codec, VectorCodec, plain
from seqdata.entries import EntryWriter
from seqdata.hashing import hash_values, mix
from seqdata.plan import Plan
from seqdata.spool import SpoolWriter
from seqdata.times import TimeParser

# a hash of an event's values, by which events that repeat one are found
ROW = "row"


class Ingest:
    """Reads one part."""

    def __init__(
        self, plan: Plan, number: int, folder: Path, slots: dict[str, str], columns: dict[str, np.dtype]
    ) -> None:
        self.plan, self.folder, self.slots, self.columns = plan, folder, slots, columns
        self.table, self.part = plan.parts[number]
        self.codecs: dict[str, Codec] = plan.codecs()
        self.users = plan.user_codec()
        self.parser = TimeParser(plan.time, plan.time_unit, plan.time_format)
        self.spools: list[SpoolWriter] = []
        self.entries: dict[str, EntryWriter] = {}
        self.rows_in = self.dropped = 0

    def run(self, tick: Callable[[int], None]) -> dict[str, Any]:
        plan, part = self.plan, self.part
        names = list(
            dict.fromkeys([plan.user, plan.time, *(name for name in self.codecs if name in part.schema.names)])
        )
        try:
            self._open()
            for batch in part.read(names, {plan.time: pa.string()} | plan.types, self._batch_rows(names)):
                if batch.num_rows:
                    self._batch(
                        {name: self._cast(name, batch.column(i)) for i, name in enumerate(names)}, batch.num_rows
                    )
                    tick(self.rows_in)
        finally:
            for entries in self.entries.values():
                entries.close()
        return {
            "rows_in": self.rows_in,
            "dropped": self.dropped,
            "rows": [spool.rows for spool in self.spools],
            "entries": {slot: (writer.count, writer.bytes) for slot, writer in self.entries.items()},
            "starts": {slot: writer.starts for slot, writer in self.entries.items()},
            "widths": {name: codec.width for name, codec in self.codecs.items() if isinstance(codec, VectorCodec)},
            "zone": self.parser.zone,
        }

    def _batch_rows(self, names: list[str]) -> int:
        # a larger batch repeats fewer entries; what it takes besides the spool is about three words a value, and wide
        # values are held several times over
        width = 24 * len(names) + 3 * max(self.part.width(names) - 8 * len(names), 0)
        return int(min(max(self.plan.budget // 8 // width, 1 << 10), 1 << 19))

    def _open(self) -> None:
        for i in range(self.plan.shards):
            self.spools.append(SpoolWriter(self.folder / f"spool_{i:05d}", self.columns))
        for name, codec in self.codecs.items():
            if codec.kind is not None:
                slot = self.slots[name]
                self.entries[slot] = EntryWriter(self.folder / f"{slot}.arrow", codec.kind)
        if self.users is not None:
            self.entries["user"] = EntryWriter(self.folder / "user.arrow", self.users.kind)

    def _batch(self, values: dict[str, pa.Array], rows: int) -> None:
        plan, where, first = self.plan, self.part.where, self.part.first_row + self.rows_in
        time = self.parser.parse(values[plan.time], first, where)
        self.rows_in += rows
        keep = self._keep(values[plan.user], first)
        if keep is not None:
            chosen = pa.array(keep)
            values = {name: array.filter(chosen) for name, array in values.items()}
            time = time[keep]
            self.dropped += rows - len(time)
            rows = len(time)
        fit = None if plan.fit_before is None else time < plan.fit_before
        keys, hashes = self._keys(values[plan.user], rows, first)
        spooled: dict[str, np.ndarray] = {"user": keys, "time": time}
        if plan.dedup:
            spooled[ROW] = np.zeros(rows, np.uint64)
        for name, codec in self.codecs.items():
            source = values.get(name)
            if name == plan.event_field:
                source = pa.DictionaryArray.from_arrays(np.zeros(rows, np.int32), pa.array([self.table]))
            coded = codec.ingest(source, fit, rows, where)
            slot = self.slots[name]
            spooled[slot] = coded.codes
            if slot in self.entries:
                self.entries[slot].add(coded)
            if plan.dedup:
                seen = codec.spread(coded, source)
                spooled[ROW] = mix(spooled[ROW] ^ seen)
        if len(self.spools) == 1:
            self.spools[0].append(spooled)
            return
        shard = (hashes % np.uint64(len(self.spools))).astype(np.uint16)
        order = np.argsort(shard, kind="stable")
        ends = np.cumsum(np.bincount(shard, minlength=len(self.spools)))
        for i, spool in enumerate(self.spools):
            piece = order[ends[i - 1] if i else 0 : ends[i]]
            spool.append({name: column[piece] for name, column in spooled.items()})

    def _cast(self, name: str, array: pa.Array) -> pa.Array:
        kind = self.plan.types.get(name)
        return (
            array if kind is None or array.type == kind else plain(array, kind, f"column {name!r} of {self.part.where}")
        )

    def _keep(self, users: pa.Array, first: int) -> np.ndarray | None:
        if pa.types.is_floating(users.type):
            users = pc.if_else(pc.is_nan(users), pa.scalar(None, users.type), users)
        valid = users.is_valid().to_numpy(zero_copy_only=False)
        if valid.all():
            return None
        if self.plan.null_user == "error":
            raise ValueError(
                f"user column {self.plan.user!r} of {self.part.where}: {int((~valid).sum())} null value(s), the first"
                f" at row {first + int(np.argmin(valid))}; null_user='drop' leaves such rows out"
            )
        return valid

    def _keys(self, users: pa.Array, rows: int, first: int) -> tuple[np.ndarray, np.ndarray]:
        place = f"user column {self.plan.user!r} of {self.part.where}"
        if self.users is not None:
            coded = self.users.ingest(users, None, rows, self.part.where)
            self.entries["user"].add(coded)
            sharded = len(self.spools) > 1
            return coded.codes, hash_values(coded.entries)[coded.codes - 1] if sharded else np.zeros(0, np.uint64)
        keys = plain(users, pa.int64(), place).to_numpy(zero_copy_only=False)
        if rows and int(keys.min()) < 0:
            at = int(np.argmax(keys < 0))
            raise ValueError(
                f"{place}: negative id {keys[at]} at or after row {first + at}; integer ids need to be >= 0 (text ids"
                f" may be anything: types={{{self.plan.user!r}: 'string'}})"
            )
        return keys, mix(keys.view(np.uint64)) if len(self.spools) > 1 else np.zeros(0, np.uint64)
