"""The simple layout: any event tables in input/, ready labels in target/{train,valid}.parquet."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import duckdb
import numpy as np
from numpy.typing import NDArray

from ubt.log.arrays import read_arrays
from ubt.log.base import COLUMNS, DAYS_IN_WINDOW, FAMILIES, ITEMS, Log, listing, need_files
from ubt.log.sql import FLOATS, latest, literal, other_price, price_borders, price_bucket, text, whole
from ubt.log.table import Table, need_same_kind


def read(folder: Path, connection: duckdb.DuckDBPyConnection) -> Log:
    """Describe the log in a folder; the labels are ready, so the windows follow the last event."""
    paths = [folder / "target" / f"{name}.parquet" for name in ("train", "valid")]
    need_files([*paths, folder / "input" / "relevant_clients.npy"], folder)
    items = next((path for path in (folder / ITEMS, folder / "input" / ITEMS) if path.exists()), None)
    files = sorted((folder / "input").glob("*.parquet"))
    if not files:
        raise FileNotFoundError(f"input/*.parquet: no event table; there is: {listing(folder)}")
    files = [path for path in files if path != items]
    properties = None if items is None else Table(connection, items)
    events, found = _events([Table(connection, path) for path in files], properties)
    # The layout's prices are buckets 0..99; amounts become buckets, and those of the labels by the same borders.
    borders: list[float] | None = [] if "price" in found else None
    if "price" in found and other_price(connection, f"({events})") is not None:
        borders = price_borders(connection, f"({events})", "price")
        events = f"SELECT * REPLACE ({price_bucket('price', borders)} AS price) FROM ({events})"
    last = latest(connection, f"({events})", "timestamp", folder / "input")
    train_start = last.replace(microsecond=0) + timedelta(seconds=1)
    valid_start = train_start + timedelta(days=DAYS_IN_WINDOW)
    bought = " WHERE event_type = 'product_buy'"
    if connection.execute(f"SELECT 1 FROM ({events}){bought} LIMIT 1").fetchone() is None:
        bought = ""
    arrays, labels = read_arrays(folder), []
    for path, moment in zip(paths, (train_start, valid_start), strict=True):
        table = Table(connection, path)
        labels.append(_labels(table, moment, borders))
        _need_asked(table, arrays["relevant_clients"])
    return _Simple(
        connection=connection,
        layout="simple",
        files=[*files, *([items] if items else []), *paths, *sorted(folder.glob("*/*.npy"))],
        families={family: column for family, column in FAMILIES.items() if column in found},
        train_start=train_start,
        valid_start=valid_start,
        end=valid_start + timedelta(days=DAYS_IN_WINDOW),
        arrays=arrays,
        events=events,
        wanted=sorted({"sku", "category", "price", "name"} & found),
        bought=bought,
        labels=labels,
    )


@dataclass
class _Simple(Log):
    wanted: list[str] = field(default_factory=list)
    bought: str = ""
    labels: list[str] = field(default_factory=list)

    def outcomes(self, events: str) -> str:
        history = f"SELECT {', '.join(['client_id', 'timestamp', *self.wanted])} FROM {events}{self.bought}"
        return " UNION ALL BY NAME ".join([history, *self.labels])

    def active(self, events: str) -> str:
        return f"SELECT client_id, timestamp FROM {events}{self.bought}"


def _events(tables: list[Table], items: Table | None) -> tuple[str, set[str]]:
    """Return the SQL of all events, and the columns of families that they have."""
    parts, found = [], set()
    for table in tables:
        kept = sorted(set(table.kinds) & set(FAMILIES.values()) - {"event_type"})
        table.need(("client_id", "timestamp", *kept))
        stem = Path(table.name).stem
        if stem not in COLUMNS:
            table.need(("event_type",))
        kind = literal(stem) if stem in COLUMNS else "CAST(event_type AS VARCHAR)"
        found |= {"event_type", *kept}
        fields = "".join(f", {column}" for column in kept)
        parts.append(
            f"SELECT {table.client} AS client_id, CAST(timestamp AS TIMESTAMP) AS timestamp, "
            f"{kind} AS event_type{fields} FROM {table.sql}"
        )
    events = " UNION ALL BY NAME ".join(parts)
    if items is None or "sku" not in found:
        return events, found
    added = sorted(set(items.kinds) & {"category", "price", "name"} - found)
    items.need(("sku", *added))
    need_same_kind([table for table in tables if "sku" in table.kinds], items)
    fields = "".join(f", p.{column}" for column in added)
    return f"SELECT e.*{fields} FROM ({events}) e LEFT JOIN {items.sql} p USING (sku)", found | set(added)


def _labels(table: Table, moment: datetime, borders: list[float] | None) -> str:
    """SQL of the outcome rows of a table of ready labels, each with its churn where the table has that.

    Prices become buckets by `borders`; without borders they are buckets, and with None there are none in the history.
    """
    kept = sorted({"churn", "sku", "category", "price", "name"} & set(table.kinds))
    table.need(("client_id", *kept))
    if not kept:
        raise ValueError(f"{table.name}: no label; needs some of churn, category, sku, price, name")
    if "churn" in kept:
        _check_churn(table)
    if "price" in kept and borders == []:
        other = other_price(table.connection, table.sql)
        if other is not None:
            raise ValueError(f"{table.name}: got price {other}, needs buckets 0..99, as those in input/ are")
    ids = {"sku", "category"} if borders is None else {"sku", "category", "price"}
    typed = []
    for column in kept:
        if column == "price" and borders:
            typed.append(f"{price_bucket(column, borders)} AS price")
        elif column in ids and table.kinds[column] in FLOATS:
            typed.append(f"{whole(column, table.name)} AS {column}")
        else:
            typed.append(column)
    columns = [f"{table.client} AS client_id", f"TIMESTAMP '{text(moment)}' AS timestamp", *typed]
    return f"SELECT {', '.join(columns)} FROM {table.sql}"


def _check_churn(table: Table) -> None:
    query = f"SELECT client_id, churn FROM {table.sql} WHERE churn IS NULL OR churn NOT IN (0, 1) LIMIT 1"
    row = table.connection.execute(query).fetchone()
    if row is not None:
        raise ValueError(f"{table.name}: client {row[0]} has churn {row[1]}; needs 0 or 1")
    query = f"SELECT client_id FROM {table.sql} GROUP BY client_id HAVING count(DISTINCT churn) > 1 LIMIT 1"
    row = table.connection.execute(query).fetchone()
    if row is not None:
        raise ValueError(f"{table.name}: client {row[0]} has rows with churn 0 and rows with churn 1")


def _need_asked(table: Table, asked: NDArray) -> None:
    clients = table.connection.sql(f"SELECT DISTINCT {table.client} FROM {table.sql}")
    labelled = clients.to_arrow_table()[0].to_numpy()
    if len(labelled) and not np.isin(labelled.astype(str), asked.astype(str)).any():
        raise ValueError(
            f"{table.name}: none of its {len(labelled)} clients is asked for, e.g. {labelled[0]!r}; "
            f"relevant_clients.npy holds e.g. {asked[:1].tolist()}"
        )
