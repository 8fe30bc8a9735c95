"""The official propensity score: one golden value for each quirk, worked out by hand from its definition."""

import math

import pytest
import torch

from mtl_heads import losses
from mtl_heads.metrics import PropensityScore, official_diversity, official_novelty


def _logit(p):
    return math.log(p / (1 - p))


def test_diversity_by_hand():
    # sigmoids (0.5, 0.5, 0.75, 0.25) sum to 2: p = (1/4, 1/4, 3/8, 1/8), entropy 0.5 + 0.5 + 0.5306 + 0.375; over 2.
    z = torch.tensor([[0.0, 0.0, _logit(0.75), _logit(0.25)]], dtype=torch.float64)
    by_hand = (0.5 + 0.5 + 0.375 * math.log2(8 / 3) + 0.125 * 3) / 2
    assert by_hand == pytest.approx(0.9528, abs=1e-4)
    assert official_diversity(z).item() == pytest.approx(by_hand, abs=1e-8)


def test_epsilon_stands_inside_the_logarithm():
    # Four equal scores: -log2(1/4 + 1e-9) / 2 = 1 - 4e-9 / (2 ln 2), a hair below 1, and not 1.
    value = official_diversity(torch.zeros(1, 4, dtype=torch.float64)).item()
    assert value == pytest.approx(1 - 4e-9 / (2 * math.log(2)), abs=1e-15) and value < 1
    # All mass on one of two labels: p = (1, 0) gives -log2(1 + 1e-9) / 1 < 0, where epsilon outside would give >= 0.
    spike = official_diversity(torch.tensor([[0.0, -800.0]], dtype=torch.float64)).item()
    assert spike == pytest.approx(-1e-9 / math.log(2), rel=1e-6)


def test_novelty_by_hand_with_its_hundredth_power():
    # k = 2 of three labels, popularity (6, 3, 1): w = (6, 3, 1) / 9. Scores (0.01, 0.03, 0.02): the top two are
    # labels 1, 2: 0.03 * 3/9 + 0.02 * 1/9 = 0.11 / 9; novelty (1 - 0.11 / 9)^100.
    z = torch.tensor([[_logit(0.01), _logit(0.03), _logit(0.02)]], dtype=torch.float64)
    popularity = torch.tensor([6.0, 3.0, 1.0])
    value = official_novelty(z, popularity, k=2).item()
    assert value == pytest.approx((1 - 0.11 / 9) ** 100, rel=1e-6)
    assert value == pytest.approx(0.2924, abs=1e-4)
    assert losses.novelty_loss(z, popularity, k=2).item() == pytest.approx(0.11 / 9, rel=1e-6)


def test_the_mean_over_rows_comes_before_the_power():
    z = torch.tensor([[_logit(0.02)] * 2, [_logit(0.04)] * 2], dtype=torch.float64)
    value = official_novelty(z, torch.ones(2), k=1).item()
    assert value == pytest.approx(0.97**100, rel=1e-6)
    assert value != pytest.approx((0.98**100 + 0.96**100) / 2, rel=1e-3)


def test_the_scale_of_popularity_does_not_matter():
    z = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)) - 4
    popularity = torch.rand(12, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(official_novelty(z, popularity), official_novelty(z, popularity * 1e6))
    # Predicting the ten most popular labels with certainty is popularity 1, novelty 0.
    top = torch.full((1, 12), -100.0).index_fill(1, popularity.topk(10).indices, 100.0)
    assert official_novelty(top, popularity).item() == pytest.approx(0, abs=1e-12)


def test_a_label_without_a_positive_scores_zero_and_counts():
    # Label 0 is ranked perfectly (1.0), label 1 the wrong way round (0.0), label 2 has no positive (0.0), label 3 no
    # negative (0.0): macro mean 1/4, not the 1/2 of the labels that have both.
    scores = torch.tensor([[0.9, 0.1, 0.5, 0.5], [0.1, 0.9, 0.5, 0.5]])
    targets = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 1]])
    metric = PropensityScore(torch.ones(4))
    metric.update(scores, targets)
    assert metric.compute()["auroc"] == 0.25


def test_ties_count_half():
    metric = PropensityScore(torch.ones(2))
    metric.update(torch.tensor([[0.5, 0.2], [0.5, 0.2], [0.5, 0.3]]), torch.tensor([[1, 1], [0, 0], [0, 0]]))
    # Label 0: both pairs tie: 0.5. Label 1: one tie, one lost: 0.25.
    assert metric.compute()["auroc"] == 0.375


def test_the_sigmoid_is_decided_batch_by_batch():
    # Batch 1 lies in [0, 1] and stays; batch 2 does not and becomes sigmoid(3) = 0.95, sigmoid(0.1) = 0.525.
    # Merged: 0.51+ 0.9- | 0.95+ 0.525-: positives win 2 of 4 pairs. Cut as one batch, all become sigmoids and keep the
    # order 0.51+ 0.9- 3.0+ 0.1-: 3 of 4. With 0.55 as the first positive it passes 0.525: 3 of 4 again.
    def auroc(first_positive, batches):
        scores = torch.tensor([[first_positive, 0.0], [0.9, 0.0], [3.0, 0.0], [0.1, 0.0]])
        targets = torch.tensor([[1, 0], [0, 0], [1, 0], [0, 0]])
        metric = PropensityScore(torch.ones(2))
        for part in batches:
            metric.update(scores[part], targets[part])
        return metric.compute()["auroc"] * 2

    halves, whole = [slice(0, 2), slice(2, 4)], [slice(0, 4)]
    assert auroc(0.51, halves) == 0.5
    assert auroc(0.51, whole) == 0.75
    assert auroc(0.55, halves) == 0.75


