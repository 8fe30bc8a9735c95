"""Shop transactions as revenue-prediction rows: what a customer did in the first days, and what came after.

Every customer gives one row, at the end of the first `first_days` days after the first purchase. Features use purchases
before that moment only, labels the ones from it on. Label money is what was sold; cancellations and returns never take
it back, so that longer horizons never hold less. They do count as features, of the observed days.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ltv.config import PARTITION, ImportConfig
from runkit.errors import SettingError
from runkit.files import atomic_folder, write_json
from synthlogs.ragged import Ragged

COLUMNS = ("customer", "time", "item", "quantity", "amount", "country")
DAY = pd.Timedelta(days=1)


def read_cdnow(path: str | Path) -> pd.DataFrame:
    """Read ``CDNOW_master.txt``: 69,659 purchases of 23,570 customers, January 1997 to June 1998.

    Args:
        path: the file, or the folder that holds it

    Returns:
        one line a purchase with customer, time, quantity and amount (USD).
    """
    path = _file(path, "CDNOW_master.txt")
    table = pd.read_csv(path, sep=r"\s+", skiprows=1, header=None, names=["customer", "time", "quantity", "amount"])
    table["time"] = pd.to_datetime(table["time"].astype(str), format="%Y%m%d")
    return table


def read_online_retail(path: str | Path) -> pd.DataFrame:
    """Read UCI Online Retail from Parquet or CSV: 541,909 invoice lines, December 2010 to December 2011.

    Lines without a customer cannot be given to anyone and are left out (135,080 in the published file).

    Args:
        path: the file, or the folder that holds ``onlineretail.parquet``

    Returns:
        one line an invoice line with customer, time, item, quantity, amount (GBP) and country.
    """
    path = _file(path, "onlineretail.parquet")
    table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    table = table.dropna(subset=["CustomerID"])
    return pd.DataFrame(
        {
            "customer": table["CustomerID"].astype("int64"),
            "time": pd.to_datetime(table["InvoiceDate"]),
            "item": table["StockCode"].astype(str),
            "quantity": table["Quantity"],
            "amount": table["Quantity"] * table["UnitPrice"],
            "country": table["Country"].astype(str),
        }
    )


READERS = {"cdnow": read_cdnow, "online_retail": read_online_retail}


def import_transactions(source: str, path: str | Path, data_dir: str | Path, config: ImportConfig) -> dict[str, int]:
    """Read a published set and write it as daily partitions of rows that ``layout: transactions`` trains on.

    Args:
        source: "cdnow" or "online_retail"
        path: the file or its folder
        data_dir: folder to write; must not exist or be empty
        config: the observed days and the horizons

    Returns:
        how many lines, customers and rows there were, and how many customers were left out because the data end before
        their longest horizon does.
    """
    config.check()
    if source not in READERS:
        raise SettingError(f"source: got {source!r}, needs one of {', '.join(READERS)}")
    data_dir = Path(data_dir)
    if data_dir.exists() and any(data_dir.iterdir()):
        raise FileExistsError(f"data_dir: {data_dir} is not empty; remove it or name another folder")
    try:
        lines = READERS[source](path)
    except FileNotFoundError as error:
        raise SettingError(str(error)) from None
    rows, facts = customer_rows(lines, config)
    with atomic_folder(data_dir, "ltv transactions") as folder:
        for name, table in _daily(rows):
            target = folder / "train" / "train" / f"datetime={name}" / "part-00000.parquet"
            target.parent.mkdir(parents=True)
            pq.write_table(table, target)
        keep = [column for column in COLUMNS if column in lines]
        lines[keep].to_parquet(folder / "transactions.parquet", index=False)
        write_json(folder / "imported.json", {"source": source, "config": asdict(config), "result": facts})
    return facts


def customer_rows(lines: pd.DataFrame, config: ImportConfig) -> tuple[pa.Table, dict[str, int]]:
    """Turn purchases into one row per customer: features of the first days, labels of the horizons after them.

    Args:
        lines: customer, time, quantity, amount and, where there are, item and country; negative amounts are returns
        config: the observed days and the horizons

    Returns:
        the rows with the column ``row_time`` (the end of the observed days), and counts of what was used and left out.
    """
    lines = lines.sort_values(["customer", "time"], kind="stable").reset_index(drop=True)
    sales = lines[lines["amount"] > 0]
    first = sales.groupby("customer")["time"].min()
    row_time = first.dt.normalize() + config.first_days * DAY
    closed = row_time + config.horizons[-1] * DAY <= lines["time"].max().normalize() + DAY
    customers = first.index[closed]
    facts = {
        "lines": len(lines),
        "customers": int(lines["customer"].nunique()),
        "customers_without_a_sale": int(lines["customer"].nunique() - len(first)),
        "customers_with_open_horizons": int((~closed).sum()),
        "rows": len(customers),
    }
    if not len(customers):
        raise SettingError(
            f"horizons: {config.first_days} observed days and horizons up to {config.horizons[-1]} days are longer "
            "than the data; choose shorter ones"
        )
    number = pd.Series(np.arange(len(customers)), index=customers)
    lines = lines[lines["customer"].isin(customers)].copy()
    lines["row"] = lines["customer"].map(number).to_numpy()
    since = (lines["time"] - lines["customer"].map(row_time)) / DAY
    lines["since"] = since.to_numpy()
    columns = {"customer": pa.array(customers), "row_time": pa.array(row_time[customers].astype("datetime64[us]"))}
    columns |= _features(lines[lines["since"] < 0], first[customers], row_time[customers], len(customers))
    columns |= _labels(lines[(lines["since"] >= 0) & (lines["amount"] > 0)], config.horizons, len(customers))
    return pa.table(columns), facts


def _features(seen: pd.DataFrame, first: pd.Series, row_time: pd.Series, number: int) -> dict[str, pa.Array]:
    sold, returned = seen[seen["amount"] > 0], seen[seen["amount"] <= 0]
    orders = sold.groupby(["row", "time"], sort=True)["amount"].sum().reset_index()

    def total(values: pd.Series, row: pd.Series) -> np.ndarray:
        return np.bincount(row, values, number)

    spend = total(sold["amount"], sold["row"])
    days = sold["time"].dt.normalize().groupby(sold["row"])
    active = days.nunique().to_numpy()
    again = sold["time"].dt.normalize() > days.transform("min")
    repeat_money = total(sold["amount"] * again, sold["row"])
    count = np.bincount(orders["row"], minlength=number)
    opening = orders.groupby("row")["amount"].first().to_numpy()
    gap = orders.groupby("row")["time"].diff() / DAY
    columns = {
        "orders": pa.array(count),
        "active_days": pa.array(active),
        # What BG/NBD and Gamma-Gamma know of a customer: days bought again, days from first to last, money of those.
        "repeat_days": pa.array(active - 1),
        "recency_days": pa.array(((days.max() - days.min()) / DAY).to_numpy()),
        "spend_per_repeat_day": pa.array(repeat_money / np.maximum(active - 1, 1)),
        "spend": pa.array(spend),
        "spend_per_order": pa.array(spend / count),
        "first_order": pa.array(opening),
        "largest_order": pa.array(orders.groupby("row")["amount"].max().to_numpy()),
        "last_order": pa.array(orders.groupby("row")["amount"].last().to_numpy()),
        "units": pa.array(total(sold["quantity"], sold["row"])),
        "lines": pa.array(np.bincount(sold["row"], minlength=number)),
        "returned": pa.array(total(-returned["amount"], returned["row"])),
        "mean_gap_days": pa.array(gap.groupby(orders["row"]).mean().to_numpy(), from_pandas=True),
        "first_time": pa.array(_unix(first)),
        "last_time": pa.array(_unix(orders.groupby("row")["time"].max())),
        "first_weekday": pa.array(first.dt.day_of_week.to_numpy().astype(np.int32)),
        "first_hour": pa.array(first.dt.hour.to_numpy().astype(np.int32)),
    }
    day = (sold["since"].to_numpy() // 1).astype(int)
    columns["spend_by_day"] = _map(sold["row"], pd.Series(day).astype(str).to_numpy(), sold["amount"], number)
    if "item" in sold:
        columns["spend_by_item"] = _map(sold["row"], sold["item"].to_numpy(), sold["amount"], number)
    if "country" in sold:
        columns["country"] = pa.array(sold.groupby("row")["country"].first().to_numpy())
    return columns


def _labels(bought: pd.DataFrame, horizons: list[int], number: int) -> dict[str, pa.Array]:
    columns: dict[str, pa.Array] = {}
    for days in horizons:
        inside = bought[bought["since"] < days]
        money = np.bincount(inside["row"], inside["amount"], number)
        columns[f"revenue_d{days}"] = pa.array(np.round(money, 2))
        columns[f"buyer_d{days}"] = pa.array((money > 0).astype(np.int32))
    return columns


def _map(row: pd.Series, key: np.ndarray, value: pd.Series, number: int) -> pa.Array:
    """Sum `value` by row and key into a map column."""
    codes, names = pd.factorize(key)
    lists, merged, entry = Ragged(np.ones(number, bool), np.bincount(row, minlength=number)).group(codes, len(names))
    return lists.map(pa.array(names[merged].tolist()), np.bincount(entry, value, len(merged)))


def _daily(rows: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    day = pd.Series(rows["row_time"].to_pandas()).dt.normalize()
    for moment in sorted(day.unique()):
        yield moment.strftime(PARTITION), rows.filter(pa.array((day == moment).to_numpy())).drop_columns(["row_time"])


def _unix(times: pd.Series) -> np.ndarray:
    return ((times - pd.Timestamp(0)) / pd.Timedelta(seconds=1)).to_numpy()


def _file(path: str | Path, name: str) -> Path:
    path = Path(path)
    path = path / name if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"path: {path} does not exist; needs {name} or the folder that holds it")
    return path
