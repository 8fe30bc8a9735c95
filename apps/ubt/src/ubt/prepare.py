"""Turn a raw log into a store of per-user timelines, the outcome rows of each window, and who is asked for."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import seqdata
from runkit.files import atomic_folder, content_hash, file_hash, read_json, write_json
from ubt.config import LogConfig, PrepareConfig
from ubt.log import Log, read_log
from ubt.log.sql import copy, scan, text
from ubt.log.table import VECTORS

FORMAT = 4
PRICE_BUCKETS = 100
TARGETS = ("category", "sku", "new_sku", "price")


@dataclass
class Targets:
    """What one propensity task asks about.

    Args:
        ids: target values [C]; none where the log has no such task
        popularity: weight of each of them in the novelty score [C]
    """

    ids: NDArray
    popularity: NDArray[np.float64]


@dataclass
class Prepared:
    """A prepared log.

    Args:
        folder: where it lies
        store: the events of all users
        users: ids of the users asked for [U], in the order in which embeddings are written
        known: positions in `users` of those who have an event anywhere in the log
        active: whether a user takes part in the churn task [U]
        asked: whether a user takes part in the propensity tasks [U]
        targets: what each propensity task asks about, by "category", "sku", "new_sku" and "price"
        name_width: numbers in an item's name vector; 0 where the log has no names
        families: feature family -> field of the store
        train_start, valid_start, end: borders of the windows, UTC
        fingerprint: hash of every input byte and of the settings
    """

    folder: Path
    store: seqdata.Store
    users: NDArray
    known: NDArray[np.int64]
    active: NDArray[np.bool_]
    asked: NDArray[np.bool_]
    targets: dict[str, Targets]
    name_width: int
    families: dict[str, str]
    train_start: datetime
    valid_start: datetime
    end: datetime
    fingerprint: str

    @property
    def categories(self) -> NDArray:
        """Target categories [C]."""
        return self.targets["category"].ids

    @property
    def skus(self) -> NDArray:
        """Target skus [S]."""
        return self.targets["sku"].ids

    def history(self, before: datetime) -> seqdata.View:
        """Return the events before a moment of the users that are in the store, in the order of `known`."""
        return self.store.as_of(before).select(self.users[self.known])

    def seen(self, before: datetime) -> NDArray[np.bool_]:
        """Return whether each user has an event before a moment [U]."""
        found = np.zeros(len(self.users), bool)
        found[self.known] = self.history(before).lengths() > 0
        return found


def prepare(data_dir: str | Path, folder: str | Path, log_config: LogConfig, config: PrepareConfig) -> bool:
    """Write store, targets and users below `folder`, unless exactly this is there already.

    The split is the challenge's: end = last purchase, train_start = midnight 27 days earlier, valid_start 14 days
    after it; a log described by YAML brings its own borders. Vocabularies are fitted on rows before train_start only.

    Returns:
        True if something was written, False if the prepared folder was up to date.
    """
    folder = Path(folder)
    log = read_log(data_dir, log_config)
    found = read_json(folder / "prepared.json")
    files = fingerprints(log.files, Path(data_dir), found.get("files", {}))
    settings = [FORMAT, seqdata.__version__, log.layout, asdict(log_config), asdict(config)]
    fingerprint = content_hash([*settings, [[Path(name).name, one["hash"]] for name, one in files.items()]])
    if found.get("fingerprint") == fingerprint:
        return False
    with atomic_folder(folder, "ubt prepared log") as new:
        events = new / "events.parquet"
        if log.events:
            # Read once, into the columns and types of this app; what follows reads the copy.
            copy(log.connection, log.events, events)
        try:
            _build_store(log, events, new / "store", config)
        except ValueError as error:
            # The copy is gone when this is read.
            given = ", ".join(p.name for p in log.files if p.suffix != ".npy" and p.parent.name != "target")
            raise ValueError(str(error).replace(str(events), f"the events of {given}")) from None
        _write_outcomes(log, scan([events]), new / "target")
        _write_users(log, scan([events]), new)
        _write_targets(log, log_config, new)
        facts = {
            "format": FORMAT,
            "fingerprint": fingerprint,
            "layout": log.layout,
            "reading": log.reading,
            "files": files,
            "families": log.families,
            "name_width": _name_width(new / "store", log.families),
            "train_start": text(log.train_start),
            "valid_start": text(log.valid_start),
            "end": text(log.end),
        }
        write_json(new / "prepared.json", facts)
        events.unlink(missing_ok=True)
    return True


def fingerprints(paths: Iterable[Path], folder: Path, known: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return size, time and hash of files by their path as seen from a folder.

    Args:
        paths: the files
        folder: where the paths start
        known: the same of an earlier time; a file that has kept size and time is not read again
    """
    found = {}
    for path in paths:
        name, status = os.path.relpath(path, folder), path.stat()
        stamp = {"bytes": status.st_size, "modified_ns": status.st_mtime_ns}
        before = known.get(name, {})
        same = stamp.items() <= before.items()
        found[name] = stamp | {"hash": before["hash"] if same else file_hash(path)}
    return found


