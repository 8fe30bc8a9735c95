"""Every layout of a log is read for what it is, and what does not fit is named."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest

from ubt.config import LogConfig, PrepareConfig
from ubt.features import aggregates
from ubt.labels import earlier_labels, window_labels
from ubt.prepare import Prepared, open_prepared, prepare

VECTORS = np.random.default_rng(0).integers(0, 256, (40, 5))


def simple_log(folder: Path, tables: bool) -> Path:
    """40 skus, 50 clients, as five tables with an item table or as one table with all columns."""
    rng = np.random.default_rng(1)
    rows = 900
    events = pd.DataFrame(
        {
            "client_id": rng.integers(0, 50, rows),
            "timestamp": pd.Timestamp("2024-01-01") + pd.to_timedelta(rng.integers(0, 30 * 86400, rows), unit="s"),
            "event_type": rng.choice(["page_visit", "add_to_cart", "product_buy"], rows),
            "sku": rng.integers(0, 40, rows),
        }
    )
    events.loc[0, ["timestamp", "event_type"]] = [pd.Timestamp("2024-01-30 12:00:00"), "product_buy"]
    items = pd.DataFrame(
        {
            "sku": np.arange(40),
            "category": np.arange(40) // 10,
            "price": np.arange(40) * 2,
            "name": [str(v) for v in VECTORS],
        }
    )
    (folder / "input").mkdir(parents=True)
    (folder / "target").mkdir()
    if tables:
        items.to_parquet(folder / "product_properties.parquet", index=False)
        for kind, part in events.groupby("event_type"):
            part = part.drop(columns="event_type").astype({"timestamp": str})
            part.to_parquet(folder / "input" / f"{kind}.parquet", index=False)
    else:
        events.merge(items, on="sku").to_parquet(folder / "input" / "events.parquet", index=False)
    np.save(folder / "input" / "relevant_clients.npy", np.arange(40, dtype=np.int64)[::-1])
    np.save(folder / "target" / "active_clients.npy", np.arange(30, dtype=np.int64))
    train = {"client_id": [0, 1, 1, 2], "churn": [1, 0, 0, 0], "category": [None, 3, 1, None]}
    train |= {"sku": [None, 31, 12, None], "price": [None, 62, 24, None]}
    pd.DataFrame(train).to_parquet(folder / "target" / "train.parquet", index=False)
    valid = {"client_id": [5], "churn": [0], "category": [2], "sku": [25], "price": [50]}
    pd.DataFrame(valid).to_parquet(folder / "target" / "valid.parquet", index=False)
    return folder


@pytest.mark.parametrize("tables", [True, False])
def test_the_simple_layout_has_ready_labels(tmp_path: Path, prepare_for: Callable[..., Prepared], tables: bool) -> None:
    prepared = prepare_for(simple_log(tmp_path / "log", tables))
    assert set(prepared.families) == {"event_type", "item", "category", "price", "name"}
    assert prepared.store.num_events == 900 and prepared.name_width == 5
    # The last event lies in the history, and nothing else was split off.
    assert prepared.history(prepared.train_start).lengths().sum() == (900 - _of_others(tmp_path / "log"))
    assert prepared.categories.dtype == prepared.skus.dtype == np.int64
    earlier = earlier_labels(prepared, 1)[0]
    assert 0 < (earlier.conversion == 0).sum() < 40 and earlier.category.sum() > 0
    labels = window_labels(prepared, "train")
    at = {client: row for row, client in enumerate(prepared.users)}
    assert [labels.churn[at[client]] for client in (0, 1, 2, 3)] == [1, 0, 0, 1]
    assert np.isnan(labels.churn[at[35]]) and labels.conversion[at[35]] == 1
    found = labels.category.toarray()[at[1]]
    assert set(prepared.categories[found > 0]) == {1, 3} and labels.category.sum() == 2
    assert labels.price[at[1]] == 24 and np.isnan(labels.price[at[2]])
    scored = window_labels(prepared, "validation")
    assert scored.conversion[at[5]] == 0 and scored.conversion.sum() == 39
    assert set(prepared.skus[scored.sku.toarray()[at[5]] > 0]) == {25}
    features = next(aggregates(prepared, prepared.train_start, [1.0]))
    assert any(name.startswith("mean name") for name in features.names) and np.isfinite(features.values).all()


@pytest.mark.parametrize("tables", [True, False])
def test_clients_may_be_floats_that_are_whole(
    tmp_path: Path, prepare_for: Callable[..., Prepared], tables: bool
) -> None:
    folder = simple_log(tmp_path / "log", tables)
    before = prepare_for(folder)
    for path in folder.glob("*/*.parquet"):
        pd.read_parquet(path).astype({"client_id": float}).to_parquet(path, index=False)
    after = prepare_for(folder)
    np.testing.assert_array_equal(before.store.users, after.store.users)
    assert after.store.users.dtype == np.int64
    for window in ("train", "validation"):
        np.testing.assert_array_equal(*(window_labels(one, window).churn for one in (before, after)))
    path = folder / "target" / "valid.parquet"
    pd.read_parquet(path).assign(client_id=5.5).to_parquet(path, index=False)
    with pytest.raises(duckdb.Error, match=r"valid.parquet: column client_id holds 5.5, which is no whole number"):
        prepare_for(folder)


def test_event_types_may_be_numbers(tmp_path: Path, prepare_for: Callable[..., Prepared]) -> None:
    folder = simple_log(tmp_path / "log", tables=False)
    path = folder / "input" / "events.parquet"
    frame = pd.read_parquet(path)
    frame.assign(event_type=frame["event_type"].map(len)).to_parquet(path, index=False)
    assert set(prepare_for(folder).store.vocabulary("event_type").values) == {"10", "11"}
    borders = {"train_start": "2024-01-20", "valid_start": "2024-01-25", "label_events": ["11"]}
    log = {"files": ["*.parquet"], "user": "client_id", "time": "timestamp"}
    assert set(prepare_for(path.parent, **log, **borders).store.vocabulary("event_type").values) == {"10", "11"}


@pytest.mark.parametrize(
    ("table", "change", "message"),
    [
        ("input/events", {"timestamp": "soon"}, "events.parquet: column timestamp holds 'soon' .VARCHAR., needs times"),
        ("input/events", {"timestamp": 17e8}, "column timestamp holds '1700000000.0' .DOUBLE., needs times like 2022"),
        ("input/events", {"timestamp": None}, "events.parquet: column timestamp holds nothing in some rows, needs"),
        ("input/events", {"client_id": None}, "events.parquet: column client_id is empty in 1 rows, needs a client"),
        ("input/events", {"category": [1, 2]}, r"events.parquet: column category holds BIGINT\[\], needs one number"),
        ("input/events", {"name": "[1 2 x]"}, r"the events of events.parquet: .*'\[1 2 x\]' is not a"),
        ("target/train", {"client_id": None}, "train.parquet: column client_id is empty in 1 rows"),
    ],
)
def test_rows_that_cannot_be_read_are_named_with_file_and_column(
    tmp_path: Path, prepare_for: Callable[..., Prepared], table: str, change: dict, message: str
) -> None:
    folder = simple_log(tmp_path / "log", tables=False)
    path = folder / f"{table}.parquet"
    frame = pd.read_parquet(path)
    for column, value in change.items():
        if isinstance(value, float | list):
            frame[column] = [value] * len(frame)
        else:
            frame[column] = [value, *(str(one) if isinstance(value, str) else one for one in frame[column][1:])]
    frame.to_parquet(path, index=False)
    with pytest.raises(ValueError, match=message) as error:
        prepare_for(folder)
    assert ".new" not in str(error.value) and "null_user" not in str(error.value)


@pytest.mark.parametrize(
    ("table", "column", "value", "message"),
    [
        ("product_buy", "sku", "shoe", "product_buy.parquet: column sku holds text, needs numbers, as product_prop"),
        ("page_visit", "client_id", None, "page_visit.parquet: column client_id is empty in 1 rows"),
        ("search_query", "timestamp", "never", "search_query.parquet: column timestamp holds 'never'"),
        ("search_query", "timestamp", 1_700_000_000, "column timestamp holds '1700000000' .BIGINT., needs times"),
    ],
)
def test_rows_of_the_challenge_layout_that_cannot_be_read_are_named(
    raw_copy: Path, prepare_for: Callable[..., Prepared], table: str, column: str, value: object, message: str
) -> None:
    path = raw_copy / f"{table}.parquet"
    frame = pd.read_parquet(path)
    if isinstance(value, int):
        frame[column] = value
    else:
        frame[column] = [value, *(str(one) if isinstance(value, str) else one for one in frame[column][1:])]
    frame.to_parquet(path, index=False)
    with pytest.raises(ValueError, match=message):
        prepare_for(raw_copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user": None}, "b.parquet: column user is empty in 1 rows, needs a client in each"),
        ({"time": "late"}, "b.parquet: column time holds 'late'"),
        ({"kind": [[1], [2]]}, "log.category: column kind holds BIGINT"),
        ({"user": []}, "b.parquet: no column 'user', which others of"),
    ],
)
def test_rows_of_a_described_log_that_cannot_be_read_are_named(
    tmp_path: Path, prepare_for: Callable[..., Prepared], change: dict, message: str
) -> None:
    good = pd.DataFrame({"user": [1, 2], "time": ["2024-01-01", "2024-01-03"], "event": "buy", "kind": [1, 2]})
    good.to_parquet(tmp_path / "a.parquet", index=False)
    for column, value in change.items():
        values = value if isinstance(value, list) else [good[column][0], value]
        good = good.drop(columns=column)
        if values:
            good[column] = values
    for name in "ab" if "kind" in change else "b":
        good.to_parquet(tmp_path / f"{name}.parquet", index=False)
    columns = {"user": "user", "time": "time", "event": "event", "category": "kind"}
    with pytest.raises(ValueError, match=message):
        prepare_for(tmp_path, files=["*.parquet"], train_start="2024-01-02", valid_start="2024-01-03", **columns)


@pytest.mark.parametrize("name", ["input/relevant_clients", "target/propensity_sku"])
@pytest.mark.parametrize("damage", ["empty", "cut", "other"])
def test_damaged_arrays_are_named(raw_copy: Path, prepare_for: Callable[..., Prepared], name: str, damage: str) -> None:
    path = raw_copy / f"{name}.npy"
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": content[:-5], "other": b"PK, no array at all"}[damage])
    with pytest.raises(ValueError, match=rf"{path.stem}.npy: damaged, or no array; needs whole numbers"):
        prepare_for(raw_copy)


class Planted:
    def __reduce__(self) -> tuple:
        return exec, ("raise SystemExit('ran')",)


def test_arrays_of_objects_are_read_and_run_nothing(raw_copy: Path, prepare_for: Callable[..., Prepared]) -> None:
    path = raw_copy / "target" / "propensity_sku.npy"
    ids = np.load(path)
    # As the organisers save some of them.
    np.save(path, ids.astype(object))
    np.testing.assert_array_equal(prepare_for(raw_copy).skus, ids)
    np.save(path, np.array([*map(np.int32, ids[:-1]), ids[-1]], object))
    np.testing.assert_array_equal(prepare_for(raw_copy).skus, ids)
    np.save(path, np.array([*ids[:-1], Planted()], object))
    with pytest.raises(ValueError, match=r"propensity_sku.npy: damaged, or no array"):
        prepare_for(raw_copy)


def _of_others(folder: Path) -> int:
    frames = [pd.read_parquet(path) for path in (folder / "input").glob("*.parquet")]
    return int((pd.concat(frames)["client_id"] >= 40).sum())


def test_training_and_validation_labels_are_not_mixed(tmp_path: Path, prepare_for: Callable[..., Prepared]) -> None:
    prepared = prepare_for(simple_log(tmp_path / "log", tables=True))
    train, scored = (window_labels(prepared, window) for window in ("train", "validation"))
    assert not (train.category.multiply(scored.category)).nnz
    assert (train.conversion == 0).sum() == 2 and (scored.conversion == 0).sum() == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"churn": [1, 0, 0, 2]}, "client 2 has churn 2"),
        ({"sku": [7.5, 31, 12, None]}, "train.parquet: column sku holds 7.5, which is no whole number"),
        ({"price": [None, 620, 24, None]}, "train.parquet: got price 620.0, needs buckets 0..99"),
        ({"client_id": None}, "no column 'client_id'"),
        ({"churn": None, "category": None, "sku": None, "price": None}, "no label; needs some of"),
    ],
)
def test_ready_labels_that_contradict_themselves_are_named(
    tmp_path: Path, prepare_for: Callable[..., Prepared], change: dict, message: str
) -> None:
    folder = simple_log(tmp_path / "log", tables=True)
    path = folder / "target" / "train.parquet"
    frame = pd.read_parquet(path)
    for column, values in change.items():
        frame = frame.drop(columns=column) if values is None else frame.assign(**{column: values})
    frame.to_parquet(path, index=False)
    with pytest.raises((ValueError, duckdb.Error), match=message):
        prepare_for(folder)


def test_ready_labels_are_taken_as_they_are(tmp_path: Path, prepare_for: Callable[..., Prepared]) -> None:
    folder = simple_log(tmp_path / "log", tables=True)
    path = folder / "target" / "train.parquet"
    frame = pd.read_parquet(path)
    frame.assign(sku=[7, 31, 12, None], category=[2, 3, 1, None]).to_parquet(path, index=False)
    prepared = prepare_for(folder)
    labels = window_labels(prepared, "train")
    row = prepared.users.tolist().index(0)
    assert labels.churn[row] == labels.conversion[row] == 1
    assert prepared.categories[labels.category.toarray()[row] > 0].tolist() == [2]
    assert prepared.skus[labels.sku.toarray()[row] > 0].tolist() == [7]


@pytest.mark.parametrize("tables", [True, False])
def test_amounts_become_buckets_of_the_history(
    tmp_path: Path, prepare_for: Callable[..., Prepared], tables: bool
) -> None:
    folder = simple_log(tmp_path / "log", tables)
    for path in [*folder.glob("*.parquet"), *folder.glob("*/*.parquet")]:
        frame = pd.read_parquet(path)
        if "price" in frame:
            frame.assign(price=frame["price"] * 12.75).to_parquet(path, index=False)
    prepared = prepare_for(folder)
    history = pd.concat(pd.read_parquet(path) for path in (folder / "input").glob("*.parquet"))
    amounts = history["sku"].to_numpy() * 2 * 12.75
    borders = np.quantile(amounts, np.arange(1, 100) / 100)
    labels = window_labels(prepared, "train")
    wanted = np.searchsorted(borders, 62 * 12.75, side="right"), np.searchsorted(borders, 24 * 12.75, side="right")
    assert labels.price[prepared.users.tolist().index(1)] in wanted
    found = sorted(prepared.store.vocabulary(prepared.families["price"]).values)
    assert found == sorted(set(np.searchsorted(borders, amounts, side="right").tolist()))
    assert labels.price_buckets.sum() == 2 and set(prepared.targets["price"].ids) <= set(found)


def test_a_described_log_may_have_names_and_queries(tmp_path: Path, prepare_for: Callable[..., Prepared]) -> None:
    rng = np.random.default_rng(0)
    sku = rng.integers(0, 40, 300)
    frame = pd.DataFrame(
        {
            "user_id": rng.integers(0, 20, 300),
            "event_time": pd.Timestamp("2024-01-01") + pd.to_timedelta(np.sort(rng.integers(0, 86400, 300)), unit="s"),
            "event_type": "buy",
            "thing": sku,
            "title": [str(v) for v in VECTORS[sku]],
            "asked": [list(map(int, v[:3])) for v in VECTORS[sku]],
        }
    )
    (tmp_path / "log").mkdir()
    frame.to_parquet(tmp_path / "log" / "events.parquet", index=False)
    settings = {"files": ["*.parquet"], "item": "thing", "name": "title", "query": "asked"}
    borders = {"train_start": "2024-01-01 08:00:00", "valid_start": "2024-01-01 16:00:00"}
    prepared = prepare_for(tmp_path / "log", **settings, **borders)
    assert prepared.name_width == 5
    assert prepared.store.vectors("query").shape[1] == 3
    labels = window_labels(prepared, "train")
    inside = frame[frame["event_time"].between("2024-01-01 08:00:00", "2024-01-01 15:59:59")]
    first = inside.groupby("user_id")["thing"].first()
    for row, user in enumerate(prepared.users):
        wanted = VECTORS[first[user]] / 127.5 - 1 if user in first.index else np.full(5, np.nan)
        # Events of one second have no order of their own.
        if user in first.index and inside[inside["user_id"] == user]["event_time"].is_unique:
            np.testing.assert_allclose(labels.name[row], wanted, atol=1e-6)


def test_irregular_vectors_are_read_and_broken_ones_named(raw_copy: Path, prepare_for: Callable[..., Prepared]) -> None:
    path = raw_copy / "product_properties.parquet"
    items = pd.read_parquet(path)
    items.loc[0, "name"] = "[" + ",".join(str(i) for i in range(16)) + " ]"
    items.loc[1, "name"] = None
    items.to_parquet(path, index=False)
    prepared = prepare_for(raw_copy)
    assert prepared.name_width == 16
    vectors = prepared.store.item_column("sku", "name")
    ids = prepared.store.vocabulary("sku").encode(items["sku"][:2].to_numpy())
    for number, wanted in zip(ids, (np.arange(16), np.zeros(16)), strict=True):
        if number > 1:
            np.testing.assert_array_equal(vectors[number], wanted)
    # The first row does not settle how many numbers a vector has.
    for row in (2, 0):
        items.loc[row, "name"] = "[1 2 three]"
        items.to_parquet(path, index=False)
        with pytest.raises(ValueError, match=r"column 'name': '\[1 2 three\]' is not a vector of 16"):
            prepare_for(raw_copy)


@pytest.mark.parametrize(
    ("name", "ids", "message"),
    [
        ("input/relevant_clients", np.array([1.0, 2.0]), "got float64 .* needs whole numbers or text as ids"),
        ("input/relevant_clients", np.array([[1], [2]]), "needs one dimension"),
        ("input/relevant_clients", np.array([], np.int64), "holds nobody"),
        ("input/relevant_clients", np.array(["a", "b"]), "relevant_clients.npy: holds text, the log's client_id"),
        ("input/relevant_clients", np.array([10**15]), "none of its 1 clients has an event"),
        ("target/propensity_sku", np.array([10**15, 10**15 + 1, -1, -2, -3]), "none of its 5 ids is in the log"),
        ("target/propensity_category", np.array(list("abcdefgh")), "propensity_category.npy: holds text"),
    ],
)
def test_ids_that_do_not_fit_are_named(
    raw_copy: Path, prepare_for: Callable[..., Prepared], name: str, ids: np.ndarray, message: str
) -> None:
    np.save(raw_copy / f"{name}.npy", ids)
    with pytest.raises(ValueError, match=message):
        prepare_for(raw_copy)


def test_what_a_killed_prepare_left_is_swept(raw_log: Path, tmp_path: Path) -> None:
    code = (
        "import sys, os, signal; import ubt.prepare as p\n"
        "from ubt.config import LogConfig, PrepareConfig\n"
        "p._write_users = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        "p.prepare(sys.argv[1], sys.argv[2], LogConfig(), PrepareConfig())"
    )
    folder = tmp_path / "prepared"
    process = subprocess.Popen([sys.executable, "-c", code, str(raw_log), str(folder)], stderr=subprocess.DEVNULL)
    assert process.wait() < 0
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".prepared.") and left.name.endswith(".new")
    # Of a process that still runs, nothing is touched.
    living = tmp_path / left.name.replace(f"-{process.pid}-", f"-{os.getppid()}-")
    living.mkdir()
    assert prepare(raw_log, folder, LogConfig(), PrepareConfig())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([living.name, "prepared"])


def test_labels_of_strangers_and_contradictions_are_named(tmp_path: Path, prepare_for: Callable[..., Prepared]) -> None:
    folder = simple_log(tmp_path / "log", tables=False)
    path = folder / "target" / "train.parquet"
    good = pd.read_parquet(path)
    for wrong, message in (
        (good.assign(client_id=good.client_id + 1000), "none of its 3 clients is asked for"),
        (good.assign(client_id="u" + good.client_id.astype(str)), "none of its 3 clients is asked for"),
        (
            pd.concat([good, good.iloc[1:2].assign(churn=1, category=None, sku=None, price=None)]),
            "churn 0 and rows with",
        ),
        (good.assign(churn=[1, 0, None, 0]), "churn None"),
    ):
        wrong.to_parquet(path, index=False)
        with pytest.raises(ValueError, match=message):
            prepare(folder, tmp_path / "prepared", LogConfig(), PrepareConfig())


def test_a_described_log_may_have_text_users_and_prices_that_are_none(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = 2000
    log = pd.DataFrame(
        {
            "user": [f"u{i}" for i in rng.integers(0, 60, rows)],
            "time": pd.Timestamp("2024-01-01") + pd.to_timedelta(np.sort(rng.integers(0, 30 * 86400, rows)), unit="s"),
            "event": rng.choice(["view", "purchase"], rows),
            "price": np.where(rng.random(rows) < 0.2, np.inf, rng.random(rows)),
        }
    )
    (tmp_path / "log").mkdir()
    log.to_parquet(tmp_path / "log" / "events.parquet", index=False)
    config = LogConfig(
        files=["*.parquet"], user="user", time="time", event="event", price="price", label_events=["purchase"],
        train_start="2024-01-15", valid_start="2024-01-22",
    )  # fmt: skip
    prepare(tmp_path / "log", tmp_path / "prepared", config, PrepareConfig())
    found = open_prepared(tmp_path / "prepared")
    assert sorted(found.users.tolist()) == sorted(set(log.user))
    assert 0 < np.nanmean(window_labels(found, "train").churn) < 1
    config.label_events = ["purchse"]
    with pytest.raises(ValueError, match=r"log\.label_events: no event of type 'purchse'"):
        prepare(tmp_path / "log", tmp_path / "prepared", config, PrepareConfig())


def test_users_that_are_fractions_stay_what_they_are(tmp_path: Path, prepare_for: Callable[..., Prepared]) -> None:
    rows = 300
    user = np.repeat([7.0, 7.5, 8.0], rows // 3)
    moment = pd.Timestamp("2024-01-01") + pd.to_timedelta(np.arange(rows) % 100, unit="h")
    (tmp_path / "log").mkdir()
    frame = pd.DataFrame({"user_id": user, "event_time": moment, "event_type": "view"})
    borders = {"files": ["*.parquet"], "train_start": "2024-01-03", "valid_start": "2024-01-04"}
    for users, wanted in ((user, ["7.0", "7.5", "8.0"]), (np.round(user), [7, 8])):
        frame.assign(user_id=users).to_parquet(tmp_path / "log" / "events.parquet", index=False)
        assert sorted(prepare_for(tmp_path / "log", **borders).users.tolist()) == wanted
