"""The generated log has the challenge's layout and statistics, and the same seed gives the same bytes."""

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from synthlogs.shop import TABLES, ShopConfig, generate
from synthlogs.text import time_text, vector_text

TINY = ShopConfig(clients=6000, relevant_share=0.1, target_categories=8, target_skus=5, target_new_skus=3)


@pytest.fixture(scope="module")
def raw_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("log") / "data"
    generate(folder, TINY)
    return folder


def test_files_and_schemas_are_those_of_the_challenge(raw_log: Path) -> None:
    value = {"page_visit": "url", "search_query": "query"}
    for table in TABLES:
        schema = pq.read_schema(raw_log / f"{table}.parquet")
        kind = "string" if table == "search_query" else "int64"
        found = {name: str(schema.field(name).type) for name in schema.names}
        assert found == {"client_id": "int64", "timestamp": "string", value.get(table, "sku"): kind}
    items = pq.read_schema(raw_log / "product_properties.parquet")
    assert [(name, str(items.field(name).type)) for name in items.names] == [
        ("sku", "int64"),
        ("category", "int64"),
        ("price", "int64"),
        ("name", "string"),
    ]
    for name, kind in {
        "input/relevant_clients": np.int64,
        "target/active_clients": np.int64,
        "target/propensity_category": np.int64,
        "target/popularity_propensity_category": np.float64,
        "target/propensity_sku": np.int64,
        "target/popularity_propensity_sku": np.float64,
        "target/propensity_new_sku": np.int64,
        "target/popularity_propensity_new_sku": np.float64,
        "target/propensity_price": np.int64,
        "target/popularity_propensity_price": np.float64,
    }.items():
        array = np.load(raw_log / f"{name}.npy")
        assert array.ndim == 1 and array.dtype == kind
        assert "popularity" in name or len(np.unique(array)) == len(array)


def test_texts_times_and_prices_are_written_as_in_the_challenge(raw_log: Path) -> None:
    queries = pd.read_parquet(raw_log / "search_query.parquet")["query"]
    items = pd.read_parquet(raw_log / "product_properties.parquet")
    for text in [*queries.head(50), *items["name"].head(50)]:
        numbers = [int(number) for number in re.findall(r"\d+", text)]
        assert len(numbers) == 16 and max(numbers) < 256
        assert text == str(np.array(numbers))
    assert (queries.str.len() == 65).mean() > 0.95
    assert set(items["price"]) == set(range(100))
    assert items["price"].value_counts().max() <= items["price"].value_counts().min() + 1
    for table in TABLES:
        times = pd.read_parquet(raw_log / f"{table}.parquet")["timestamp"]
        assert times.str.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d").all()
        assert times.max() <= "2022-11-09 23:59:59"


def test_users_and_targets_come_from_the_history_only(raw_log: Path) -> None:
    buys = pd.read_parquet(raw_log / "product_buy.parquet")
    items = pd.read_parquet(raw_log / "product_properties.parquet")
    past = buys[buys["timestamp"] < "2022-10-13"]
    relevant = np.load(raw_log / "input/relevant_clients.npy")
    active = np.load(raw_log / "target/active_clients.npy")
    assert set(active) == set(relevant) & set(past["client_id"])
    sold = past.merge(items, on="sku")["category"].value_counts()
    categories = np.load(raw_log / "target/propensity_category.npy")
    popularity = np.load(raw_log / "target/popularity_propensity_category.npy")
    np.testing.assert_allclose(popularity, [sold[category] / len(past) for category in categories])
    assert sold.iloc[: len(categories)].sum() == sold[categories].sum()
    assert not (relevant == np.sort(relevant)).all()


