"""What a build makes of its input, against a brute-force pandas build."""

from __future__ import annotations

import filecmp
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import seqdata

KEYS = {"user": "user", "time": "time", "time_unit": "s", "progress": False}


def check(store: seqdata.Store, log: pd.DataFrame, oracle, cutoff: int | None = None) -> None:
    ordered = oracle.order(log, "user", "time")
    assert np.array_equal(store.users, np.unique(log.user))
    assert np.array_equal(np.diff(store.offsets), ordered.groupby("user").size().values)
    assert np.array_equal(store.time, ordered.time.values * 1_000_000)
    assert np.array_equal(store.column("row"), ordered.row.values.astype(np.float32))
    fit = pd.Series(True, index=ordered.index) if cutoff is None else ordered.time < cutoff
    assert np.array_equal(store.column("item"), oracle.ids(ordered.item, fit))
    assert np.array_equal(store.column("brand"), oracle.ids(ordered.brand, fit))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("cutoff", [None, 300])
def test_equals_pandas_with_ties_in_input_order(tmp_path, oracle, shards, cutoff):
    log = oracle.log()
    before = None if cutoff is None else cutoff * 1_000_000
    store = seqdata.build(log, tmp_path / "s", fit_before=before, shards=shards, **KEYS)
    check(store, log, oracle, cutoff)
    assert store.schema["fit_before"] == before


def test_memory_limit_changes_nothing_but_memory(tmp_path, oracle, monkeypatch):
    log = oracle.log(rows=20_000)
    whole = seqdata.build(log, tmp_path / "a", **KEYS)
    # ranges so small that every step of the out-of-core path runs
    monkeypatch.setattr("seqdata.spool.BYTES_A_ROW", 56 * 20_000)
    pieces = seqdata.build(log, tmp_path / "b", memory_limit="32MB", **KEYS)
    check(pieces, log, oracle)
    assert_same_files(whole.path, pieces.path)


def test_two_builds_are_the_same_bytes(tmp_path, oracle):
    oracle.log().to_parquet(tmp_path / "log.parquet")
    stores = [seqdata.build(tmp_path / "log.parquet", tmp_path / name, shards=2, **KEYS) for name in ("a", "b")]
    assert_same_files(stores[0].path, stores[1].path)


def assert_same_files(one: Path, other: Path) -> None:
    names = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    for name in names:
        assert filecmp.cmp(one / name, other / name, shallow=False), name


def as_source(kind: str, log: pd.DataFrame, folder: Path):
    table = pa.Table.from_pandas(log, preserve_index=False)
    third = len(log) // 3
    pieces = [table.slice(0, third), table.slice(third, third), table.slice(2 * third)]
    if kind == "pandas":
        return log
    if kind == "polars":
        return pl.from_arrow(table)
    if kind == "lazy polars":
        return pl.from_arrow(table).lazy()
    if kind == "arrow":
        return table
    if kind == "reader":
        return table.to_reader(max_chunksize=77)
    if kind == "stream":
        return Capsule(table)
    if kind == "duckdb":
        connection = duckdb.connect()
        connection.register("log", table)
        return connection.sql("SELECT * FROM log")
    if kind == "sql":
        pq.write_table(table, folder / "log.parquet")
        return seqdata.Sql(f"SELECT * FROM '{folder}/log.parquet'")
    for i, piece in enumerate(pieces):
        name = folder / f"part-{i}.{'csv' if 'csv' in kind else 'parquet'}"
        piece.to_pandas().to_csv(name, index=False) if "csv" in kind else pq.write_table(piece, name)
    if "list" in kind:
        return sorted(folder.glob("part-*"))
    return str(folder / "part-*")


class Capsule:
    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def __arrow_c_stream__(self, requested_schema=None):
        return self.table.__arrow_c_stream__(requested_schema)


@pytest.mark.parametrize(
    "kind",
    [
        "pandas",
        "polars",
        "lazy polars",
        "arrow",
        "reader",
        "stream",
        "duckdb",
        "sql",
        "parquet glob",
        "parquet list",
        "csv glob",
        "csv list",
    ],
)
def test_every_kind_of_source_gives_the_same_store(tmp_path, oracle, kind):
    log = oracle.log(rows=1000)
    check(seqdata.build(as_source(kind, log, tmp_path), tmp_path / "s", **KEYS), log, oracle)


