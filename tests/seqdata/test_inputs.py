"""Kinds of input beside plain files and frames: partitions, data sets, lists a row, ids of other types, repeats."""

from __future__ import annotations

import datetime as dt
import decimal
import os
import subprocess
import sys
import uuid

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

import seqdata
from seqdata import exchange

KEYS = {"user": "user", "time": "time", "progress": False}
NOON = dt.datetime(2024, 1, 1, 12)


def log(rows=40, **columns) -> pa.Table:
    at = np.arange(rows)
    return pa.table({"user": at % 7, "time": pa.array(at, pa.timestamp("s")), "x": at % 5, **columns})


def decoded(store, name):
    return store.vocabulary(name).decode(store.column(name))


def test_hive_partitions_are_columns(tmp_path):
    table = log(country=pa.array(["de", "at", None, "a b"] * 10), day=pa.array([1, 2] * 20))
    keys = pads.partitioning(pa.schema([("country", pa.string()), ("day", pa.int64())]), flavor="hive")
    pads.write_dataset(table, tmp_path / "h", format="parquet", partitioning=keys)
    whole = seqdata.build(table.select(["user", "time", "x", "country", "day"]), tmp_path / "whole", **KEYS)
    for source in (
        tmp_path / "h",
        str(tmp_path / "h" / "*" / "day=*" / "*.parquet"),
        pads.dataset(tmp_path / "h", partitioning=keys),
    ):
        store = seqdata.build(source, tmp_path / "s", overwrite=True, **KEYS)
        assert store.fields == whole.fields
        for name in store.fields:
            assert decoded(store, name) == decoded(whole, name)
    # a day as the time of its events
    timed = seqdata.build(tmp_path / "h", tmp_path / "t", user="user", time="day", time_unit="s", progress=False)
    assert sorted(set(timed.time.tolist())) == [1_000_000, 2_000_000]


def test_a_column_of_the_file_wins_over_its_folder(tmp_path):
    (tmp_path / "h" / "x=9" / "part=007").mkdir(parents=True)
    pq.write_table(log(), tmp_path / "h" / "x=9" / "part=007" / "a.parquet")
    (tmp_path / "h" / "part=08").mkdir()
    log(5).to_pandas().to_csv(tmp_path / "h" / "part=08" / "b.csv", index=False)
    store = seqdata.build(tmp_path / "h", tmp_path / "s", **KEYS)
    assert store.vocabulary("x").values.tolist() == [0, 1, 2, 3, 4]
    assert store.vocabulary("part").values.tolist() == ["007", "08"]
    # a file named by itself is read as it is
    one = seqdata.build(tmp_path / "h" / "x=9" / "part=007" / "a.parquet", tmp_path / "one", **KEYS)
    assert one.fields == ["x"]


class HuggingFace:
    """What such a data set offers: views in a format, and batches of its chosen rows."""

    def __init__(self, table, rows=None):
        self.table, self.rows = table, list(range(table.num_rows)) if rows is None else rows

    def with_format(self, kind):
        assert kind == "arrow"
        return self

    def iter(self, batch_size):
        for i in range(0, len(self.rows), batch_size):
            yield self.table.take(pa.array(self.rows[i : i + batch_size], pa.int64()))


def test_data_sets(tmp_path):
    chosen = list(range(0, 40, 3))
    store = seqdata.build(HuggingFace(log(), chosen), tmp_path / "hf", **KEYS)
    assert store.num_events == len(chosen)
    assert decoded(store, "x") == decoded(seqdata.build(log().take(pa.array(chosen)), tmp_path / "t", **KEYS), "x")
    with pytest.raises(ValueError, match="has no rows"):
        seqdata.build(HuggingFace(log(), []), tmp_path / "e", **KEYS)
    filtered = pads.dataset(log()).filter(pads.field("x") == 3)
    assert seqdata.build(filtered, tmp_path / "d", **KEYS).num_events == 8


def test_one_row_of_lists_a_user(tmp_path):
    flat = seqdata.build(log(60, y=pa.array([f"v{i % 9}" for i in range(60)])), tmp_path / "flat", **KEYS)
    exchange.to_parquet(flat.all(), tmp_path / "lists.parquet")
    rows = pq.read_table(tmp_path / "lists.parquet")
    rows = rows.append_column("home", pa.array([f"h{user}" for user in rows["user"].to_pylist()]))
    pq.write_table(rows, tmp_path / "lists.parquet")
    back = seqdata.build(tmp_path / "lists.parquet", tmp_path / "back", **KEYS)
    assert back.fields == ["x", "y", "home"]
    assert np.array_equal(back.time, flat.time) and np.array_equal(back.users, flat.users)
    assert decoded(back, "x") == decoded(flat, "x") and decoded(back, "y") == decoded(flat, "y")
    assert decoded(back, "home") == [f"h{user}" for user in np.repeat(back.users, np.diff(back.offsets))]
    uneven = pa.table({"user": [1, 2], "time": pa.array([[1], [2, 3]], pa.list_(pa.timestamp("s"))), "x": [[5], [6]]})
    with pytest.raises(ValueError, match=r"column 'x'.*a list of 1 at row 1, where 'time' has 2"):
        seqdata.build(uneven, tmp_path / "u", **KEYS)


