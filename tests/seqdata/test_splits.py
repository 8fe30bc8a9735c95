"""Splits, filters and labels against loops over pandas frames."""

from __future__ import annotations

import datetime as dt

import numpy as np
import pandas as pd
import pytest

import seqdata
from seqdata import labels

SECOND = 1_000_000


@pytest.fixture
def made(tmp_path, oracle):
    log = oracle.log(rows=2000, users=60)
    items = pd.DataFrame({"item": range(50), "cat": [f"c{i % 5}" for i in range(50)], "cost": np.arange(50.0)})
    table = seqdata.ItemTable(items, "item", {"cat": "categorical", "cost": "numeric"})
    store = seqdata.build(
        log, tmp_path / "s", user="user", time="time", time_unit="s", items={"item": table}, progress=False
    )
    return store, oracle.order(log, "user", "time")


def rows_of(view: seqdata.View) -> dict[int, list[float]]:
    found = view.gather(["row"])
    return {
        u: found["row"][a:b].tolist() for u, a, b in zip(view.users, found.offsets, found.offsets[1:], strict=False)
    }


def by_user(frame: pd.DataFrame, users) -> dict[int, list[float]]:
    return {user: frame[frame.user == user].row.tolist() for user in users}


def test_where(made):
    store, log = made
    cutoff = 300
    view = store.as_of(cutoff * SECOND).where("brand", ["b1", "b3"])
    chosen = log[(log.time < cutoff) & log.brand.isin(["b1", "b3"])]
    assert rows_of(view) == by_user(chosen, store.users)
    # narrowing in time commutes with narrowing by value
    assert rows_of(store.all().where("brand", ["b1", "b3"]).as_of(cutoff * SECOND)) == rows_of(view)
    again = view.where("item.cat", ["c1"])
    assert rows_of(again) == by_user(chosen[chosen.item % 5 == 1], store.users)
    assert rows_of(again.select([5, 2])) == by_user(chosen[chosen.item % 5 == 1], [5, 2])
    assert rows_of(store.all().where("row", [3.0, 7.0])) == by_user(log[log.row.isin([3, 7])], store.users)
    with pytest.raises(KeyError, match="'brand' has no value 'zz'"):
        store.all().where("brand", ["zz"])


def test_numbers_are_compared_as_the_column_holds_them(tmp_path):
    log = pd.DataFrame({"user": [0, 1, 2], "time": [1, 2, 3], "x": [0.1, 0.2, 0.1], "c": ["a", "b", "a"]})
    store = seqdata.build(log, tmp_path / "s", user="user", time="time", time_unit="s", progress=False)
    assert store.all().where("x", [0.1]).lengths().tolist() == [1, 0, 1]
    assert labels.multi_hot(store.all(), "x", [0.2, 0.1]).tolist() == [[False, True], [True, False], [False, True]]
    hot = [True, False, True]
    assert labels.multi_hot(store.all(), "c", ["a", "b", "a"]).tolist() == [hot, [False, True, False], hot]
    assert labels.multi_hot(store.all(), "c", []).shape == (3, 0)


def test_batches_of_filtered_views(made):
    store, log = made
    view = store.as_of(400 * SECOND).where("brand", ["b2"])
    rows = [row for batch in view.batches(max_tokens=40, fields=["row"]) for row in batch.jagged["row"]]
    assert rows == log[(log.time < 400) & (log.brand == "b2")].row.tolist()


def test_leave_last_and_ratio(made):
    store, log = made
    view = store.as_of(400 * SECOND)
    past = log[log.time < 400]
    history, target = view.leave_last(2)
    assert rows_of(history) == {u: r[:-2] for u, r in by_user(past, store.users).items()}
    assert rows_of(target) == {u: r[-2:] for u, r in by_user(past, store.users).items()}
    train, valid = history.leave_last(1)
    assert rows_of(valid) == {u: r[:-2][-1:] for u, r in by_user(past, store.users).items()}
    assert train.num_events + valid.num_events + target.num_events == view.num_events
    parts = view.ratio(0.7, 0.2, 0.1)
    for user, rows in by_user(past, store.users).items():
        a, b = int(len(rows) * 0.7 + 1e-9), int(len(rows) * 0.9 + 1e-9)
        assert [rows_of(part.select([user]))[user] for part in parts] == [rows[:a], rows[a:b], rows[b:]]
    with pytest.raises(ValueError, match="sum to 1"):
        view.ratio(0.5, 0.4)


