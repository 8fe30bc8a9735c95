"""Find out how a raw log is laid out and describe it as SQL over its files; nothing is read into Python."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
from numpy.typing import NDArray

from ubt.columns import need_columns, need_one_value, need_same_kind, need_times, need_users
from ubt.config import LogConfig
from ubt.sql import (
    FLOATS,
    checked,
    kinds_of,
    only,
    other_price,
    parse_moment,
    price_borders,
    price_bucket,
    quoted,
    scan,
    text,
    whole,
    whole_numbers,
)

ITEM_EVENTS = ("product_buy", "add_to_cart", "remove_from_cart")
COLUMNS = {
    **{name: ("client_id", "timestamp", "sku") for name in ITEM_EVENTS},
    "page_visit": ("client_id", "timestamp", "url"),
    "search_query": ("client_id", "timestamp", "query"),
}
ITEMS = "product_properties.parquet"
ITEM_COLUMNS = ("sku", "category", "price", "name")
DAYS_IN_WINDOW = 14


@dataclass
class Log:
    """A log as SQL: what the events are, where history ends, and which rows are outcomes.

    Args:
        connection: DuckDB connection the queries run on
        layout: "raw" or "split" for the challenge's directories, "simple" for one events table with ready labels,
            "custom" for a log described by YAML
        files: every input file, for the fingerprint
        sources: event table -> its path; without an item table {"events": SQL of client_id, timestamp and fields}
        items: path of the item table, or None
        families: feature family -> field of the store
        outcomes: SQL of client_id, timestamp, sku, category, ... of all outcome rows; without an item table from a
            view "events"
        active: SQL of client_id, timestamp of the rows that make a user active; likewise
        train_start, valid_start, end: borders of the windows, UTC
        arrays: the layout's own .npy files by stem, where it has them
    """

    connection: duckdb.DuckDBPyConnection
    layout: str
    files: list[Path]
    sources: dict[str, str]
    items: Path | None
    families: dict[str, str]
    outcomes: str
    active: str
    train_start: datetime
    valid_start: datetime
    end: datetime
    arrays: dict[str, NDArray] = field(default_factory=dict)


def read_log(data_dir: str | Path, config: LogConfig) -> Log:
    """Describe the log below `data_dir`: the challenge's raw or split layout, the simple one of input/ and
    target/{train,valid}.parquet, or the one `config` describes.

    Raises:
        FileNotFoundError: if the folder, a table or an array is missing; names it and what is there
        ValueError: if a column is missing or the windows are not in order
    """
    folder = Path(data_dir)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"data_dir: {folder} is not a folder; give --data-dir, or write one with `ubt generate`"
        )
    connection = duckdb.connect()
    connection.execute("SET TimeZone = 'UTC'")
    connection.execute("SET enable_progress_bar = false")
    if config.files:
        return _custom(folder, config, connection)
    if (folder / "target" / "train.parquet").exists():
        return _simple(folder, connection)
    return _challenge(folder, connection)


def _challenge(folder: Path, connection: duckdb.DuckDBPyConnection) -> Log:
    split = (folder / "target" / "train_target.parquet").exists()
    events = folder / "input" if split else folder
    paths = {name: events / f"{name}.parquet" for name in COLUMNS}
    _need([*paths.values(), folder / ITEMS, folder / "input" / "relevant_clients.npy"], folder)
    for name, path in paths.items():
        need_columns(connection, path, COLUMNS[name])
    need_columns(connection, folder / ITEMS, ITEM_COLUMNS)
    need_same_kind(connection, [paths[name] for name in ITEM_EVENTS], folder / ITEMS)
    if split:
        targets = [folder / "target" / f"{name}_target.parquet" for name in ("train", "validation")]
        _need(targets, folder)
        for path in targets:
            need_columns(connection, path, ("client_id", "timestamp", "sku", "category"))
        last = f"SELECT max(CAST(timestamp AS TIMESTAMP)) FROM {scan(targets)}"
        need_same_kind(connection, targets, folder / ITEMS)
    else:
        last = f"SELECT max(CAST(timestamp AS TIMESTAMP)) FROM {scan([paths['product_buy']])}"
    end = _moment(connection.execute(last).fetchone(), paths["product_buy"])
    train_start = (end - timedelta(days=2 * DAYS_IN_WINDOW - 1)).replace(hour=0, minute=0, second=0, microsecond=0)
    buys = f"SELECT client_id, CAST(timestamp AS TIMESTAMP) AS timestamp, sku FROM {scan([paths['product_buy']])}"
    # A left join: a purchase of a sku without properties still is a purchase, only without a category.
    outcomes = (
        f"SELECT b.*, p.category, p.price, p.name FROM ({buys}) b LEFT JOIN {scan([folder / ITEMS])} p USING (sku)"
    )
    if split:
        later = f"SELECT client_id, CAST(timestamp AS TIMESTAMP) AS timestamp, sku FROM {scan(targets)}"
        outcomes = outcomes.replace(f"({buys})", f"({buys} UNION ALL {later})")
    arrays = _arrays(folder)
    return Log(
        connection=connection,
        layout="split" if split else "raw",
        files=[*paths.values(), folder / ITEMS, *sorted(folder.glob("*/*.npy")), *(targets if split else [])],
        sources={name: str(path) for name, path in paths.items()},
        items=folder / ITEMS,
        families={
            "event_type": "event_type",
            "category": "sku.category",
            "price": "sku.price",
            "item": "sku",
            "url": "url",
            "name": "sku.name",
            "query": "query",
        },
        outcomes=outcomes,
        active=f"SELECT client_id, timestamp FROM ({buys})",
        train_start=train_start,
        valid_start=train_start + timedelta(days=DAYS_IN_WINDOW),
        end=end,
        arrays=arrays,
    )


def _custom(folder: Path, config: LogConfig, connection: duckdb.DuckDBPyConnection) -> Log:
    files = sorted({path for pattern in config.files for path in folder.glob(pattern)})
    if not files:
        raise FileNotFoundError(f"log.files: nothing in {folder} matches {config.files}; there is: {_listing(folder)}")
    table = scan(files)
    found = {row[0]: row[1] for row in connection.execute(f"DESCRIBE SELECT * FROM {table}").fetchall()}
    named = {"client_id": config.user, "timestamp": config.time, "event_type": config.event, "sku": config.item}
    named |= {"category": config.category, "price": config.price, "url": config.url}
    named |= {"name": config.name, "query": config.query}
    roles = {role: column for role, column in named.items() if column is not None}
    keys = {"client_id": "user", "timestamp": "time", "event_type": "event", "sku": "item"}
    for role, column in roles.items():
        if column not in found:
            key = keys.get(role, role)
            raise ValueError(f"log.{key}: no column {column!r} in {config.files}; there is: {', '.join(found)}")
        need_one_value(f"log.{keys.get(role, role)}", role, column, found[column])
    for path in files:
        need_rows(connection, path, config)
    moments = []
    for key in ("train_start", "valid_start"):
        value = getattr(config, key)
        if value is None:
            raise ValueError(f"log.{key}: missing; a log described by YAML needs the borders of its windows")
        moments.append(parse_moment(value, f"log.{key}"))
    train_start, valid_start = moments
    time = checked(config.time, "TIMESTAMP", "log.time")
    if config.end is None:
        end = _moment(connection.execute(f"SELECT max({time}) FROM {table}").fetchone(), folder)
    else:
        end = parse_moment(config.end, "log.end")
    if not train_start < valid_start <= end:
        raise ValueError(
            f"log: needs train_start < valid_start <= end, got {text(train_start)}, {text(valid_start)}, {text(end)}"
        )
    columns = [f"{whole_numbers(connection, table, config.user)} AS client_id", f"{time} AS timestamp"]
    columns.append(f"CAST({quoted(config.event)} AS VARCHAR) AS event_type")
    for role in ("sku", "category", "url", "name", "query"):
        if role in roles:
            columns.append(f"{quoted(roles[role])} AS {role}")
    if "price" in roles:
        # Fitted on history alone.
        before = f"WHERE {time} < TIMESTAMP '{text(train_start)}'"
        borders = price_borders(connection, table, roles["price"], before)
        if not borders:
            raise ValueError(f"log.price: column {roles['price']} has no number before train_start")
        columns.append(f"{price_bucket(roles['price'], borders)} AS price")
    sql = f"SELECT {', '.join(columns)} FROM {table}"
    for key in ("label_events", "active_events"):
        for name in getattr(config, key):
            query = f"SELECT 1 FROM {table} WHERE CAST({quoted(config.event)} AS VARCHAR) = ? LIMIT 1"
            if connection.execute(query, [name]).fetchone() is None:
                raise ValueError(f"log.{key}: no event of type {name!r} in column {config.event}")
    return Log(
        connection=connection,
        layout="custom",
        files=files,
        sources={"events": sql},
        items=None,
        families={family: role for family, role in _FAMILY_OF.items() if role in roles},
        outcomes=f"SELECT * FROM events{only(config.label_events)}",
        active=f"SELECT client_id, timestamp FROM events{only(config.active_events)}",
        train_start=train_start,
        valid_start=valid_start,
        end=end,
    )


def need_rows(connection: duckdb.DuckDBPyConnection, path: Path, config: LogConfig) -> None:
    """Raise ValueError unless each row of a file of a log described by YAML has a user and a time."""
    for column in (config.user, config.time):
        if column not in kinds_of(connection, path):
            raise ValueError(f"{path.name}: no column {column!r}, which others of {config.files} have")
    need_users(connection, path, config.user)
    need_times(connection, path, config.time)


_FAMILY_OF = {
    "event_type": "event_type",
    "category": "category",
    "price": "price",
    "item": "sku",
    "url": "url",
    "name": "name",
    "query": "query",
}


def _simple(folder: Path, connection: duckdb.DuckDBPyConnection) -> Log:
    targets = [folder / "target" / f"{name}.parquet" for name in ("train", "valid")]
    _need([*targets, folder / "input" / "relevant_clients.npy"], folder)
    files = sorted((folder / "input").glob("*.parquet"))
    if not files:
        raise FileNotFoundError(f"input/*.parquet: no event table; there is: {_listing(folder)}")
    items = next((path for path in (folder / ITEMS, folder / "input" / ITEMS) if path.exists()), None)
    files = [path for path in files if path != items]
    tables, found = [], set()
    for path in files:
        kept = sorted(set(kinds_of(connection, path)) & set(_FAMILY_OF.values()) - {"event_type"})
        need_columns(connection, path, ("client_id", "timestamp", *kept))
        if path.stem not in COLUMNS:
            need_columns(connection, path, ("event_type",))
        kind = f"'{path.stem}'" if path.stem in COLUMNS else "CAST(event_type AS VARCHAR)"
        found |= {"event_type", *kept}
        fields = "".join(f", {column}" for column in kept)
        tables.append(
            f"SELECT {_client(connection, path)} AS client_id, CAST(timestamp AS TIMESTAMP) AS timestamp, "
            f"{kind} AS event_type{fields} FROM {scan([path])}"
        )
    events = " UNION ALL BY NAME ".join(tables)
    if items is not None and "sku" in found:
        added = sorted(set(kinds_of(connection, items)) & {"category", "price", "name"} - found)
        need_columns(connection, items, ("sku", *added))
        need_same_kind(connection, [path for path in files if "sku" in kinds_of(connection, path)], items)
        found |= set(added)
        fields = "".join(f", p.{column}" for column in added)
        events = f"SELECT e.*{fields} FROM ({events}) e LEFT JOIN {scan([items])} p USING (sku)"
    # The layout's prices are buckets 0..99; amounts become buckets, and those of the labels by the same borders.
    borders: list[float] | None = [] if "price" in found else None
    if "price" in found and other_price(connection, f"({events})") is not None:
        borders = price_borders(connection, f"({events})", "price")
        events = f"SELECT * REPLACE ({price_bucket('price', borders)} AS price) FROM ({events})"
    last = _moment(connection.execute(f"SELECT max(timestamp) FROM ({events})").fetchone(), folder / "input")
    # The labels are ready and bear no time: the windows follow the last event.
    train_start = last.replace(microsecond=0) + timedelta(seconds=1)
    valid_start = train_start + timedelta(days=DAYS_IN_WINDOW)
    bought = " WHERE event_type = 'product_buy'"
    buys = connection.execute(f"SELECT count(*) FROM ({events}){bought}").fetchone()
    if not buys or not buys[0]:
        bought = ""
    wanted = sorted({"sku", "category", "price", "name"} & found)
    outcomes = [f"SELECT {', '.join(['client_id', 'timestamp', *wanted])} FROM events{bought}"]
    arrays = _arrays(folder)
    for path, moment in zip(targets, (train_start, valid_start), strict=True):
        outcomes.append(_ready_outcomes(connection, path, moment, borders))
        clients = connection.sql(f"SELECT DISTINCT {_client(connection, path)} FROM {scan([path])}")
        labelled = clients.to_arrow_table()[0].to_numpy()
        asked = arrays["relevant_clients"]
        if len(labelled) and not np.isin(labelled.astype(str), asked.astype(str)).any():
            raise ValueError(
                f"{path.name}: none of its {len(labelled)} clients is asked for, e.g. {labelled[0]!r}; "
                f"relevant_clients.npy holds e.g. {asked[:1].tolist()}"
            )
    return Log(
        connection=connection,
        layout="simple",
        files=[*files, *([items] if items else []), *targets, *sorted(folder.glob("*/*.npy"))],
        sources={"events": events},
        items=None,
        families={family: column for family, column in _FAMILY_OF.items() if column in found},
        outcomes=" UNION ALL BY NAME ".join(outcomes),
        active=f"SELECT client_id, timestamp FROM events{bought}",
        train_start=train_start,
        valid_start=valid_start,
        end=valid_start + timedelta(days=DAYS_IN_WINDOW),
        arrays=arrays,
    )


def _ready_outcomes(
    connection: duckdb.DuckDBPyConnection, path: Path, moment: datetime, borders: list[float] | None
) -> str:
    """SQL of the outcome rows of a table of ready labels, each with its churn where the table has that.

    Prices become buckets by `borders`; without borders they are buckets, and with None there are none in the history.
    """
    columns = kinds_of(connection, path)
    kept = sorted({"churn", "sku", "category", "price", "name"} & set(columns))
    need_columns(connection, path, ("client_id", *kept))
    if not kept:
        raise ValueError(f"{path.name}: no label; needs some of churn, category, sku, price, name")
    if "churn" in kept:
        _check_churn(connection, path)
    if "price" in kept and borders == []:
        other = other_price(connection, scan([path]))
        if other is not None:
            raise ValueError(f"{path.name}: got price {other}, needs buckets 0..99, as those in input/ are")
    ids = {"sku", "category"} if borders is None else {"sku", "category", "price"}
    typed = []
    for column in kept:
        if column == "price" and borders:
            typed.append(f"{price_bucket(column, borders)} AS price")
        elif column in ids and columns[column] in FLOATS:
            typed.append(f"{whole(column, path.name)} AS {column}")
        else:
            typed.append(column)
    client = f"{_client(connection, path)} AS client_id"
    return f"SELECT {client}, TIMESTAMP '{text(moment)}' AS timestamp, {', '.join(typed)} FROM {scan([path])}"


def _check_churn(connection: duckdb.DuckDBPyConnection, path: Path) -> None:
    wrong = "churn IS NULL OR churn NOT IN (0, 1)"
    row = connection.execute(f"SELECT client_id, churn FROM {scan([path])} WHERE {wrong} LIMIT 1").fetchone()
    if row is not None:
        raise ValueError(f"{path.name}: client {row[0]} has churn {row[1]}; needs 0 or 1")
    query = f"SELECT client_id FROM {scan([path])} GROUP BY client_id HAVING count(DISTINCT churn) > 1 LIMIT 1"
    row = connection.execute(query).fetchone()
    if row is not None:
        raise ValueError(f"{path.name}: client {row[0]} has rows with churn 0 and rows with churn 1")


def _need(paths: Iterable[Path], folder: Path) -> None:
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(
                f"{path.relative_to(folder)}: not found in {folder}, which is read in the RecSys Challenge 2025 layout "
                f"({', '.join(COLUMNS)}.parquet, {ITEMS}, input/relevant_clients.npy), or, with "
                f"target/train.parquet, in the simple one; there is: {_listing(folder)}. "
                "Another log needs `log.files` in its YAML."
            )


def _listing(folder: Path) -> str:
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "nothing"


def _arrays(folder: Path) -> dict[str, NDArray]:
    """The layout's own arrays by stem: who is asked for, who is active, the targets and their popularity."""
    paths = [folder / "input" / "relevant_clients.npy", folder / "target" / "active_clients.npy"]
    paths += sorted((folder / "target").glob("*propensity_*.npy"))
    for path in paths:
        asked = path.with_name(path.name.removeprefix("popularity_"))
        if not asked.exists() and asked != path:
            raise FileNotFoundError(f"target/{asked.name}: missing beside target/{path.name}")
    return {path.stem: _load(path) for path in paths if path.exists()}


