"""The split and the labels against a row-by-row computation in pandas."""

import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ubt.labels import earlier_labels, window_labels
from ubt.prepare import TARGETS, Prepared, open_prepared


def by_hand(raw: Path, start: str, end: str, users: np.ndarray, categories: np.ndarray) -> tuple[list, np.ndarray]:
    buys = pd.read_parquet(raw / "product_buy.parquet")
    buys["timestamp"] = pd.to_datetime(buys["timestamp"])
    items = pd.read_parquet(raw / "product_properties.parquet").set_index("sku")["category"]
    inside = buys[(buys["timestamp"] >= start) & (buys["timestamp"] < end)]
    bought = set(inside["client_id"])
    multi_hot = np.zeros((len(users), len(categories)))
    for client, sku in zip(inside["client_id"], inside["sku"], strict=True):
        for i in np.flatnonzero(users == client):
            for c in np.flatnonzero(categories == items[sku]):
                multi_hot[i, c] = 1
    return [float(user not in bought) for user in users], multi_hot


def test_the_split_is_the_official_one(raw_log: Path, prepared: Prepared) -> None:
    end = pd.to_datetime(pd.read_parquet(raw_log / "product_buy.parquet")["timestamp"]).max()
    assert prepared.end == end
    assert prepared.train_start == (end - pd.Timedelta(days=27)).floor("D") == datetime(2022, 10, 13)
    assert prepared.valid_start == datetime(2022, 10, 27)
    assert prepared.store.schema["fit_before_text"].startswith("2022-10-13")


@pytest.mark.parametrize(
    ("window", "start", "end"), [("train", "2022-10-13", "2022-10-27"), ("validation", "2022-10-27", "2022-11-10")]
)
def test_labels_equal_a_row_by_row_computation(
    raw_log: Path, prepared: Prepared, window: str, start: str, end: str
) -> None:
    churn, category = by_hand(raw_log, start, end, prepared.users, prepared.categories)
    active = np.isin(prepared.users, np.load(raw_log / "target" / "active_clients.npy"))
    labels = window_labels(prepared, window)
    np.testing.assert_array_equal(labels.churn, np.where(active, churn, np.nan))
    np.testing.assert_array_equal(labels.category.toarray(), category)
    assert labels.asked.all() and category.sum() > 0


def literal(raw: Path, prepared: Prepared, start: str, end: str) -> dict[str, np.ndarray]:
    """The labels of one window by a loop over purchases in time order, then by sku."""
    buys = pd.read_parquet(raw / "product_buy.parquet").sort_values(["timestamp", "sku"])
    items = pd.read_parquet(raw / "product_properties.parquet").set_index("sku")
    row_of = {user: row for row, user in enumerate(prepared.users)}
    users = len(prepared.users)
    found = {what: np.zeros((users, len(prepared.targets[what].ids))) for what in TARGETS}
    found["first price"], found["first name"] = np.full(users, np.nan), np.full((users, 16), np.nan)
    found["conversion"] = np.ones(users)
    for client, time, sku in zip(buys["client_id"], buys["timestamp"], buys["sku"], strict=True):
        if client not in row_of or not start <= time < end:
            continue
        row, item = row_of[client], items.loc[sku]
        found["conversion"][row] = 0
        values = {"category": item["category"], "sku": sku, "new_sku": sku, "price": item["price"]}
        for what, value in values.items():
            for i, wanted in enumerate(prepared.targets[what].ids):
                if value == wanted:
                    found[what][row, i] = 1
        if np.isnan(found["first price"][row]):
            found["first price"][row] = item["price"]
            numbers = [int(part) for part in item["name"].strip("[]").split()]
            found["first name"][row] = [number / 127.5 - 1 for number in numbers]
    return found


def test_every_label_equals_a_loop_over_rows(raw_copy: Path, prepare_for: Callable[..., Prepared]) -> None:
    buys = pd.read_parquet(raw_copy / "product_buy.parquet")
    inside = buys[buys["timestamp"] >= "2022-10-13"]["sku"].to_numpy()
    new = np.setdiff1d(inside, buys[buys["timestamp"] < "2022-10-13"]["sku"])
    for name, ids in {"new_sku": new, "price": np.arange(100)[::-1], "sku": np.unique(inside)[:40]}.items():
        np.save(raw_copy / "target" / f"propensity_{name}.npy", ids)
        np.save(raw_copy / "target" / f"popularity_propensity_{name}.npy", np.linspace(0.1, 1, len(ids)))
    prepared = prepare_for(raw_copy)
    windows = {
        "train": (window_labels(prepared, "train"), "2022-10-13", "2022-10-27"),
        "validation": (window_labels(prepared, "validation"), "2022-10-27", "2022-11-10"),
        "earlier": (earlier_labels(prepared, 2, span=2)[1], "2022-09-15", "2022-10-13"),
    }
    for window, (labels, start, end) in windows.items():
        wanted = literal(raw_copy, prepared, start, end)
        for what in TARGETS:
            found = getattr(labels, "price_buckets" if what == "price" else what).toarray()
            np.testing.assert_array_equal(found, wanted[what], err_msg=f"{window} {what}")
            assert wanted[what].sum() > 0 or (window, what) == ("earlier", "new_sku")
        np.testing.assert_array_equal(labels.price, wanted["first price"].astype(np.float32))
        np.testing.assert_allclose(labels.name, wanted["first name"], atol=1e-6)
        asked = labels.asked
        np.testing.assert_array_equal(labels.conversion, np.where(asked, wanted["conversion"], np.nan))
        assert labels.price.dtype == labels.name.dtype == np.float32


