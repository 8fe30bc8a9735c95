"""What the columns of a log's files must hold; what does not fit is named by file and column."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import duckdb

from ubt.sql import FLOATS, kinds_of, quoted, scan

# Vectors may be lists; all other columns hold one value a row.
VECTORS = ("name", "query")


def need_columns(connection: duckdb.DuckDBPyConnection, path: Path, names: Iterable[str]) -> None:
    """Raise ValueError unless a table has these columns of the challenge, and in each row a client and a time."""
    found, names = kinds_of(connection, path), list(names)
    for name in names:
        if name not in found:
            raise ValueError(f"{path.name}: no column {name!r}; there is: {', '.join(found)}")
        need_one_value(path.name, name, name, found[name])
    if "client_id" in names:
        need_users(connection, path, "client_id")
    if "timestamp" in names:
        need_times(connection, path, "timestamp")


def need_one_value(key: str, role: str, column: str, kind: str) -> None:
    if role not in VECTORS and (kind.endswith("]") or kind.startswith(("STRUCT", "MAP"))):
        raise ValueError(f"{key}: column {column} holds {kind}, needs one number or text in each row")


def need_users(connection: duckdb.DuckDBPyConnection, path: Path, column: str) -> None:
    name = quoted(column)
    missing = f"{name} IS NULL" + (f" OR isnan({name})" if kinds_of(connection, path)[column] in FLOATS else "")
    row = connection.execute(f"SELECT count(*) FROM {scan([path])} WHERE {missing}").fetchone()
    if row and row[0]:
        raise ValueError(f"{path.name}: column {column} is empty in {row[0]:,} rows, needs a client in each")


def need_times(connection: duckdb.DuckDBPyConnection, path: Path, column: str) -> None:
    name, kind = quoted(column), kinds_of(connection, path)[column]
    wrong = f"TRY_CAST({name} AS TIMESTAMP) IS NULL"
    if kind != "VARCHAR" and not kind.startswith(("TIMESTAMP", "DATE")):
        wrong = "true"
    row = connection.execute(f"SELECT CAST({name} AS VARCHAR) FROM {scan([path])} WHERE {wrong} LIMIT 1").fetchone()
    if row is not None:
        held = "nothing in some rows" if row[0] is None else f"{row[0]!r} ({kind})"
        raise ValueError(f"{path.name}: column {column} holds {held}, needs times like 2022-10-13 00:00:00 (UTC)")


def need_same_kind(connection: duckdb.DuckDBPyConnection, paths: Iterable[Path], items: Path) -> None:
    """Raise ValueError where skus are text in an event table and numbers in the item table, or the other way round."""
    # A table without rows may have a type of its own.
    found = {path: kinds_of(connection, path)["sku"] for path in (items, *paths)}
    kinds = {path: "text" if kind == "VARCHAR" else "numbers" for path, kind in found.items() if kind != '"NULL"'}
    for path, kind in kinds.items():
        if kind != kinds.get(items, kind):
            raise ValueError(f"{path.name}: column sku holds {kind}, needs {kinds[items]}, as {items.name} has")
