"""AUROC against the definition, and its standard error against resampling."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ubt.metrics import auroc, macro_auroc, roc_curve

rows = st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=2, max_size=30).filter(
    lambda pairs: len({truth for truth, _ in pairs}) == 2
)


@given(rows)
def test_it_is_the_share_of_pairs_in_the_right_order(pairs: list[tuple[bool, int]]) -> None:
    high = [score for truth, score in pairs if truth]
    low = [score for truth, score in pairs if not truth]
    expected = np.mean([(a > b) + 0.5 * (a == b) for a in high for b in low])
    truth, score = np.array(pairs, float).T
    found = auroc(truth, score)
    assert found.value == pytest.approx(expected)
    false, true = roc_curve(truth, score)
    assert np.trapezoid(true, false) == pytest.approx(expected)


def test_the_standard_errors_agree_with_the_bootstrap() -> None:
    rng = np.random.default_rng(0)
    truth = (rng.random(800) < 0.3).astype(float)
    one, other = truth + rng.normal(0, 1.2, 800), truth + rng.normal(0, 2.0, 800)
    samples = []
    for _ in range(600):
        row = rng.integers(0, 800, 800)
        samples.append((auroc(truth[row], one[row]).value, auroc(truth[row], other[row]).value))
    first, second = np.array(samples).T
    assert auroc(truth, one).standard_error == pytest.approx(first.std(), rel=0.1)
    difference, error = auroc(truth, one).minus(auroc(truth, other))
    assert difference > 0
    assert error == pytest.approx((first - second).std(), rel=0.1)


def test_a_single_positive_proves_nothing() -> None:
    truth = np.zeros(200)
    truth[0] = 1
    good, bad = np.arange(200)[::-1], np.r_[120, np.arange(199)]
    difference, error = auroc(truth, good).minus(auroc(truth, bad))
    assert difference > 0.3 and error > difference / 2
    rng = np.random.default_rng(0)
    # Two standard errors hold about 95 % of the time with four positives, too.
    held = 0
    for _ in range(400):
        truth = np.r_[np.ones(4), np.zeros(200)]
        found = auroc(truth, rng.normal(size=204))
        held += abs(found.value - 0.5) < 2 * found.standard_error
    assert held / 400 > 0.85


def test_the_mean_over_labels_leaves_out_labels_of_one_class() -> None:
    truth = np.array([[1, 0, 1], [0, 0, 0], [1, 0, 1], [0, 0, 0]], float)
    score = np.array([[3, 1, 1], [1, 2, 2], [2, 3, 3], [0, 4, 4]], float)
    found = macro_auroc(truth, score)
    assert found.labels == 2
    assert found.value == pytest.approx((1.0 + 0.25) / 2)


def test_one_class_and_nan_are_refused() -> None:
    with pytest.raises(ValueError, match="3 positive and 0 negative"):
        auroc(np.ones(3), np.arange(3.0))
    with pytest.raises(ValueError, match="1 NaN"):
        auroc(np.array([0.0, 1.0]), np.array([0.0, np.nan]))
    with pytest.raises(ValueError, match="no label has both classes"):
        macro_auroc(np.zeros((3, 2)), np.zeros((3, 2)))
