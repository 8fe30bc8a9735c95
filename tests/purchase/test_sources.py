"""Logs of other layouts become the same store."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from purchase.cli import app
from purchase.prepare import FIRST, open_prepared

SPLIT = ["--cutoff", "2020-01-02", "--horizon-hours", "24"]


def prepared(run: Path, *words: str):
    assert app.main(["prepare", "--run-dir", str(run), "--no-progress", *words]) == 0
    return open_prepared(app.parse("prepare", ["--config", str(run / "config.yaml")]))


def timeline(one, user) -> list[tuple]:
    view = one.store.all().select([user]).gather(["item_id", "event_type", "timestamp"])
    ids = one.item_ids.to_pylist()
    return [
        (ids[item - FIRST], ("view", "cart", "purchase")[kind - FIRST], second)
        for item, kind, second in zip(view["item_id"], view["event_type"], view["timestamp"], strict=True)
    ]


def test_any_log_by_its_columns(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(
        "who,what,when,how,make\n"
        "b,shoe,1577836800,look,acme\na,sock,1577836900,look,\na,shoe,1577837000,buy,acme\na,hat,1577923300,buy,best\n"
        "a,sock,1577837100,scroll,\n"
    )
    words = ["--folder", str(tmp_path), "--files", "*.csv", "--user", "who", "--item", "what", "--time", "when"]
    words += ["--event", "how", "--brand", "make", "--category", "", "--catalogue", "", "--no-whole-ids"]
    words += ["--views", "look", "--purchases", "buy"]
    assert app.main(["prepare", "--run-dir", str(tmp_path / "run"), *SPLIT, *words]) == 2
    one = prepared(tmp_path / "run", *SPLIT, *words, "--ignored", "scroll")
    assert one.item_ids.to_pylist() == ["shoe", "sock", "hat"] and one.num_items == 2
    assert one.brand.tolist() == [1, 0] and one.category.tolist() == [0, 0]
    assert timeline(one, "a") == [
        ("sock", "view", 1577836900),
        ("shoe", "purchase", 1577837000),
        ("hat", "purchase", 1577923300),
    ]
    rows, items, strangers = one.targets(one.split.test_start, "purchase")
    assert one.history().users[rows].tolist() == ["a"] and items.tolist() == [2] and strangers == 0


def test_a_catalogue_has_items_that_nobody_looked_at(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user_id,product_id,event_time,event_type\n1,7,2020-01-01 00:00:00 UTC,view\n")
    (tmp_path / "items.csv").write_text("product_id,brand,category_id\n9,acme,3\n7,best,3\n")
    words = [
        "--folder",
        str(tmp_path),
        "--files",
        "log.csv",
        "--catalogue",
        "items.csv",
        "--brand",
        "",
        "--category",
        "",
    ]
    one = prepared(tmp_path / "run", *SPLIT, *words)
    assert one.item_ids.to_pylist() == [7, 9] and one.num_items == 2
    assert timeline(one, 1) == [(7, "view", 1577836800)]


def test_sessions_of_retailrocket(tmp_path: Path) -> None:
    sessions = pa.table({"session_id": pa.array([1, 20], pa.int32()), "item_ids": [[5, 6], [6, 7, 8]]})
    pq.write_table(sessions, tmp_path / "train_sessions.parquet")
    test = pa.table({"input_item_ids": [[5, 5]], "target_item_id": pa.array([8], pa.int32())})
    pq.write_table(test, tmp_path / "test_prefix_target.parquet")
    one = prepared(tmp_path / "run", "--config", "retailrocket", "--folder", str(tmp_path))
    assert [item for item, _, _ in timeline(one, 20)] == [6, 7, 8] and one.num_items == 4
    valid = one.targets(one.split.valid_start, "view")
    assert one.item_ids.take(pa.array(valid[1])).to_pylist() == [8]
    rows, items, _ = one.targets(one.split.test_start, "view")
    assert one.history().users[rows].tolist() == [10_000_001] and one.item_ids[int(items[0])].as_py() == 8


@pytest.mark.parametrize("files", ["none/*.parquet", "log.csv"])
def test_a_log_without_rows_or_users_is_refused(tmp_path: Path, files: str, capsys) -> None:
    (tmp_path / "log.csv").write_text("user_id,product_id,event_time,event_type\n,7,2020-01-01 00:00:00,view\n")
    words = ["--folder", str(tmp_path), "--files", files, "--catalogue", "", "--brand", "", "--category", ""]
    assert app.main(["prepare", "--run-dir", str(tmp_path / "run"), *SPLIT, *words]) in (1, 2)
    assert "log.files: got" in (error := capsys.readouterr().err) or "log.user: got 1 rows without one" in error


def test_the_slice_of_rees46(footfall_data, tmp_path: Path) -> None:
    (tmp_path / "rees46").mkdir()
    shutil.copy(footfall_data("rees46") / "ecommerce100K_2019_Oct.parquet", tmp_path / "rees46")
    words = ["--config", "rees46", "--folder", str(tmp_path / "rees46"), "--cutoff", "2019-10-31 23:00:00"]
    one = prepared(tmp_path / "run", *words, "--horizon-hours", "1")
    assert one.store.num_events == 100_000 and len(one.targets(one.split.test_start, "view")[0]) > 0
