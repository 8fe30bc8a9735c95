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
    names = ", ".join("'" + str(path).replace("'", "''") + "'" for path in paths)
    reader = "read_csv" if names.rstrip("'").endswith((".csv", ".csv.gz")) else "read_parquet"
    return f"{reader}([{names}], union_by_name = true)"


def text(moment: datetime) -> str:
    """Return a moment as the SQL and JSON of this app write it, in UTC without a zone."""
    return moment.isoformat(sep=" ")


def parse_moment(value: Any, key: str) -> datetime:
    try:
        moment = datetime.fromisoformat(str(value).replace("Z", "+00:00"))
    except ValueError:
        raise ValueError(f"{key}: got {value!r}, needs a time like 2022-10-13 00:00:00 (UTC)") from None
    return moment.astimezone(timezone.utc).replace(tzinfo=None) if moment.tzinfo else moment


def kinds_of(connection: duckdb.DuckDBPyConnection, path: Path) -> dict[str, str]:
    """Columns of a file and DuckDB's names of their types."""
    rows = connection.execute(f"DESCRIBE SELECT * FROM {scan([path])}").fetchall()
    return {row[0]: row[1] for row in rows}


def quoted(column: str) -> str:
    return '"' + column.replace('"', '""') + '"'


def checked(column: str, kind: str, key: str) -> str:
    """SQL that casts a column and fails with the value that could not be cast."""
    name = quoted(column)
    message = f"'{key}: column {column} holds ' || CAST({name} AS VARCHAR) || ', which is no {kind}'"
    bad = f"{name} IS NOT NULL AND TRY_CAST({name} AS {kind}) IS NULL"
    return f"CASE WHEN {bad} THEN error({message}) ELSE TRY_CAST({name} AS {kind}) END"


def whole(column: str, key: str) -> str:
    """SQL of a column of ids that a data frame wrote as floats because some are missing."""
    message = f"'{key}: column {column} holds ' || {column} || ', which is no whole number'"
    missing = f"{column} IS NULL OR isnan({column})"
    return (
        f"CASE WHEN {missing} THEN NULL WHEN {column} <> floor({column}) THEN error({message}) "
        f"ELSE CAST({column} AS BIGINT) END"
    )


def whole_numbers(connection: duckdb.DuckDBPyConnection, table: str, column: str) -> str:
    """SQL of a user column: BIGINT when every value is a whole number, else text."""
    name = quoted(column)
    cast, number = f"TRY_CAST({name} AS BIGINT)", f"TRY_CAST({name} AS DOUBLE)"
    fits = f"({cast} IS NOT NULL AND {number} = floor({number})) OR {name} IS NULL"
    row = connection.execute(f"SELECT bool_and({fits}) FROM {table}").fetchone()
    return f"CAST({name} AS {'BIGINT' if row and row[0] else 'VARCHAR'})"


def price_borders(connection: duckdb.DuckDBPyConnection, table: str, column: str, where: str = "") -> list[float]:
    """The 99 borders between the hundredths of a table's prices; none where no row has a price."""
    shares = [i / 100 for i in range(1, 100)]
    row = connection.execute(f"SELECT quantile_cont({_price(column)}, {shares}) FROM {table} {where}").fetchone()
    return [float(border) for border in row[0]] if row and row[0] is not None else []


def price_bucket(column: str, borders: list[float]) -> str:
    """SQL of the price's quantile bucket 0..99."""
    price = _price(column)
    return f"CASE WHEN {price} IS NULL THEN NULL ELSE len(list_filter({borders!r}, lambda x: x <= {price})) END"


def other_price(connection: duckdb.DuckDBPyConnection, table: str) -> float | None:
    """Return a price that is no bucket 0..99, if there is one."""
    price = _price("price")
    bucket = f"{price} BETWEEN 0 AND 99 AND {price} = floor({price})"
    row = connection.execute(f"SELECT {price} FROM {table} WHERE NOT ({bucket}) LIMIT 1").fetchone()
    return row[0] if row else None


def _price(column: str) -> str:
    """SQL of a price; one that is not finite is none: data frames write missing ones as NaN."""
    number = f"TRY_CAST({quoted(column)} AS DOUBLE)"
    return f"(CASE WHEN isfinite({number}) THEN {number} END)"


def only(events: list[str]) -> str:
    names = ", ".join("'" + name.replace("'", "''") + "'" for name in events)
    return f" WHERE event_type IN ({names})" if events else ""
