"""One small log and one trained run, shared by the tests of the commands."""

from pathlib import Path

import pytest

from ltv.cli import main
from synthlogs.ads import AdsConfig, generate

SETTINGS = """\
data:
  root: {root}
  train_end: 2025-10-01-17-00
  val_start: 2025-10-01-18-00
training:
  chunk_size: 1000
models:
  threads: 1
  guard: "off"
  buyer_classifier: {{n_estimators: 12, num_leaves: 7, min_data_in_leaf: 30}}
  revenue_regressor: {{n_estimators: 12, num_leaves: 7, min_data_in_leaf: 30}}
"""


@pytest.fixture(scope="session")
def advertising_log(tmp_path_factory) -> Path:
    """24 labelled hours with 6,000 rows, 3 hours to predict with 700; a tenth of the rows buys."""
    root = tmp_path_factory.mktemp("advertising") / "raw"
    config = AdsConfig(rows=6000, hours=24, test_rows=700, test_hours=3, gap_hours=2, buyer_rate=0.1, seed=5)
    generate(root, config)
    return root


@pytest.fixture(scope="session")
def settings(advertising_log, tmp_path_factory) -> Path:
    """A settings file for that log: small trees, one thread."""
    path = tmp_path_factory.mktemp("settings") / "small.yaml"
    path.write_text(SETTINGS.format(root=advertising_log))
    return path


@pytest.fixture(scope="session")
def trained(settings, tmp_path_factory) -> Path:
    """A run directory after `ltv train` and `ltv predict`; treat it as read-only."""
    run_dir = tmp_path_factory.mktemp("runs") / "small"
    assert main(["train", "--config", str(settings), "--run-dir", str(run_dir)]) == 0
    assert main(["predict", "--config", str(settings), "--run-dir", str(run_dir)]) == 0
    return run_dir
