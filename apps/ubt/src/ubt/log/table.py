"""A table of a log: its files, its columns, and what they must hold; what does not fit is named by file and column."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import duckdb

from ubt.log.sql import FLOATS, quoted, scan, whole

# Vectors may be lists; all other columns hold one value a row.
VECTORS = ("name", "query")


class Table:
    """Files that are read as one table; their columns are looked up once.

    Args:
        connection: DuckDB connection the queries run on
        paths: files, Parquet or CSV

    Attributes:
        sql: reads the table
        kinds: column -> DuckDB's name of its type
        name: of the first file, for messages
    """

    def __init__(self, connection: duckdb.DuckDBPyConnection, *paths: Path):
        self.connection, self.paths, self.name, self.sql = connection, list(paths), paths[0].name, scan(paths)
        rows = connection.execute(f"DESCRIBE SELECT * FROM {self.sql}").fetchall()
        self.kinds = {row[0]: row[1] for row in rows}

    @property
    def client(self) -> str:
        """SQL of client_id, as whole numbers where a data frame wrote floats."""
        return whole("client_id", self.name) if self.kinds["client_id"] in FLOATS else "client_id"

    def need(self, names: Iterable[str]) -> None:
        """Raise ValueError unless the table has these columns of the challenge, and in each row a client and a time."""
        names = list(names)
        for name in names:
            if name not in self.kinds:
                raise ValueError(f"{self.name}: no column {name!r}; there is: {', '.join(self.kinds)}")
            self.need_one_value(self.name, name, name)
        if "client_id" in names:
            self.need_users("client_id")
        if "timestamp" in names:
            self.need_times("timestamp")

    def need_one_value(self, key: str, role: str, column: str) -> None:
        """Raise ValueError where a column that plays a role holds lists or structs."""
        kind = self.kinds[column]
        if role not in VECTORS and (kind.endswith("]") or kind.startswith(("STRUCT", "MAP"))):
            raise ValueError(f"{key}: column {column} holds {kind}, needs one number or text in each row")

    def need_users(self, column: str) -> None:
        """Raise ValueError unless each row has a user."""
        name = quoted(column)
        missing = f"{name} IS NULL" + (f" OR isnan({name})" if self.kinds[column] in FLOATS else "")
        row = self.connection.execute(f"SELECT count(*) FROM {self.sql} WHERE {missing}").fetchone()
        if row and row[0]:
            raise ValueError(f"{self.name}: column {column} is empty in {row[0]:,} rows, needs a client in each")

    def need_times(self, column: str) -> None:
        """Raise ValueError unless each row has a time."""
        name, kind = quoted(column), self.kinds[column]
        wrong = f"TRY_CAST({name} AS TIMESTAMP) IS NULL"
        if kind != "VARCHAR" and not kind.startswith(("TIMESTAMP", "DATE")):
            wrong = "true"
        query = f"SELECT CAST({name} AS VARCHAR) FROM {self.sql} WHERE {wrong} LIMIT 1"
        row = self.connection.execute(query).fetchone()
        if row is not None:
            held = "nothing in some rows" if row[0] is None else f"{row[0]!r} ({kind})"
            raise ValueError(f"{self.name}: column {column} holds {held}, needs times like 2022-10-13 00:00:00 (UTC)")


def need_same_kind(tables: Iterable[Table], items: Table) -> None:
    """Raise ValueError where skus are text in an event table and numbers in the item table, or the other way round."""
    # A table without rows may have a type of its own.
    found = {table.name: table.kinds["sku"] for table in (items, *tables)}
    kinds = {name: "text" if kind == "VARCHAR" else "numbers" for name, kind in found.items() if kind != '"NULL"'}
    for name, kind in kinds.items():
        if kind != kinds.get(items.name, kind):
            raise ValueError(f"{name}: column sku holds {kind}, needs {kinds[items.name]}, as {items.name} has")
