"""Write a generated shop's log, chunk of clients by chunk of clients."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import fields
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from synthlogs.folder import progress, whole_folder, write_mark
from synthlogs.settings import ShopConfig
from synthlogs.shop.catalogue import DAY, Catalogue
from synthlogs.shop.clients import TABLES, Simulation
from synthlogs.text import time_text, vector_text

CHUNK_CLIENTS = 100_000
FILES = (*(f"{name}.parquet" for name in (*TABLES, "product_properties")), "input/*.npy", "target/*.npy")


def generate(folder: str | Path, config: ShopConfig, *, bar: bool = True) -> dict[str, float]:
    """Write the five event tables, the item table and the challenge's ``.npy`` files below `folder`.

    Clients are simulated in chunks that are streamed to disk, so memory grows with the catalogue and one chunk only.
    The same config gives the same bytes. The folder appears in one step, when it is complete.

    Args:
        bar: show a progress bar where stderr is a terminal

    Returns:
        Clients and rows of each table.

    Raises:
        ValueError: if the config leaves no client, no history or no catalogue.
        FileExistsError: if `folder` holds something that this function did not write.
    """
    config.check()
    rng = np.random.default_rng([config.log_seed, 0])
    with whole_folder(folder, FILES) as new:
        catalogue = Catalogue.draw(config, rng)
        client_ids = rng.permutation(config.clients).astype(np.int64) * 7 + 3
        tally = _write_events(new, catalogue, client_ids, config, bar)
        pq.write_table(_item_table(catalogue), new / "product_properties.parquet")
        _write_targets(new, catalogue, client_ids, tally, config, rng)
        write_mark(new, settings_of(config))
    return {"clients": config.clients, **tally.rows}


def settings_of(config: ShopConfig) -> dict[str, object]:
    """Return the settings that determine a generated log; the mark of its folder holds them."""
    return {one.name: getattr(config, one.name) for one in fields(ShopConfig)}


class _Tally:
    """What the targets need to know of the events: who was seen and bought before train_start, and what was sold."""

    def __init__(self, clients: int, skus: int, history_end: int) -> None:
        self.history_end = history_end
        self.events = np.zeros(clients, np.int64)
        self.buys = np.zeros(clients, np.int64)
        self.sku_sales = np.zeros(skus, np.int64)
        self.train_sales = np.zeros(skus, np.int64)
        self.rows: dict[str, float] = dict.fromkeys(TABLES, 0)

    def add(self, table: str, client: NDArray, second: NDArray, value: NDArray) -> None:
        past = second < self.history_end
        self.rows[table] += len(client)
        self.events += np.bincount(client[past], minlength=len(self.events))
        if table == "product_buy":
            self.buys += np.bincount(client[past], minlength=len(self.buys))
            self.sku_sales += np.bincount(value[past], minlength=len(self.sku_sales))
            train = ~past & (second < self.history_end + 14 * DAY)
            self.train_sales += np.bincount(value[train], minlength=len(self.train_sales))


def _write_events(folder: Path, catalogue: Catalogue, client_ids: NDArray, config: ShopConfig, bar: bool) -> _Tally:
    end = int(datetime.fromisoformat(config.end + "+00:00").timestamp())
    start = end - config.days * DAY
    tally = _Tally(config.clients, len(catalogue.sku_id), (end - 27 * DAY) // DAY * DAY)
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(pq.ParquetWriter(folder / f"{name}.parquet", _schema(name))) for name in TABLES
        }
        shown = stack.enter_context(progress(config.clients, "generate", "client", bar))
        for number, first in enumerate(range(0, config.clients, CHUNK_CLIENTS)):
            clients = min(CHUNK_CLIENTS, config.clients - first)
            rng = np.random.default_rng([config.log_seed, 1, number])
            simulation = Simulation(catalogue, clients, start, end, tally.history_end, rng)
            for name, (client, second, value) in simulation.tables().items():
                tally.add(name, client + first, second, value)
                writers[name].write_table(_event_table(name, client_ids[client + first], second, value, catalogue))
            shown.update(clients)
    return tally


def _write_targets(
    folder: Path, catalogue: Catalogue, client_ids: NDArray, tally: _Tally, config: ShopConfig, rng: np.random.Generator
) -> None:
    relevant = _relevant(tally.events, tally.buys, config, rng)
    target = folder / "target"
    (folder / "input").mkdir()
    target.mkdir()
    np.save(folder / "input" / "relevant_clients.npy", client_ids[relevant])
    np.save(target / "active_clients.npy", client_ids[relevant[tally.buys[relevant] > 0]])
    category_sales = np.zeros(len(catalogue.category_id), np.int64)
    np.add.at(category_sales, catalogue.sku_category, tally.sku_sales)
    price_sales = np.bincount(catalogue.sku_price, tally.sku_sales, minlength=100)
    _save_popular(target, "category", catalogue.category_id, category_sales, config.target_categories)
    _save_popular(target, "sku", catalogue.sku_id, tally.sku_sales, config.target_skus)
    _save_popular(target, "price", np.arange(100), price_sales, 100)
    # Nobody bought these before train_start: their popularity is that of the train window.
    launched = catalogue.launched
    _save_popular(target, "new_sku", catalogue.sku_id[launched], tally.train_sales[launched], len(launched))


def _schema(name: str) -> pa.Schema:
    value = {"page_visit": ("url", pa.int64()), "search_query": ("query", pa.string())}.get(name, ("sku", pa.int64()))
    return pa.schema([("client_id", pa.int64()), ("timestamp", pa.string()), value])


def _event_table(name: str, client: NDArray, second: NDArray, value: NDArray, catalogue: Catalogue) -> pa.Table:
    if name == "search_query":
        column = vector_text(catalogue.query[value])
    else:
        column = pa.array(catalogue.url_id[value] if name == "page_visit" else catalogue.sku_id[value])
    return pa.table([pa.array(client), time_text(second), column], schema=_schema(name))


def _item_table(catalogue: Catalogue) -> pa.Table:
    columns = {
        "sku": catalogue.sku_id,
        "category": catalogue.category_id[catalogue.sku_category],
        "price": catalogue.sku_price,
        "name": vector_text(catalogue.sku_name),
    }
    return pa.table(columns)


def _relevant(events: NDArray, buys: NDArray, config: ShopConfig, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw clients seen in the history, half of them buyers, the busier the likelier; in random order."""
    wanted = max(1, round(config.clients * config.relevant_share))
    buyers, others = np.flatnonzero(buys > 0), np.flatnonzero((buys == 0) & (events > 0))
    first = min(len(buyers), max(round(wanted * 0.51), wanted - len(others)))
    chosen = []
    for group, number, power in ((buyers, first, 0.0), (others, min(wanted - first, len(others)), 0.8)):
        # Weighted sampling without replacement: the smallest exponential clocks win.
        clock = rng.exponential(size=len(group)) / np.maximum(events[group], 1) ** power
        chosen.append(group[np.argsort(clock)[:number]])
    return rng.permutation(np.concatenate(chosen))


def _save_popular(folder: Path, what: str, ids: NDArray, sales: NDArray, number: int) -> None:
    top = np.argsort(-sales, kind="stable")[: min(number, len(ids))]
    np.save(folder / f"propensity_{what}.npy", ids[top])
    np.save(folder / f"popularity_propensity_{what}.npy", (sales[top] / max(sales.sum(), 1)).astype(np.float64))
