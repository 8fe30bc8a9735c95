"""Real logs through the configurations that ship, build and audit."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import pandas as pd
import pytest

import seqdata
from seqdata.cli import main

EXPECTED = {
    # data folder, users, events, rows left out
    "rees46": ("rees46", 72_999, 400_000, 0),
    "online_retail": ("online-retail", 4_372, 406_829, 135_080),
    "movielens_small": ("ml-latest-small", 610, 104_519, 0),
    "lgsr": ("lgsr", 4_965, 2_441_814, 592_474),
}


@pytest.fixture
def built(footfall_data, tmp_path, monkeypatch):
    def build(name: str) -> seqdata.Store:
        folder = footfall_data(EXPECTED[name][0])
        monkeypatch.setenv("FOOTFALL_DATA", str(folder.parent))
        assert main(["build", "--config", name, "--out", str(tmp_path / name), "--no-progress"]) == 0
        return seqdata.open_store(tmp_path / name)

    return build


@pytest.mark.parametrize(
    "name", ["rees46", "online_retail", "movielens_small", pytest.param("lgsr", marks=pytest.mark.slow)]
)
def test_build_and_audit(built, name, tmp_path, capsys):
    store = built(name)
    _, users, events, dropped = EXPECTED[name]
    assert (store.num_users, store.num_events) == (users, events)
    assert store.schema["rows"]["dropped"]["null_user"] == dropped
    # a store with its own cutoff has no leak ...
    assert main(["audit", str(store.path), "--html", str(tmp_path / "r.html")]) == 0
    # ... and inputs that reach into the label window are one
    cut = store.schema["fit_before_text"].removesuffix("Z")
    assert main(["audit", str(store.path), "--labels", cut, "2030-01-01"]) == 1
    assert "are among the inputs" in capsys.readouterr().out


def test_rees46_equals_pandas(built, footfall_data):
    store = built("rees46")
    files = sorted(footfall_data("rees46").glob("*.parquet"))
    frames = [pd.read_parquet(path).astype(str) for path in files]
    for frame in frames:
        frame["event_time"] = pd.to_datetime(frame.event_time.str.removesuffix(" UTC"), format="ISO8601").astype(
            "int64"
        )
        frame["event_time"] //= 1000 if frame.event_time.iloc[0] > 10**17 else 1
        frame["user_id"] = frame.user_id.astype(int)
    log = pd.concat(frames).sort_values(["user_id", "event_time"], kind="stable")
    assert np.array_equal(store.time, log.event_time)
    assert store.users.tolist() == sorted(set(log.user_id))
    known = {str(value): i + 2 for i, value in enumerate(store.vocabulary("product_id").values)}
    assert store.column("product_id").tolist() == [known.get(item, 1) for item in log.product_id]
    early = log[log.event_time < store.schema["fit_before"]]
    counts = early.product_id.astype(int).value_counts()
    ranked = sorted(counts.index, key=lambda item: (-counts[item], item))
    assert store.vocabulary("product_id").values.tolist() == ranked
    assert np.allclose(store.column("price"), log.price.astype(float), rtol=1e-6)


@pytest.mark.slow
def test_lgsr_fits_in_600_mb_and_equals_pandas(footfall_data, tmp_path):
    path = footfall_data("lgsr") / "transactions.parquet"
    code = textwrap.dedent("""
        import sys, seqdata
        options = {"user": "CUST_CODE", "time": "SHOP_DATE", "time_format": "%Y%m%d", "null_user": "drop"}
        seqdata.build(sys.argv[1], sys.argv[2], progress=False, **options)
        print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
        """)
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(tmp_path / "s")], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 600_000
    store = seqdata.open_store(tmp_path / "s")
    columns = ["CUST_CODE", "SHOP_DATE", "BASKET_ID", "PROD_CODE", "SPEND"]
    log = pd.read_parquet(path, columns=columns).dropna(subset=["CUST_CODE"])
    sample = sorted(set(log.CUST_CODE))[::100]
    view = store.all().select(sample)
    batch = next(view.batches(batch_size=len(sample), fields=columns[2:]))
    mine = log[log.CUST_CODE.isin(sample)].sort_values(["CUST_CODE", "SHOP_DATE"], kind="stable")
    for name in ("BASKET_ID", "PROD_CODE"):
        assert store.vocabulary(name).decode(batch.jagged[name]) == mine[name].tolist()
    assert np.array_equal(batch.jagged["SPEND"], mine.SPEND.astype(np.float32))
    assert batch.jagged.lengths.tolist() == mine.groupby("CUST_CODE").size().tolist()
