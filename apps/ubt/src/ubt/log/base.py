"""What a log is, however it is laid out: tables, windows, and the SQL of its events and outcomes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import duckdb
from numpy.typing import NDArray

from ubt.log.table import Table

DAYS_IN_WINDOW = 14
ITEM_EVENTS = ("product_buy", "add_to_cart", "remove_from_cart")
COLUMNS = {
    **{name: ("client_id", "timestamp", "sku") for name in ITEM_EVENTS},
    "page_visit": ("client_id", "timestamp", "url"),
    "search_query": ("client_id", "timestamp", "query"),
}
ITEMS = "product_properties.parquet"
# Feature family -> column of a table that holds all events.
FAMILIES = {
    "event_type": "event_type",
    "category": "category",
    "price": "price",
    "item": "sku",
    "url": "url",
    "name": "name",
    "query": "query",
}


@dataclass
class Log:
    """A log: what the events are, where history ends, and which rows are outcomes.

    Args:
        connection: DuckDB connection the queries run on
        layout: "raw" or "split" for the challenge's directories, "simple" for one events table with ready labels,
            "custom" for a log described by YAML
        files: every input file, for the fingerprint
        families: feature family -> field of the store
        train_start, valid_start, end: borders of the windows, UTC
        arrays: the layout's own .npy files by stem, where it has them
        tables: event table -> its files, where each has one of its own
        items: the item table beside them, or None
        events: else, SQL of client_id, timestamp and fields of all events
        reading: what was found out about the values of the columns, by which later days are read
    """

    connection: duckdb.DuckDBPyConnection
    layout: str
    files: list[Path]
    families: dict[str, str]
    train_start: datetime
    valid_start: datetime
    end: datetime
    arrays: dict[str, NDArray] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)
    items: Table | None = None
    events: str = ""
    reading: dict[str, Any] = field(default_factory=dict)

    def outcomes(self, events: str) -> str:
        """Return the SQL of client_id, timestamp, sku, category, ... of all outcome rows.

        Args:
            events: where the rows of `self.events` can be read
        """
        raise NotImplementedError

    def active(self, events: str) -> str:
        """Return the SQL of client_id, timestamp of the rows that make a user active; `events` as in `outcomes`."""
        raise NotImplementedError


def need_files(paths: Iterable[Path], folder: Path) -> None:
    """Raise FileNotFoundError for the first file that is missing; says what is there."""
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(
                f"{path.relative_to(folder)}: not found in {folder}, which is read in the RecSys Challenge 2025 layout "
                f"({', '.join(COLUMNS)}.parquet, {ITEMS}, input/relevant_clients.npy), or, with "
                f"target/train.parquet, in the simple one; there is: {listing(folder)}. "
                "Another log needs `log.files` in its YAML."
            )


def listing(folder: Path) -> str:
    """Return the first files below a folder."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "nothing"