def test_diversity_and_novelty_apply_the_sigmoid_always():
    probabilities = torch.tensor([[0.5, 0.25, 0.75]])
    metric = PropensityScore(torch.ones(3), k=1)
    metric.update(probabilities, torch.tensor([[1, 0, 0]]))
    s = probabilities.double().sigmoid()
    assert metric.compute()["novelty"] == pytest.approx(float(1 - s.max()) ** 100, rel=1e-4)


def test_a_constant_predictor_scores_as_known():
    # 0.8 * 0.5 + 0.1 * 1 + 0.1 * N with logits 0: N = (1 - 0.5)^100 = 0.
    g = torch.Generator().manual_seed(0)
    metric = PropensityScore(torch.rand(100, generator=g))
    targets = torch.rand(400, 100, generator=g) < 0.1
    for part in range(0, 400, 64):
        metric.update(torch.zeros(400, 100)[part : part + 64], targets[part : part + 64])
    result = metric.compute()
    assert result["auroc"] == 0.5 and result["diversity"] == pytest.approx(1, abs=1e-6)
    assert result["score"] == pytest.approx(0.5, abs=1e-6)


def test_k_is_at_most_the_number_of_labels():
    z = torch.randn(4, 3)
    torch.testing.assert_close(official_novelty(z, torch.ones(3)), official_novelty(z, torch.ones(3), k=3))


def test_the_auroc_equals_torchmetrics():
    torchmetrics = pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    g = torch.Generator().manual_seed(0)
    scores = (torch.rand(300, 7, generator=g) * 20).round() / 20
    targets = (torch.rand(300, 7, generator=g) < 0.2).long()
    metric = PropensityScore(torch.ones(7))
    metric.update(scores, targets)
    expected = torchmetrics.functional.classification.multilabel_auroc(scores, targets, 7)
    assert metric.compute()["auroc"] == pytest.approx(expected.item(), abs=1e-6)


def test_the_losses_are_the_metrics_unpowered_parts_and_can_be_trained():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(6, 20, generator=g, dtype=torch.float64, requires_grad=True)
    popularity = torch.rand(20, generator=g)
    novelty, diversity = losses.novelty_loss(z, popularity), losses.diversity_loss(z)
    metric = PropensityScore(popularity)
    metric.update(z, torch.ones(6, 20))
    result = metric.compute()
    assert (1 - novelty.item()) ** 100 == pytest.approx(result["novelty"])
    assert 1 - diversity.item() == pytest.approx(result["diversity"])
    for loss in (losses.novelty_loss, lambda x, _: losses.diversity_loss(x)):
        x = z.detach().clone().requires_grad_()
        optimiser = torch.optim.Adam([x], 0.1)
        first = loss(x, popularity).item()
        for _ in range(40):
            optimiser.zero_grad()
            loss(x, popularity).backward()
            optimiser.step()
        assert loss(x, popularity).item() < 0.7 * first


def test_rows_without_labels_are_left_out():
    g = torch.Generator().manual_seed(0)
    z, y = torch.randn(9, 4, generator=g), torch.rand(9, 4, generator=g) < 0.5
    mask = torch.tensor([True, True, False, True, False, True, True, False, True])
    one, two = PropensityScore(torch.ones(4), k=2), PropensityScore(torch.ones(4), k=2)
    one.update(torch.where(mask[:, None], z, float("nan")), y, mask)
    two.update(z[mask], y[mask])
    assert one.compute() == two.compute()
    one.reset()
    assert math.isnan(one.compute()["score"])
    one.update(z, y, torch.zeros(9, dtype=torch.bool))
    assert math.isnan(one.compute()["score"])


def test_state_saves_and_resumes():
    z, y = torch.randn(9, 4), torch.rand(9, 4) < 0.5
    whole, resumed = PropensityScore(torch.ones(4)), PropensityScore(torch.ones(4))
    whole.update(z[:5], y[:5])
    resumed.load_state_dict(whole.state_dict())
    for metric in (whole, resumed):
        metric.update(z[5:], y[5:])
    assert whole.compute() == resumed.compute()


def test_errors():
    with pytest.raises(ValueError, match=r"popularity must be \[C\] with C >= 2"):
        PropensityScore(torch.ones(1))
    with pytest.raises(ValueError, match=r"logits and targets must be \[N, 3\]"):
        PropensityScore(torch.ones(3)).update(torch.zeros(2, 4), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"popularity must be \[C\] for logits"):
        losses.novelty_loss(torch.zeros(2, 3), torch.ones(4))
