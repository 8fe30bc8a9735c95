"""Plots are PNG files that hold what they were given."""

from pathlib import Path

import numpy as np
import pytest

from runkit import plots


def test_every_plot_is_a_png(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    plots.lines(tmp_path / "deep" / "loss.png", {"train": ([1, 2], [0.5, 0.4])}, "Loss", "epoch", "nats", whole=True)
    plots.lines(tmp_path / "roc.png", {"a": ([0, 1], [0, 1])}, "ROC", "false", "true", diagonal=True, marker="o")
    plots.bars(tmp_path / "bars.png", {"a": 1.0, "b": 2.0}, "Bars", "AUROC", errors=[0.1, 0.2])
    share = rng.random(100)
    plots.calibration(tmp_path / "calibration.png", share, rng.random(100) < share, "Calibration")
    found = sorted(tmp_path.rglob("*.png"))
    assert len(found) == 4 and all(path.read_bytes().startswith(b"\x89PNG") for path in found)
    assert len(list(tmp_path.iterdir())) == 4


def test_calibration_groups_are_means_of_the_sorted_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    monkeypatch.setattr(plots, "save", lambda figure, path: kept.append(figure))
    plots.calibration(tmp_path / "a.png", [0.1, 0.9, 0.2, 0.8], [0, 1, 1, 1], "x", bins=2)
    points = kept[0].axes[0].lines[1].get_xydata()
    np.testing.assert_allclose(points, [[0.15, 0.5], [0.85, 1.0]])
