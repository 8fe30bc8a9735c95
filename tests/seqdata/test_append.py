"""Appending and compacting."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import seqdata

KEYS = {"user": "user", "time": "time", "time_unit": "s", "progress": False}
FIELDS = {
    "item": seqdata.Categorical(),
    "brand": seqdata.Categorical(),
    "price": seqdata.Numeric(),
    "row": seqdata.Numeric(),
}


def check(store: seqdata.Store, log: pd.DataFrame, known: list, oracle) -> None:
    """The store holds the log, ids as `known` has them."""
    ordered = oracle.order(log, "user", "time")
    assert np.array_equal(store.users, np.unique(log.user))
    assert np.array_equal(store.time, ordered.time * 1_000_000)
    assert np.array_equal(np.diff(store.offsets), ordered.groupby("user").size())
    assert np.array_equal(store.column("row"), ordered.row)
    ids = {value: i + 2 for i, value in enumerate(known)}
    assert store.vocabulary("item").values.tolist() == known
    assert store.column("item").tolist() == [ids.get(item, 1) for item in ordered.item]
    batches = list(store.as_of(10**15).batches(7, fields=["row"]))
    assert np.array_equal(np.concatenate([batch.jagged["row"] for batch in batches]), ordered.row)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 99), cut=st.integers(1, 199), late=st.booleans(), grow=st.booleans(), text=st.booleans())
def test_append_equals_a_build_of_both(tmp_path_factory, oracle, seed, cut, late, grow, text):
    log = oracle.log(seed, rows=200, users=12)
    if late:
        log = log.sort_values("time", kind="stable", ignore_index=True)
    if text:
        log["user"] = "u" + log.user.astype(str)
    folder = tmp_path_factory.mktemp("append")
    store = seqdata.build(log[:cut], folder / "s", fields=FIELDS, **KEYS)
    before = store.vocabulary("item").values.tolist()
    longer = seqdata.append(store, log[cut:], fit_before=10**15 if grow else None, progress=False)
    fresh = log[cut:][~log.item[cut:].isin(before)].item.value_counts()
    added = sorted(fresh.index, key=lambda item: (-fresh[item], item)) if grow else []
    check(longer, log, before + added, oracle)
    # whoever had the store open sees what it opened
    check(store, log[:cut], before, oracle)
    one = seqdata.compact(longer)
    assert len(one.schema["shards"]) == 1
    check(one, log, before + added, oracle)
    assert one.schema["rows"]["in"] == 200


def test_many_appends_keep_ids_and_clean_up(tmp_path, oracle):
    log = oracle.log(rows=600)
    store = seqdata.build(log[:200], tmp_path / "s", fields=FIELDS, shards=2, **KEYS)
    known = store.vocabulary("item").values.tolist()
    for start in (200, 300, 400, 500):
        store = store.append(log[start : start + 100], progress=False)
    check(store, log, known, oracle)
    assert len(os.listdir(tmp_path / "s" / "fitted")) <= 2
    assert sorted(os.listdir(tmp_path / "s")) == ["fitted", "schema.json", "shards"]


def test_fewer_columns_new_tables_and_items(tmp_path):
    buy = pd.DataFrame({"user": [1, 2], "time": [1, 2], "sku": [10, 11], "query": [None, "[1 2]"]})
    items = pd.DataFrame({"sku": [10, 11], "cat": ["x", "y"], "price": [1.0, 2.0]})
    fields = {"sku": seqdata.Categorical(), "query": seqdata.Vector(2)}
    table = seqdata.ItemTable(items, "sku", {"cat": "categorical", "price": "numeric"})
    store = seqdata.build(
        {"buy": buy}, tmp_path / "s", fields=fields, items={"sku": table}, fit_before=5_000_000, **KEYS
    )
    fresh = pd.DataFrame({"user": [3, 1], "time": [6, 7], "sku": [12, 10]})
    more = pd.DataFrame({"sku": [12, 10], "cat": ["y", "never"], "price": [3.0, 9.0]})
    grown = seqdata.append(
        store, {"cart": fresh}, fit_before=7_000_000, items={"sku": seqdata.ItemTable(more, "sku")}, progress=False
    )
    assert grown.vocabulary("sku").values.tolist() == [10, 11, 12]
    assert grown.vocabulary("event_type").values.tolist() == ["buy", "cart"]
    assert grown.column("query").tolist() == [0, 0, 1, 0]
    assert grown.vectors("query").tolist() == [[0, 0], [1, 2]]
    # what an id had, it keeps
    assert grown.vocabulary("sku.cat").decode(grown.item_column("sku", "cat")) == [None, None, "x", "y", "y"]
    assert grown.item_column("sku", "price")[2:].tolist() == [1.0, 2.0, 3.0]
    assert grown.schema["fit_before"] == 7_000_000


def test_new_vectors_come_behind_old_ones(tmp_path):
    old = pd.DataFrame({"user": [1, 1], "time": [1, 2], "q": ["[9 9]", "[5 5]"]})
    new = pd.DataFrame({"user": [1, 1], "time": [3, 4], "q": ["[1 1]", "[9 9]"]})
    store = seqdata.build(old, tmp_path / "s", fields={"q": seqdata.Vector(2)}, **KEYS)
    grown = seqdata.append(store, new, progress=False)
    assert np.array_equal(grown.vectors("q")[:3], store.vectors("q"))
    assert grown.vectors("q")[grown.column("q")].tolist() == [[9, 9], [5, 5], [1, 1], [9, 9]]


def test_mistakes(tmp_path, oracle):
    log = oracle.log(rows=50)
    store = seqdata.build(log, tmp_path / "s", fields=FIELDS, fit_before=9_000_000, **KEYS)
    with pytest.raises(ValueError, match="one source, not a mapping"):
        seqdata.append(store, {"a": log}, progress=False)
    with pytest.raises(ValueError, match="vocabularies only move forward"):
        seqdata.append(store, log, fit_before=8_000_000, progress=False)
    with pytest.raises(KeyError, match="user column 'user' is not in"):
        seqdata.append(store, log.drop(columns="user"), progress=False)
    with pytest.raises(ValueError, match="log is empty"):
        seqdata.append(store, log[:0], progress=False)
    seqdata.append(store, log, progress=False)
    with pytest.raises(ValueError, match="open it again"):
        seqdata.append(store, log, progress=False)
    with pytest.raises(ValueError, match="open it again"):
        older = seqdata.open_store(store.path)
        seqdata.append(seqdata.open_store(store.path), log, progress=False)
        seqdata.compact(older)
    tables = seqdata.build({"a": log}, tmp_path / "t", fields=FIELDS, **KEYS)
    with pytest.raises(ValueError, match="needs a mapping"):
        seqdata.append(tables, log, progress=False)


@pytest.mark.parametrize("at", [1, 4, 8])
def test_full_disk(tmp_path, oracle, monkeypatch, at):
    log = oracle.log(rows=100)
    store = seqdata.build(log, tmp_path / "s", fields=FIELDS, **KEYS)
    calls = [0]

    def full(file, values):
        calls[0] += 1
        if calls[0] >= at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        file.write(values.reshape(-1).view(np.uint8).data)

    for module in ("layout", "spool", "fit"):
        monkeypatch.setattr(f"seqdata.{module}.write_all", full)
    with pytest.raises(OSError, match="no space left while changing"):
        seqdata.append(store, log, progress=False)
    monkeypatch.undo()
    check(seqdata.open_store(tmp_path / "s"), log, store.vocabulary("item").values.tolist(), oracle)
    assert sorted(os.listdir(tmp_path / "s")) == ["fitted", "schema.json", "shards"]


SLOW_APPEND = textwrap.dedent("""
    import sys, time, pyarrow as pa, seqdata
    from seqdata import layout

    def batches():
        for i in range(50):
            yield pa.record_batch(
                {"user": [i % 7], "time": [i], "item": [i], "brand": ["x"], "price": [0.5], "row": [1.0]}
            )
            if sys.argv[2] == "read":
                print("now", flush=True)
                time.sleep(0.05)

    if sys.argv[2] == "switch":
        inner = layout.write_json
        def stop(path, value):
            if path.name == "schema.json":
                print("now", flush=True)
                time.sleep(20)
            inner(path, value)
        layout.write_json = stop
    schema = next(batches()).schema
    reader = pa.RecordBatchReader.from_batches(schema, batches())
    seqdata.append(seqdata.open_store(sys.argv[1]), reader, progress=False)
    """)


@pytest.mark.parametrize("where", ["read", "switch"])
def test_killed_append_leaves_the_store(tmp_path, oracle, where):
    log = oracle.log(rows=300)
    store = seqdata.build(log, tmp_path / "s", fields=FIELDS, **KEYS)
    known = store.vocabulary("item").values.tolist()
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_APPEND, str(tmp_path / "s"), where], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "now\n"
    with pytest.raises(FileExistsError, match="another process is changing"):
        seqdata.append(store, log, progress=False)
    process.send_signal(signal.SIGKILL)
    process.stdout.close()
    process.wait(30)
    check(seqdata.open_store(tmp_path / "s"), log, known, oracle)
    again = log.assign(row=log.row + 1000)
    check(seqdata.append(store, again, progress=False), pd.concat([log, again], ignore_index=True), known, oracle)
    assert sorted(os.listdir(tmp_path / "s")) == ["fitted", "schema.json", "shards"]