def seconds(moment: datetime) -> int:
    """Return a moment in UTC as seconds since 1970."""
    return int(moment.replace(tzinfo=timezone.utc).timestamp())


def open_prepared(folder: str | Path) -> Prepared:
    """Open what `prepare` wrote; nothing but the users is read.

    Raises:
        FileNotFoundError: if there is nothing prepared; names the command that helps
    """
    folder = Path(folder)
    facts = read_json(folder / "prepared.json")
    if facts.get("format") != FORMAT:
        raise FileNotFoundError(
            f"{folder}: no prepared log; run `ubt prepare` with the same --config and --run-dir first"
        )
    users = np.load(folder / "input" / "relevant_clients.npy")
    store = seqdata.open_store(folder / "store")
    target = folder / "target"
    return Prepared(
        folder=folder,
        store=store,
        users=users,
        known=np.flatnonzero(np.isin(users, store.users)),
        active=np.isin(users, np.load(target / "active_clients.npy")),
        asked=np.isin(users, np.load(target / "asked_clients.npy")),
        targets={
            what: Targets(
                np.load(target / f"propensity_{what}.npy"), np.load(target / f"popularity_propensity_{what}.npy")
            )
            for what in TARGETS
        },
        name_width=facts["name_width"],
        families=facts["families"],
        **{key: datetime.fromisoformat(facts[key]) for key in ("train_start", "valid_start", "end")},
        fingerprint=facts["fingerprint"],
    )


def _build_store(log: Log, events: Path, path: Path, config: PrepareConfig) -> None:
    known = seqdata.Categorical()
    if log.items is None:
        sources: Any = str(events)
        fields: dict[str, Any] = {
            column: seqdata.Vector(_width(log, scan([events]), column)) if family in VECTORS else known
            for family, column in log.families.items()
        }
        items = None
    else:
        sources = {name: str(table.paths[0]) for name, table in log.tables.items()}
        query = seqdata.Vector(_width(log, log.tables["search_query"].sql, "query"))
        fields = {"sku": known, "url": known, "query": query}
        name = seqdata.Vector(_width(log, log.items.sql, "name"))
        properties: dict[str, Any] = {"category": known, "price": known, "name": name}
        items = {"sku": seqdata.ItemTable(str(log.items.paths[0]), key="sku", fields=properties)}
    seqdata.build(
        sources,
        path,
        user="client_id",
        time="timestamp",
        fields=fields,
        items=items,
        fit_before=log.train_start,
        memory_limit=config.memory_limit,
        progress=False,
    )


def _write_outcomes(log: Log, events: str, folder: Path) -> None:
    """Write the outcome rows before, in and after the train window; no command but `score` opens the last file."""
    folder.mkdir()
    start, middle, end = (f"TIMESTAMP '{text(moment)}'" for moment in (log.train_start, log.valid_start, log.end))
    borders = {
        "history": f"timestamp < {start}",
        "train": f"timestamp >= {start} AND timestamp < {middle}",
        "validation": f"timestamp >= {middle} AND timestamp <= {end}",
    }
    for name, where in borders.items():
        # Ties by sku, so that the first outcome of a user is the same in every run.
        order = "timestamp, client_id" + (", sku" if "item" in log.families else "")
        query = f"SELECT * FROM ({log.outcomes(events)}) WHERE {where} ORDER BY {order}"
        copy(log.connection, query, folder / f"{name}_target.parquet")
    since = f"SELECT client_id, min(timestamp) AS since FROM ({log.active(events)})"
    copy(log.connection, f"{since} GROUP BY client_id ORDER BY client_id", folder / "active_since.parquet")