def _load(path: Path) -> NDArray:
    try:
        with path.open("rb") as file:
            # The organisers save some of these as arrays of objects.
            array = np.lib.format.read_array(file, allow_pickle=path.stem.startswith("propensity"))
    except (ValueError, EOFError, pickle.UnpicklingError):
        raise ValueError(
            f"{path}: damaged, or no array; needs whole numbers or text (popularity: numbers), written by numpy.save"
        ) from None
    if array.ndim != 1:
        raise ValueError(f"{path}: got shape {array.shape}, needs one dimension")
    if array.dtype == object:
        array = np.array(array.tolist())
    if not path.stem.startswith("popularity") and array.dtype.kind not in "iuU":
        raise ValueError(f"{path}: got {array.dtype} {array[:3]}, needs whole numbers or text as ids")
    return array


def _client(connection: duckdb.DuckDBPyConnection, path: Path) -> str:
    """SQL of a table's client_id, as whole numbers where a data frame wrote floats."""
    return whole("client_id", path.name) if kinds_of(connection, path)["client_id"] in FLOATS else "client_id"


def _moment(row: tuple[Any, ...] | None, where: Path) -> datetime:
    if row is None or row[0] is None:
        raise ValueError(f"{where}: no row with a time, so the windows cannot be placed")
    return row[0]
