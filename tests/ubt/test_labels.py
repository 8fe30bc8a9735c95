"""The split and the labels against a row-by-row computation in pandas."""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ubt.labels import earlier_labels, positions, window_labels
from ubt.prepare import Prepared


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


def test_positions_find_ids_in_any_order() -> None:
    place, known = positions(np.array([5, 1, 9]), np.array([9, 2, 5, 1, 1, 100]))
    assert known.tolist() == [True, False, True, True, True, False]
    assert place[known].tolist() == [2, 0, 1, 1]
    assert not positions(np.array([], int), np.array([3]))[1].any()