def _write_users(log: Log, events: str, folder: Path) -> None:
    """Write who is asked for, who is scored, and who is active."""
    target, store = folder / "target", seqdata.open_store(folder / "store")
    before = f"< TIMESTAMP '{text(log.train_start)}'"
    users, active = log.arrays.get("relevant_clients"), log.arrays.get("active_clients")
    if users is not None:
        asked = users
    else:
        # Nobody said who is asked for: everybody is embedded, and whoever has a history is scored. Users who only
        # appear in the label windows are in the log because of what they did there, so scoring them would leak.
        # Text ids: numpy writes text of a fixed width without pickling.
        users = store.users.astype(str) if store.users.dtype == object else store.users
        (asked,) = _columns(log, f"SELECT DISTINCT client_id FROM {events} WHERE timestamp {before}")
    if not len(users):
        raise ValueError("relevant_clients.npy: holds nobody; needs one client or more")
    unique, counts = np.unique(users, return_counts=True)
    if len(unique) != len(users):
        raise ValueError(
            f"relevant_clients.npy: {len(users) - len(unique)} duplicates, e.g. client {unique[counts > 1][0]}"
        )
    _check_kind("input/relevant_clients.npy", users, "client_id", store.users)
    if not np.isin(users, store.users).any():
        raise ValueError(f"relevant_clients.npy: none of its {len(users)} clients has an event, e.g. {users[0]}")
    if active is None:
        since = scan([target / "active_since.parquet"])
        (active,) = _columns(log, f"SELECT client_id FROM {since} WHERE since {before}")
    (folder / "input").mkdir()
    np.save(folder / "input" / "relevant_clients.npy", users)
    np.save(target / "asked_clients.npy", asked)
    np.save(target / "active_clients.npy", active)


def _write_targets(log: Log, config: LogConfig, folder: Path) -> None:
    """Write what each propensity task asks about, and how popular it is."""
    target, store = folder / "target", seqdata.open_store(folder / "store")
    # Without its files a task asks about what was bought most; nobody can guess what will be new.
    limits = {"category": config.target_categories, "sku": config.target_skus, "price": PRICE_BUCKETS}
    for what in TARGETS:
        name, field = f"propensity_{what}", log.families.get({"sku": "item", "new_sku": ""}.get(what, what))
        ids, popularity = log.arrays.get(name), log.arrays.get(f"popularity_{name}")
        if ids is None:
            history = target / "history_target.parquet"
            ids, sales = _most_frequent(log, history, what, limits[what] if field else 0)
            popularity = sales / max(sales.sum(), 1)
        if popularity is None:
            raise FileNotFoundError(f"target/popularity_{name}.npy: missing beside target/{name}.npy")
        _check_targets(name, ids, popularity)
        if len(ids) and field and what != "price":
            known = np.asarray(store.vocabulary(field).values)
            _check_kind(f"target/{name}.npy", ids, what, known)
            if not np.isin(ids, known).any():
                raise ValueError(f"target/{name}.npy: none of its {len(ids)} ids is in the log")
        np.save(target / f"{name}.npy", ids)
        np.save(target / f"popularity_{name}.npy", popularity)


def _most_frequent(log: Log, history: Path, column: str, limit: int) -> tuple[NDArray, NDArray[np.float64]]:
    """The most frequent values of a column of the outcomes before train_start, ties by value, and their counts."""
    if not limit:
        return np.zeros(0, np.int64), np.zeros(0)
    counted = (
        f"SELECT {column}, count(*) AS n FROM {scan([history])} WHERE {column} IS NOT NULL "
        f"GROUP BY {column} ORDER BY n DESC, {column} LIMIT {limit}"
    )
    ids, sales = _columns(log, counted)
    return ids, sales.astype(np.float64)


def _check_kind(name: str, ids: NDArray, column: str, values: NDArray) -> None:
    kinds = ["text" if array.dtype.kind in "UO" else "numbers" for array in (ids, values)]
    if len(set(kinds)) > 1:
        raise ValueError(f"{name}: holds {kinds[0]}, the log's {column} {kinds[1]}")


def _check_targets(name: str, ids: NDArray, popularity: NDArray) -> None:
    if len(np.unique(ids)) != len(ids):
        raise ValueError(f"target/{name}.npy: {len(ids) - len(np.unique(ids))} duplicates among {len(ids)} targets")
    if popularity.shape != ids.shape or not np.isfinite(popularity).all() or (popularity < 0).any():
        raise ValueError(
            f"target/popularity_{name}.npy: needs one finite number >= 0 for each of the {len(ids)} targets, "
            f"got {popularity.dtype} {popularity.shape}"
        )


def _name_width(store: Path, families: dict[str, str]) -> int:
    if "name" not in families:
        return 0
    opened, field = seqdata.open_store(store), families["name"]
    return (opened.item_column(*field.split(".")) if "." in field else opened.vectors(field)).shape[1]


def _columns(log: Log, query: str) -> list[NDArray]:
    """The columns of a query's result."""
    columns = (column.to_numpy() for column in log.connection.sql(query).to_arrow_table().columns)
    return [values.astype(str) if values.dtype == object else values for values in columns]


def _width(log: Log, table: str, column: str) -> int:
    """Return how many numbers most of a column's first 1,000 vectors hold; 16 when there is none."""
    query = f"SELECT {column} FROM {table} WHERE {column} IS NOT NULL LIMIT 1000"
    found = log.connection.execute(query).fetchall()
    widths = Counter(len(re.findall(r"\d+", value)) if isinstance(value, str) else len(value) for (value,) in found)
    return widths.most_common(1)[0][0] if widths else 16
