"""The shared draws follow their weights, and the root finder is Brent's."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq

from synthlogs.draws import Choice, Tree, children, quantile, rank_within, root, sigmoid, zipf


def test_a_choice_among_all_follows_the_weights():
    weight = zipf(np.arange(5), 1.5, shift=3.0)
    drawn = Choice.among(weight).draw(60_000, np.random.default_rng(0))
    np.testing.assert_allclose(np.bincount(drawn, minlength=5) / len(drawn), weight / weight.sum(), atol=0.01)


def test_a_choice_within_a_parent_never_leaves_it_and_follows_its_weights():
    parent = np.array([0, 0, 1, 2, 2, 2])
    weight = np.array([3.0, 1.0, 5.0, 1.0, 0.0, 1.0])
    asked = np.repeat([0, 1, 2], 20_000)
    drawn = Choice.within(parent, 3, weight, base=100)(asked, np.random.default_rng(0)) - 100
    assert (parent[drawn] == asked).all()
    shares = np.bincount(drawn, minlength=6) / 20_000
    np.testing.assert_allclose(shares, [0.75, 0.25, 1.0, 0.5, 0.0, 0.5], atol=0.02)


def test_every_parent_has_a_child_and_ranks_start_anew():
    rng = np.random.default_rng(0)
    parent = children(7, 50, rng, weight=np.arange(1.0, 8.0))
    assert len(parent) == 50 and set(parent) == set(range(7)) and (np.diff(parent) >= 0).all()
    rank = rank_within(parent)
    assert all(rank[parent == one].tolist() == list(range((parent == one).sum())) for one in range(7))
    tree = Tree.grow(4, 30, rng)
    asked = rng.integers(0, 4, 1000)
    assert (tree.parent[tree.draw(asked, rng)] == asked).all()


def test_the_quantile_is_the_inverse_of_the_normal_share():
    scores = np.random.default_rng(0).normal(size=50_000)
    assert (scores > quantile(0.9)).mean() == pytest.approx(0.1, abs=0.01)


@given(st.floats(-4, 4), st.floats(0.2, 5), st.floats(-0.9, 0.9))
def test_the_root_is_that_of_scipys_brentq_to_the_last_bit(shift, scale, target):
    def function(x):
        return float(np.tanh(scale * (x - shift))) + 0.01 * x - target

    if (function(-200.0) > 0) == (function(200.0) > 0):
        return
    assert root(function, -200.0, 200.0) == brentq(function, -200.0, 200.0, xtol=1e-6)
    assert abs(function(root(function, -200.0, 200.0, tolerance=1e-12))) < 1e-6


def test_a_root_at_an_end_is_found_and_none_is_refused():
    assert root(lambda x: x, 0.0, 1.0) == 0.0 and root(lambda x: x - 1, 0.0, 1.0) == 1.0
    with pytest.raises(ValueError, match="different signs"):
        root(lambda x: x * x + 1, -1.0, 1.0)


def test_the_logistic_function_is_symmetric():
    x = np.linspace(-30, 30, 7)
    np.testing.assert_allclose(sigmoid(x) + sigmoid(-x), 1.0)
