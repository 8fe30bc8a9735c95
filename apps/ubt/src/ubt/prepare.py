"""Turn a raw log into a store of per-user timelines, the outcome rows of each window, and who is asked for."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

import seqdata
from ubt.config import LogConfig, PrepareConfig
from ubt.log import Log, read_log, text
from ubt.rundir import read_json, temporary_directory, write_json

FORMAT = 1


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
        categories: target categories [C]
        popularity: weight of each target category [C]
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
    categories: NDArray
    popularity: NDArray[np.float64]
    families: dict[str, str]
    train_start: datetime
    valid_start: datetime
    end: datetime
    fingerprint: str

    def history(self, before: datetime) -> seqdata.View:
        """Return the events before a moment of the users that are in the store, in the order of `known`."""
        return self.store.as_of(before).select(self.users[self.known])


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
        if log.layout == "custom":
            _write_events(log, new / "events.parquet")
        _build_store(log, new / "store", config)
        _write_outcomes(log, new / "target")
        _write_users(log, log_config, new)
        facts = {
            "format": FORMAT,
            "fingerprint": fingerprint,
            "layout": log.layout,
            "families": log.families,
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
        categories=np.load(target / "propensity_category.npy"),
        popularity=np.load(target / "popularity_propensity_category.npy"),
        families=facts["families"],
        **{key: datetime.fromisoformat(facts[key]) for key in ("train_start", "valid_start", "end")},
        fingerprint=facts["fingerprint"],
    )


def _write_events(log: Log, path: Path) -> None:
    """Read a custom log once, into the columns and types of this app; what follows reads the copy."""
    log.connection.execute(f"COPY ({log.sources['events']}) TO '{path}' (FORMAT parquet)")
    log.connection.execute(f"CREATE VIEW events AS SELECT * FROM read_parquet('{path}')")
    log.sources = {"events": str(path)}


def _build_store(log: Log, path: Path, config: PrepareConfig) -> None:
    known = seqdata.Categorical()
    if log.items is None:
        sources: Any = log.sources["events"]
        fields: dict[str, Any] = dict.fromkeys(log.families.values(), known)
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
        query = f"SELECT * FROM ({log.outcomes}) WHERE {where} ORDER BY timestamp, client_id"
        log.connection.execute(f"COPY ({query}) TO '{folder / f'{name}_target.parquet'}' (FORMAT parquet)")
    since = f"SELECT client_id, min(timestamp) AS since FROM ({log.active}) GROUP BY client_id ORDER BY client_id"
    log.connection.execute(f"COPY ({since}) TO '{folder / 'active_since.parquet'}' (FORMAT parquet)")


def _write_users(log: Log, config: LogConfig, folder: Path) -> None:
    (folder / "input").mkdir()
    target = folder / "target"
    before = f"< TIMESTAMP '{text(log.train_start)}'"
    arrays = dict(log.arrays)
    users = arrays.pop("relevant_clients", None)
    if users is None:
        # Nobody said who is asked for: everybody is embedded, and whoever has a history is scored. Users who only
        # appear in the label windows are in the log because of what they did there, so scoring them would leak.
        users = seqdata.open_store(folder / "store").users
        seen = log.connection.sql(f"SELECT DISTINCT client_id FROM events WHERE timestamp {before}")
        asked = _column(seen.to_arrow_table())
    else:
        asked = users
    unique, counts = np.unique(users, return_counts=True)
    if len(unique) != len(users):
        raise ValueError(
            f"relevant_clients.npy: {len(users) - len(unique)} duplicates, e.g. client {unique[counts > 1][0]}"
        )
    if "active_clients" not in arrays:
        active = log.connection.sql(
            f"SELECT client_id FROM read_parquet('{target / 'active_since.parquet'}') WHERE since {before}"
        )
        arrays["active_clients"] = _column(active.to_arrow_table())
    if "propensity_category" not in arrays:
        history = f"read_parquet('{target / 'history_target.parquet'}')"
        counted = (
            log.connection.sql(
                f"SELECT category, count(*) AS n FROM {history} WHERE category IS NOT NULL "
                f"GROUP BY category ORDER BY n DESC, category LIMIT {config.target_categories}"
            ).to_arrow_table()
            if "category" in log.families
            else pa.table({"category": pa.array([], pa.int64()), "n": []})
        )
        arrays["propensity_category"] = _column(counted)
        popularity = counted.column("n").to_numpy().astype(np.float64)
        arrays["popularity_propensity_category"] = popularity / max(popularity.sum(), 1)
    if "popularity_propensity_category" not in arrays:
        raise FileNotFoundError(
            "target/popularity_propensity_category.npy: missing beside target/propensity_category.npy"
        )
    np.save(folder / "input" / "relevant_clients.npy", users)
    np.save(target / "asked_clients.npy", asked)
    for name, array in arrays.items():
        np.save(target / f"{name}.npy", array)


def _column(table: pa.Table) -> NDArray:
    values = table.column(0).to_numpy()
    return values.astype(str) if values.dtype == object else values


def _width(log: Log, path: str, column: str) -> int:
    """Return how many numbers the first vector of a text column holds; 16 when there is none."""
    query = f"SELECT {column} FROM read_parquet('{path}') WHERE {column} IS NOT NULL LIMIT 1"
    row = log.connection.execute(query).fetchone()
    if row is None:
        return 16
    return len(re.findall(r"\d+", row[0])) if isinstance(row[0], str) else len(row[0])


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
