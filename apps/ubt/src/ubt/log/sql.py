"""SQL over the files of a log: what to read, casts that fail by name, prices as buckets."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import duckdb

FLOATS = ("DOUBLE", "FLOAT")


def scan(paths: Iterable[Path]) -> str:
    """Return the SQL that reads these files, Parquet or CSV, as one table."""
    names = ", ".join(literal(str(path)) for path in paths)
    reader = "read_csv" if names.rstrip("'").endswith((".csv", ".csv.gz")) else "read_parquet"
    return f"{reader}([{names}], union_by_name = true)"


def literal(value: str) -> str:
    """Return a text as SQL."""
    return "'" + value.replace("'", "''") + "'"


def quoted(column: str) -> str:
    """Return the name of a column as SQL."""
    return '"' + column.replace('"', '""') + '"'


def text(moment: datetime) -> str:
    """Return a moment as the SQL and JSON of this app write it, in UTC without a zone."""
    return moment.isoformat(sep=" ")


def parse_moment(value: Any, key: str) -> datetime:
    """Return the moment in UTC that a setting names, without a zone.

    Raises:
        ValueError: if it is none; names the setting
    """
    try:
        moment = datetime.fromisoformat(str(value).replace("Z", "+00:00"))
    except ValueError:
        raise ValueError(f"{key}: got {value!r}, needs a time like 2022-10-13 00:00:00 (UTC)") from None
    return moment.astimezone(timezone.utc).replace(tzinfo=None) if moment.tzinfo else moment


def cast(column: str, kind: str, key: str) -> str:
    """Return the SQL that casts a column and fails with the value that could not be cast."""
    name = quoted(column)
    message = f"{literal(f'{key}: column {column} holds ')} || CAST({name} AS VARCHAR) || ', which is no {kind}'"
    bad = f"{name} IS NOT NULL AND TRY_CAST({name} AS {kind}) IS NULL"
    return f"CASE WHEN {bad} THEN error({message}) ELSE TRY_CAST({name} AS {kind}) END"


def whole(column: str, key: str) -> str:
    """Return the SQL of a column of ids that a data frame wrote as floats because some are missing."""
    message = f"{literal(f'{key}: column {column} holds ')} || {column} || ', which is no whole number'"
    missing = f"{column} IS NULL OR isnan({column})"
    return (
        f"CASE WHEN {missing} THEN NULL WHEN {column} <> floor({column}) THEN error({message}) "
        f"ELSE CAST({column} AS BIGINT) END"
    )


def only(events: list[str]) -> str:
    """Return the SQL that keeps some event types, all where none is named."""
    return f" WHERE event_type IN ({', '.join(map(literal, events))})" if events else ""


def price_bucket(column: str, borders: list[float]) -> str:
    """Return the SQL of the price's quantile bucket 0..99."""
    price = _price(column)
    return f"CASE WHEN {price} IS NULL THEN NULL ELSE len(list_filter({borders!r}, lambda x: x <= {price})) END"


def price_borders(connection: duckdb.DuckDBPyConnection, table: str, column: str, where: str = "") -> list[float]:
    """Return the 99 borders between the hundredths of a table's prices; none where no row has a price."""
    shares = [i / 100 for i in range(1, 100)]
    row = connection.execute(f"SELECT quantile_cont({_price(column)}, {shares}) FROM {table} {where}").fetchone()
    return [float(border) for border in row[0]] if row and row[0] is not None else []


def other_price(connection: duckdb.DuckDBPyConnection, table: str) -> float | None:
    """Return a price that is no bucket 0..99, if there is one."""
    price = _price("price")
    bucket = f"{price} BETWEEN 0 AND 99 AND {price} = floor({price})"
    row = connection.execute(f"SELECT {price} FROM {table} WHERE NOT ({bucket}) LIMIT 1").fetchone()
    return row[0] if row else None


def latest(connection: duckdb.DuckDBPyConnection, table: str, time: str, where: Path) -> datetime:
    """Return the last moment of a column of a table.

    Raises:
        ValueError: if there is none; names where it was looked for
    """
    row = connection.execute(f"SELECT max({time}) FROM {table}").fetchone()
    if row is None or row[0] is None:
        raise ValueError(f"{where}: no row with a time, so the windows cannot be placed")
    return row[0]


def copy(connection: duckdb.DuckDBPyConnection, query: str, path: Path) -> None:
    """Write the result of a query to a Parquet file."""
    connection.execute(f"COPY ({query}) TO {literal(str(path))} (FORMAT parquet)")


def _price(column: str) -> str:
    """SQL of a price; one that is not finite is none: data frames write missing ones as NaN."""
    number = f"TRY_CAST({quoted(column)} AS DOUBLE)"
    return f"(CASE WHEN isfinite({number}) THEN {number} END)"
