"""The aggregate baseline against pandas, user by user."""

from pathlib import Path

import numpy as np
import pandas as pd

from ubt.features import aggregates
from ubt.generate import TABLES
from ubt.prepare import Prepared


def test_aggregates_are_what_pandas_counts(raw_log: Path, prepared: Prepared) -> None:
    found = aggregates(prepared, prepared.train_start, [1.0, 30.0])
    assert found.values.shape == (len(prepared.users), len(found.names)) and len(set(found.names)) == len(found.names)
    assert np.isfinite(found.values).all()
    frame = pd.concat([pd.read_parquet(raw_log / f"{table}.parquet").assign(table=table) for table in TABLES])
    frame["timestamp"] = pd.to_datetime(frame["timestamp"])
    items = pd.read_parquet(raw_log / "product_properties.parquet")
    frame = frame[frame["timestamp"] < prepared.train_start].merge(items, on="sku", how="left")
    frame["days"] = (prepared.train_start - frame["timestamp"]).dt.total_seconds() / 86400
    numbers = items.set_index("sku")["name"].map(lambda text: [int(part) for part in text[1:-1].split()])

    def expect(name: str, values: pd.Series, missing: float = 0.0, log: bool = True) -> None:
        wanted = values.reindex(prepared.users).fillna(missing).to_numpy(float)
        column = found.values[:, found.names.index(name)]
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
    expect("mean price 0", frame.groupby("client_id")["price"].mean(), log=False)
    named = frame[frame["sku"].isin(numbers.index)]
    third = named.assign(value=named["sku"].map(numbers.str[2]))
    expect("mean name 2", third.groupby("client_id")["value"].mean(), log=False)
