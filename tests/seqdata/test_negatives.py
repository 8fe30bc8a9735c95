"""Negatives: their distribution, what they avoid, and that they repeat for the same seed."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import seqdata
from seqdata import Jagged, Negatives


@pytest.fixture
def store(tmp_path):
    items = np.repeat(np.arange(6), [32, 16, 8, 4, 2, 1])
    log = pd.DataFrame({"user": 1, "time": range(len(items)), "item": items})
    table = pd.DataFrame({"item": range(6), "cat": ["a", "a", "a", "b", "b", "c"]})
    return seqdata.build(
        log,
        tmp_path / "s",
        user="user",
        time="time",
        time_unit="s",
        items={"item": seqdata.ItemTable(table, "item")},
        progress=False,
    )


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_shares_follow_counts_to_the_alpha(store, alpha):
    # an unknown positive: nothing is excluded
    drawn = Negatives(store, "item", alpha=alpha).draw(np.ones(2000, int), 10)
    assert drawn.dtype == np.int32
    shares = np.bincount(drawn.ravel(), minlength=8)[2:] / drawn.size
    expected = np.array([32, 16, 8, 4, 2, 1]) ** alpha
    assert np.allclose(shares, expected / expected.sum(), atol=0.015)
    log_q = Negatives(store, "item", alpha=alpha).log_q
    assert np.allclose(np.exp(log_q[2:]), expected / expected.sum())
    assert np.isneginf(log_q[:2]).all()


def test_fresh_by_step_and_same_by_seed(store):
    negatives, positives = Negatives(store, "item", seed=3), np.full(50, 2)
    first = negatives.draw(positives, 4, step=1)
    assert np.array_equal(first, Negatives(store, "item", seed=3).draw(positives, 4, step=1))
    assert not np.array_equal(first, negatives.draw(positives, 4, step=2))
    assert not np.array_equal(first, negatives.draw(positives, 4, step=1, epoch=1))
    assert not np.array_equal(first, Negatives(store, "item", seed=4).draw(positives, 4, step=1))


def test_positives_and_known_items_are_avoided(store):
    positives = np.array([2, 2, 3, 7])
    assert not (Negatives(store, "item", alpha=1.0).draw(positives, 50) == positives[:, None]).any()
    avoid = Jagged({"item": np.array([2, 3, 4, 5, 7])}, np.array([0, 4, 5]))
    drawn = Negatives(store, "item", alpha=1.0).draw(positives, 50, avoid=avoid, rows=[0, 0, 1, 1])
    assert set(drawn[:2].ravel()) == {6, 7}
    assert 7 not in drawn[2:]
    with pytest.raises(ValueError, match="avoid needs rows"):
        Negatives(store, "item").draw(positives, 2, avoid=avoid)


def test_category_aware(store):
    # ids 2, 3, 4 are of category a, 5 and 6 of b, 7 alone in c
    drawn = Negatives(store, "item", category="item.cat").draw(np.array([2, 5, 7, 1]), 200)
    assert set(drawn[0]) == {3, 4}
    assert set(drawn[1]) == {6}
    assert set(drawn[2]) == {2, 3, 4, 5, 6}
    assert set(drawn[3]) == {2, 3, 4, 5, 6, 7}
    half = Negatives(store, "item", category="item.cat", within=0.5).draw(np.full(1, 5), 4000)
    assert 0.57 < (half == 6).mean() < 0.63
    with pytest.raises(KeyError, match="no item column"):
        Negatives(store, "item", category="item.brand")


@pytest.mark.parametrize("alpha", [0.0, 0.75])
@pytest.mark.parametrize("options", [{}, {"category": "item.cat"}, {"category": "item.cat", "within": 0.4}])
@pytest.mark.parametrize("known", [False, True])
def test_log_q_is_the_chance_of_a_draw(store, alpha, options, known):
    negatives, draws = Negatives(store, "item", alpha=alpha, **options), 8_000
    for positive in (1, 2, 3, 6, 7):
        positives = np.full(draws, positive)
        # one sequence knows two items, one of them the second most popular; another knows nearly all
        avoid = Jagged({"item": np.array([3, 6, 2, 3, 4, 5])}, np.array([0, 2, 6])) if known else None
        for row in range(2 if known else 1):
            told = {"avoid": avoid, "rows": np.full(draws, row)} if known else {}
            drawn = negatives.draw(positives, 5, **told)
            shares = np.bincount(drawn.ravel(), minlength=8) / drawn.size
            one = {"avoid": avoid, "rows": [row]} if known else {}
            chances = np.exp(negatives.log_q_of(np.array([positive]), np.arange(8)[None], **one))[0]
            assert np.isclose(chances.sum(), 1, atol=1e-5)
            assert np.allclose(shares, chances, atol=0.015)
    if not options:
        assert np.allclose(negatives.log_q[2:], negatives.log_q_of(np.array([1]), np.arange(2, 8)[None])[0])
    else:
        with pytest.raises(ValueError, match="depends on the positive"):
            _ = negatives.log_q


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_in_batch(store, alpha):
    negatives = Negatives(store, "item", alpha=alpha)
    log_q, same = negatives.in_batch(np.array([2, 3, 2]))
    assert np.allclose(np.exp(log_q), [32 / 63, 16 / 63, 32 / 63])
    assert same.tolist() == [[False, False, True], [False, False, False], [True, False, False]]


def test_in_batch_chances_are_those_of_the_events_before_the_fit(tmp_path):
    log = pd.DataFrame({"user": 1, "time": range(8), "item": ["a", "a", None, "b", "rare", "a", "z", "z"]})
    store = seqdata.build(
        log,
        tmp_path / "s",
        user="user",
        time="time",
        time_unit="s",
        fields={"item": seqdata.Categorical(max_size=2)},
        fit_before=6_000_000,
        progress=False,
    )
    chances = np.exp(Negatives(store, "item").in_batch(np.array([1, 2, 3]))[0])
    assert np.allclose(chances, [1 / 5, 3 / 5, 1 / 5])


def test_bad_arguments(store):
    with pytest.raises(ValueError, match=r"needs 0\.\.7"):
        Negatives(store, "item").draw(np.array([9]), 2)
    with pytest.raises(ValueError, match="count=0"):
        Negatives(store, "item").draw(np.array([2]), 0)
    with pytest.raises(ValueError, match="within=2"):
        Negatives(store, "item", within=2)
