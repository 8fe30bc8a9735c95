"""Nothing before the cutoff may depend on anything after it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import seqdata

CUTOFF = 50
OPTIONS = {"user": "user", "time": "time", "time_unit": "s", "fit_before": CUTOFF * 1_000_000, "progress": False}
FIELDS = {
    "item": seqdata.Categorical(),
    "rare": seqdata.Categorical(min_count=2, max_size=3, oov_buckets=2),
    "query": seqdata.Vector(2),
    "price": seqdata.Numeric(),
}


@st.composite
def logs(draw) -> pd.DataFrame:
    rows = draw(st.integers(1, 60))

    def column(values):
        return draw(st.lists(values, min_size=rows, max_size=rows))

    huge = draw(st.booleans())
    return pd.DataFrame(
        {
            "user": column(st.just(3) if huge else st.integers(0, 6)),
            "time": column(st.integers(0, 100)),
            "item": pd.array(column(st.one_of(st.none(), st.integers(-3, 8))), "Int64"),
            "rare": pd.Series(column(st.one_of(st.none(), st.sampled_from(list("abcdefé")))), dtype=object),
            "query": pd.Series(
                column(st.one_of(st.none(), st.sampled_from(["[1 2]", "[ 1  2]", "[3 4]", "[5 6]"]))), dtype=object
            ),
            "price": column(st.floats(0, 9, width=32)),
        }
    )


def contents(view: seqdata.View) -> list:
    """Everything a model could see of a view."""
    store, seen = view.store, []
    for batch in view.batches(3, shuffle=True, seed=1):
        values = dict(batch.jagged.values)
        values["query"] = store.vectors("query")[values["query"]]
        seen.append((batch.users.tolist(), batch.jagged.offsets.tolist(), {k: v.tolist() for k, v in values.items()}))
    return seen


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(log=logs(), change=st.sampled_from(["delete", "alter", "add"]))
def test_future_rows_change_nothing_before_the_cutoff(tmp_path_factory, log, change):
    if not (log.time < CUTOFF).any():
        log.loc[0, "time"] = 0
    future = log.time >= CUTOFF
    other = log.copy()
    if change == "delete":
        other = log[~future]
    elif change == "alter":
        other.loc[future, "item"] = 99
        other.loc[future, "rare"] = "z"
        other.loc[future, "query"] = "[0 0]"
        other.loc[future, "user"] = 77
    else:
        extra = log.assign(time=log.time + CUTOFF + 60, item=98, user=log.user + 5, query="[0 1]")
        other = pd.concat([extra, log])
    folder = tmp_path_factory.mktemp("leak")
    one = seqdata.build(log, folder / "a", fields=FIELDS, **OPTIONS)
    two = seqdata.build(other, folder / "b", fields=FIELDS, **OPTIONS)
    for name in ("item", "rare"):
        assert one.vocabulary(name).values.tolist() == two.vocabulary(name).values.tolist()
        assert one.vocabulary(name).counts.tolist() == two.vocabulary(name).counts.tolist()
    for cutoff in (CUTOFF, CUTOFF // 2):
        assert contents(one.as_of(cutoff * 1_000_000)) == contents(two.as_of(cutoff * 1_000_000))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(log=logs(), shards=st.sampled_from([1, 3]))
def test_any_log_equals_the_oracle(tmp_path_factory, oracle, log, shards):
    fields = {"item": seqdata.Categorical(), "price": seqdata.Numeric()}
    store = seqdata.build(log, tmp_path_factory.mktemp("any") / "s", fields=fields, shards=shards, **OPTIONS)
    ordered = oracle.order(log, "user", "time")
    assert np.array_equal(store.time, ordered.time * 1_000_000)
    assert np.array_equal(store.column("item"), oracle.ids(ordered.item, ordered.time < CUTOFF))
    assert np.array_equal(store.column("price"), ordered.price.to_numpy(np.float32))
    for cutoff in (0, 33, 101):
        view = store.as_of(cutoff * 1_000_000)
        assert view.users.tolist() == sorted(set(ordered.user[ordered.time < cutoff]))
        lengths = dict(zip(view.users, view.lengths(), strict=True))
        for user in store.users:
            mine = ordered[(ordered.user == user) & (ordered.time < cutoff)]
            batch = next(view.select([user]).batches(1))
            assert batch.jagged["timestamp"].tolist() == mine.time.tolist()
            assert lengths.get(user, 0) == len(mine)


def test_window_and_as_of_agree(tmp_path, oracle):
    log = oracle.log()
    store = seqdata.build(log, tmp_path / "s", **OPTIONS)
    low, high = 100, 400
    window = store.all().window(low * 1_000_000, high * 1_000_000)
    assert window.num_events == ((log.time >= low) & (log.time < high)).sum()
    assert store.as_of(low * 1_000_000).num_events + window.num_events == store.as_of(high * 1_000_000).num_events
    assert store.as_of("1970-01-01 00:01:40").num_events == (log.time < low).sum()
    with pytest.raises(ValueError, match=r"start .* is after end"):
        store.all().window(5, 4)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), text=st.booleans(), shards=st.sampled_from([1, 2]))
def test_tables_with_null_users_and_repeated_rows_equal_the_oracle(tmp_path_factory, oracle, data, text, shards):
    tables = {name: data.draw(logs()) for name in ("b", "a")}
    tables["a"] = pd.concat([tables["a"], tables["a"][:5]]).drop(columns="item")
    for table in tables.values():
        null = data.draw(st.lists(st.booleans(), min_size=len(table), max_size=len(table)))
        users = table.user.astype(str) if text else table.user.astype("Int64")
        table["user"] = users.mask(np.array(null), None)
    whole = pd.concat([table.assign(event_type=name) for name, table in tables.items()], ignore_index=True)
    known = whole.dropna(subset=["user"])
    folder = tmp_path_factory.mktemp("tables")
    fields = {"item": seqdata.Categorical(), "rare": seqdata.Categorical(min_count=2), "price": seqdata.Numeric()}
    if not len(known):
        with pytest.raises(ValueError, match="log is empty"):
            seqdata.build(tables, folder / "s", fields=fields, null_user="drop", **OPTIONS)
        return
    store = seqdata.build(tables, folder / "s", fields=fields, null_user="drop", shards=shards, **OPTIONS)
    ordered = oracle.order(known, "user", "time")
    fit = ordered.time < CUTOFF
    assert store.schema["rows"]["dropped"]["null_user"] == len(whole) - len(known)
    assert store.users.tolist() == sorted(set(known.user))
    assert np.array_equal(store.time, ordered.time * 1_000_000)
    assert np.array_equal(store.column("item"), oracle.ids(ordered.item, fit))
    assert np.array_equal(store.column("rare"), oracle.ids(ordered.rare, fit, 2))
    assert np.array_equal(store.column("price"), ordered.price.to_numpy(np.float32))
    names = store.vocabulary("event_type").decode(store.column("event_type"))
    assert names == ordered.event_type.tolist()