def test_statistics_are_those_published(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    generate(folder, ShopConfig(clients=60_000))
    tables = {table: pd.read_parquet(folder / f"{table}.parquet") for table in TABLES}
    total = sum(len(table) for table in tables.values())
    published = {
        "page_visit": 0.888,
        "search_query": 0.058,
        "add_to_cart": 0.032,
        "remove_from_cart": 0.011,
        "product_buy": 0.0101,
    }
    for table, share in published.items():
        assert len(tables[table]) / total == pytest.approx(share, rel=0.35), table
    repeated = {table: frame.duplicated().mean() for table, frame in tables.items()}
    assert repeated["product_buy"] == pytest.approx(0.1597, rel=0.2)
    assert repeated["search_query"] == pytest.approx(0.0564, rel=0.2)
    events = pd.concat([table["client_id"] for table in tables.values()]).value_counts()
    assert events.mean() == pytest.approx(9.4, rel=0.15)
    assert 2 <= events.median() <= 3
    assert events.quantile(0.9) == pytest.approx(18, rel=0.2)
    assert events.quantile(0.99) == pytest.approx(119, rel=0.2)
    relevant = np.load(folder / "input/relevant_clients.npy")
    history = pd.concat([t[t["timestamp"] < "2022-10-13"]["client_id"] for t in tables.values()]).value_counts()
    assert history.reindex(relevant).fillna(0).clip(upper=128).mean() == pytest.approx(33.15, rel=0.3)
    share = len(np.load(folder / "target/active_clients.npy")) / len(relevant)
    assert share == pytest.approx(0.51, abs=0.03)


def test_the_seed_decides_every_byte_and_the_counts_are_those_written(tmp_path: Path) -> None:
    config = ShopConfig(clients=2000, target_categories=4, target_skus=4)

    def written(name: str, config: ShopConfig) -> dict[str, str]:
        counts = generate(tmp_path / name, config)
        for table in TABLES:
            assert counts[table] == pq.read_metadata(tmp_path / name / f"{table}.parquet").num_rows
        files = sorted(p for p in (tmp_path / name).rglob("*") if p.is_file())
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    first = written("a", config)
    assert first == written("b", config)
    # What this generator wrote, it replaces.
    assert first != written("a", replace(config, log_seed=1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_new_skus": 1}, "target_new_skus: got 1"),
        ({"clients": 5}, "clients: got 5"),
        ({"days": 20}, "days: got 20"),
        ({"relevant_share": 0.0}, "relevant_share"),
        ({"end": "9 November"}, "end: got '9 November'"),
        ({"log_seed": -1}, "log_seed: got -1"),
    ],
)
def test_settings_without_sense_are_refused(tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(tmp_path / "data", replace(ShopConfig(), **settings))
    assert not (tmp_path / "data").exists()


def test_new_skus_are_not_seen_before_the_label_windows_and_sell_in_both(tmp_path: Path) -> None:
    raw = tmp_path / "data"
    generate(raw, ShopConfig(clients=20_000))
    new = np.load(raw / "target/propensity_new_sku.npy")
    assert len(new) == len(np.unique(new)) == 20
    assert set(new) <= set(pd.read_parquet(raw / "product_properties.parquet")["sku"])
    for table in ("product_buy", "add_to_cart", "remove_from_cart"):
        rows = pd.read_parquet(raw / f"{table}.parquet")
        assert not rows[rows["timestamp"] < "2022-10-13"]["sku"].isin(new).any()
    buys = pd.read_parquet(raw / "product_buy.parquet")
    train = buys[buys["timestamp"].between("2022-10-13", "2022-10-26 23:59:59")]
    assert train["sku"].isin(new).mean() > 0.02
    assert buys[buys["timestamp"] >= "2022-10-27"]["sku"].isin(new).mean() > 0.02
    popularity = np.load(raw / "target/popularity_propensity_new_sku.npy")
    sold = train["sku"].value_counts().reindex(new).fillna(0).to_numpy()
    np.testing.assert_allclose(popularity, sold / sold.sum())
    assert (np.diff(popularity) <= 0).all()
    prices = np.load(raw / "target/propensity_price.npy")
    assert sorted(prices) == list(range(100))


@given(st.integers(0, 5).flatmap(lambda n: arrays(np.uint8, (n, 3))))
def test_vectors_are_printed_as_numpy_prints_them(vectors: np.ndarray) -> None:
    assert vector_text(vectors).to_pylist() == [str(row) for row in vectors]


def test_times_are_printed_in_utc() -> None:
    assert time_text(np.array([0, 1665619199])).to_pylist() == ["1970-01-01 00:00:00", "2022-10-12 23:59:59"]
