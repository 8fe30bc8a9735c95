"""Turn a raw log into a store of per-user timelines, the outcome rows of each window, and who is asked for."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

import seqdata
from ubt.columns import VECTORS
from ubt.config import LogConfig, PrepareConfig
from ubt.log import Log, read_log
from ubt.rundir import read_json, temporary_directory, write_json
from ubt.sql import text

FORMAT = 3
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
    fingerprint = _fingerprint(log, log_config, config)
    if read_json(folder / "prepared.json").get("fingerprint") == fingerprint:
        return False
    with temporary_directory(folder) as new:
        if log.items is None:
            _write_events(log, new / "events.parquet")
        try:
            _build_store(log, new / "store", config)
        except ValueError as error:
            # The copy is gone when this is read.
            given = ", ".join(p.name for p in log.files if p.suffix != ".npy" and p.parent.name != "target")
            raise ValueError(str(error).replace(str(new / "events.parquet"), f"the events of {given}")) from None
        _write_outcomes(log, new / "target")
        _write_users(log, log_config, new)
        facts = {
            "format": FORMAT,
            "fingerprint": fingerprint,
            "layout": log.layout,
            "families": log.families,
            "name_width": _name_width(new / "store", log.families),
            "train_start": text(log.train_start),
            "valid_start": text(log.valid_start),
            "end": text(log.end),
        }
        write_json(new / "prepared.json", facts)
        (new / "events.parquet").unlink(missing_ok=True)
    return True


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


def _write_events(log: Log, path: Path) -> None:
    """Read a log without an item table once, into the columns and types of this app; what follows reads the copy."""
    log.connection.execute(f"COPY ({log.sources['events']}) TO '{path}' (FORMAT parquet)")
    log.connection.execute(f"CREATE VIEW events AS SELECT * FROM read_parquet('{path}')")
    log.sources = {"events": str(path)}


def _build_store(log: Log, path: Path, config: PrepareConfig) -> None:
    known = seqdata.Categorical()
    if log.items is None:
        sources: Any = log.sources["events"]
        fields: dict[str, Any] = {
            column: seqdata.Vector(_width(log, log.sources["events"], column)) if family in VECTORS else known
            for family, column in log.families.items()
        }
        items = None
    else:
        sources = log.sources
        query = seqdata.Vector(_width(log, log.sources["search_query"], "query"))
        fields = {"sku": known, "url": known, "query": query}
        name = seqdata.Vector(_width(log, str(log.items), "name"))
        properties: dict[str, Any] = {"category": known, "price": known, "name": name}
        items = {"sku": seqdata.ItemTable(str(log.items), key="sku", fields=properties)}
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


def _write_outcomes(log: Log, folder: Path) -> None:
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
        query = f"SELECT * FROM ({log.outcomes}) WHERE {where} ORDER BY {order}"
        log.connection.execute(f"COPY ({query}) TO '{folder / f'{name}_target.parquet'}' (FORMAT parquet)")
    since = f"SELECT client_id, min(timestamp) AS since FROM ({log.active}) GROUP BY client_id ORDER BY client_id"
    log.connection.execute(f"COPY ({since}) TO '{folder / 'active_since.parquet'}' (FORMAT parquet)")


def _write_users(log: Log, config: LogConfig, folder: Path) -> None:
    (folder / "input").mkdir()
    target = folder / "target"
    before = f"< TIMESTAMP '{text(log.train_start)}'"
    arrays: dict[str, NDArray] = dict(log.arrays)
    users = arrays.pop("relevant_clients", None)
    if users is None:
        # Nobody said who is asked for: everybody is embedded, and whoever has a history is scored. Users who only
        # appear in the label windows are in the log because of what they did there, so scoring them would leak.
        users = seqdata.open_store(folder / "store").users
        if users.dtype == object:
            # Text ids: numpy writes text of a fixed width without pickling.
            users = users.astype(str)
        seen = log.connection.sql(f"SELECT DISTINCT client_id FROM events WHERE timestamp {before}")
        asked = _column(seen.to_arrow_table())
    else:
        asked = users
    if not len(users):
        raise ValueError("relevant_clients.npy: holds nobody; needs one client or more")
    unique, counts = np.unique(users, return_counts=True)
    if len(unique) != len(users):
        raise ValueError(
            f"relevant_clients.npy: {len(users) - len(unique)} duplicates, e.g. client {unique[counts > 1][0]}"
        )
    events = seqdata.open_store(folder / "store")
    _check_kind("input/relevant_clients.npy", users, "client_id", events.users)
    if not np.isin(users, events.users).any():
        raise ValueError(f"relevant_clients.npy: none of its {len(users)} clients has an event, e.g. {users[0]}")
    if "active_clients" not in arrays:
        active = log.connection.sql(
            f"SELECT client_id FROM read_parquet('{target / 'active_since.parquet'}') WHERE since {before}"
        )
        arrays["active_clients"] = _column(active.to_arrow_table())
    history = f"read_parquet('{target / 'history_target.parquet'}')"
    known = {
        what: np.asarray(events.vocabulary(log.families[family]).values)
        for what, family in (("category", "category"), ("sku", "item"))
        if family in log.families
    }
    guessed = {
        "category": ("category", config.target_categories),
        "sku": ("item", config.target_skus),
        "price": ("price", PRICE_BUCKETS),
    }
    for what in TARGETS:
        name = f"propensity_{what}"
        if name not in arrays:
            # Without its files a task asks about what was bought most; nobody can guess what will be new.
            family, limit = guessed.get(what, ("", 0))
            arrays[name], sales = _most_frequent(log, history, what, limit if family in log.families else 0)
            arrays[f"popularity_{name}"] = sales / max(sales.sum(), 1)
        elif f"popularity_{name}" not in arrays:
            raise FileNotFoundError(f"target/popularity_{name}.npy: missing beside target/{name}.npy")
        _check_targets(name, arrays[name], arrays[f"popularity_{name}"])
        if len(arrays[name]) and what in known:
            _check_kind(f"target/{name}.npy", arrays[name], what, known[what])
            if not np.isin(arrays[name], known[what]).any():
                raise ValueError(f"target/{name}.npy: none of its {len(arrays[name])} ids is in the log")
    np.save(folder / "input" / "relevant_clients.npy", users)
    np.save(target / "asked_clients.npy", asked)
    for name, array in arrays.items():
        np.save(target / f"{name}.npy", array)


def _most_frequent(log: Log, history: str, column: str, limit: int) -> tuple[NDArray, NDArray[np.float64]]:
    """The most frequent values of a column of the outcomes before train_start, ties by value, and their counts."""
    if not limit:
        return np.zeros(0, np.int64), np.zeros(0)
    counted = log.connection.sql(
        f"SELECT {column}, count(*) AS n FROM {history} WHERE {column} IS NOT NULL "
        f"GROUP BY {column} ORDER BY n DESC, {column} LIMIT {limit}"
    ).to_arrow_table()
    return _column(counted), counted.column("n").to_numpy().astype(np.float64)


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


def _column(table: pa.Table) -> NDArray:
    values = table.column(0).to_numpy()
    return values.astype(str) if values.dtype == object else values


def _width(log: Log, path: str, column: str) -> int:
    """Return how many numbers most of a column's first 1,000 vectors hold; 16 when there is none."""
    query = f"SELECT {column} FROM read_parquet('{path}') WHERE {column} IS NOT NULL LIMIT 1000"
    found = log.connection.execute(query).fetchall()
    widths = Counter(len(re.findall(r"\d+", value)) if isinstance(value, str) else len(value) for (value,) in found)
    return widths.most_common(1)[0][0] if widths else 16


def _fingerprint(log: Log, log_config: LogConfig, config: PrepareConfig) -> str:
    total = hashlib.blake2b(digest_size=16)
    total.update(
        json.dumps(
            [FORMAT, seqdata.__version__, log.layout, asdict(log_config), asdict(config)], sort_keys=True
        ).encode()
    )
    for path in log.files:
        total.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                total.update(block)
    return total.hexdigest()
