"""Numbers in buckets whose borders only the past knows."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import seqdata
from seqdata import Quantiles, quantiles

KEYS = {"user": "user", "time": "time", "time_unit": "s", "progress": False}


def expected(values: pd.Series, fit: pd.Series, n: int) -> list[int]:
    borders = np.quantile(values[fit].dropna(), np.arange(1, n) / n)
    return [0 if np.isnan(one) else 2 + int((borders <= one).sum()) for one in values]


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("pieces", [False, True])
def test_buckets_are_those_of_the_past(tmp_path, oracle, monkeypatch, shards, pieces):
    log = oracle.log()
    log.loc[::5, "price"] = np.nan
    if pieces:
        # sorted in several ranges of users
        monkeypatch.setattr("seqdata.spool.BYTES_A_ROW", 56 * 20_000)
    fields = {"price": Quantiles(7), "row": seqdata.Numeric()}
    store = seqdata.build(
        log, tmp_path / "s", fields=fields, fit_before=300_000_000, shards=shards, memory_limit="32MB", **KEYS
    )
    ordered = oracle.order(log, "user", "time")
    assert store.column("price").dtype == np.int32
    assert store.column("price").tolist() == expected(ordered.price, ordered.time < 300, 7)
    assert len(store.entry("price")["borders"]) == 6
    assert store.all().where("price", [3]).num_events == (store.column("price") == 3).sum()
    assert store.verify() == [] and seqdata.audit(store).worst != "error"
    # the future moves no border
    other = log.assign(price=np.where(log.time < 300, log.price, 1e9))
    again = seqdata.build(other, tmp_path / "t", fields=fields, fit_before=300_000_000, shards=shards, **KEYS)
    assert again.entry("price")["borders"] == store.entry("price")["borders"]
    past = [one.as_of(300_000_000).gather(["price"])["price"].tolist() for one in (store, again)]
    assert past[0] == past[1]
    # nor does an append
    grown = seqdata.append(store, other.assign(row=0.0), progress=False)
    assert grown.entry("price")["borders"] == store.entry("price")["borders"]
    mine = pd.Series(grown.column("price"))[grown.column("row") > 0]
    assert sorted(mine) == sorted(store.column("price")[store.column("row") > 0].tolist())


def test_properties_of_items(tmp_path):
    log = pd.DataFrame({"user": [1, 2, 3], "time": [1, 2, 3], "sku": [10, 11, 12]})
    items = pd.DataFrame({"sku": [10, 11, 12, 13], "price": [1.0, 5.0, np.nan, 1e6]})
    table = seqdata.ItemTable(items, "sku", {"price": {"kind": "quantiles", "n": 2}})
    store = seqdata.build(log, tmp_path / "s", items={"sku": table}, **KEYS)
    assert store.entry("sku.price")["borders"] == [3.0]
    assert store.item_column("sku", "price").tolist() == [0, 0, 2, 3, 0]
    more = pd.DataFrame({"sku": [14], "price": [2.0]})
    fresh = log.assign(sku=14, time=9)
    grown = seqdata.append(
        store, fresh, items={"sku": seqdata.ItemTable(more, "sku")}, fit_before=20_000_000, progress=False
    )
    assert grown.item_column("sku", "price").tolist() == [0, 0, 2, 3, 0, 2]


def test_mistakes_and_extremes(tmp_path):
    with pytest.raises(ValueError, match=r"Quantiles\(n=1\): needs an integer from 2"):
        Quantiles(1)
    log = pd.DataFrame({"user": [1, 2], "time": [1, 2], "x": [np.nan, np.inf]})
    store = seqdata.build(log, tmp_path / "s", fields={"x": Quantiles(4)}, **KEYS)
    assert store.column("x").tolist() == [0, 2] and store.entry("x")["borders"] == []


def test_of_very_many_numbers_an_even_sample_is_taken(monkeypatch):
    monkeypatch.setattr(quantiles, "MOST", 1000)
    values = np.random.default_rng(0).random(50_000)
    for size in (50_000, 777):
        batches = [values[low : low + size] for low in range(0, len(values), size)]
        borders = quantiles.fit_borders(batches, len(values), 4)
        assert borders == np.quantile(values[::50], [0.25, 0.5, 0.75]).tolist()
