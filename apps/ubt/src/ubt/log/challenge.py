"""The layout of the RecSys Challenge 2025, raw or split: five event tables, an item table, arrays of ids."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import duckdb

from ubt.log.arrays import read_arrays
from ubt.log.base import COLUMNS, DAYS_IN_WINDOW, ITEM_EVENTS, ITEMS, Log, need_files
from ubt.log.sql import latest, scan
from ubt.log.table import Table, need_same_kind

ITEM_COLUMNS = ("sku", "category", "price", "name")


def read(folder: Path, connection: duckdb.DuckDBPyConnection) -> Log:
    """Describe the log in a folder; one with target/train_target.parquet is split already."""
    split = (folder / "target" / "train_target.parquet").exists()
    paths = {name: (folder / "input" if split else folder) / f"{name}.parquet" for name in COLUMNS}
    after = [folder / "target" / f"{name}_target.parquet" for name in ("train", "validation")] if split else []
    need_files([*paths.values(), folder / ITEMS, folder / "input" / "relevant_clients.npy"], folder)
    tables = {name: Table(connection, path) for name, path in paths.items()}
    for name, table in tables.items():
        table.need(COLUMNS[name])
    items = Table(connection, folder / ITEMS)
    items.need(ITEM_COLUMNS)
    need_same_kind([tables[name] for name in ITEM_EVENTS], items)
    need_files(after, folder)
    targets = [Table(connection, path) for path in after]
    for target in targets:
        target.need(("client_id", "timestamp", "sku", "category"))
    need_same_kind(targets, items)
    last = scan(after or [paths["product_buy"]])
    end = latest(connection, last, "CAST(timestamp AS TIMESTAMP)", paths["product_buy"])
    train_start = (end - timedelta(days=2 * DAYS_IN_WINDOW - 1)).replace(hour=0, minute=0, second=0, microsecond=0)
    return _Challenge(
        connection=connection,
        layout="split" if split else "raw",
        files=[*paths.values(), folder / ITEMS, *sorted(folder.glob("*/*.npy")), *after],
        families={
            "event_type": "event_type",
            "category": "sku.category",
            "price": "sku.price",
            "item": "sku",
            "url": "url",
            "name": "sku.name",
            "query": "query",
        },
        train_start=train_start,
        valid_start=train_start + timedelta(days=DAYS_IN_WINDOW),
        end=end,
        arrays=read_arrays(folder),
        tables=tables,
        items=items,
        later=targets,
    )


def checked(files: list[Path], connection: duckdb.DuckDBPyConnection) -> list[Path]:
    """Return event tables of new days.

    Raises:
        ValueError: if a column is missing, or a row has no client or time
    """
    for path in files:
        Table(connection, path).need(COLUMNS[path.stem])
    return files


@dataclass
class _Challenge(Log):
    # Purchases of the label windows, where they lie apart.
    later: list[Table] | None = None

    def outcomes(self, events: str) -> str:
        bought = " UNION ALL ".join(_buys(table) for table in (self.tables["product_buy"], *(self.later or [])))
        assert self.items is not None
        # A left join: a purchase of a sku without properties still is a purchase, only without a category.
        properties = f"LEFT JOIN {self.items.sql} p USING (sku)"
        return f"SELECT b.*, p.category, p.price, p.name FROM ({bought}) b {properties}"

    def active(self, events: str) -> str:
        return f"SELECT client_id, timestamp FROM ({_buys(self.tables['product_buy'])})"


def _buys(table: Table) -> str:
    return f"SELECT client_id, CAST(timestamp AS TIMESTAMP) AS timestamp, sku FROM {table.sql}"
