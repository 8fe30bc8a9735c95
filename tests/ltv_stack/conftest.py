"""A small world with planted truth: nested history drives a chance to buy and a log-normal amount at three horizons."""

from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ltv_stack import Column, Horizon, LTVConfig, Schema

START = datetime(2025, 10, 1)


def make_table(rows: int, seed: int, hour: datetime, buyer_rate: float = 0.15) -> pa.Table:
    rng = np.random.default_rng(seed)
    taste = rng.normal(size=rows)
    country = rng.choice(["DE", "US", "FR", None], rows, p=[0.4, 0.4, 0.15, 0.05])
    bundle = rng.choice(["game", "shop", "chat"], rows)
    entries = rng.poisson(1.5 + np.maximum(taste, 0))
    null = rng.random(rows) < 0.3
    spend = []
    for i in range(rows):
        keys = rng.choice(["game", "shop", "chat"], entries[i])
        values = rng.lognormal(taste[i], 0.5, entries[i])
        spend.append(None if null[i] else list(zip(keys.tolist(), values.tolist(), strict=True)))
    now = hour.timestamp() if hour.tzinfo else (hour - datetime(1970, 1, 1)).total_seconds()
    last_buy = np.where(rng.random(rows) < 0.5, now - rng.exponential(20 * 86400, rows) * np.exp(-taste), np.nan)
    logit = np.log(buyer_rate / (1 - buyer_rate)) - 0.7 + 1.3 * taste + np.where(country == "US", 0.7, 0.0)
    buyer = rng.random(rows) < 1 / (1 + np.exp(-logit))
    d7 = np.where(buyer, rng.lognormal(1.5 + 0.6 * taste, 0.8), 0.0)
    d1 = np.where(rng.random(rows) < 0.5, d7 * rng.random(rows), 0.0)
    later = (rng.random(rows) < 0.3 * (buyer + 0.1)) * rng.lognormal(1.0 + 0.5 * taste, 0.7)
    d14 = d7 + later
    return pa.table(
        {
            "row_id": [f"{seed}-{i}" for i in range(rows)],
            "country": pa.array(country.tolist(), pa.string()),
            "bundle": bundle.tolist(),
            "spend": pa.array(spend, pa.map_(pa.string(), pa.float64())),
            "last_buy": pa.array(last_buy, from_pandas=True),
            "noise": rng.normal(size=rows),
            "age": np.maximum(taste + rng.normal(0, 0.5, rows), -3.0),
            "buyer_d7": buyer.astype(np.int8),
            "revenue_d1": d1,
            "revenue_d7": d7,
            "revenue_d14": d14,
        }
    )


def make_schema() -> Schema:
    week = timedelta(days=7)
    return Schema(
        [
            Column("country", kind="category"),
            Column("bundle", kind="category"),
            Column("spend", kind="nested", lookup=("bundle",)),
            Column("last_buy", kind="unix_seconds"),
            Column("noise"),
            Column("age"),
            Column("revenue_d1", role="label", available_at=timedelta(days=1)),
            Column("revenue_d7", role="label", available_at=week),
            Column("revenue_d14", role="label", available_at=2 * week),
            Column("buyer_d7", role="label", available_at=week),
        ],
        [
            Horizon("d1", "revenue_d1"),
            Horizon("d7", "revenue_d7", "buyer_d7"),
            Horizon("d14", "revenue_d14"),
        ],
        segments=("country",),
    )


FEATURES = {
    "categorical": {"min_count": 5},
    "interactions": {
        "terms": [{"name": "spend_fresh", "op": "product", "left": "spend__sum", "right": "last_buy__decay"}]
    },
    "local_distribution": {"by": ["country"], "features": ["spend__sum", "age"], "min_rows": 50},
}
SMALL = {"n_estimators": 30, "num_leaves": 15, "min_data_in_leaf": 40, "learning_rate": 0.1}


def small_config(**changes: object) -> LTVConfig:
    settings = {
        "buyer_classifier": SMALL,
        "revenue_regressor": SMALL,
        "stacking_meta": {"n_estimators": 30},
        "features": FEATURES,
    }
    return LTVConfig.from_dict({**settings, "threads": 1, "sample_rows": 5000, **changes})


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve hourly partitions of 1,000 rows; in each one a second part file."""
    root = tmp_path_factory.mktemp("world")
    for number in range(12):
        hour = START + timedelta(hours=number)
        folder = root / f"datetime={hour:%Y-%m-%d-%H-%M}"
        folder.mkdir()
        table = make_table(1000, number, hour)
        pq.write_table(table.slice(0, 617), folder / "part-0.parquet")
        pq.write_table(table.slice(617), folder / "part-1.parquet", row_group_size=100)
    return root


@pytest.fixture(scope="session")
def schema() -> Schema:
    return make_schema()


@pytest.fixture(scope="session")
def config() -> Callable[..., LTVConfig]:
    return small_config


@pytest.fixture(scope="session")
def table() -> Callable[..., pa.Table]:
    return make_table