def test_lists_keep_their_order_and_globs_are_sorted(tmp_path):
    for name, item in [("b", 1), ("a", 2)]:
        pd.DataFrame({"user": [1], "time": [5], "item": [item]}).to_parquet(tmp_path / f"{name}.parquet")
    listed = seqdata.build([tmp_path / "b.parquet", tmp_path / "a.parquet"], tmp_path / "1", **KEYS)
    globbed = seqdata.build(tmp_path / "*.parquet", tmp_path / "2", **KEYS)
    assert listed.vocabulary("item").decode(listed.column("item")) == [1, 2]
    assert globbed.vocabulary("item").decode(globbed.column("item")) == [2, 1]


def test_tables_with_different_columns_become_one_timeline(tmp_path):
    buy = pd.DataFrame({"user": [7, 3, 7], "time": [1, 1, 4], "sku": [10, 11, 10]})
    visit = pd.DataFrame(
        {"user": [7, 7, 9], "time": [1, 2, 0], "url": ["a", "b", "a"], "sku": pd.array([None, 11, None], "Int64")}
    )
    store = seqdata.build({"visit": visit, "buy": buy}, tmp_path / "s", **KEYS)
    assert store.users.tolist() == [3, 7, 9]
    assert store.offsets.tolist() == [0, 1, 5, 6]
    names = store.vocabulary("event_type").decode(store.column("event_type"))
    # at time 1 user 7 has one event in each table: the tables' order decides
    assert names == ["buy", "visit", "buy", "visit", "buy", "visit"]
    assert store.vocabulary("sku").decode(store.column("sku")) == [11, None, 10, 11, 10, None]
    assert store.column("url").tolist() == [0, 2, 0, 3, 0, 2]
    assert store.schema["tables"]["visit"]["rows_in"] == 3


def test_table_names_have_ids_even_without_events_before_the_cutoff(tmp_path):
    early = pd.DataFrame({"user": [1], "time": [1]})
    late = pd.DataFrame({"user": [1], "time": [9]})
    store = seqdata.build({"z": early, "a": late}, tmp_path / "s", fit_before=5_000_000, event_field="kind", **KEYS)
    assert store.vocabulary("kind").values.tolist() == ["z", "a"]


def test_text_users(tmp_path, oracle):
    log = oracle.log(rows=500)
    log["user"] = "ü" + log.user.astype(str)
    for shards in (1, 4):
        store = seqdata.build(log, tmp_path / str(shards), shards=shards, **KEYS)
        check(store, log, oracle)
        assert store.as_of(10**9).select(["ü7", "ü10"]).users.tolist() == ["ü7", "ü10"]


def test_mixed_users_become_text_and_types_casts_them(tmp_path):
    files = []
    for i, users in enumerate([["3", "10"], [3, 4]]):
        files.append(tmp_path / f"{i}.parquet")
        pd.DataFrame({"user": users, "time": [1, 2]}).to_parquet(files[-1])
    assert seqdata.build(files, tmp_path / "a", **KEYS).users.tolist() == ["10", "3", "4"]
    assert seqdata.build(files, tmp_path / "b", types={"user": "int64"}, **KEYS).users.tolist() == [3, 4, 10]


@pytest.mark.parametrize(
    ("spelling", "options"),
    [
        (["2022-06-23 14:05:00", "2022-06-23T14:05:01", "2022-06-23"], {}),
        (["2022-06-23 14:05:00 UTC", "2022-06-23 14:05:01 UTC", "2022-06-23 00:00:00 UTC"], {}),
        (["2022-06-23T16:05:00+02:00", "2022-06-23T14:05:01Z", "2022-06-22T22:30:00-0130"], {}),
        (pd.to_datetime(["2022-06-23 14:05:00", "2022-06-23 14:05:01", "2022-06-23 00:00:00"]), {}),
        (
            pd.to_datetime(["2022-06-23 14:05:00", "2022-06-23 14:05:01", "2022-06-23 00:00:00"])
            .tz_localize("UTC")
            .tz_convert("Asia/Tokyo"),
            {},
        ),
        ([1655993100, 1655993101, 1655942400], {"time_unit": "s"}),
        ([1655993100000, 1655993101000, 1655942400000], {"time_unit": "ms"}),
        ([1655993100000000000, 1655993101000000000, 1655942400000000000], {"time_unit": "ns"}),
        (["1655993100", "1655993101", "1655942400"], {"time_unit": "s"}),
        (["23.06.2022 14:05:00", "23.06.2022 14:05:01", "23.06.2022 00:00:00"], {"time_format": "%d.%m.%Y %H:%M:%S"}),
        ([20220623140500, 20220623140501, 20220623000000], {"time_format": "%Y%m%d%H%M%S"}),
    ],
)
def test_times_of_every_spelling(tmp_path, spelling, options):
    log = pd.DataFrame({"user": [1, 1, 1], "time": spelling})
    store = seqdata.build(log, tmp_path / "s", user="user", time="time", **options)
    assert store.time.tolist() == [1655942400000000, 1655993100000000, 1655993101000000]


