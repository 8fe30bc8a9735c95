"""Whole runs on real transactions, the classical rival, and Dask against the local engine."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.dataset as ds
import pytest

from ltv.btyd import predict_btyd
from ltv.cli import main
from ltv.config import ImportConfig
from ltv.transactions import import_transactions
from ltv_stack import open_partitions


def run(*words):
    assert main([str(word) for word in words]) == 0


def test_btyd_predicts_more_for_those_who_came_back_and_more_for_longer(tmp_path):
    pytest.importorskip("lifetimes", reason="BG/NBD needs the library lifetimes")
    rng = np.random.default_rng(0)
    lines = ["customer date cds dollars"]
    for customer in range(400):
        rate, day = rng.gamma(0.8, 0.05), float(rng.integers(0, 60))
        while day < 200:
            date = pd.Timestamp("2020-01-01") + pd.Timedelta(days=int(day))
            lines.append(f"{customer} {date:%Y%m%d} 1 {rng.gamma(4, 5):.2f}")
            day += rng.exponential(1 / rate) + 1e-3
    (tmp_path / "CDNOW_master.txt").write_text("\n".join(lines) + "\n")
    import_transactions("cdnow", tmp_path, tmp_path / "data", ImportConfig())
    train = open_partitions(tmp_path / "data" / "train" / "train", end="2020-02-20")
    rows = open_partitions(tmp_path / "data" / "train" / "train", start="2020-02-21")
    purchases = tmp_path / "data" / "transactions.parquet"
    said = predict_btyd(purchases, train, rows, ["d7", "d28"], recalibrate=False)
    assert (said["d7"] <= said["d28"]).all() and (said["d7"] >= 0).all()
    orders = rows.read(["orders"])["orders"].to_numpy()
    assert said["d28"][orders > 1].mean() > 2 * said["d28"][orders == 1].mean()
    truth = rows.read(["revenue_d28"])["revenue_d28"].to_numpy()
    assert 0.4 < said["d28"].sum() / truth.sum() < 2.5
    curve = predict_btyd(purchases, train, rows, ["d28"], recalibrate=True)["d28"]
    errors = [np.mean((np.log1p(p) - np.log1p(truth)) ** 2) for p in (said["d28"], curve)]
    assert errors[1] < errors[0]


@pytest.mark.slow
@pytest.mark.parametrize(("source", "folder"), [("cdnow", "cdnow"), ("online_retail", "online-retail")])
def test_real_transactions_end_to_end_in_order_at_four_horizons(footfall_data, tmp_path, source, folder):
    import_transactions(source, footfall_data(folder), tmp_path / "data", ImportConfig())
    words = [
        "--config",
        f"config/config_{source}.yaml",
        "--data.root",
        tmp_path / "data",
        "--run-dir",
        tmp_path / "run",
    ]
    run("train", *words)
    run("predict", *words)
    table = ds.dataset(sorted((tmp_path / "run" / "predictions" / "test").glob("*.parquet"))).to_table()
    for end in ("", "_lo", "_hi"):
        names = [n for h in ("d1", "d7", "d14", "d28") if (n := f"revenue_{h}{end}") in table.column_names]
        assert end or len(names) == 4
        for before, after in pairwise(table[name].to_numpy() for name in names):
            assert (before <= after).all()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())["val"]
    train = open_partitions(
        tmp_path / "data" / "train" / "train", end="1997-02-17" if source == "cdnow" else "2011-07-04"
    )
    constant = np.log1p(train.read(["revenue_d7"])["revenue_d7"].to_numpy()).mean()
    start, end = ("1997-03-17", "1997-04-08") if source == "cdnow" else ("2011-08-01", "2011-11-11")
    rows = open_partitions(tmp_path / "data" / "train" / "train", start=start, end=end)
    truth = np.log1p(rows.read(["revenue_d7"])["revenue_d7"].to_numpy())
    assert metrics["d7"]["msle"] < np.mean((truth - constant) ** 2)
    assert metrics["d7"]["gini"] > 0.2


@pytest.mark.slow
def test_dask_workers_predict_what_the_local_engine_does(settings, trained, tmp_path):
    pytest.importorskip("distributed", reason="the engine `dask` needs dask and distributed")
    # In a process of its own: the cluster's threads and warnings stay out of this one.
    words = [
        sys.executable,
        "-m",
        "ltv.cli",
        "train",
        "--config",
        settings,
        "--run-dir",
        tmp_path,
        "--engine.name",
        "dask",
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    subprocess.run([str(word) for word in words], check=True, env=environment)
    local, dask = (Path(folder) / "models" for folder in (trained, tmp_path))
    for name in ("buyer_classifier.txt", "log1p_d7.txt", "calibration.json"):
        assert (local / name).read_text() == (dask / name).read_text(), name
