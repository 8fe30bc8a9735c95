"""Areas under the ROC curve and their errors, against counting pairs in plain Python."""

import math

import pytest
import torch

from mtl_heads import TaskLosses
from mtl_heads.metrics import AUROC, MeanLosses, PropensityScore, auroc, auroc_influence, propensity_influence


def _case(seed, n=40, values=7):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(values, (n,), generator=g).double(), (torch.rand(n, generator=g) < 0.4).double()


def _beats(a, b):
    return float(a > b) + 0.5 * float(a == b)


@pytest.mark.parametrize("seed", range(5))
def test_the_area_counts_pairs_exactly(seed):
    scores, labels = _case(seed)
    high, low = scores[labels > 0].tolist(), scores[labels == 0].tolist()
    by_hand = sum(_beats(a, b) for a in high for b in low) / (len(high) * len(low))
    assert auroc(scores, labels).item() == by_hand
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))
    assert auroc(scores[order], labels[order]).item() == by_hand
    metric = AUROC()
    metric.update(scores[:9], labels[:9])
    metric.update(scores[9:], labels[9:])
    assert metric.compute()["macro"] == by_hand


@pytest.mark.parametrize("seed", range(5))
def test_the_influence_is_delongs(seed):
    scores, labels = _case(seed)
    s, y = scores.tolist(), labels.tolist()
    high, low = [a for a, b in zip(s, y, strict=True) if b], [a for a, b in zip(s, y, strict=True) if not b]
    value = sum(_beats(a, b) for a in high for b in low) / (len(high) * len(low))
    expected = []
    for a, b in zip(s, y, strict=True):
        share = sum(_beats(a, o) for o in low) / len(low) if b else sum(_beats(o, a) for o in high) / len(high)
        number = len(high) if b else len(low)
        expected.append((share - value) * math.sqrt(number / (number - 1)) / number)
    torch.testing.assert_close(
        auroc_influence(scores, labels), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-15
    )


def test_columns_masks_and_missing_classes():
    scores = torch.stack([_case(0)[0], _case(1)[0], _case(2)[0]], 1)
    labels = torch.stack([_case(0)[1], _case(1)[1], torch.ones(40).double()], 1)
    mask = torch.rand(40, generator=torch.Generator().manual_seed(3)) < 0.7
    poisoned = torch.where(mask[:, None], scores, torch.nan)
    area, influence = auroc(poisoned, labels, mask), auroc_influence(poisoned, labels, mask)
    for c in range(2):
        assert area[c] == auroc(scores[mask, c], labels[mask, c])
        assert torch.equal(influence[mask, c], auroc_influence(scores[mask, c], labels[mask, c]))
    assert area[2].isnan() and influence[:, 2].isnan().all() and (influence[~mask, :2] == 0).all()
    with pytest.raises(ValueError, match=r"scores: got \d+ NaN, needs numbers"):
        auroc(poisoned, labels)
    with pytest.raises(ValueError, match=r"got \(3,\), \(2,\), needs both \[N\]"):
        auroc(torch.zeros(3), torch.zeros(2))


def test_a_class_of_one_row_counts_from_chance():
    influence = auroc_influence(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 0.0, 1.0]))
    assert influence[2] == 0.5


def test_the_propensity_score_moves_as_its_influence_says():
    """Doubling one row's weight moves each mean by its contribution: checked on diversity and novelty alone."""
    g = torch.Generator().manual_seed(0)
    logits, popularity = torch.randn(400, 4, generator=g).double() - 4, torch.tensor([4.0, 3, 2, 1])
    targets = torch.zeros(400, 4)
    influence = propensity_influence(logits, targets, popularity, k=2)

    def score(rows):
        metric = PropensityScore(popularity, k=2)
        metric.update(logits[rows], targets[rows])
        return metric.compute()["score"]

    base = score(torch.arange(400))
    for row in (0, 7, 300):
        moved = score(torch.cat([torch.arange(400), torch.tensor([row])])) - base
        assert moved == pytest.approx(float(influence[row]), rel=0.1, abs=1e-7)
    assert float(influence.sum()) == pytest.approx(0, abs=1e-9)


def test_mean_losses_weigh_batches_by_their_labels():
    metric = MeanLosses("ab")
    metric.update(TaskLosses(("a", "b"), torch.tensor([1.0, 5.0]), torch.tensor([3.0, 1.0])))
    metric.update(TaskLosses(("a", "b"), torch.tensor([2.0, torch.nan]), torch.tensor([1.0, 0.0])))
    assert metric.compute() == {"a": 1.25, "b": 5.0}
    metric.reset()
    assert math.isnan(metric.compute()["a"])
    with pytest.raises(ValueError, match=r"losses: got tasks \('b', 'a'\), needs \('a', 'b'\)"):
        metric.update(TaskLosses(("b", "a"), torch.zeros(2), torch.zeros(2)))
