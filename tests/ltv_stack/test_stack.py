"""The stack's learners: explicit names never fall back, a round trip is exact, rows stand alone."""

from pathlib import Path

import numpy as np
import pytest

from ltv_stack import stack as module
from ltv_stack.stack import BASES, Stack, meta_features
from ltv_stack.stages import blocked_folds


def toy(rows: int = 1500) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(0)
    p, g = rng.random(rows), rng.normal(2, 0.5, rows)
    features = meta_features(p, {"d1": g - 0.5, "d7": g}, {"d1": 1.0, "d7": 2.0})
    y = np.where(rng.random(rows) < p, g, 0.0)
    return features, {"d1": y / 2, "d7": y}, blocked_folds(np.arange(rows), 3)


@pytest.mark.parametrize("bases", [[name] for name in BASES] + [list(BASES)], ids="+".join)
def test_learns_saves_and_predicts_row_by_row(bases: list[str], tmp_path: Path) -> None:
    if "xgboost" in bases:
        pytest.importorskip("xgboost")
    features, targets, fold = toy()
    stack = Stack(bases, {"n_estimators": 60}, threads=1).fit(features, targets, fold)
    found = stack.predict(features, "d7")
    assert np.mean((found - targets["d7"]) ** 2) < 0.8 * np.var(targets["d7"])
    stack.save(tmp_path / "stack")
    loaded = Stack.load(tmp_path / "stack", threads=1)
    for size in (1, 100):
        parts = [loaded.predict(features[i : i + size], "d7") for i in range(0, 300, size)]
        assert np.concatenate(parts).tobytes() == found[:300].tobytes()
    assert loaded.predict(features[:0], "d7").shape == (0,)


def test_meta_features_are_those_of_the_document() -> None:
    found = meta_features(np.array([0.5]), {"d1": np.array([2.0]), "d7": np.array([5.0])}, {"d1": 1.0, "d7": 2.0})
    np.testing.assert_allclose(found, [[0.5, 2.0, 5.0, 4.0, 1.0, 2.5, 2.0]])


def test_folds_are_stretches_of_time() -> None:
    time = np.random.default_rng(0).permutation(10)
    fold = blocked_folds(time, 3)
    assert [fold[time == t][0] for t in range(10)] == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    with pytest.raises(ValueError, match="folds: got 1"):
        blocked_folds(time, 1)


def test_a_base_named_is_never_left_out_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_installed", lambda: BASES[:2])
    assert Stack().bases == ("elastic_net", "random_forest")
    with pytest.raises(ImportError, match=r"ltv-stack\[xgboost\]"):
        Stack(["xgboost"])
    with pytest.raises(ValueError, match="stacking_bases: got \\['svm'\\]"):
        Stack(["svm"])