def test_dates_and_csv_times(tmp_path):
    dates = pa.table({"user": [1], "time": pa.array([19166], pa.date32())})
    assert seqdata.build(dates, tmp_path / "a", user="user", time="time").time.tolist() == [19166 * 86_400_000_000]
    (tmp_path / "log.csv").write_text("user,time\n1,2022-06-23 14:05:00 UTC\n")
    assert seqdata.build(tmp_path / "log.csv", tmp_path / "b", user="user", time="time").time.tolist() == [
        1655993100000000
    ]


def test_null_users_are_refused_or_dropped_and_counted(tmp_path):
    log = pd.DataFrame({"user": [1.0, None, 2.0, None], "time": [3, 1, 2, 0], "item": [5, 6, 7, 8]})
    with pytest.raises(ValueError, match=r"user.*2 null value.*row 1.*null_user='drop'"):
        seqdata.build(log, tmp_path / "s", **KEYS)
    store = seqdata.build(log, tmp_path / "s", null_user="drop", **KEYS)
    assert store.schema["rows"] == {"in": 4, "out": 2, "dropped": {"null_user": 2}}
    assert store.users.tolist() == [1, 2]
    # a dropped row does not reach the vocabulary either
    assert sorted(store.vocabulary("item").values.tolist()) == [5, 7]


def test_categorical_options(tmp_path):
    log = pd.DataFrame(
        {"user": 1, "time": range(8), "a": list("xxxyyzzw"), "b": [1, 1, 2, 2, 3, 3, 3, 9], "c": list("xxxyyzzw")}
    )
    fields = {
        "a": seqdata.Categorical(min_count=2),
        "b": seqdata.Categorical(max_size=2),
        "c": seqdata.Categorical(values=["z", "x", "q"]),
    }
    store = seqdata.build(log, tmp_path / "s", fields=fields, **KEYS)
    assert store.vocabulary("a").values.tolist() == ["x", "y", "z"]
    assert store.column("a").tolist() == [2, 2, 2, 3, 3, 4, 4, 1]
    assert store.vocabulary("b").values.tolist() == [3, 1]
    assert store.column("b").tolist() == [3, 3, 1, 1, 2, 2, 2, 1]
    assert store.vocabulary("c").values.tolist() == ["z", "x", "q"]
    assert store.column("c").tolist() == [3, 3, 3, 1, 1, 2, 2, 1]


def test_unknown_buckets_and_hashed_fields(tmp_path):
    log = pd.DataFrame({"user": 1, "time": range(40), "a": [f"v{i}" for i in range(40)], "b": range(40)})
    fields = {"a": seqdata.Categorical(max_size=5, oov_buckets=7), "b": seqdata.Hashed(10)}
    store = seqdata.build(log, tmp_path / "s", fields=fields, fit_before=20_000_000, **KEYS)
    ids, vocabulary = store.column("a"), store.vocabulary("a")
    assert len(vocabulary) == 1 + 7 + 5
    known = ids >= 8
    assert known.sum() == 5
    assert vocabulary.decode(ids[known]) == log.a[known].tolist()
    assert len(set(ids[~known])) > 1
    assert set(ids[~known]) <= set(range(1, 8))
    assert np.array_equal(vocabulary.encode(log.a), ids)
    hashed = store.column("b")
    assert hashed.min() >= 2
    assert hashed.max() <= 11
    assert np.array_equal(store.vocabulary("b").encode(log.b.values), hashed)
    assert len(store.vocabulary("b")) == 12


