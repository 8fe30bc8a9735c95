"""Estimates, paired differences and their errors against other people's code and brute force; tables."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from runkit.compare import (
    Estimate,
    against,
    auroc,
    bootstrap,
    macro_auroc,
    markdown_table,
    mean,
    text_table,
    two_class_columns,
    verdict,
)


@pytest.fixture
def rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    label = rng.random(400) < 0.3
    good = rng.normal(size=400) + label
    return label.astype(int), good.round(1), (good + rng.normal(size=400)).round(1)


def delong_variance(score: np.ndarray, other: np.ndarray, label: np.ndarray) -> float:
    """Covariance of two AUROCs by the definition: placement values of every pair."""
    up, down = label == 1, label == 0

    def placements(s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        wins = (s[up][:, None] > s[down]) + 0.5 * (s[up][:, None] == s[down])
        return wins.mean(1), wins.mean(0)

    (a, b), (c, d) = placements(score), placements(other)
    return np.cov(a, c)[0, 1] / up.sum() + np.cov(b, d)[0, 1] / down.sum()


def test_auroc_and_delongs_error(rows: tuple[np.ndarray, ...]) -> None:
    label, good, worse = rows
    a, b = auroc(good, label), auroc(worse, label)
    assert a.value == pytest.approx(roc_auc_score(label, good), abs=1e-12)
    assert a.error**2 == pytest.approx(delong_variance(good, good, label))
    paired = delong_variance(good, good, label) + delong_variance(worse, worse, label)
    paired -= 2 * delong_variance(good, worse, label)
    assert (a - b).error ** 2 == pytest.approx(paired) and (a - b).value == a.value - b.value
    assert (a - b).error < np.hypot(a.error, b.error)


def test_macro_auroc_leaves_out_columns_with_one_class(rows: tuple[np.ndarray, ...]) -> None:
    label, good, worse = rows
    labels = np.stack([label, np.zeros_like(label), 1 - label], 1)
    found = macro_auroc(np.stack([good, good, worse], 1), labels)
    parts = auroc(good, label), auroc(worse, 1 - label)
    assert two_class_columns(labels) == [0, 2]
    assert found.value == pytest.approx((parts[0].value + parts[1].value) / 2)
    np.testing.assert_allclose(found.influence, (parts[0] / 2 + 0.5 * parts[1]).influence)
    with pytest.raises(ValueError, match="no column with both classes"):
        macro_auroc(np.ones((3, 1)), np.ones((3, 1)))


def test_the_mean_of_paired_differences_is_the_t_tests() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=50), rng.normal(0.4, size=50)
    difference = mean(a) - mean(b)
    assert difference.value == pytest.approx((a - b).mean())
    assert difference.error == pytest.approx(stats.sem(a - b))
    assert difference.value / difference.error == pytest.approx(stats.ttest_rel(a, b).statistic)
    low, high = difference.interval(0.9)
    assert (low, high) == pytest.approx(stats.norm.interval(0.9, difference.value, difference.error))


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    held = [low <= 1.0 <= high for low, high in (mean(rng.exponential(size=200)).interval(0.9) for _ in range(400))]
    assert 0.85 < np.mean(held) < 0.95


def test_bootstrap_is_near_the_normal_interval_and_repeats(rows: tuple[np.ndarray, ...]) -> None:
    label, good, _ = rows
    found = bootstrap(lambda drawn: auroc(good[drawn], label[drawn]).value, len(label), draws=300, seed=5)
    assert found == bootstrap(lambda drawn: auroc(good[drawn], label[drawn]).value, len(label), draws=300, seed=5)
    assert found == pytest.approx(auroc(good, label).interval(), abs=0.02)


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda: mean([1.0, 2.0]) - mean([1.0, 2.0, 3.0]), "units: got 2 and 3, needs the same ones"),
        (lambda: mean([1.0, 2.0], np.array([1, 2])) - mean([1.0, 2.0], np.array([2, 1])), "in the same order"),
        (lambda: mean([1.0]), "needs two or more"),
        (lambda: mean([1.0, np.nan]), "got 1 of 2"),
        (lambda: auroc([0.1, np.nan], [0, 1]), "1 NaN"),
        (lambda: auroc([0.1, 0.2], [1, 1]), "got 2 positive and 0 negative rows, needs both"),
        (lambda: auroc([0.1, 0.2], [0, 2]), "label: got 2, needs 0 or 1"),
        (lambda: auroc([0.1, 0.2], [0, np.nan]), "label: got nan, needs 0 or 1"),
        (lambda: auroc([0.1, 0.2], [0, 1, 1]), "needs .n. twice"),
        (lambda: mean([1.0, 2.0]).interval(95), "level: got 95, needs a share"),
        (lambda: bootstrap(lambda drawn: float("nan"), 3, 5), "statistic: got 5 of 5"),
        (lambda: bootstrap(lambda drawn: 0.0, 0), "needs 1 or more"),
        (lambda: verdict(Estimate(float("nan"), np.ones(2))), "difference: got nan"),
        (lambda: against({"a": mean([1.0, 2.0])}, "b"), "baseline: got 'b', needs one of a"),
    ],
)
def test_what_cannot_be_estimated_is_named(act, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        act()


@pytest.mark.parametrize(("value", "word"), [(0.3, "win"), (0.1, "tie"), (-0.1, "tie"), (-0.3, "LOSE")])
def test_the_verdict_is_two_errors_from_zero(value: float, word: str) -> None:
    assert verdict(Estimate(value, np.array([0.06, 0.08]))) == word


def test_tables_say_who_wins() -> None:
    values = np.linspace(0, 1, 50)
    table = against({"ours": mean(values + 1), "popular": mean(values), "same": mean(values)}, "popular")
    assert [row.get("verdict") for row in table] == ["win", None, "tie"]
    text = markdown_table(table)
    assert text.splitlines()[:2] == ["| method | score | minus popular | verdict |", "| --- | --- | --- | --- |"]
    assert (
        "| ours | 1.5000 ± 0.0421 | 1.0000 ± 0.0000 | win |" in text and "| popular | 0.5000 ± 0.0421 |  |  |" in text
    )


def test_tables_keep_cells_apart() -> None:
    table = [{"name": "a|b\nc", "x": 1 / 3, "n": 5}, {"name": "d", "x": float("nan"), "more": None}]
    assert markdown_table(table) == (
        "| name | x | n | more |\n| --- | --- | --- | --- |\n| a\\|b c | 0.33333 | 5 |  |\n| d |  |  |  |\n"
    )
    assert text_table(table).splitlines() == [
        "name         x  n  more",
        "-----  -------  -  ----",
        "a|b c  0.33333  5",
        "d",
    ]
