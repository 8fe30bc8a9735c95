"""Metrics against closed forms and against the order of rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import mean_squared_log_error, r2_score

from ltv_stack import (
    buyer_metrics,
    calibration_table,
    call_metrics,
    decile_table,
    interval_coverage,
    lift_table,
    lorenz,
    mutual_gini,
    normalized_gini,
    revenue_metrics,
)

AMOUNTS = arrays(np.float64, st.integers(1, 40), elements=st.sampled_from([0.0, 0.0, 1.0, 2.5, 7.0, 100.0]))


def test_against_a_second_implementation() -> None:
    rng = np.random.default_rng(0)
    y = np.where(rng.random(500) < 0.2, rng.lognormal(size=500), 0.0)
    prediction = np.abs(y + rng.normal(size=500))
    found = revenue_metrics(y, prediction)
    assert found["msle"] == pytest.approx(mean_squared_log_error(y, prediction))
    assert found["rmsle"] == pytest.approx(found["msle"] ** 0.5)
    assert found["r2"] == pytest.approx(r2_score(y, prediction))
    assert found["bias_ratio"] == pytest.approx(prediction.sum() / y.sum())
    assert found["nrmse"] == pytest.approx(found["rmse"] / y.mean())
    assert found["ambe"] == pytest.approx(abs(prediction.mean() - y.mean()))


@settings(max_examples=100, deadline=None)
@given(AMOUNTS, st.data())
def test_nothing_depends_on_the_order_of_rows(y: np.ndarray, data: st.DataObject) -> None:
    prediction = data.draw(arrays(np.float64, len(y), elements=st.sampled_from([0.0, 1.0, 1.0, 3.0])))
    order = np.array(data.draw(st.permutations(range(len(y)))))
    one, two = revenue_metrics(y, prediction), revenue_metrics(y[order], prediction[order])
    assert one == pytest.approx(two, nan_ok=True)
    for table in (decile_table, lift_table, calibration_table):
        a, b = table(y, prediction), table(y[order], prediction[order])
        np.testing.assert_allclose(a.to_numpy(), b.to_numpy(), atol=1e-9)
    if (y > 0).any() and not (y > 0).all():
        assert buyer_metrics(y, prediction / 4) == pytest.approx(buyer_metrics(y[order], prediction[order] / 4))


def test_mutual_gini_of_crossing_curves_is_not_zero() -> None:
    # Both curves enclose the same area, so a signed integral is 0; the area between them is not.
    y = np.array([0.0, 3.0, 3.0, 3.0])
    other = np.array([1.0, 1.0, 2.5, 4.5])
    rows, true = lorenz(y)
    _, said = lorenz(other)
    signed = ((said - true)[1:] + (said - true)[:-1]).sum() / 2 / 4
    assert (said - true).min() < 0 < (said - true).max()
    found = mutual_gini(y, other)
    assert found > abs(signed) + 0.01
    fine = np.linspace(0, 1, 400_001)
    expected = np.abs(np.interp(fine, rows, said) - np.interp(fine, rows, true)).mean()
    assert found == pytest.approx(expected, rel=1e-4)
    assert mutual_gini(y, y * 3) == pytest.approx(0)


def test_gini_of_perfect_reversed_and_constant_rankings() -> None:
    y = np.array([0.0, 0.0, 1.0, 5.0])
    assert normalized_gini(y, y) == pytest.approx(1)
    assert normalized_gini(y, -y) == pytest.approx(-1)
    assert normalized_gini(y, np.ones(4)) == pytest.approx(0)
    assert np.isnan(normalized_gini(np.zeros(3), np.arange(3.0)))


def test_deciles_and_lift_with_ties_do_not_fail_and_add_up() -> None:
    y = np.array([0.0] * 95 + [10.0] * 5)
    table = decile_table(y, np.zeros(100))
    assert table["revenue_share"].sum() == pytest.approx(1)
    np.testing.assert_allclose(table["lift"], 1)
    lift = lift_table(y, y)
    assert lift.loc[lift["fraction"] == 0.05, "revenue_share"].item() == pytest.approx(1)
    assert lift.loc[lift["fraction"] == 0.01, "lift"].item() == pytest.approx(20)


def test_no_revenue_and_one_class_give_nan_not_an_error() -> None:
    found = revenue_metrics(np.zeros(5), np.ones(5))
    assert np.isnan(found["gini"]) and np.isnan(found["bias_ratio"]) and np.isnan(found["r2"])
    assert np.isnan(buyer_metrics(np.zeros(5), np.full(5, 0.1))["auc"])
    assert decile_table(np.zeros(5), np.ones(5))["lift"].isna().all()


def test_coverage_and_calibration_by_segment() -> None:
    y = np.array([0.0, 0.0, 5.0, 9.0])
    found = interval_coverage(y, np.zeros(4), np.array([0.0, 1.0, 6.0, 6.0]))
    assert (found["overall"], found["buyers"]) == (0.75, 0.5)
    assert found["informative"] == pytest.approx(2 / 3)
    table = calibration_table(y, np.ones(4), ["a", None, "b", "b"])
    assert table["segment"].tolist() == ["b", "(missing)", "a"]
    assert table["mean_true"].tolist() == [7, 0, 0]


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match="prediction: got shape"):
        revenue_metrics(np.ones(3), np.ones(2))
    with pytest.raises(ValueError, match="prediction: 1 of 3 values are not finite"):
        revenue_metrics(np.ones(3), np.array([1.0, np.nan, 1.0]))
    with pytest.raises(ValueError, match="y: 1 amounts are negative"):
        revenue_metrics(np.array([-1.0]), np.array([1.0]))


def test_as_many_rows_are_called_buyers_as_there_are() -> None:
    buyer, chance = np.array([1.0, 0.0, 1.0, 0.0, 0.0]), np.array([0.9, 0.8, 0.3, 0.2, 0.1])
    found = call_metrics(buyer, chance)
    assert found == {"accuracy": 0.6, "precision": 0.5, "recall": 0.5, "f1": 0.5, "roc_auc": pytest.approx(5 / 6)}
