"""Aggregates of pasts against loops over pandas frames, and that the future changes none."""

from __future__ import annotations

import datetime as dt

import numpy as np
import pandas as pd
import pytest

import seqdata
from seqdata import aggregates, positions_of

SECOND, CUT = 1_000_000, 400
FIELDS = ["brand", "item", "item.cat", "item.cost", "price"]


def build(log, folder):
    items = pd.DataFrame({"item": range(50), "cat": [f"c{i % 5}" for i in range(50)], "cost": np.arange(50.0)})
    table = seqdata.ItemTable(items, "item", {"cat": "categorical", "cost": "numeric"})
    return seqdata.build(
        log,
        folder,
        user="user",
        time="time",
        time_unit="s",
        fit_before=CUT * SECOND,
        items={"item": table},
        progress=False,
    )


@pytest.fixture
def made(tmp_path, oracle):
    log = oracle.log(rows=1500, users=70)
    log.loc[log.user == 3, "time"] += 1000
    log.loc[::7, "price"] = np.nan
    view = build(log, tmp_path / "s").all()
    ordered = oracle.order(log, "user", "time")
    past = ordered[ordered.time < CUT]
    return view, [past[past.user == user] for user in view.users]


def everything(past: aggregates.Past) -> dict[str, np.ndarray]:
    day, brands = dt.timedelta(seconds=90), past.where("brand", ["b2", "b5"])
    return {
        "counts": past.counts(),
        "recent": past.within(day).counts(),
        "brands": brands.counts(),
        "of": past.counts_of("item", [2, 5, 1, 2, 0, 9]),
        "none": past.counts_of("item", []),
        "distinct": past.distinct("item"),
        "brands seen": past.distinct("brand"),
        "days": past.distinct(past["timestamp"] // 100),
        "top": past.top_shares("item", 3),
        "last": past.since_last(),
        "first": brands.since_first(),
        "sum": past.sums("price"),
        "cost": past.means("item.cost"),
        "mean": past.means("price"),
        "tenths": past.means(past["item"][:, None] == np.arange(4)),
        "decayed": past.decayed(day),
        "decayed price": past.decayed(day, "price"),
        "sessions": past.sessions(dt.timedelta(seconds=20)),
    }


def test_aggregates_equal_loops(made):
    view, frames = made
    found = everything(aggregates.Past(view, CUT * SECOND, FIELDS))
    items = view.store.vocabulary("item").values.tolist()
    assert min(map(len, frames)) == 0
    for row, mine in enumerate(frames):
        age = CUT - mine.time.to_numpy()
        chosen = mine[mine.brand.isin(["b2", "b5"])]
        ids = np.array([items.index(item) + 2 if item in items else 1 for item in mine.item], int)
        assert found["counts"][row] == len(mine)
        assert found["recent"][row] == (age <= 90).sum()
        assert found["brands"][row] == len(chosen)
        assert found["of"][row].tolist() == [(ids == i).sum() if i > 1 else 0 for i in (2, 5, 1, 2, 0, 9)]
        assert found["distinct"][row] == len(set(ids))
        assert found["brands seen"][row] == mine.brand.nunique()
        assert found["days"][row] == (mine.time // 100).nunique()
        shares = sorted(np.unique(ids, return_counts=True)[1] / max(len(ids), 1), reverse=True)[:3]
        assert found["top"][row].tolist() == shares + [0.0] * (3 - len(shares))
        assert np.array_equal(found["last"][row], age.min() if len(mine) else np.nan, equal_nan=True)
        first = CUT - chosen.time.min() if len(chosen) else np.nan
        assert np.array_equal(found["first"][row], first, equal_nan=True)
        price = mine.price.to_numpy(np.float32).astype(float)
        assert np.isclose(found["sum"][row], np.nansum(price))
        mean = np.nan if np.isnan(price).all() else np.nanmean(price)
        assert np.isclose(found["mean"][row], mean, equal_nan=True)
        assert np.isclose(found["cost"][row], mine.item.mean(), equal_nan=True) or 1 in ids
        expected = (ids[:, None] == np.arange(4)).mean(0) if len(ids) else np.full(4, np.nan)
        assert np.allclose(found["tenths"][row], expected, equal_nan=True)
        weight = 0.5 ** (age / 90)
        assert np.isclose(found["decayed"][row], weight.sum())
        assert np.isclose(found["decayed price"][row], np.nansum(weight * price))
        gaps = np.diff(mine.time)
        assert found["sessions"][row] == (len(mine) > 0) + (gaps > 20).sum()
    assert found["none"].shape == (len(view), 0)


@pytest.mark.parametrize("change", ["delete", "alter", "add"])
def test_the_future_changes_nothing(tmp_path, oracle, change):
    log = oracle.log(rows=2400, users=40)
    future, other = log.time >= CUT, log.copy()
    assert future.any()
    if change == "delete":
        other = log[~future]
    elif change == "alter":
        other.loc[future, ["item", "brand", "price"]] = [7, "b3", 99.0]
        other.loc[future, "time"] += 10_000
    else:
        other = pd.concat([log.assign(time=log.time + CUT, brand="b2", price=5.0), log])
    views = [build(one, tmp_path / name).all() for one, name in ((log, "a"), (other, "b"))]
    users = np.unique(log[~future].user)
    one, two = (everything(aggregates.Past(v.select(users), CUT * SECOND, FIELDS)) for v in views)
    for name, values in one.items():
        assert np.array_equal(values, two[name], equal_nan=True), name


def test_parts_equal_the_whole(made):
    view, _ = made
    whole = everything(aggregates.Past(view, CUT * SECOND, FIELDS))
    pieces = list(aggregates.parts(view, CUT * SECOND, FIELDS, events=100))
    assert len(pieces) > 5 and [rows.start for rows, _ in pieces[1:]] == [rows.stop for rows, _ in pieces[:-1]]
    split = [everything(past) for _, past in pieces]
    for name, values in whole.items():
        assert np.array_equal(values, np.concatenate([one[name] for one in split]), equal_nan=True), name


def test_mistakes(made):
    past = aggregates.Past(made[0], CUT * SECOND, ["item", "brand"])
    with pytest.raises(KeyError, match=r"no field 'price' in this Past; it has \['item', 'brand', 'timestamp'\]"):
        past.sums("price")
    with pytest.raises(ValueError, match="'brand' is categorical; needs a numeric field"):
        past.sums("brand")
    with pytest.raises(ValueError, match="k=0"):
        past.top_shares("item", 0)
    with pytest.raises(ValueError, match="needs one for each of"):
        past.sums(np.zeros(3))
    with pytest.raises(KeyError, match="'brand' has no value 'zz'"):
        past.where("brand", ["zz"])
    with pytest.raises(ValueError, match="gap=0"):
        past.sessions(0)


@pytest.mark.parametrize("text", [False, True])
def test_positions_of(text):
    rng = np.random.default_rng(0)
    among, wanted = rng.integers(0, 60, 40), rng.integers(0, 80, 200)
    if text:
        among, wanted = among.astype(str), wanted.astype(str).astype(object)
    known = among.tolist()
    assert positions_of(wanted, among).tolist() == [known.index(one) if one in known else -1 for one in wanted]
    assert positions_of(wanted, among[:0]).tolist() == [-1] * 200
    assert positions_of(wanted[:0], among).tolist() == []
    assert positions_of(np.array([np.nan, 1.5]), np.array([1.5, np.nan])).tolist() == [-1, 0]
