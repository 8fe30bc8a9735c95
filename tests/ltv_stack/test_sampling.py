"""HistUS and HistOS as published, their expected weights, and what undoes them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ltv_stack import Histogram, histos, histos_weights, histus, histus_weights, undo_weights


def skewed(rows: int = 4000) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.where(rng.random(rows) < 0.1, rng.lognormal(1, 1, rows), 0.0)


def test_rarity_is_the_published_formula() -> None:
    y = np.array([0.0] * 7 + [11.0] * 2 + [20.0])
    histogram = Histogram(bins=2).fit(y)
    np.testing.assert_array_equal(histogram.counts, [7, 3])
    expected = np.exp([-7 / (7 + 1e-8), -3 / (7 + 1e-8)])
    np.testing.assert_allclose(histogram.rarity(np.array([0.0, 20.0])), expected)
    np.testing.assert_allclose(histogram.rarity(np.array([-5.0, 99.0])), expected)


def test_the_commonest_bin_keeps_the_published_share() -> None:
    weights = histus_weights(skewed())
    assert weights[0] == pytest.approx(np.exp(-1), rel=1e-6)
    assert histos_weights(skewed())[0] == pytest.approx(1.57, abs=0.01)


def test_expected_copies_of_the_rarest_are_the_published_number() -> None:
    y = np.concatenate([np.zeros(99_999), [1000.0]])
    assert histos_weights(y)[-1] - 1 == pytest.approx(8.9, abs=0.1)


def test_weights_are_the_mean_of_the_draws() -> None:
    y = np.repeat([0.0, 5.0, 50.0], [700, 200, 100])
    histogram = Histogram(bins=10).fit(y)
    times = np.zeros((2, len(y)))
    for seed in range(300):
        times[0] += np.bincount(histus(y, seed=seed, histogram=histogram), minlength=len(y))
        times[1] += np.bincount(histos(y, seed=seed, histogram=histogram), minlength=len(y))
    for drawn, weights in zip(times / 300, (histus_weights, histos_weights), strict=True):
        expected = weights(y, histogram=histogram)
        for value in (0.0, 5.0, 50.0):
            assert drawn[y == value].mean() == pytest.approx(expected[y == value][0], rel=0.03)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300), st.integers(0, 5))
def test_the_largest_payer_is_never_dropped(y: list[float], seed: int) -> None:
    amounts = np.array(y)
    assert amounts.max() in amounts[histus(amounts, seed=seed)]
    assert amounts.max() in amounts[histos(amounts, seed=seed)]
    assert (histus_weights(amounts) > 0).all()


def test_oversampling_keeps_every_row_and_repeats_rare_amounts_more() -> None:
    y = skewed()
    copies = np.bincount(histos(y, seed=1), minlength=len(y))
    assert copies.min() == 1 and copies.max() <= 41
    assert copies[y > 20].mean() > 2 * copies[y == 0].mean()
    np.testing.assert_array_equal(histos(y, seed=1), histos(y, seed=1))


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-6, 1 - 1e-6), st.floats(0.1, 50), st.floats(0.1, 50))
def test_undoing_weights_is_exact(p: float, buyers: float, others: float) -> None:
    weighted = p * buyers / (p * buyers + (1 - p) * others)
    assert undo_weights(np.array([weighted]), buyers, others)[0] == pytest.approx(p, rel=1e-6)


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match="y: got shape"):
        histus(np.empty(0))
    with pytest.raises(ValueError, match="y: 1 of 2 amounts are not finite"):
        histos_weights(np.array([1.0, np.nan]))
    with pytest.raises(ValueError, match="not fitted"):
        Histogram().rarity(np.ones(2))
