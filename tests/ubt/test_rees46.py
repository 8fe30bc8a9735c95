"""The packaged description of the real REES46 log, on the real log."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ubt.cli import main


@pytest.mark.slow
def test_every_user_is_embedded_and_scored_beside_the_baseline(
    footfall_data: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = footfall_data("rees46")
    assert main(["run", "--config", "rees46", "--data-dir", str(folder), "--run-dir", str(tmp_path)]) == 0
    assert "all - official baseline" in capsys.readouterr().out
    vectors = np.load(tmp_path / "embeddings" / "embeddings.npy")
    ids = np.load(tmp_path / "embeddings" / "client_ids.npy")
    assert vectors.shape[0] == 72_999 == len(np.unique(ids)) and vectors.dtype == np.float16
    assert np.isfinite(vectors).all()
    tasks = json.loads((tmp_path / "metrics.json").read_text())["tasks"]
    assert {"churn", "conversion", "propensity_category", "propensity_sku", "propensity_price"} <= set(tasks)
    for task in ("churn", "propensity_category"):
        ours = tasks[task]["methods"]["all"]
        assert ours["auroc"] > 0.6 and ours["standard_error"] < 0.03