def test_broken_and_missing_values_are_no_labels(prepared_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(prepared_dir, tmp_path / "prepared"))
    path = folder / "target" / "train_target.parquet"
    rows = pd.read_parquet(path)
    user = np.load(folder / "input" / "relevant_clients.npy")[:3]
    good = "[" + " ".join(["255"] * 16) + "]"
    wrong = {
        "client_id": [user[0], user[0], user[1], user[2]],
        "name": ["[1 2 x]", good, None, "[1 2 3]"],
        "price": [np.nan, 7, 9, np.nan],
        "category": [np.nan, np.nan, np.nan, np.nan],
    }
    extra = rows.iloc[:4].assign(**wrong).assign(timestamp=pd.Timestamp("2022-10-13"))
    pd.concat([extra, rows[~rows["client_id"].isin(user)]]).to_parquet(path, index=False)
    labels = window_labels(open_prepared(folder), "train")
    np.testing.assert_array_equal(labels.price[:3], [7, 9, np.nan])
    assert (labels.name[0] == 1).all() and np.isnan(labels.name[1:3]).all()
    assert labels.category[:3].sum() == 0 and (labels.conversion[:3] == 0).all()


def test_a_task_the_log_does_not_know_has_no_width(raw_copy: Path, prepare_for: Callable[..., Prepared]) -> None:
    for path in (raw_copy / "target").glob("*propensity_*"):
        path.unlink()
    prepared = prepare_for(raw_copy, target_categories=5, target_skus=7)
    labels = window_labels(prepared, "train")
    users = len(prepared.users)
    assert labels.category.shape == (users, 5) and labels.sku.shape == (users, 7)
    assert 50 < labels.price_buckets.shape[1] <= 100 and labels.new_sku.shape == (users, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids, weights: (ids, None), "popularity_propensity_sku.npy: missing beside"),
        (lambda ids, weights: (np.r_[ids, ids[:1]], np.r_[weights, 0.1]), "1 duplicates"),
        (lambda ids, weights: (ids, weights[:-1]), "needs one finite number >= 0 for each of the 5 targets"),
        (lambda ids, weights: (ids, np.where(weights == weights[0], np.nan, weights)), "needs one finite number"),
    ],
)
def test_target_files_that_do_not_fit_are_named(
    raw_copy: Path, prepare_for: Callable[..., Prepared], change: Callable, message: str
) -> None:
    files = [raw_copy / "target" / f"{name}propensity_sku.npy" for name in ("", "popularity_")]
    for path, array in zip(files, change(*(np.load(path) for path in files)), strict=True):
        path.unlink()
        if array is not None:
            np.save(path, array)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare_for(raw_copy)


def test_earlier_windows_are_labelled_alike_and_know_who_was_there(raw_log: Path, prepared: Prepared) -> None:
    first, second = earlier_labels(prepared, 2)
    assert (first.start, second.start) == (datetime(2022, 9, 29), datetime(2022, 9, 15))
    churn, category = by_hand(raw_log, "2022-09-15", "2022-09-29", prepared.users, prepared.categories)
    buys = pd.read_parquet(raw_log / "product_buy.parquet")
    before = set(buys[buys["timestamp"] < "2022-09-15"]["client_id"])
    active = np.array([user in before for user in prepared.users]) & prepared.active
    np.testing.assert_array_equal(second.churn, np.where(active, churn, np.nan))
    np.testing.assert_array_equal(second.category.toarray(), category)
    tables = ["product_buy", "add_to_cart", "remove_from_cart", "page_visit", "search_query"]
    events = pd.concat([pd.read_parquet(raw_log / f"{t}.parquet")[["client_id", "timestamp"]] for t in tables])
    seen = set(events[events["timestamp"] < "2022-09-15"]["client_id"])
    np.testing.assert_array_equal(second.asked, [user in seen for user in prepared.users])


def test_a_span_of_two_windows_ends_where_the_scored_window_starts(raw_log: Path, prepared: Prepared) -> None:
    first, second = earlier_labels(prepared, 2, span=2)
    for labels, start, end in ((first, "2022-09-29", "2022-10-27"), (second, "2022-09-15", "2022-10-13")):
        churn, category = by_hand(raw_log, start, end, prepared.users, prepared.categories)
        asked = ~np.isnan(labels.churn)
        np.testing.assert_array_equal(labels.churn[asked], np.array(churn)[asked])
        np.testing.assert_array_equal(labels.category.toarray(), category)
    widest = earlier_labels(prepared, 1, span=9)[0]
    np.testing.assert_array_equal(widest.category.toarray(), first.category.toarray())


def test_a_purchase_of_an_unknown_sku_is_a_purchase_without_category(
    raw_copy: Path, prepare_for: Callable[..., Prepared]
) -> None:
    buys = pd.read_parquet(raw_copy / "product_buy.parquet")
    client = np.load(raw_copy / "target" / "active_clients.npy")[0]
    buys = buys[buys["client_id"] != client]
    extra = pd.DataFrame({"client_id": [client], "timestamp": ["2022-10-20 10:00:00"], "sku": [-5]})
    pd.concat([buys, extra]).to_parquet(raw_copy / "product_buy.parquet", index=False)
    prepared = prepare_for(raw_copy)
    labels = window_labels(prepared, "train")
    row = list(prepared.users).index(client)
    assert labels.churn[row] == 0
    assert labels.category[[row]].sum() == 0
