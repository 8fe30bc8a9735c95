"""Metrics against brute force on small cases: order metrics, ranking, calibration, coverage."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_heads.metrics import (
    AUROC,
    AveragePrecision,
    CalibrationError,
    CatalogueCoverage,
    RankingMetrics,
    catalogue_ranks,
    ranks,
)


def _auroc_by_hand(scores, targets):
    pairs = [(p, n) for p, y in zip(scores, targets) if y for n, z in zip(scores, targets) if not z]  # noqa: B905
    return sum((p > n) + 0.5 * (p == n) for p, n in pairs) / len(pairs)


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans(), st.booleans()), min_size=1, max_size=25))
@settings(deadline=None, max_examples=40)
def test_auroc_is_the_share_of_pairs_in_order_over_present_labels(rows):
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    scores = torch.tensor([float(s) * 100 for s, _, _ in rows])
    targets, mask = torch.tensor([y for _, y, _ in rows]), torch.tensor([m for _, _, m in rows])
    metric = AUROC()
    for part in range(0, len(rows), 4):
        metric.update(scores[part : part + 4], targets[part : part + 4], mask[part : part + 4])
    kept = [(s, y) for s, y, m in rows if m]
    value = metric.compute()["macro"]
    if len({y for _, y in kept}) == 2:
        assert value == pytest.approx(_auroc_by_hand(*zip(*kept, strict=True)), abs=1e-6)
    else:
        assert math.isnan(value)


def test_average_precision_by_hand_and_labels_apart():
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    # Order + - + : precision 1 at recall 1/2, 2/3 at recall 1: AP = 5/6. Label 1 has no positive: NaN, not in the mean.
    metric = AveragePrecision(num_labels=2)
    metric.update(torch.tensor([[9.0, 1.0], [8.0, 2.0], [7.0, 3.0]]), torch.tensor([[1, 0], [0, 0], [1, 0]]))
    result = metric.compute()
    assert result["macro"] == pytest.approx(5 / 6) and math.isnan(result["per_label"][1])
    resumed = AveragePrecision(num_labels=2)
    resumed.load_state_dict(metric.state_dict())
    assert resumed.compute()["macro"] == result["macro"]
    metric.reset()
    assert math.isnan(metric.compute()["macro"])


def test_large_logits_keep_their_order():
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    metric = AUROC()
    metric.update(torch.tensor([200.0, 300.0, 400.0]), torch.tensor([0, 0, 1]))
    assert metric.compute()["macro"] == 1.0


def _rank_by_hand(line, item, ties, excluded=()):
    candidates = [i for i in range(len(line)) if i == item or i not in excluded]
    above = sum(line[i] > line[item] for i in candidates)
    equal = [i for i in candidates if line[i] == line[item] and i != item]
    behind = {"index": sum(i < item for i in equal), "middle": len(equal) / 2, "worst": len(equal), "best": 0}[ties]
    return above + behind


@given(
    st.integers(1, 4), st.integers(1, 7), st.sampled_from(["index", "middle", "worst", "best"]), st.integers(0, 10**6)
)
@settings(deadline=None, max_examples=60)
def test_ranks_follow_the_tie_rule(n, items, ties, seed):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 3, (n, items), generator=g).float()
    rows, wanted = torch.randint(n, (5,), generator=g), torch.randint(items, (5,), generator=g)
    exclude = torch.rand(n, items, generator=g) < 0.3
    got = ranks(scores, rows, wanted, exclude=exclude, ties=ties)
    for p in range(5):
        row, item = int(rows[p]), int(wanted[p])
        hidden = exclude[row].nonzero()[:, 0].tolist()
        assert got[p] == _rank_by_hand(scores[row].tolist(), item, ties, hidden)


def test_ranking_metrics_by_hand():
    # Scores fall with the item number. Row 0: items 0 and 3 relevant (ranks 0, 3); row 1: item 1 (rank 1); row 2: none.
    scores = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]).expand(3, 5)
    relevant = torch.zeros(3, 5)
    relevant[0, 0] = relevant[0, 3] = relevant[1, 1] = 1
    metric = RankingMetrics(ks=(1, 2, 5))
    metric.update(scores, relevant)
    result = metric.compute()
    log2 = math.log2
    assert result["ndcg@1"] == pytest.approx((1 + 0) / 2)
    assert result["ndcg@2"] == pytest.approx((1 / (1 + 1 / log2(3)) + 1 / log2(3)) / 2)
    assert result["ndcg@5"] == pytest.approx(((1 + 1 / log2(5)) / (1 + 1 / log2(3)) + 1 / log2(3)) / 2)
    assert [result[f"recall@{k}"] for k in (1, 2, 5)] == [0.25, 0.75, 1.0]
    assert [result[f"mrr@{k}"] for k in (1, 2, 5)] == [0.5, 0.75, 0.75]
    assert [result[f"phr@{k}"] for k in (1, 2, 5)] == [0.5, 1.0, 1.0]
    assert result["rows"] == 2 and result["skipped"] == 1


def test_ranking_in_batches_with_one_item_a_row_and_absent_labels():
    g = torch.Generator().manual_seed(0)
    scores, items = torch.randn(20, 9, generator=g), torch.randint(9, (20,), generator=g)
    mask = torch.rand(20, generator=g) < 0.7
    one, two = RankingMetrics((3,)), RankingMetrics((3,))
    for part in range(0, 20, 6):
        at = slice(part, part + 6)
        one.update(scores[at], torch.where(mask, items, -7)[at], mask=mask[at])
    two.update(scores[mask], torch.nn.functional.one_hot(items[mask], 9))
    assert one.compute() == pytest.approx(two.compute())
    resumed = RankingMetrics((3,))
    resumed.load_state_dict(one.state_dict())
    assert resumed.compute() == one.compute()
    one.reset()
    assert math.isnan(one.compute()["ndcg@3"])


def test_a_constant_score_is_no_free_lunch():
    scores = torch.zeros(1, 100)
    for ties, rank in (("index", 40), ("middle", 49.5), ("worst", 99), ("best", 0)):
        assert ranks(scores, torch.tensor([0]), torch.tensor([40]), ties=ties).item() == rank


def test_catalogue_ranks_equal_ranks_over_the_whole_matrix(monkeypatch):
    from mtl_heads.metrics import ranking

    monkeypatch.setattr(ranking, "CHUNK_BYTES", 4 * 30 * 3)
    g = torch.Generator().manual_seed(0)
    queries, table = torch.randn(10, 4, generator=g), torch.randn(30, 4, generator=g)
    rows, items = torch.arange(10).repeat_interleave(2), torch.randint(30, (20,), generator=g)
    hidden = torch.rand(10, 30, generator=g) < 0.2
    got = catalogue_ranks(queries, table, rows, items, exclude=hidden.nonzero(as_tuple=True))
    assert torch.equal(got, ranks(queries @ table.T, rows, items, exclude=hidden))
    with pytest.raises(ValueError, match="rows must be non-decreasing"):
        catalogue_ranks(queries, table, rows.flip(0), items)


def test_calibration_error_by_hand():
    # Two bins: (0.2, 0.4) with one positive of two: gap 0.2; (0.9) with a positive: gap 0.1. ECE = 2/3 0.2 + 1/3 0.1.
    p, y = torch.tensor([0.2, 0.4, 0.9, 0.7]), torch.tensor([1.0, 0.0, 1.0, float("nan")])
    mask = ~y.isnan()
    expected = {"l1": 0.5 / 3, "l2": math.sqrt((2 * 0.04 + 0.01) / 3), "max": 0.2}
    for norm, value in expected.items():
        metric = CalibrationError(bins=2, norm=norm)
        metric.update(p[:1], y[:1])
        metric.update(p[1:], y[1:], mask[1:])
        assert metric.compute() == pytest.approx(value, abs=1e-7)
    assert math.isnan(CalibrationError().compute())
    with pytest.raises(ValueError, match=r"probabilities must lie in \[0, 1\]"):
        CalibrationError().update(torch.tensor([1.5]), torch.tensor([1.0]))


def test_bins_close_on_the_right():
    metric = CalibrationError(bins=4)
    metric.update(torch.tensor([0.0, 0.25, 0.26, 1.0]), torch.zeros(4))
    assert metric.table()[0].tolist() == [2.0, 1.0, 0.0, 1.0]


def test_coverage_by_hand():
    metric = CatalogueCoverage(5, k=2)
    metric.update(
        torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0], [0.0, 5.0, 4.0, 0.0, 0.0], [0.0, 0, 0, 0, 9.0]]),
        torch.tensor([True, True, False]),
    )
    assert metric.compute() == pytest.approx(3 / 5)


def test_errors():
    with pytest.raises(ValueError, match="scores must not hold NaN"):
        ranks(torch.tensor([[float("nan"), 1.0]]), torch.tensor([0]), torch.tensor([0]))
    with pytest.raises(ValueError, match="ties must be one of index, middle, worst, best"):
        RankingMetrics(ties="random")
    with pytest.raises(ValueError, match="ks must be list lengths >= 1"):
        RankingMetrics(ks=(0,))
    with pytest.raises(ValueError, match="norm must be one of"):
        CalibrationError(norm="l3")


def test_nan_in_an_absent_or_excluded_place_is_never_looked_at():
    g = torch.Generator().manual_seed(0)
    scores, items = torch.rand(6, 5, generator=g), torch.randint(5, (6,), generator=g)
    mask = torch.tensor([True, False, True, True, False, True])
    hot = torch.nn.functional.one_hot(items, 5).float()
    exclude = (torch.rand(6, 5, generator=g) < 0.3) & (hot == 0)
    spoiled = torch.where(mask[:, None] & ~exclude, scores, torch.nan)
    clean, one, many = (RankingMetrics((2,)) for _ in range(3))
    clean.update(scores[mask], items[mask], exclude=exclude[mask])
    one.update(spoiled, torch.where(mask, items, -7), mask=mask, exclude=exclude)
    many.update(spoiled, torch.where(mask[:, None], hot, torch.nan), mask=mask, exclude=exclude)
    assert clean.compute() == one.compute() == many.compute()
    with pytest.raises(ValueError, match="scores must not hold NaN"):
        clean.update(torch.full((1, 5), torch.nan), items[:1])


def test_sums_stay_exact_when_the_model_is_made_half():
    metric = RankingMetrics((1,)).bfloat16()
    for _ in range(300):
        metric.update(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    assert metric.compute()["rows"] == 300
