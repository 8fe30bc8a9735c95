"""Readers of shop transactions: what is observed, what is label, what is left out, all countable by hand."""

import json

import numpy as np
import pandas as pd
import pyarrow.dataset as ds
import pytest

from ltv.cli import main
from ltv.config import ImportConfig
from ltv.transactions import customer_rows, import_transactions, read_cdnow, read_online_retail

DAYS = ImportConfig(first_days=3, horizons=[1, 5])


def lines(*rows):
    table = pd.DataFrame(rows, columns=["customer", "time", "item", "quantity", "amount"])
    return table.assign(time=pd.to_datetime(table["time"]))


@pytest.fixture
def shop():
    return lines(
        (7, "2020-01-01 10:00", "a", 1, 10.0),
        (7, "2020-01-01 10:00", "b", 2, 4.0),
        (7, "2020-01-03 23:59", "a", 1, 6.0),
        (7, "2020-01-03 09:00", "a", -1, -3.0),
        (7, "2020-01-04 00:00", "c", 1, 100.0),
        (7, "2020-01-04 12:00", "c", -1, -100.0),
        (7, "2020-01-07 12:00", "c", 1, 5.0),
        (7, "2020-01-09 00:00", "c", 1, 1000.0),
        (3, "2020-01-02 08:00", "a", 3, 9.0),
        (5, "2020-01-20 08:00", "a", 3, 9.0),
        (9, "2020-01-02 08:00", "a", -1, -9.0),
        (3, "2020-01-25 08:00", "a", 1, 1.0),
    )


def test_features_stop_where_labels_start(shop):
    table, facts = customer_rows(shop, DAYS)
    rows = {row["customer"]: row for row in table.to_pylist()}
    seven, three = rows[7], rows[3]
    assert seven["row_time"] == pd.Timestamp("2020-01-04") and three["row_time"] == pd.Timestamp("2020-01-05")
    assert (seven["orders"], seven["spend"], seven["units"], seven["lines"]) == (2, 20.0, 4.0, 3)
    assert (seven["first_order"], seven["largest_order"], seven["last_order"], seven["returned"]) == (
        14.0,
        14.0,
        6.0,
        3.0,
    )
    assert seven["active_days"] == 2 and seven["mean_gap_days"] == pytest.approx(2 + 13.9833333 / 24)
    assert (seven["repeat_days"], seven["recency_days"], seven["spend_per_repeat_day"]) == (1, 2.0, 6.0)
    assert (three["repeat_days"], three["recency_days"], three["spend_per_repeat_day"]) == (0, 0.0, 0.0)
    assert dict(seven["spend_by_item"]) == {"a": 16.0, "b": 4.0}
    assert dict(seven["spend_by_day"]) == {"-3": 14.0, "-1": 6.0}
    assert three["mean_gap_days"] is None
    # Midnight of the row's day is label time; a later return takes nothing back; the last day is open on the right.
    assert (seven["revenue_d1"], seven["revenue_d5"]) == (100.0, 105.0)
    assert (three["revenue_d1"], three["revenue_d5"], three["buyer_d5"]) == (0.0, 0.0, 0)
    assert facts == {
        "lines": 12,
        "customers": 4,
        "customers_without_a_sale": 1,
        "customers_with_open_horizons": 1,
        "rows": 2,
    }


def test_horizons_longer_than_the_data_are_refused(shop):
    with pytest.raises(ValueError, match="longer than the data"):
        customer_rows(shop, ImportConfig(first_days=3, horizons=[400]))
    with pytest.raises(ValueError, match="rising"):
        ImportConfig(horizons=[7, 1]).check()


