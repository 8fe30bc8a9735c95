"""The scorer against values worked out by hand from the organisers' definitions, and against their training rule."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from torch import nn

from ubt import official
from ubt.official import BATCH, Network, Task, fit, judged, official_score


def task(scored: np.ndarray, popularity: list[float] | None = None, train: np.ndarray | None = None) -> Task:
    scored = np.asarray(scored, np.float32)
    train = scored if train is None else np.asarray(train, np.float32)
    weights = None if popularity is None else np.array(popularity)
    return Task("task", np.arange(len(scored)), csr_array(train), csr_array(scored), weights)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def by_hand(z: np.ndarray, truth: np.ndarray, popularity: np.ndarray) -> tuple[float, float, float]:
    """AUROC, diversity and novelty of one batch by loops over rows, labels and pairs."""
    s = 1 / (1 + np.exp(-z.astype(np.float64)))
    areas = []
    for c in range(z.shape[1]):
        high, low = s[truth[:, c] > 0, c], s[truth[:, c] == 0, c]
        pairs = [(a > b) + 0.5 * (a == b) for a in high for b in low]
        areas.append(np.mean(pairs) if pairs else 0.0)
    k = min(10, z.shape[1])
    w = popularity / np.sort(popularity)[::-1][:k].sum()
    diversity, popular = 0.0, 0.0
    for row in s:
        p = row / row.sum()
        diversity -= sum(x * math.log2(x + 1e-9) for x in p) / math.log2(len(p)) / len(s)
        popular += sum(row[i] * w[i] for i in np.argsort(-row)[:k]) / len(s)
    return float(np.mean(areas)), diversity, (1 - popular) ** 100


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.integers(2, 14), st.integers(3, 20))
def test_the_score_is_the_definition(seed: int, labels: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    z = (rng.normal(size=(rows, labels)) - 4).astype(np.float32)
    truth, popularity = rng.random((rows, labels)) < 0.3, rng.random(labels) + 0.01
    score, parts = official_score(z, task(truth, list(popularity)))
    area, diversity, novelty = by_hand(z, truth, popularity)
    assert parts["auroc"] == pytest.approx(area, abs=1e-6)
    assert parts["diversity"] == pytest.approx(diversity, abs=1e-5)
    assert parts["novelty"] == pytest.approx(novelty, rel=1e-3, abs=1e-6)
    assert score == pytest.approx(0.8 * area + 0.1 * diversity + 0.1 * novelty, abs=1e-5)


def test_a_label_without_positives_scores_zero_and_counts() -> None:
    z = np.array([[2, 0, 0], [-2, 0, 0]], np.float32)
    score, parts = official_score(z, task([[1, 0, 1], [0, 0, 1]], [1, 1, 1]))
    assert parts["auroc"] == pytest.approx(1 / 3)
    result = judged(task([[1, 0, 1], [0, 0, 1]], [1, 1, 1]), z)
    assert result.score == score and np.isfinite(result.estimate.influence).all()


def test_churn_with_one_class_is_zero_and_no_error() -> None:
    z = np.array([[2], [1]], np.float32)
    assert official_score(z, task([[1], [1]]))[0] == 0.0
    assert official_score(z, task([[0], [0]]))[0] == 0.0


@pytest.mark.parametrize("popularity", [None, [1.0, 2.0]])
def test_sigmoids_are_taken_batch_by_batch_and_only_outside_of_0_to_1(popularity: list[float] | None) -> None:
    # In the first batch all logits lie in [0, 1] and stay: 0.75 for the positive, 0.7 for the others. In the second one
    # lies outside, so they become sigmoids: 0.953 for the positive, sigmoid(0.9) = 0.711 for the others. So 0.75 beats
    # them all; it would lose to 0.9, and sigmoid(0.75) = 0.679 would lose to 0.711.
    z, truth = np.full((2 * BATCH, 1), 0.7, np.float32), np.zeros((2 * BATCH, 1), np.float32)
    z[BATCH:] = 0.9
    z[[0, BATCH]] = [[0.75], [3.0]]
    truth[[0, BATCH]] = 1
    if popularity:
        z, truth = np.repeat(z, 2, 1), np.repeat(truth, 2, 1)
    assert official_score(z, task(truth, popularity))[1]["auroc"] == 1.0
    z[BATCH] = 1.0
    assert official_score(z, task(truth, popularity))[1]["auroc"] == pytest.approx(0.75)


def test_one_batch_of_probabilities_is_not_squeezed() -> None:
    z = np.array([[0.0], [1.0]], np.float32)
    assert official_score(z, task([[0], [1]]))[0] == 1.0


def test_saturated_sigmoids_tie() -> None:
    # float32 sigmoids of 20 and 30 are both 1: a tie, as in the organisers' code.
    z = np.array([[20.0], [30.0]], np.float32)
    assert official_score(z, task([[0], [1]]))[0] == 0.5


def test_the_scale_of_the_popularity_does_not_matter() -> None:
    z = np.random.default_rng(0).normal(size=(5, 12)).astype(np.float32) - 4
    truth, weights = np.eye(5, 12), np.arange(1.0, 13.0)
    one, other = (official_score(z, task(truth, list(weights * scale)))[1] for scale in (1, 1e6))
    assert one["novelty"] == pytest.approx(other["novelty"], rel=1e-4)


def test_novelty_is_raised_to_the_hundredth_power_after_the_mean() -> None:
    z = np.array([[logit(0.02)] * 2, [logit(0.04)] * 2], np.float32)
    parts = official_score(z, task([[1, 0], [0, 1]], [1, 1]))[1]
    assert parts["novelty"] == pytest.approx(0.97**100, rel=1e-3)


def test_epsilon_stands_inside_the_logarithm() -> None:
    # All mass on one label: -log2(1 + 1e-9) is below zero, where an epsilon outside would not be.
    diversity = official_score(np.array([[0.0, -800.0]], np.float32), task([[1, 0]], [1, 1]))[1]["diversity"]
    assert diversity <= 0 and diversity == pytest.approx(0, abs=1e-6)


def test_a_constant_predictor_gets_what_the_leaderboard_shows_for_it() -> None:
    truth = np.random.default_rng(0).random((400, 100)) < 0.05
    score, parts = official_score(np.full((400, 100), -9.0, np.float32), task(truth, [1.0] * 100))
    assert parts["auroc"] == 0.5 and parts["diversity"] == pytest.approx(1, abs=1e-6)
    assert 0.5 < score < 0.6


def test_the_network_is_the_official_one() -> None:
    network = Network(7, 5)
    assert sum(p.numel() for p in network.parameters()) == (
        7 * 2048 + 2048 + 2 * 2048 + 3 * (2 * 2048 + 2048 * 4096 + 4096 + 4096 * 2048 + 2048) + 2 * 2048 + 2048 * 5 + 5
    )
    assert (official.SEED, official.EPOCHS, official.BATCH, official.LEARNING_RATE) == (1278, 3, 128, 1e-3)


def test_weights_and_steps_are_those_of_the_rule_written_out() -> None:
    """Seed 1278, layers drawn from input to output, AdamW, batches in the order of the rows, three epochs."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 4)).astype(np.float32)
    y = (x[:, :1] + rng.normal(size=(300, 1)) > 0).astype(np.float32)
    order = rng.permutation(300)
    torch.manual_seed(1278)
    first, middle = nn.Linear(4, 8), [nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)]
    norm, last = (nn.LayerNorm(8), nn.LayerNorm(8)), nn.Linear(8, 1)
    layers = nn.ModuleList([first, *middle, *norm, last])

    def forward(rows: torch.Tensor) -> torch.Tensor:
        h = norm[0](first(rows))
        h = h + middle[2](nn.functional.gelu(middle[1](middle[0](h))))
        return last(norm[1](h))

    optimiser = torch.optim.AdamW(layers.parameters(), lr=1e-3)
    inputs, truth, scores = torch.from_numpy(x[order]), torch.from_numpy(y[order]), []
    one = Task("churn", order, csr_array(y[order]), csr_array(y[order]), None)
    for _ in range(3):
        for start in range(0, 300, 128):
            loss = nn.functional.binary_cross_entropy_with_logits(
                forward(inputs[start : start + 128]), truth[start : start + 128]
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        scores.append(official_score(forward(inputs).detach().numpy(), one)[0])
    result = fit(lambda rows: x[rows], one, 8, 1)
    assert result.score == pytest.approx(max(scores), abs=1e-4)
    assert result.best_epoch == int(np.argmax(scores))
    # Another order of the clients is another training.
    turned = Task("churn", order[::-1], csr_array(y[order][::-1]), csr_array(y[order][::-1]), None)
    assert not np.allclose(fit(lambda rows: x[rows], turned, 8, 1).logits[::-1], result.logits, atol=1e-6)


def test_the_callers_random_numbers_are_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    fit(lambda rows: np.ones((len(rows), 2), np.float32), task([[1], [0]]), 4, 0)
    assert torch.equal(torch.rand(1), expected)


def test_standard_errors_agree_with_the_bootstrap() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random((400, 3)) < [0.3, 0.2, 0.0]
    base = truth * 1.0 + rng.normal(0, 1.2, (400, 3)) - 5
    other = truth * 1.0 + rng.normal(0, 1.6, (400, 3)) - 5
    weights = [0.5, 0.3, 0.2]
    found = [judged(task(truth, weights), np.asarray(z, np.float32)) for z in (base, other)]
    scores = []
    for _ in range(150):
        row = rng.integers(0, 400, 400)
        scores.append([official_score(z[row].astype(np.float32), task(truth[row], weights))[0] for z in (base, other)])
    first, second = np.array(scores).T
    assert found[0].estimate.error == pytest.approx(first.std(), rel=0.2)
    difference = found[0].estimate - found[1].estimate
    assert difference.value == pytest.approx(found[0].score - found[1].score)
    assert difference.error == pytest.approx((first - second).std(), rel=0.2)
