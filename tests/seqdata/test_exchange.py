"""Parquet lists, RecBole files and torch.nested."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

import seqdata
from seqdata.cli import main
from seqdata.exchange import read_recbole, to_nested, to_parquet, to_recbole


@pytest.fixture
def made(tmp_path, oracle):
    log = oracle.log(rows=300, users=20)
    items = pd.DataFrame({"item": range(50), "cat": [f"c {i % 5}" for i in range(50)], "cost": np.arange(50.0)})
    log["query"] = [f"[{i % 3} 7]" if i % 4 else None for i in range(300)]
    fields = {
        "item": "categorical",
        "brand": "categorical",
        "price": "numeric",
        "row": "numeric",
        "query": seqdata.Vector(2),
    }
    table = seqdata.ItemTable(items, "item")
    store = seqdata.build(
        log,
        tmp_path / "s",
        user="user",
        time="time",
        time_unit="s",
        fields=fields,
        items={"item": table},
        progress=False,
    )
    return store, oracle.order(log, "user", "time")


def test_parquet_lists(made, tmp_path):
    store, log = made
    assert (
        to_parquet(
            store.as_of(50 * 10**6), tmp_path / "l.parquet", fields=["item", "brand", "price", "query", "item.cat"]
        )
        == 20
    )
    table = pq.read_table(tmp_path / "l.parquet").to_pylist()
    for row in table:
        mine = log[(log.user == row["user"]) & (log.time < 50)]
        assert row["item"] == mine.item.tolist()
        assert row["brand"] == [None if pd.isna(b) else b for b in mine.brand]
        assert [stamp.timestamp() for stamp in row["time"]] == mine.time.tolist()
        assert row["item.cat"] == [f"c {i % 5}" for i in mine.item]
        assert row["query"] == [None if pd.isna(q) else [int(n) for n in q[1:-1].split()] for q in mine["query"]]
    to_parquet(store.all(), tmp_path / "l.parquet", fields=["item"], ids=True)
    assert (
        np.concatenate(pq.read_table(tmp_path / "l.parquet")["item"].to_pylist()).tolist()
        == store.column("item").tolist()
    )


def test_recbole_round_trip(made, tmp_path):
    store, log = made
    fields = ["item", "brand", "price", "row"]
    with pytest.raises(ValueError, match="'query' is a vector field"):
        to_recbole(store.all(), tmp_path / "shop")
    assert to_recbole(store.all(), tmp_path / "shop", fields=fields) == 300
    head = (tmp_path / "shop" / "shop.inter").read_text().splitlines()[0]
    assert head == "user:token\ttimestamp:float\titem:token\tbrand:token\tprice:float\trow:float"
    # RecBole's own names for the two columns that it needs
    for name in ("shop.inter", "shop.item"):
        path = tmp_path / "shop" / name
        path.write_text(path.read_text().replace("user:", "user_id:", 1).replace("item:", "item_id:", 1))
    arguments = read_recbole(tmp_path / "shop")
    again = seqdata.build(arguments.pop("sources"), tmp_path / "again", progress=False, **arguments)
    order = [str(user) for user in again.users]
    mine = pd.concat([log[log.user == int(user)] for user in order])
    assert again.users.tolist() == sorted(str(user) for user in store.users)
    assert again.time.tolist() == (mine.time * 1_000_000).tolist()
    assert again.column("row").tolist() == mine.row.tolist()
    assert again.vocabulary("brand").decode(again.column("brand")) == [None if pd.isna(b) else b for b in mine.brand]
    assert again.vocabulary("item_id").decode(again.column("item_id")) == [str(i) for i in mine.item]
    cats = again.vocabulary("item_id.cat").decode(again.item_column("item_id", "cat"))[2:]
    assert cats == [f"c {int(i) % 5}" for i in again.vocabulary("item_id").values]


def test_recbole_mistakes(tmp_path):
    with pytest.raises(FileNotFoundError, match="no RecBole file"):
        read_recbole(tmp_path / "shop")
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "shop.inter").write_text("user_id:token\titem_id:thing\n")
    with pytest.raises(ValueError, match="'item_id' has type 'thing'"):
        read_recbole(tmp_path / "shop")
    (tmp_path / "shop" / "shop.inter").write_text("user_id:token\titem_id:token\n")
    with pytest.raises(ValueError, match="needs user_id and timestamp"):
        read_recbole(tmp_path / "shop")


def test_nested(made):
    store, log = made
    nested = to_nested(store.all(), ["row"])
    rows = nested["row"].unbind()
    assert len(rows) == 20
    assert rows[3].tolist() == log[log.user == store.users[3]].row.tolist()
    assert nested["timestamp"].values().tolist() == log.time.tolist()


def test_export_command(made, tmp_path, capsys):
    store, _ = made
    assert main(["export", str(store.path), str(tmp_path / "l.parquet"), "--before", "1970-01-01 00:00:40"]) == 0
    assert "wrote 20 rows" in capsys.readouterr().out
    assert main(["export", str(store.path), str(tmp_path / "shop"), "--format", "recbole", "--fields", "item"]) == 0
    assert (tmp_path / "shop" / "shop.item").read_text().splitlines()[0] == "item:token\tcat:token\tcost:float"
