"""Read a log into a store of timelines, and number its items so that nothing after the cutoff can be seen in them.

RUN/prepared/store/          every event of every user, in time order
    prepared/items.parquet   item_id, brand and category as codes (0 = none); the catalogue first, in the order of ids
    prepared/identity.json   what it was made of
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

import seqdata
from purchase.config import EVENTS, Config, Split
from purchase.sources import catalogue_query, check_log, files_of, log_query
from runkit.errors import SettingError
from runkit.files import atomic_folder, content_hash, file_hash, read_json, write_json
from runkit.run import Run

PACKAGES = ("purchase", "seqdata", "mtl-heads", "rankers", "hstu-kernels", "torch", "lightning", "implicit", "lightgbm")
# Ids of a store below this are missing and unknown.
FIRST = 2
KIND = "purchase prepared"
log = logging.getLogger("purchase")


def prepare(config: Config) -> str:
    """Write ``<run_dir>/prepared``."""
    run = Run(config.run_dir)
    with run.command("prepare", config, PACKAGES) as facts:
        identity = _identity(config)
        if config.resume and read_json(run.folder / "prepared" / "identity.json").get("made_of") == identity:
            return "what is prepared is of these settings and this log: kept"
        with atomic_folder(run.folder / "prepared", kind=KIND) as folder:
            counts = _write(config, folder)
            write_json(folder / "identity.json", {"made_of": identity, "split": asdict(config.split), **counts})
        facts |= counts
    return ", ".join(f"{name} {number:,}" for name, number in counts.items())


@dataclass(frozen=True)
class Prepared:
    """What `prepare` wrote.

    Args:
        store: all events; item numbers are its ids less ``FIRST``
        split: past and future
        num_items: items of the catalogue; the numbers from there on are of items that appear at the cutoff or later
        item_ids: the log's own ids [items in all]
        brand: code of each item of the catalogue [num_items], 0 = none
        category: the same of its category
        key: hash of what it was made of
    """

    store: seqdata.Store
    split: Split
    num_items: int
    item_ids: pa.Array
    brand: NDArray[np.int64]
    category: NDArray[np.int64]
    key: str

    def history(self, moment: int | None = None) -> seqdata.View:
        """Events before a moment (the cutoff if None), always of the users who have one before the cutoff."""
        view = self.store.as_of(self.split.test_start)
        return view if moment is None else view.window(None, moment)

    def targets(self, start: int, event: str) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """Who had such an event with what within the horizon from ``start`` on.

        Returns:
            Rows of `history` [n], items [n], and how many more users had one but no event before the cutoff.
        """
        future = self.store.all().window(start, start + self.split.horizon).where("event_type", [event])
        lengths = future.lengths()
        row = seqdata.positions_of(future.user_index, self.history().user_index)
        rows = np.repeat(row, lengths)
        items = future.gather(["item_id"])["item_id"].astype(np.int64) - FIRST
        return rows[rows >= 0], items[rows >= 0], int((lengths[row < 0] > 0).sum())


def open_prepared(config: Config) -> Prepared:
    """Return what `prepare` wrote for this split.

    Raises:
        FileNotFoundError: if nothing is prepared
        ValueError: if it was prepared with another split
    """
    folder = Path(config.run_dir) / "prepared"
    identity = read_json(folder / "identity.json")
    if not identity:
        raise FileNotFoundError(f"run_dir: got {config.run_dir}, needs a prepared log; run `purchase prepare` first")
    if identity["split"] != asdict(config.split):
        raise ValueError(f"split: got {asdict(config.split)}, needs that of `purchase prepare`, {identity['split']}")
    items = pq.read_table(folder / "items.parquet")
    known = items.slice(0, identity["catalogue"])
    return Prepared(
        seqdata.open_store(folder / "store"),
        config.split,
        identity["catalogue"],
        items["item_id"].combine_chunks(),
        known["brand"].to_numpy().astype(np.int64),
        known["category"].to_numpy().astype(np.int64),
        content_hash(identity["made_of"]),
    )


def _write(config: Config, folder: Path) -> dict[str, int]:
    source = log_query(config.log)
    with duckdb.connect() as database:
        check_log(database, source, config.log)
        log.info("reading items")
        known = database.sql(catalogue_query(source, config.log, config.split.test_start)).to_arrow_table()
        database.register("known", known)
        later = f"SELECT DISTINCT item_id FROM ({source}) ANTI JOIN known USING (item_id) ORDER BY item_id"
        new = database.sql(later).to_arrow_table()
    if not len(known):
        raise ValueError(f"split.cutoff: got {config.split.cutoff}, needs events before it")
    nothing = pa.array(np.zeros(len(new), np.int32))
    items = {
        "item_id": pa.concat_arrays([table["item_id"].combine_chunks() for table in (known, new)]),
        **{name: pa.concat_arrays([_codes(known[name]), nothing]) for name in ("brand", "category")},
    }
    pq.write_table(pa.table(items), folder / "items.parquet")
    log.info("building timelines")
    store = seqdata.build(
        seqdata.Sql(source),
        folder / "store",
        user="user_id",
        time="event_time",
        time_unit="us",
        fields={
            "event_type": seqdata.Categorical(values=EVENTS),
            "item_id": seqdata.Categorical(values=items["item_id"].to_pylist()),
        },
        fit_before=config.split.test_start,
        progress=config.progress,
    )
    with store:
        counts = {
            "events": store.num_events,
            "users": store.num_users,
            "catalogue": len(known),
            "later_items": len(new),
        }
    return counts


def _codes(values: pa.ChunkedArray) -> pa.Array:
    """Whole numbers from 1 on in the order of the texts; 0 where there is none."""
    distinct = pc.unique(values.combine_chunks()).drop_null()
    distinct = distinct.take(pc.sort_indices(distinct))
    return pc.add(pc.fill_null(pc.index_in(values.combine_chunks(), distinct), -1), 1).cast(pa.int32())


def _identity(config: Config) -> dict[str, Any]:
    files = [Path(name) for name in files_of(config.log)]
    if missing := [str(path) for path in files if not path.is_file()]:
        raise SettingError(f"log.files: got {missing[0]}, needs a file")
    settings = asdict(config.log) | {"folder": ""}
    return {"log": settings, "split": asdict(config.split), "files": {path.name: file_hash(path) for path in files}}
