"""Nothing of the future is learnt from, shown or counted before it is judged."""

import shutil
from pathlib import Path

import duckdb
import numpy as np
import pytest
import torch

from purchase.evaluate import interactions
from purchase.features import pair_features
from purchase.objectives import next_items
from purchase.prepare import open_prepared
from purchase.train import Training
from rankers import Popularity, union
from runkit.files import read_json
from runkit.training import load_checkpoint

CUTOFF = "TIMESTAMPTZ '2019-12-01 00:00:00+00'"


def rewrite(data: Path, to: Path, select: str) -> Path:
    """The log of a folder, changed by a query, as one file in another folder."""
    (to / "log").mkdir(parents=True)
    shutil.copy(data / "items.parquet", to / "items.parquet")
    source = f"read_parquet('{data}/log/????-???.parquet')"
    with duckdb.connect() as database:
        database.execute("SET TimeZone = 'UTC'")
        database.execute(f"COPY ({select.format(source=source)}) TO '{to}/log/all.parquet' (FORMAT parquet)")
    return to


def test_no_window_crosses_the_cutoff(trained: Path, config_of) -> None:
    config = config_of(trained)
    prepared = open_prepared(config)
    module = Training(config, prepared)
    batches, targets = list(module.train_dataloader()), 0
    assert batches
    for batch in batches:
        assert int(batch["seconds"].max()) * 1_000_000 < prepared.split.valid_start
        for event in module.network.heads:
            found = next_items(batch, event, config.split.horizon / 1e6)
            targets += int((found >= 0).sum())
            assert set(found[found >= 0].tolist()) <= set(batch["item"].tolist())
    assert targets > 0
    assert int(prepared.history().gather(["timestamp"])["timestamp"].max()) * 1_000_000 < prepared.split.test_start
    rows, items, _ = prepared.targets(prepared.split.test_start, "purchase")
    assert len(rows) and int(items.max()) < len(prepared.item_ids)


def test_deleting_the_future_changes_nothing(purchase, data: Path, trained: Path, tmp_path: Path) -> None:
    past = rewrite(data, tmp_path / "past", f"SELECT * FROM {{source}} WHERE event_time < {CUTOFF}")
    for command in ("prepare", "train", "predict"):
        assert purchase(command, tmp_path / "run", past) == 0
    assert purchase("predict", trained, data) == 0
    best = (run / "checkpoints" / "best.ckpt" for run in (trained, tmp_path / "run"))
    there, here = (load_checkpoint(path)["state_dict"] for path in best)
    assert there.keys() == here.keys() and all(torch.equal(there[name], here[name]) for name in there)
    assert (tmp_path / "run" / "predictions.csv").read_bytes() == (trained / "predictions.csv").read_bytes()


def test_features_refuse_the_future(trained: Path, config_of) -> None:
    prepared = open_prepared(config_of(trained))
    start = prepared.split.valid_start // 1_000_000
    past = interactions(prepared, prepared.split.valid_start)
    candidates = union({"popularity": (Popularity().fit(past), 5)}, np.arange(4))
    assert np.isfinite(pair_features(past, candidates, prepared, start)[:, :5]).all()
    with pytest.raises(ValueError, match="needs events before"):
        pair_features(interactions(prepared, None), candidates, prepared, start)


def test_items_without_a_law_score_at_chance(purchase, data: Path, config_of, tmp_path: Path) -> None:
    # Every event's item is drawn anew, all items alike: what is left to learn is nothing.
    drawn = "CAST(1000 + hash(event_time, user_id, product_id) % 100 AS INTEGER) AS product_id"
    chance = rewrite(data, tmp_path / "chance", f"SELECT * REPLACE ({drawn}) FROM {{source}}")
    run = tmp_path / "run"
    words = ("--catalogue", "", "--no-rerank", "--rankers", "popularity", "--target", "view")
    for command in ("prepare", "train", "evaluate"):
        assert purchase(command, run, chance, *words) == 0
    found = read_json(run / "metrics.json")["evaluate"]["rankers"]["network"]
    prepared = open_prepared(config_of(run))
    rows, items, _ = prepared.targets(prepared.split.test_start, "view")
    targets = np.bincount(np.unique(np.stack([rows, items]), axis=1)[0])
    targets = targets[targets > 0]
    # Each of the ten places holds one of the user's targets with the chance of targets / items.
    gains = 1 / np.log2(np.arange(10) + 2)
    expected = (targets / 100 * gains.sum() / gains.cumsum()[np.minimum(targets, 10) - 1]).mean()
    low, high = found["interval"]["ndcg@10"]
    assert found["all"]["users"] == len(targets) > 40
    # The width of the interval is four standard errors.
    assert abs(found["all"]["ndcg@10"] - expected) < high - low < 0.1