def test_uuids_decimals_and_bytes_are_ids(tmp_path):
    ids = [uuid.UUID(int=i * 7919**5) for i in range(6)] + [None]
    storage = pa.array([one and one.bytes for one in ids], pa.binary(16))
    table = pa.table(
        {
            "user": pa.ExtensionArray.from_storage(pa.uuid(), storage.slice(0, 6)),
            "time": pa.array(range(6), pa.timestamp("s")),
            "item": pa.ExtensionArray.from_storage(pa.uuid(), storage.slice(1)),
            "price": pa.array([decimal.Decimal("1.25")] * 6),
            "shop": pa.array([decimal.Decimal(i) for i in range(6)], pa.decimal128(20, 0)),
            "hash": storage.slice(1),
            "raw": pa.array([b"a", b"b", None, b"a", b"b", b"c"]),
        }
    )
    pq.write_table(table, tmp_path / "l.parquet")
    for source in (table, tmp_path / "l.parquet"):
        store = seqdata.build(source, tmp_path / "s", overwrite=True, **KEYS)
        assert store.users.tolist() == sorted(str(one) for one in ids[:6])
        by_user = [ids.index(uuid.UUID(user)) for user in store.users]
        assert decoded(store, "item") == [ids[i + 1] and str(ids[i + 1]) for i in by_user]
        assert decoded(store, "hash") == [ids[i + 1] and ids[i + 1].hex for i in by_user]
        assert decoded(store, "shop") == by_user
        assert decoded(store, "raw") == [[*"ab", None, *"abc"][i] for i in by_user]
        assert store.column("price").tolist() == [1.25] * 6
    users = pa.table(
        {"user": pa.array([decimal.Decimal(10)], pa.decimal128(20, 0)), "time": pa.array([0], pa.timestamp("s"))}
    )
    assert seqdata.build(users, tmp_path / "u", **KEYS).users.tolist() == [10]
    halves = users.set_column(0, "user", pa.array([decimal.Decimal("1.5")]))
    with pytest.raises(ValueError, match=r"user column 'user' has type decimal|not int64"):
        seqdata.build(halves, tmp_path / "h", **KEYS)


def test_lists_of_integers_stay_integers(tmp_path):
    big = [[2**53 + 1, -5], [2**53 + 1, -5], None]
    table = pa.table({"user": [1, 1, 1], "time": pa.array([1, 2, 3], pa.timestamp("s")), "v": pa.array(big)})
    store = seqdata.build(table, tmp_path / "s", **KEYS)
    assert store.vectors("v").dtype == np.int64
    assert store.vectors("v")[store.column("v")].tolist() == [*big[:2], [0, 0]]
    more = table.set_column(2, "v", pa.array([[1.0, 2.0], [3.0, 4.5], [0.0, 0.0]]))
    with pytest.raises(ValueError, match=r"\[3\.0, 4\.5\] is not a vector of 2 integers"):
        seqdata.append(store, more, progress=False)


def test_zones_are_one_or_refused(tmp_path):
    bare, zoned = pa.array([NOON]), pa.array([NOON]).cast(pa.timestamp("us", "America/New_York"))
    for name, times in (("1", bare), ("2", zoned)):
        pq.write_table(pa.table({"user": [1], "time": times}), tmp_path / f"{name}.parquet")
    with pytest.raises(ValueError, match=r"2\.parquet names a zone and .*1\.parquet does not"):
        seqdata.build(tmp_path / "*.parquet", tmp_path / "s", **KEYS)
    for first, second in (
        ("2024-01-01T00:00:00+02:00", "2024-01-01T00:00:00"),
        ("2024-01-01T00:00:00", zoned),
        ("2024-01-01T00:00:00Z", "2024-01-01T00:00:00"),
    ):
        store = seqdata.build(pa.table({"user": [1], "time": [first]}), tmp_path / "s", overwrite=True, **KEYS)
        with pytest.raises(ValueError, match="names a zone and"):
            seqdata.append(
                store, pa.table({"user": [1], "time": second if second is zoned else [second]}), progress=False
            )
        seqdata.append(store, pa.table({"user": [1], "time": [first]}), progress=False)


def test_nanoseconds_in_text_are_cut_off(tmp_path):
    for times in (["2024-01-01 00:02:07.000001999"], ["2024-01-01T00:02:07.000001999Z"]):
        store = seqdata.build(pa.table({"user": [1], "time": times}), tmp_path / "s", overwrite=True, **KEYS)
        assert store.time.tolist() == [1_704_067_327_000_001]
    with pytest.raises(ValueError, match="the first 'soon'"):
        seqdata.build(pa.table({"user": [1], "time": ["soon"]}), tmp_path / "t", **KEYS)