def test_vectors_as_text_and_as_lists(tmp_path):
    vectors = np.array([[109, 77, 31], [0, 255, 1], [109, 77, 31]])
    texts = ["[109  77  31]", "[  0 255   1]", "[109 77 31]"]
    text = pd.DataFrame({"user": 1, "time": range(4), "q": [*texts, None]})
    lists = pa.table(
        {"user": [1] * 4, "time": range(4), "q": pa.array([*vectors.tolist(), None], pa.list_(pa.int64()))}
    )
    for name, log in [("a", text), ("b", lists)]:
        store = seqdata.build(log, tmp_path / name, fields={"q": seqdata.Vector()}, **KEYS)
        table, codes = store.vectors("q"), store.column("q")
        assert table.dtype == np.uint8
        assert table.shape == (3, 3)
        assert not table[0].any()
        assert codes[3] == 0
        assert np.array_equal(table[codes[:3]], vectors)
        assert codes[0] == codes[2]


def test_item_tables_are_aligned_with_ids(tmp_path):
    log = pd.DataFrame({"user": [1, 1, 2, 2], "time": [0, 1, 2, 9], "sku": [30, 10, 30, 20]})
    items = pd.DataFrame(
        {
            "sku": [10, 20, 30, 40],
            "cat": ["x", "y", "y", None],
            "price": [1.5, 2.5, None, 4.5],
            "name": ["[1 2]", "[3 4]", None, "[5 6]"],
        }
    )
    table = seqdata.ItemTable(
        items, "sku", {"cat": seqdata.Categorical(), "price": seqdata.Numeric(), "name": seqdata.Vector(2)}
    )
    store = seqdata.build(log, tmp_path / "s", items={"sku": table}, fit_before=9_000_000, **KEYS)
    # sku 20 comes after the cutoff: it has no id, and its properties teach nothing
    assert store.vocabulary("sku").values.tolist() == [30, 10]
    assert store.vocabulary("sku.cat").values.tolist() == ["x", "y"]
    assert store.item_column("sku", "cat").tolist() == [0, 0, 3, 2]
    assert np.array_equal(
        store.item_column("sku", "price"), np.array([np.nan, np.nan, np.nan, 1.5], np.float32), equal_nan=True
    )
    assert store.item_column("sku", "name").tolist() == [[0, 0], [0, 0], [0, 0], [1, 2]]
    assert store.schema["items"]["sku"]["rows"] == {"in": 4, "out": 2, "dropped": {"not_in_vocabulary": 2}}
    batch = next(store.all().batches(10, fields=["sku.cat", "sku.name"]))
    assert batch.jagged["sku.cat"].tolist() == [3, 2, 3, 0]
    assert batch.jagged["sku.name"].shape == (4, 2)


def test_numbers_keep_their_dtype_and_gaps(tmp_path):
    log = pd.DataFrame({"user": 1, "time": range(3), "a": [1.5, None, 2.5], "b": ["1", "2", "3"], "c": [1, 2, 2**40]})
    fields = {"a": "numeric", "b": seqdata.Numeric("float64"), "c": seqdata.Numeric("int64")}
    store = seqdata.build(log, tmp_path / "s", fields=fields, **KEYS)
    assert np.array_equal(store.column("a"), np.array([1.5, np.nan, 2.5], np.float32), equal_nan=True)
    assert store.column("b").tolist() == [1.0, 2.0, 3.0]
    assert store.column("c").tolist() == [1, 2, 2**40]


def test_inference(tmp_path):
    log = pa.table(
        {
            "user": [1],
            "time": [1],
            "s": ["a"],
            "d": pa.array(["x"]).dictionary_encode(),
            "i": pa.array([3], pa.int8()),
            "f": [0.5],
            "b": [True],
            "t": pa.array([1_500_000], pa.timestamp("us")),
            "v": pa.array([[1.0, 2.0]], pa.list_(pa.float32())),
        }
    )
    store = seqdata.build(log, tmp_path / "s", **KEYS)
    kinds = {name: entry["kind"] for name, entry in store.schema["fields"].items()}
    assert kinds == {
        "s": "categorical",
        "d": "categorical",
        "i": "categorical",
        "f": "numeric",
        "b": "categorical",
        "t": "numeric",
        "v": "vector",
    }
    assert store.column("t").tolist() == [1.5]
    assert store.vectors("v")[1].tolist() == [1.0, 2.0]
