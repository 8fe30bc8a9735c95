"""Any log as one DuckDB query with five columns: user_id, item_id, event_time (microseconds), event_type, and what an
item is (brand, category)."""

from __future__ import annotations

from pathlib import Path

import duckdb

from purchase.config import Log
from runkit.errors import SettingError


def log_query(log: Log) -> str:
    """The log's events, with the types view, cart and purchase."""
    table, columns = _table(log)
    for setting in ("user", "item", "time", "event"):
        if getattr(log, setting) not in columns:
            raise SettingError(f"log.{setting}: got {getattr(log, setting)}, needs one of {', '.join(columns)}")
    kinds = {"view": log.views, "cart": log.carts, "purchase": log.purchases}
    whens = " ".join(f"WHEN {_in(log.event, names)} THEN '{kind}'" for kind, names in kinds.items() if names)
    chosen = {
        "user_id": _id(log, log.user),
        "item_id": _id(log, log.item),
        "event_time": _time(log, table),
        "event_type": f"CASE {whens} ELSE CAST({_name(log.event)} AS VARCHAR) END",
        "brand": _side(log.brand, columns, "log.brand"),
        "category": _side(log.category, columns, "log.category"),
    }
    left_out = f" WHERE NOT {_in(log.event, log.ignored)}" if log.ignored else ""
    return f"SELECT {', '.join(f'{value} AS {name}' for name, value in chosen.items())} FROM {table}{left_out}"


def catalogue_query(source: str, log: Log, cutoff: int) -> str:
    """Items known before the cutoff with brand and category, in the order of their ids.

    Where an item has several brands or categories, the last one in the order of texts is its own.
    """
    found = f"SELECT * FROM ({source}) WHERE event_time < {cutoff}"
    if log.catalogue:
        path = Path(log.folder) / log.catalogue
        with duckdb.connect() as database:
            columns = database.sql(f"SELECT * FROM {_text(str(path))} LIMIT 0").columns
        if log.item not in columns:
            raise SettingError(f"log.item: got {log.item}, needs one of {path}: {', '.join(columns)}")
        found = (
            f"SELECT item_id, brand, category FROM ({found}) UNION ALL SELECT {_id(log, log.item)}, "
            f"{_side(log.brand, columns, 'log.brand')}, {_side(log.category, columns, 'log.category')} "
            f"FROM {_text(str(path))}"
        )
    return (
        f"SELECT item_id, max(brand) AS brand, max(category) AS category FROM ({found}) "
        "WHERE item_id IS NOT NULL GROUP BY item_id ORDER BY item_id"
    )


def check_log(database: duckdb.DuckDBPyConnection, source: str, log: Log) -> None:
    """Raise ValueError for a row without user, item or time, and for an event type that no setting names."""
    nulls = ", ".join(f"count(*) FILTER ({name} IS NULL)" for name in ("user_id", "item_id", "event_time"))
    rows = database.sql(f"SELECT event_type, count(*), {nulls} FROM ({source}) GROUP BY event_type").fetchall()
    for setting, at in (("user", 2), ("item", 3), ("time", 4)):
        if missing := sum(row[at] for row in rows):
            raise ValueError(f"log.{setting}: got {missing:,} rows without one, needs one in every row")
    if other := sorted(str(row[0]) for row in rows if row[0] not in ("view", "cart", "purchase")):
        raise SettingError(f"log.event: got {', '.join(other)}, needs each named in views, carts, purchases or ignored")


def files_of(log: Log) -> list[str]:
    """The files that are read, sorted."""
    folder = Path(log.folder)
    # What a query reads is not known; the whole folder stands for it.
    names = sorted(map(str, folder.glob(log.files if not log.query else "**/*.*")))
    if not names:
        raise SettingError(f"log.files: got {folder / log.files}, needs Parquet or CSV files")
    return names + ([str(folder / log.catalogue)] if log.catalogue else [])


def _table(log: Log) -> tuple[str, list[str]]:
    if log.query:
        table = f"({log.query.replace('{folder}', log.folder.replace(chr(39), chr(39) * 2))})"
    else:
        names = [name for name in files_of(log) if not log.catalogue or name != str(Path(log.folder) / log.catalogue)]
        reader = "read_csv" if names[0].endswith((".csv", ".csv.gz")) else "read_parquet"
        table = f"{reader}([{', '.join(map(_text, names))}], union_by_name = true)"
    with duckdb.connect() as database:
        return table, database.sql(f"SELECT * FROM {table} LIMIT 0").columns


def _time(log: Log, table: str) -> str:
    with duckdb.connect() as database:
        kind = str(database.sql(f"SELECT {_name(log.time)} FROM {table} LIMIT 0").types[0])
    if kind == "VARCHAR":
        return f"epoch_us(CAST(replace({_name(log.time)}, ' UTC', '') AS TIMESTAMP))"
    if "INT" in kind:
        return f"CAST({_name(log.time)} AS BIGINT) * { {'s': 1_000_000, 'ms': 1000, 'us': 1}[log.time_unit] }"
    return f"epoch_us({_name(log.time)})"


def _id(log: Log, name: str) -> str:
    return f"CAST({_name(name)} AS {'BIGINT' if log.whole_ids else 'VARCHAR'})"


def _side(name: str, columns: list[str], setting: str) -> str:
    if not name:
        return "CAST(NULL AS VARCHAR)"
    if name not in columns:
        raise SettingError(f"{setting}: got {name}, needs one of {', '.join(columns)}, or '' for none")
    return f"CAST({_name(name)} AS VARCHAR)"


def _in(name: str, values: list[str]) -> str:
    return f"CAST({_name(name)} AS VARCHAR) IN ({', '.join(map(_text, values))})"


def _name(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _text(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
