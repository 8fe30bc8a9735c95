"""Any other log: one table with all events, whose columns and windows a YAML file names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from ubt.config import LogConfig
from ubt.log.base import FAMILIES, Log, listing
from ubt.log.sql import cast, latest, only, parse_moment, price_borders, price_bucket, quoted, text
from ubt.log.table import Table

# Role of a column -> the setting that names it, where they differ.
KEYS = {"client_id": "user", "timestamp": "time", "event_type": "event", "sku": "item"}


def read(folder: Path, config: LogConfig, connection: duckdb.DuckDBPyConnection) -> Log:
    """Describe the log in the files of a folder that `config` names."""
    files = find_files(folder, config)
    if not files:
        raise FileNotFoundError(f"log.files: nothing in {folder} matches {config.files}; there is: {listing(folder)}")
    table, roles = Table(connection, *files), _roles(config)
    for role, column in roles.items():
        key = f"log.{KEYS.get(role, role)}"
        if column not in table.kinds:
            raise ValueError(f"{key}: no column {column!r} in {config.files}; there is: {', '.join(table.kinds)}")
        table.need_one_value(key, role, column)
    for path in files:
        _need_rows(Table(connection, path), config)
    train_start, valid_start = (_border(config, key) for key in ("train_start", "valid_start"))
    time = cast(config.time, "TIMESTAMP", "log.time")
    end = latest(connection, table.sql, time, folder) if config.end is None else parse_moment(config.end, "log.end")
    if not train_start < valid_start <= end:
        raise ValueError(
            f"log: needs train_start < valid_start <= end, got {text(train_start)}, {text(valid_start)}, {text(end)}"
        )
    reading: dict[str, Any] = {"user": _user_kind(table, config.user)}
    if "price" in roles:
        # Fitted on history alone.
        before = f"WHERE {time} < TIMESTAMP '{text(train_start)}'"
        reading["borders"] = price_borders(connection, table.sql, roles["price"], before)
        if not reading["borders"]:
            raise ValueError(f"log.price: column {roles['price']} has no number before train_start")
    for key in ("label_events", "active_events"):
        for name in getattr(config, key):
            query = f"SELECT 1 FROM {table.sql} WHERE CAST({quoted(config.event)} AS VARCHAR) = ? LIMIT 1"
            if connection.execute(query, [name]).fetchone() is None:
                raise ValueError(f"log.{key}: no event of type {name!r} in column {config.event}")
    return _Described(
        connection=connection,
        layout="custom",
        files=files,
        families={family: role for family, role in FAMILIES.items() if role in roles},
        train_start=train_start,
        valid_start=valid_start,
        end=end,
        events=events_sql(table, config, reading),
        reading=reading,
        config=config,
    )


def find_files(folder: Path, config: LogConfig) -> list[Path]:
    """Return the files of a folder that `config` names."""
    return sorted({path for pattern in config.files for path in folder.glob(pattern)})


def new_table(files: list[Path], config: LogConfig, connection: duckdb.DuckDBPyConnection) -> Table:
    """Return the table of new days."""
    for path in files:
        _need_rows(Table(connection, path), config)
    return Table(connection, *files)


def events_sql(table: Table, config: LogConfig, reading: dict[str, Any]) -> str:
    """Return the SQL of client_id, timestamp and fields of all events of a table, read as the whole log is."""
    roles = _roles(config)
    columns = [
        f"CAST({quoted(config.user)} AS {reading['user']}) AS client_id",
        f"{cast(config.time, 'TIMESTAMP', 'log.time')} AS timestamp",
        f"CAST({quoted(config.event)} AS VARCHAR) AS event_type",
    ]
    columns += [f"{quoted(roles[r])} AS {r}" for r in ("sku", "category", "url", "name", "query") if r in roles]
    if "price" in roles:
        columns.append(f"{price_bucket(roles['price'], reading['borders'])} AS price")
    return f"SELECT {', '.join(columns)} FROM {table.sql}"


@dataclass
class _Described(Log):
    config: LogConfig | None = None

    def outcomes(self, events: str) -> str:
        assert self.config is not None
        return f"SELECT * FROM {events}{only(self.config.label_events)}"

    def active(self, events: str) -> str:
        assert self.config is not None
        return f"SELECT client_id, timestamp FROM {events}{only(self.config.active_events)}"


def _roles(config: LogConfig) -> dict[str, str]:
    """Return what the columns are: role -> column."""
    roles = (*KEYS, "category", "price", "url", "name", "query")
    found = {role: getattr(config, KEYS.get(role, role)) for role in roles}
    return {role: column for role, column in found.items() if column is not None}


def _border(config: LogConfig, key: str) -> Any:
    value = getattr(config, key)
    if value is None:
        raise ValueError(f"log.{key}: missing; a log described by YAML needs the borders of its windows")
    return parse_moment(value, f"log.{key}")


def _need_rows(table: Table, config: LogConfig) -> None:
    """Raise ValueError unless each row of a file has a user and a time."""
    for column in (config.user, config.time):
        if column not in table.kinds:
            raise ValueError(f"{table.name}: no column {column!r}, which others of {config.files} have")
    table.need_users(config.user)
    table.need_times(config.time)


def _user_kind(table: Table, column: str) -> str:
    """Return BIGINT when every user is a whole number, else VARCHAR."""
    name = quoted(column)
    fits = (
        f"(TRY_CAST({name} AS BIGINT) IS NOT NULL AND TRY_CAST({name} AS DOUBLE) = floor(TRY_CAST({name} AS DOUBLE)))"
    )
    row = table.connection.execute(f"SELECT bool_and({fits} OR {name} IS NULL) FROM {table.sql}").fetchone()
    return "BIGINT" if row and row[0] else "VARCHAR"
