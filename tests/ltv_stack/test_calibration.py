"""Calibration of money, two-part quantiles and conformal coverage."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ltv_stack import BucketCalibrator, ConformalIntervals, IsotonicCalibrator, LTVConfig, interval_coverage
from ltv_stack.calibration import calibrator_from_json
from ltv_stack.outputs import Outputs
from ltv_stack.twopart import TwoPart


def scores(rows: int = 20_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    true = rng.lognormal(0, 0.7, rows)
    segment = rng.choice(["a", "b"], rows)
    score = true * np.where(segment == "a", 0.5, 2.0)
    y = np.where(rng.random(rows) < 0.3, true / 0.3 * rng.lognormal(-0.125, 0.5, rows), 0.0)
    return score, y, segment.tolist()


@pytest.mark.parametrize("kind", [IsotonicCalibrator, BucketCalibrator])
def test_calibrated_money_adds_up_in_every_segment(kind: type) -> None:
    score, y, segment = scores()
    calibrator = kind().fit(score, y, segment)
    fresh, truth, where = scores(seed=1)
    said = calibrator.apply(fresh, where)
    for name in ("a", "b"):
        rows = np.array(where) == name
        assert said[rows].sum() == pytest.approx(truth[rows].sum(), rel=0.06)
        assert abs(fresh[rows].sum() / truth[rows].sum() - 1) > 0.3
    again = calibrator_from_json(json.loads(json.dumps(calibrator.to_json())))
    assert again.apply(fresh, where).tobytes() == said.tobytes()


def test_a_segment_never_seen_or_small_uses_all_rows() -> None:
    score, y, segment = scores(3000)
    for calibrator in (IsotonicCalibrator().fit(score, y, segment), BucketCalibrator().fit(score, y, segment)):
        strange = calibrator.apply(score, ["z"] * len(score))
        np.testing.assert_array_equal(strange, calibrator.apply(score))
        np.testing.assert_array_equal(strange, calibrator.apply(score, [None] * len(score)))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=1, max_size=30), st.integers(0, 3))
def test_bucket_ratios_survive_ties_and_zeros(values: list[float], seed: int) -> None:
    score = np.array(values)
    y = np.random.default_rng(seed).permutation(score)
    said = BucketCalibrator(buckets=4).fit(score, y).apply(score)
    assert np.isfinite(said).all() and (said >= 0).all()


def zero_inflated(rows: int, seed: int, rate: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    p = rng.beta(rate * 2, (1 - rate) * 2, rows)
    g = rng.normal(2, 0.5, rows)
    y = np.where(rng.random(rows) < p, np.expm1(np.maximum(g + rng.normal(0, 0.6, rows), 0.01)), 0.0)
    return p, g, y


def test_two_part_quantiles_have_their_level_and_never_cross() -> None:
    p, g, y = zero_inflated(40_000, 0, 0.4)
    parts = TwoPart().fit(y[y > 0], g[y > 0])
    p, g, y = zero_inflated(40_000, 1, 0.4)
    levels = [0.3, 0.5, 0.8, 0.95]
    found = np.column_stack([parts.quantile(level, p, g) for level in levels])
    assert (np.diff(found, axis=1) >= 0).all()
    for level, quantile in zip(levels, found.T, strict=True):
        # Where zero is likelier than the level, the quantile is 0 and more rows lie at or below it.
        assert (y <= quantile).mean() == pytest.approx(np.maximum(level, 1 - p).mean(), abs=0.01)
    assert parts.buyer_mean(g[y > 0]).mean() == pytest.approx(y[y > 0].mean(), rel=0.05)
    assert np.expm1(g[y > 0]).mean() < 0.9 * y[y > 0].mean()


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("shift", [0.7, 1.0, 1.6])
def test_conformal_intervals_cover_their_level_though_the_quantiles_are_wrong(rate: float, shift: float) -> None:
    p, g, y = zero_inflated(12_000, 0, rate)
    parts = TwoPart().fit(y[y > 0], g[y > 0])

    def bounds(p: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        low = parts.quantile(0.05, p, g)
        high = np.where(low > 0, parts.quantile(0.95, p, g), parts.quantile(0.9, p, g))
        return low, high * shift

    conformal = ConformalIntervals(0.9).fit(y, *bounds(p, g), p)
    conformal = ConformalIntervals.from_json(json.loads(json.dumps(conformal.to_json())))
    p, g, y = zero_inflated(40_000, 1, rate)
    low, high = conformal.apply(*bounds(p, g), p)
    assert (low <= high).all() and (low >= 0).all()
    found = interval_coverage(y, low, high, p)
    assert 0.88 <= found["informative"] <= 0.92
    assert found["overall"] >= 0.88
    assert found["lowest"] > 0.85


@pytest.mark.parametrize("rate", [0.05, 0.3])
@pytest.mark.parametrize("rows", [600, 4000])
def test_intervals_of_the_outputs_cover_on_average_though_chances_are_learnt_on_the_same_rows(
    rate: float, rows: int
) -> None:
    found = []
    for seed in range(12):
        worlds = [zero_inflated(size, 10 * seed + number, rate) for number, size in enumerate((rows, 10_000))]
        (scores, y), (fresh, truth) = [({"p": p**1.2, "g_d7": g, "s_d7": p * g}, y) for p, g, y in worlds]
        said = Outputs(LTVConfig(), ["d7"], "d7").fit(scores, {"d7": y}).apply(fresh)
        low, high, bought = said["revenue_d7_lo"], said["revenue_d7_hi"], truth > 0
        one = interval_coverage(truth, low, high)
        buyers = np.nan
        if "revenue_d7_buyer_lo" in said:
            inside = (truth >= said["revenue_d7_buyer_lo"]) & (truth <= said["revenue_d7_buyer_hi"])
            buyers = inside[bought].mean()
        found.append((one["overall"], one["informative"], buyers))
    overall, informative, buyers = np.nanmean(np.array([*found, [np.nan, np.nan, 0.9]]), axis=0)
    assert overall >= 0.89
    assert 0.88 <= informative <= 0.92
    assert 0.88 <= buyers <= 0.92


def test_too_few_rows_for_the_level_give_an_infinite_interval_not_a_false_promise() -> None:
    one = ConformalIntervals(0.9).fit(np.ones(3), np.zeros(3), np.ones(3), np.full(3, 0.5))
    low, high = one.apply(np.zeros(2), np.ones(2), np.full(2, 0.5))
    assert (low == 0).all() and np.isinf(high).all()


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"level: got 1\.0"):
        ConformalIntervals(1.0)
    with pytest.raises(ValueError, match="score: got no rows"):
        IsotonicCalibrator().fit(np.empty(0), np.empty(0))
    with pytest.raises(ValueError, match="target: got shape"):
        BucketCalibrator().fit(np.ones(2), np.ones(3))
    with pytest.raises(ValueError, match="not fitted"):
        IsotonicCalibrator().apply(np.ones(2))
