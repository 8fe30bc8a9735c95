"""The organisers' features and our aggregates against pandas, user by user."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from synthlogs.shop import TABLES
from ubt.features import aggregates, official_features
from ubt.prepare import Prepared


def whole(prepared: Prepared, parts: object) -> tuple[np.ndarray, list[str]]:
    parts = list(parts)
    values = np.zeros((len(prepared.users), len(parts[0].names)), np.float32)
    for part in parts:
        values[part.rows] = part.values
    assert len(set(parts[0].names)) == len(parts[0].names) and np.isfinite(values).all()
    return values, parts[0].names


@pytest.fixture(scope="module")
def frame(raw_log: Path, prepared_dir: Path) -> pd.DataFrame:
    frame = pd.concat([pd.read_parquet(raw_log / f"{table}.parquet").assign(table=table) for table in TABLES])
    frame["timestamp"] = pd.to_datetime(frame["timestamp"])
    items = pd.read_parquet(raw_log / "product_properties.parquet")
    users = np.load(raw_log / "input" / "relevant_clients.npy")
    frame = frame[(frame["timestamp"] < "2022-10-13") & frame["client_id"].isin(users)]
    return frame.merge(items, on="sku", how="left")


def test_the_baseline_is_what_the_organisers_count(frame: pd.DataFrame, prepared: Prepared) -> None:
    values, names = whole(prepared, official_features(prepared, prepared.train_start, [1.0, 7.0, 30.0]))
    # Three item tables with sku, category, price; visits with URLs; searches with their mean query of 16.
    assert len(names) == 3 * (1 + 3 * 3 * 10) + (1 + 3 * 10) + 1 + 16
    column_of = {"item": "sku", "category": "category", "price": "price", "url": "url"}
    checked = 0
    for i, name in enumerate(names):
        if name.startswith("mean query"):
            continue
        table, _, what = name.partition(": ")
        rows = frame[frame["table"] == table]
        if what != "count":
            family, value, _, days, _ = what.split(" ")
            counts = rows[column_of[family]].value_counts()
            assert counts[int(value)] >= counts.iloc[9]
            since = rows["timestamp"].max() - pd.Timedelta(days=float(days))
            rows = rows[(rows["timestamp"] >= since) & (rows[column_of[family]] == int(value))]
        expected = rows.groupby("client_id").size().reindex(prepared.users).fillna(0)
        np.testing.assert_array_equal(values[:, i], expected, err_msg=name)
        checked += expected.sum()
    assert checked > 5000
    queries = frame[frame["table"] == "search_query"].copy()
    queries["third"] = queries["query"].map(lambda text: int(text.strip("[]").split()[2]))
    expected = queries.groupby("client_id")["third"].mean().reindex(prepared.users).fillna(0)
    np.testing.assert_allclose(values[:, names.index("mean query 2")], expected, rtol=1e-5)


def test_aggregates_are_what_pandas_counts(raw_log: Path, frame: pd.DataFrame, prepared: Prepared) -> None:
    values, names = whole(prepared, aggregates(prepared, prepared.train_start, [1.0, 30.0]))
    items = pd.read_parquet(raw_log / "product_properties.parquet")
    frame = frame.assign(days=(prepared.train_start - frame["timestamp"]).dt.total_seconds() / 86400)
    numbers = items.set_index("sku")["name"].map(lambda text: [int(part) for part in text[1:-1].split()])

    def expect(name: str, wanted: pd.Series, missing: float = 0.0, log: bool = True) -> None:
        wanted = wanted.reindex(prepared.users).fillna(missing).to_numpy(float)
        column = values[:, names.index(name)]
        np.testing.assert_allclose(column, np.log1p(wanted) if log else wanted, rtol=1e-4, atol=1e-4, err_msg=name)

    buys = frame[frame["table"] == "product_buy"]
    expect("any: events", frame.groupby("client_id").size())
    expect("product_buy: events in 30 days", buys[buys["days"] <= 30].groupby("client_id").size())
    expect(
        "page_visit: events in 1 days",
        frame[(frame["table"] == "page_visit") & (frame["days"] <= 1)].value_counts("client_id"),
    )
    expect("product_buy: days since last", buys.groupby("client_id")["days"].min(), missing=1e3)
    expect("any: days since first", frame.groupby("client_id")["days"].max())
    expect("distinct item", frame.groupby("client_id")["sku"].nunique())
    expect("distinct url", frame.groupby("client_id")["url"].nunique())
    expect("distinct days", frame.assign(day=frame["timestamp"].dt.date).groupby("client_id")["day"].nunique())
    for i, category in enumerate(prepared.categories[:3]):
        rows = frame[frame["category"] == category]
        expect(f"target category {i}", rows.groupby("client_id").size())
        expect(f"target category {i} in 30 days", rows[rows["days"] <= 30].groupby("client_id").size())
    for i, sku in enumerate(prepared.skus[:3]):
        expect(f"target sku {i}", frame[frame["sku"] == sku].groupby("client_id").size())
    expect("mean price 0", frame.groupby("client_id")["price"].mean(), log=False)
    priced = frame[frame["price"].notna()]
    # Tenths of the distinct prices that the vocabulary knows.
    prices = sorted(prepared.store.vocabulary(prepared.families["price"]).values)
    fifth = priced["price"].isin([price for i, price in enumerate(prices) if i * 10 // len(prices) == 4])
    expect("mean price tenth 4", fifth.groupby(priced["client_id"]).mean(), log=False)
    named = frame[frame["sku"].isin(numbers.index)]
    third = named.assign(value=named["sku"].map(numbers.str[2]))
    expect("mean name 2", third.groupby("client_id")["value"].mean(), log=False)
