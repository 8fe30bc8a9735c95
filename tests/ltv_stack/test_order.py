"""The projection onto ordered horizons: exact, never worse, and kept between rows."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.isotonic import isotonic_regression

from ltv_stack import check_order, project_order
from ltv_stack.order import widen_order

AMOUNTS = st.integers(1, 5).flatmap(
    lambda h: arrays(np.float64, st.tuples(st.integers(0, 6), st.just(h)), elements=st.floats(0, 1e4))
)


@settings(max_examples=200, deadline=None)
@given(AMOUNTS, st.data())
def test_projection_is_ordered_equal_to_pav_and_never_raises_summed_error(
    values: np.ndarray, data: st.DataObject
) -> None:
    horizons = values.shape[1]
    weights = np.array(data.draw(st.lists(st.floats(0.1, 10), min_size=horizons, max_size=horizons)))
    steps = data.draw(arrays(np.float64, values.shape, elements=st.floats(0, 1e3)))
    truth = np.cumsum(steps, axis=1)
    for space, to in (("log1p", np.log1p), ("identity", np.asarray)):
        found = project_order(values, weights, space)
        assert (np.diff(found, axis=1) >= 0).all()
        before = (weights * (to(values) - to(truth)) ** 2).sum(axis=1)
        after = (weights * (to(found) - to(truth)) ** 2).sum(axis=1)
        assert (after <= before * (1 + 1e-9) + 1e-9).all()
        for row, projected in zip(values, found, strict=True):
            expected = isotonic_regression(to(row), sample_weight=weights)
            np.testing.assert_allclose(to(projected), expected, rtol=1e-9, atol=1e-9)
        in_order = (np.diff(values, axis=1) >= 0).all(axis=1)
        assert found[in_order].tobytes() == values[in_order].tobytes()


def test_closed_form_of_three() -> None:
    x = np.log1p(np.random.default_rng(0).lognormal(size=(2000, 3)))
    a, b, c = x.T
    low = np.minimum.reduce([a, (a + b) / 2, (a + b + c) / 3])
    high = np.maximum.reduce([c, (b + c) / 2, (a + b + c) / 3])
    middle = np.maximum.reduce([np.minimum(b, (b + c) / 2), np.minimum((a + b) / 2, (a + b + c) / 3)])
    expected = np.expm1(np.column_stack([low, middle, high]))
    np.testing.assert_allclose(project_order(np.expm1(x)), expected, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(AMOUNTS, st.data())
def test_order_between_rows_is_kept_so_quantiles_do_not_cross(values: np.ndarray, data: st.DataObject) -> None:
    more = values + data.draw(arrays(np.float64, values.shape, elements=st.floats(0, 100)))
    low, high = project_order(values), project_order(more)
    assert (low <= high * (1 + 1e-12) + 1e-12).all()


def test_what_the_projection_leaves_alone_keeps_every_bit_so_equal_quantiles_stay_equal() -> None:
    values = np.random.default_rng(3).lognormal(2, 2, size=(5000, 3))
    # The first two are out of order, the last is far above both; log1p and back would move nearly all last ones.
    low = np.column_stack([values[:, 0] + 1, values[:, 0], values[:, 2] + 1e9])
    in_order = np.sort(low, axis=1)
    np.testing.assert_array_equal(project_order(low)[:, 2], project_order(in_order)[:, 2])


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    values = np.random.default_rng(1).lognormal(size=(500, 4))
    whole = project_order(values)
    parts = np.concatenate([project_order(values[i : i + 7]) for i in range(0, 500, 7)])
    assert whole.tobytes() == parts.tobytes()


@settings(max_examples=100, deadline=None)
@given(AMOUNTS, st.data())
def test_widening_orders_bounds_and_never_narrows(lower: np.ndarray, data: st.DataObject) -> None:
    upper = lower + data.draw(arrays(np.float64, lower.shape, elements=st.floats(0, 100)))
    low, high = widen_order(lower, upper)
    assert (low <= lower).all() and (high >= upper).all()
    assert (np.diff(low, axis=1) >= 0).all() and (np.diff(high, axis=1) >= 0).all()


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match="values: got shape"):
        project_order(np.ones(3))
    with pytest.raises(ValueError, match="weights: got"):
        project_order(np.ones((2, 2)), np.array([1.0, -1.0]))
    with pytest.raises(ValueError, match="space: got 'sqrt'"):
        project_order(np.ones((2, 2)), space="sqrt")


@pytest.mark.parametrize("rest", ["", "_lo", "_buyer_hi", "_q90"])
@pytest.mark.parametrize("value", [1.0, np.nan, np.inf, -1.0])
def test_every_ordered_column_is_checked_whatever_horizons_have_it(rest, value):
    """The first horizon may have had too few rows for intervals."""
    amounts = {"revenue_d1": [1.0], f"revenue_d7{rest}": [5.0], f"revenue_d14{rest}": [6.0]}
    check_order(pa.table(amounts), ["d1", "d7", "d14"])
    with pytest.raises(RuntimeError, match=f"revenue_d14{rest}"):
        check_order(pa.table(amounts | {f"revenue_d14{rest}": [value]}), ["d1", "d7", "d14"])