def test_rolling(made):
    store, log = made
    seen = list(store.all().rolling(100 * SECOND, 400 * SECOND, 100 * SECOND, dt.timedelta(seconds=50)))
    assert [history.num_events for history, _ in seen] == [(log.time < t).sum() for t in (100, 200, 300)]
    assert [future.num_events for _, future in seen] == [
        ((log.time >= t) & (log.time < t + 50)).sum() for t in (100, 200, 300)
    ]
    with pytest.raises(ValueError, match="step=0"):
        next(store.all().rolling(0, 10, 0))


@pytest.mark.parametrize("k", [1, 5, 12])
def test_k_core(made, k):
    store, log = made
    frame = log[log.time < 300]
    while True:
        users, items = frame.user.value_counts(), frame.item.value_counts()
        good = frame.user.map(users).ge(k) & frame.item.map(items).ge(k)
        if good.all():
            break
        frame = frame[good]
    view = store.as_of(300 * SECOND).k_core("item", k)
    assert rows_of(view.at_least(1)) == by_user(frame, np.unique(frame.user))
    with pytest.raises(ValueError, match="needs a categorical"):
        store.all().k_core("row", 2)


def test_labels(made):
    store, log = made
    users = [3, 41, 7, 0]
    low, high = 100, 160
    window = log[(log.time >= low) & (log.time < high)]
    future = store.all().select(users).window(low * SECOND, high * SECOND)
    history = store.as_of(low * SECOND).select(users)
    assert labels.any_event(future).tolist() == [(window.user == u).any() for u in users]

    rows, gone = labels.churn(history.where("brand", ["b1"]), future.where("brand", ["b1"]))
    past = log[(log.time < low) & (log.brand == "b1")]
    assert rows.tolist() == [i for i, u in enumerate(users) if (past.user == u).any()]
    assert gone.tolist() == [not ((window.user == users[i]) & (window.brand == "b1")).any() for i in rows]
    with pytest.raises(ValueError, match="lacks 56 users of the history"):
        labels.churn(store.all(), future)
    again, lost = labels.churn(
        history.where("brand", ["b1"]), store.all().window(low * SECOND, high * SECOND).where("brand", ["b1"])
    )
    assert again.tolist() == rows.tolist() and lost.tolist() == gone.tolist()

    cats = ["c3", "c0", "c4"]
    hot = labels.multi_hot(future, "item.cat", cats)
    mine = {u: set((window[window.user == u].item % 5).tolist()) for u in users}
    assert hot.tolist() == [[int(c[1]) in mine[u] for c in cats] for u in users]

    spans = [dt.timedelta(seconds=10), dt.timedelta(seconds=60)]
    expected = [[((log.user == u) & (log.time >= low) & (log.time < low + s)).sum() for s in (10, 60)] for u in users]
    assert labels.counts(store.all().select(users), low * SECOND, spans).tolist() == expected
    sums = labels.sums(store.all().select(users), "item.cost", low * SECOND, spans)
    expected = [
        [log[(log.user == u) & (log.time >= low) & (log.time < low + s)].item.sum() for s in (10, 60)] for u in users
    ]
    assert sums.tolist() == expected

    first = labels.next_event(future, "row")
    expected = [window[window.user == u].row.head(1).tolist() or [np.nan] for u in users]
    assert np.array_equal(first, np.array(expected, np.float32)[:, 0], equal_nan=True)
    baskets = labels.next_basket(future, "row")
    for i, u in enumerate(users):
        rows = window[window.user == u]
        assert (
            baskets["row"][baskets.offsets[i] : baskets.offsets[i + 1]].tolist()
            == rows[rows.time == rows.time.min()].row.tolist()
        )


def test_like_lengths_share_batches(made):
    store, _ = made
    view = store.as_of(400 * SECOND)
    plain = list(view.batches(5, shuffle=True))
    pooled = list(view.batches(5, shuffle=True, length_pool=60))
    users = sorted(user for batch in pooled for user in batch.users.tolist())
    assert users == store.users.tolist()
    waste = [sum(b.jagged.max_len * len(b) for b in batches) for batches in (plain, pooled)]
    assert waste[1] < waste[0]
    assert [b.users.tolist() for b in view.batches(5, shuffle=True, length_pool=60, start=3)] == [
        b.users.tolist() for b in pooled[3:]
    ]
    longest = [b.jagged.max_len for b in pooled]
    assert longest != sorted(longest)
    assert all(b.jagged.offsets[-1] <= 200 for b in view.batches(max_tokens=200, length_pool=32))
