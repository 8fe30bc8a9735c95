"""Views and batches."""

from __future__ import annotations

import numpy as np
import pytest

import seqdata
from seqdata.order import Order


@pytest.fixture
def store(tmp_path, oracle):
    return seqdata.build(oracle.log(), tmp_path / "s", user="user", time="time", time_unit="s", progress=False)


def users_of(batches) -> list[int]:
    return [user for batch in batches for user in batch.users.tolist()]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 65, 1000])
def test_shuffled_order_is_a_permutation_that_differs_by_seed_and_epoch(n):
    order = Order(n, 3, 1, True)
    assert sorted(order(0, n).tolist()) == list(range(n))
    assert np.array_equal(np.concatenate([order(0, n // 2), order(n // 2, n)]), order(0, n))
    if n > 10:
        assert order(0, n).tolist() != list(range(n))
        assert order(0, n).tolist() != Order(n, 3, 2, True)(0, n).tolist()
        assert order(0, n).tolist() != Order(n, 4, 1, True)(0, n).tolist()


def test_shuffled_order_is_even():
    # every place gets every position about equally often
    counts = np.zeros((5, 5), int)
    for seed in range(2000):
        counts[np.arange(5), Order(5, seed, 0, True)(0, 5)] += 1
    assert counts.min() > 300
    assert counts.max() < 500


@pytest.mark.parametrize("options", [{"batch_size": 7}, {"max_tokens": 90}, {"batch_size": 3, "max_tokens": 150}])
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_user_comes_once_and_start_skips(store, options, shuffle):
    view = store.as_of(400 * 1_000_000)
    batches = list(view.batches(**options, shuffle=shuffle, seed=5))
    assert sorted(users_of(batches)) == store.users.tolist()
    assert sum(int(batch.jagged.offsets[-1]) for batch in batches) == view.num_events
    for batch in batches:
        assert len(batch) <= options.get("batch_size", 10**9)
        assert batch.jagged.offsets[-1] <= options.get("max_tokens", 10**9)
        assert np.array_equal(store.users[batch.user_index], batch.users)
    assert users_of(view.batches(**options, shuffle=shuffle, seed=5)) == users_of(batches)
    assert users_of(view.batches(**options, shuffle=shuffle, seed=5, start=4)) == users_of(batches[4:])
    if shuffle:
        assert users_of(view.batches(**options, shuffle=True, seed=5, epoch=1)) != users_of(batches)


def test_token_budget_fills_batches(store):
    lengths = [int(b.jagged.offsets[-1]) for b in store.all().batches(max_tokens=200)]
    first_of_next = [int(b.jagged.lengths[0]) for b in store.all().batches(max_tokens=200)][1:]
    assert all(a + b > 200 for a, b in zip(lengths, first_of_next, strict=False))
    with pytest.raises(ValueError, match=r"max_tokens=5: user \d+ alone has \d+ events; raise it or pass max_len <= 5"):
        next(store.all().batches(max_tokens=5))
    assert max(int(b.jagged.offsets[-1]) for b in store.all().batches(max_tokens=5, max_len=5)) == 5


def test_token_budget_over_more_users_than_one_chunk(store, monkeypatch):
    whole = users_of(store.all().batches(max_tokens=100, shuffle=True))
    monkeypatch.setattr("seqdata.batching.CHUNK", 8)
    assert users_of(store.all().batches(max_tokens=100, shuffle=True)) == whole


def test_max_len_keeps_the_last_events(store, oracle):
    ordered = oracle.order(oracle.log(), "user", "time")
    for batch in store.all().batches(10, max_len=4, fields=["row"]):
        for i, user in enumerate(batch.users):
            piece = batch.jagged["row"][batch.jagged.offsets[i] : batch.jagged.offsets[i + 1]]
            assert piece.tolist() == ordered[ordered.user == user].row.tail(4).tolist()


def test_empty_users_stay_or_go(store):
    view = store.all().window(None, 3 * 1_000_000)
    empty = view.lengths() == 0
    assert empty.any()
    assert len(users_of(view.batches(9))) == store.num_users
    assert users_of(view.batches(9, drop_empty=True)) == store.users[~empty].tolist()
    assert list(store.as_of(0).batches(9)) == []


def test_as_of_knows_nobody_who_came_later(store):
    cutoff = 3 * 1_000_000
    view, early = store.as_of(cutoff), store.all().window(None, cutoff).lengths() > 0
    assert 0 < early.sum() < store.num_users
    known = store.users[early].tolist()
    assert view.users.tolist() == users_of(view.batches(4)) == known
    assert len(view) == len(known) and (view.lengths() > 0).all()
    assert np.array_equal(view.user_index, np.flatnonzero(early))
    assert np.array_equal(
        store.users[next(view.batches(4, shuffle=True)).user_index][:2], users_of(view.batches(4, shuffle=True))[:2]
    )
    # whoever is known stays, though a filter leaves nothing of them
    some = view.where("brand", ["b1"])
    assert some.users.tolist() == known and (some.lengths() == 0).any()
    for other in (
        store.all().where("brand", ["b1"]).as_of(cutoff),
        store.all().leave_last(0)[0].where("brand", ["b1"]).as_of(cutoff),
        store.as_of(400 * 1_000_000).as_of(cutoff).where("brand", ["b1"]),
    ):
        assert other.users.tolist() == known and np.array_equal(
            other.gather(["row"])["row"], some.gather(["row"])["row"]
        )
    assert store.all().at_least(1).as_of(cutoff).users.tolist() == known
    # whoever is named stays
    late = store.users[~early][:2].tolist()
    named = [late[0], known[1], late[1]]
    for other in (view.select(named), store.all().select(named).as_of(cutoff), some.select(named)):
        assert other.users.tolist() == named and other.lengths()[[0, 2]].tolist() == [0, 0]
    assert some.select(named).lengths()[1] == some.lengths()[1]
    with pytest.raises(KeyError, match="not in this view"):
        view.at_least(1).select(named)


def test_ahead_is_the_future_of_the_same_users(store):
    import datetime as dt

    history = store.as_of(200 * 1_000_000).where("brand", ["b1"]).at_least(1)
    future = history.ahead(dt.timedelta(seconds=50))
    assert future.users.tolist() == history.users.tolist()
    whole = store.all().window(200 * 1_000_000, 250 * 1_000_000).select(history.users)
    assert np.array_equal(future.gather(["row"])["row"], whole.gather(["row"])["row"])
    with pytest.raises(ValueError, match="no end"):
        store.all().ahead(5)


@pytest.mark.parametrize("gap", [1, 30, 10_000])
def test_sessions(store, gap):
    view = store.as_of(400 * 1_000_000).where("brand", ["b1", "b2"])
    found, times = view.sessions(gap * 1_000_000), view.gather([])
    for begin, end in zip(times.offsets, times.offsets[1:], strict=False):
        mine = times["timestamp"][begin:end]
        assert found[begin:end].tolist() == np.append(0, np.cumsum(np.diff(mine) > gap))[: end - begin].tolist()
    assert view.select([]).sessions(5).tolist() == []


def test_moments_in_the_wrong_unit_are_refused(tmp_path):
    import pandas as pd

    log = pd.DataFrame({"user": [1, 1, 2], "time": [1_600_000_000, 1_600_086_400, 1_600_172_800], "x": [1, 2, 3]})
    store = seqdata.build(log, tmp_path / "t", user="user", time="time", time_unit="s", progress=False)
    batch = next(store.all().batches(1))
    moment = int(batch.jagged["timestamp"][1])
    for wrong, unit in ((moment, "s"), (moment * 1000, "ms")):
        for call in (
            lambda: store.as_of(wrong),  # noqa: B023
            lambda: store.all().window(0, wrong),  # noqa: B023
            lambda: next(store.all().rolling(wrong, moment * 1_000_000, 10)),  # noqa: B023
            lambda: seqdata.time_features(batch.jagged, wrong),  # noqa: B023
            lambda: seqdata.aggregates.Past(store.all(), wrong),  # noqa: B023
            lambda: seqdata.audit(store, cutoff=wrong),  # noqa: B023
        ):
            with pytest.raises(
                ValueError, match=f"integers are microseconds since 1970, .* as {unit} it is 2020-09-14"
            ):
                call()
    for made in (
        lambda: seqdata.build(log, tmp_path / "u", user="user", time="time", time_unit="s", fit_before=moment),
        lambda: seqdata.append(store, log, fit_before=moment, progress=False),
    ):
        with pytest.raises(ValueError, match=f"fit_before={moment}: integers are microseconds"):
            made()
    assert not (tmp_path / "u").exists() and seqdata.open_store(store.path).num_events == 3
    assert store.as_of(moment * 1_000_000).num_events == 1
    # long before and long after can be meant
    assert store.as_of(0).num_events == 0 and store.as_of(10**17).num_events == 3


def test_select_keeps_the_order_given(store):
    view = store.as_of(400 * 1_000_000).select([9, 2, 5])
    assert users_of(view.batches(2)) == [9, 2, 5]
    assert view.lengths().tolist() == store.as_of(400 * 1_000_000).lengths()[[9, 2, 5]].tolist()
    with pytest.raises(KeyError, match="unknown user id 12345"):
        view.store.all().select([1, 12345])
    with pytest.raises(KeyError, match="not in this view"):
        view.select([7])
    with pytest.raises(TypeError, match="integers"):
        store.all().select(["a"])
    assert len(store.all().select([])) == 0


def test_timestamps_are_seconds(store):
    batch = next(store.all().batches(5))
    assert batch.jagged["timestamp"].dtype == np.int64
    assert batch.jagged["timestamp"].max() < 3000


def test_bad_arguments(store):
    for options, message in [
        ({}, "needs batch_size"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_tokens": -1}, "max_tokens=-1"),
        ({"batch_size": 1, "max_len": 0}, "max_len=0"),
    ]:
        with pytest.raises(ValueError, match=message):
            next(store.all().batches(**options))
    with pytest.raises(KeyError, match="no field 'sku'; there are"):
        next(store.all().batches(3, fields=["sku"]))
    with pytest.raises(KeyError, match="no field 'sku'"):
        store.column("sku")
    with pytest.raises(KeyError, match="has no vocabulary"):
        store.vocabulary("price")
    with pytest.raises(ValueError, match="cutoff='someday'"):
        store.as_of("someday")


def test_pickled_stores_open_again(store):
    import pickle

    again = pickle.loads(pickle.dumps(store.as_of(10**8)))
    assert again.num_events == store.as_of(10**8).num_events


def test_vocabulary_round_trip(store, tmp_path):
    import pyarrow.parquet as pq

    vocabulary = store.vocabulary("brand")
    ids = vocabulary.encode(["b1", None, "never"])
    assert ids.tolist()[1:] == [0, 1]
    assert vocabulary.decode(ids) == ["b1", None, None]
    with pytest.raises(IndexError, match="this vocabulary has ids"):
        vocabulary.decode([len(vocabulary)])
    with pytest.raises(TypeError, match="holds int64"):
        store.vocabulary("item").encode(["x"])
    vocabulary.to_parquet(tmp_path / "v.parquet")
    table = pq.read_table(tmp_path / "v.parquet")
    assert table.column("id").to_pylist() == list(range(2, len(vocabulary)))
    assert table.column("value").to_pylist() == vocabulary.values.tolist()