def test_append_knows_the_files_it_took(tmp_path):
    for name, rows in (("a", 40), ("b", 30)):
        pq.write_table(log(rows), tmp_path / f"{name}.parquet")
    store = seqdata.build(tmp_path / "a.parquet", tmp_path / "s", **KEYS)
    os.rename(tmp_path / "a.parquet", tmp_path / "renamed.parquet")
    with pytest.raises(ValueError, match=r"renamed\.parquet are in the store already; taken='skip'"):
        seqdata.append(store, tmp_path / "renamed.parquet", progress=False)
    with pytest.raises(ValueError, match="taken='always'"):
        seqdata.append(store, tmp_path / "b.parquet", taken="always", progress=False)
    store = seqdata.append(store, tmp_path / "*.parquet", taken="skip", progress=False)
    assert store.num_events == 70
    assert seqdata.append(store, tmp_path / "*.parquet", taken="skip", progress=False).num_events == 70
    assert seqdata.append(store, tmp_path / "b.parquet", taken="again", progress=False).num_events == 100
    for name in ("empty", "empty too"):
        pq.write_table(log(0), tmp_path / f"{name}.parquet")
        later = [tmp_path / f"{name}.parquet", log(1)]
        store = seqdata.append(seqdata.open_store(store.path), later, progress=False)
    assert store.num_events == 102
    # other content of the same size under the same name
    (tmp_path / "c.csv").write_text("user,time,x\n1,2024-01-01,1\n")
    store = seqdata.append(seqdata.open_store(store.path), tmp_path / "c.csv", progress=False)
    (tmp_path / "c.csv").write_text("user,time,x\n1,2024-01-01,2\n")
    assert seqdata.append(store, tmp_path / "c.csv", progress=False).num_events == 104


@pytest.mark.parametrize("shards", [1, 3])
def test_repeated_events_are_left_out_on_wish(tmp_path, shards):
    rng = np.random.default_rng(0)
    table = pa.table(
        {
            "user": rng.integers(0, 9, 600),
            "time": pa.array(rng.integers(0, 20, 600), pa.timestamp("s")),
            "item": [None if x == 3 else f"i{x}" for x in rng.integers(0, 4, 600)],
            "price": [None if x == 2 else x / 2 for x in rng.integers(0, 3, 600)],
            "tag": rng.integers(0, 50, 600) % 2,
            "v": pa.array([[x] for x in (rng.integers(0, 2, 600)).tolist()], pa.list_(pa.float32())),
        }
    )
    # nothing is counted, so every item has the same id; all tags share a bucket
    fields = {"item": "categorical", "price": "numeric", "tag": seqdata.Hashed(1), "v": "vector"}
    options = {"fields": fields | {"v": seqdata.Vector(1, "float32")}, "fit_before": 0, "shards": shards, **KEYS}
    store = seqdata.build(table, tmp_path / "s", dedup=True, **options)
    frame = table.to_pandas()
    frame["v"] = [v[0] for v in frame.v]
    want = frame.drop_duplicates().sort_values(["user", "time"], kind="stable")
    assert store.schema["rows"] == {
        "in": 600, "out": len(want), "dropped": {"null_user": 0, "repeated": 600 - len(want)}
    }  # fmt: skip
    assert np.array_equal(np.repeat(store.users, np.diff(store.offsets)), want.user)
    assert np.array_equal(store.column("price"), want.price.astype("float32"), equal_nan=True)
    assert store.vectors("v")[store.column("v")].ravel().tolist() == want.v.tolist()
    assert seqdata.build(table, tmp_path / "all", **options).num_events == 600


def test_export_keeps_quotes_and_microseconds(tmp_path):
    items = pd.DataFrame({"c": ['12" ruler', "b"], "note": ['say "hi"', None]})
    table = pa.table(
        {"user": [1, 2], "time": pa.array([1_600_000_000_123_456, 0], pa.timestamp("us")), "c": ['12" ruler', "b"]}
    )
    store = seqdata.build(table, tmp_path / "s", items={"c": seqdata.ItemTable(items, "c")}, **KEYS)
    exchange.to_parquet(store.all(), tmp_path / "o.parquet")
    assert pq.read_table(tmp_path / "o.parquet")["time"][0].as_py()[0].microsecond == 123456
    assert exchange.to_recbole(store.all(), tmp_path / "rb") == 2
    assert (tmp_path / "rb" / "rb.inter").read_text().splitlines() == [
        "user:token\ttimestamp:float\tc:token", '1\t1600000000\t12" ruler', "2\t0\tb"
    ]  # fmt: skip
    assert (tmp_path / "rb" / "rb.item").read_text() == 'c:token\tnote:token\n12" ruler\tsay "hi"\nb\t\n'


def test_lists_of_texts_are_refused_before_anything_is_read(tmp_path):
    table = log(3, tags=pa.array([["a"], ["b", "c"], []]))
    with pytest.raises(ValueError, match=r"column 'tags' has type list<.*which no field holds"):
        seqdata.build(table, tmp_path / "s", **KEYS)
    assert seqdata.build(table, tmp_path / "s", fields={"x": "categorical"}, **KEYS).fields == ["x"]


def test_nothing_of_the_system_is_needed_to_import():
    code = "import sys; sys.modules['fcntl'] = sys.modules['resource'] = None; import seqdata, seqdata.cli"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