def test_files_are_daily_partitions_with_the_purchases_beside_them(tmp_path):
    text = "customer_id date number_of_cds dollar_value\n"
    text += " 00001 19970101  1   11.77\n 00001 19970110  1  20.00\n 00002 19970102  2  12.00\n 00002 19970301 1 5.00\n"
    (tmp_path / "CDNOW_master.txt").write_text(text)
    facts = import_transactions("cdnow", tmp_path, tmp_path / "out", ImportConfig(first_days=7, horizons=[7]))
    parts = sorted(p.name for p in (tmp_path / "out" / "train" / "train").iterdir())
    assert parts == ["datetime=1997-01-08-00-00", "datetime=1997-01-09-00-00"] and facts["rows"] == 2
    rows = {r["customer"]: r for r in ds.dataset(tmp_path / "out" / "train" / "train").to_table().to_pylist()}
    assert rows[1]["revenue_d7"] == 20.0 and rows[2]["revenue_d7"] == 0.0
    assert len(pd.read_parquet(tmp_path / "out" / "transactions.parquet")) == 4
    assert json.loads((tmp_path / "out" / "imported.json").read_text())["result"] == facts
    with pytest.raises(FileExistsError):
        import_transactions("cdnow", tmp_path, tmp_path / "out", ImportConfig())
    words = ["import", "--source", "cdnow", "--path", str(tmp_path), "--first-days", "7"]
    assert main([*words, "--data-dir", str(tmp_path / "two"), "--horizons", "2", "7"]) == 0
    assert json.loads((tmp_path / "two" / "imported.json").read_text())["config"]["horizons"] == [2, 7]
    assert main([*words, "--data-dir", str(tmp_path / "four")]) == 0
    columns = ds.dataset(tmp_path / "four" / "train" / "train").schema.names
    assert [f"revenue_d{d}" in columns for d in (1, 2, 7, 14, 28)] == [True, False, True, True, True]


def test_submissions_of_transactions_are_checked_by_their_own_ids(tmp_path):
    rng = np.random.default_rng(0)
    days = pd.Timestamp("1997-01-01") + pd.to_timedelta(rng.integers(0, 60, 4000), "D")
    lines = zip(rng.integers(0, 900, 4000), days.strftime("%Y%m%d"), rng.lognormal(3, 1, 4000).round(2), strict=True)
    text = "customer_id date number_of_cds dollar_value\n" + "".join(f" {c} {d} 1 {v}\n" for c, d, v in lines)
    (tmp_path / "CDNOW_master.txt").write_text(text)
    import_transactions("cdnow", tmp_path, tmp_path / "raw", ImportConfig(first_days=7, horizons=[7, 14]))
    (tmp_path / "test.yaml").write_text(
        "data: {layout: transactions, test_dir: train/train, horizons: [d7, d14]}\n"
        "models: {guard: 'off', threads: 1, buyer_classifier: {n_estimators: 5}}\n"
    )
    words = ["--config", str(tmp_path / "test.yaml"), "--run-dir", str(tmp_path / "run")]
    words += ["--data.root", str(tmp_path / "raw")]
    assert main(["train", *words]) == 0 and main(["predict", *words]) == 0
    assert main(["submit", *words, "--dry-run"]) == 0


def test_unknown_sources_and_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="cdnow, online_retail"):
        import_transactions("kdd98", tmp_path, tmp_path / "out", ImportConfig())
    with pytest.raises(FileNotFoundError, match="CDNOW_master"):
        read_cdnow(tmp_path)


def test_cdnow_has_the_published_counts(footfall_data):
    table = read_cdnow(footfall_data("cdnow"))
    assert len(table) == 69_659 and table["customer"].nunique() == 23_570
    assert table["amount"].sum() == pytest.approx(2_500_315.63)


def test_online_retail_has_the_published_counts_and_ordered_labels(footfall_data):
    table = read_online_retail(footfall_data("online-retail"))
    assert len(table) == 541_909 - 135_080 and table["customer"].nunique() == 4_372
    rows, facts = customer_rows(table, ImportConfig())
    money = np.stack([rows[f"revenue_d{d}"].to_numpy() for d in (1, 7, 14, 28)], 1)
    assert (np.diff(money, axis=1) >= 0).all() and (money[:, -1] > 0).mean() > 0.1
    assert facts["rows"] + facts["customers_with_open_horizons"] + facts["customers_without_a_sale"] == 4_372
