"""Sampled retrieval losses: the fused scores, the sign of logQ, accidental hits, and what they estimate."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from mtl_heads import FrequencySampler, MultiTaskHeads, StreamingFrequency, TaskSpec, UniformSampler
from mtl_heads.losses import bpr_loss, gather_dot, nce_loss, sampled_softmax_loss
from mtl_heads.losses import gather_dot as _function
from mtl_heads.losses.gather_dot import _in_pieces


def _inputs(n, i, s, d, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    queries = torch.randn(n, d, generator=g, dtype=dtype, requires_grad=True)
    table = torch.randn(i, d, generator=g, dtype=dtype, requires_grad=True)
    return queries, table, torch.randint(i, (n, s), generator=g)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (7, 3, 5, 2), (8, 50, 17, 9), (3, 4, 0, 2), (0, 4, 3, 2)])
def test_gather_dot_equals_gather_and_bmm(shape):
    n, i, s, d = shape
    queries, table, items = _inputs(n, i, s, d)
    weight = torch.randn(n, s, dtype=torch.float64)
    fused = gather_dot(queries, table, items)
    plain = (table[items] * queries[:, None]).sum(-1)
    torch.testing.assert_close(fused, plain)
    for mine, theirs in zip(
        torch.autograd.grad((fused * weight).sum(), (queries, table)),
        torch.autograd.grad((plain * weight).sum(), (queries, table)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("chunk", [1, 200, 1 << 20])
def test_pieces_give_the_same_scores(chunk):
    queries, table, items = _inputs(8, 50, 17, 9)
    queries, table = queries.detach(), table.detach()
    torch.testing.assert_close(_in_pieces(queries, table, items, chunk), gather_dot(queries, table, items))


def test_an_item_outside_the_table_is_refused():
    queries, table, items = _inputs(4, 5, 3, 2)
    for wrong in (5, -1):
        items[2, 1] = wrong
        with pytest.raises(IndexError, match=r"items: got .* needs rows of the table, 0 \.\. 4"):
            gather_dot(queries, table, items)


def test_gather_dot_gradcheck_and_only_the_gradients_asked_for():
    queries, table, items = _inputs(4, 5, 3, 2)
    assert gradcheck(lambda q, t: _function(q, t, items), (queries, table))
    frozen = gather_dot(queries, table.detach(), items)
    assert torch.autograd.grad(frozen.sum(), queries)[0].shape == queries.shape


def test_gather_dot_widens_half_precision():
    queries, table, items = _inputs(6, 9, 4, 8, torch.bfloat16)
    out = gather_dot(queries, table, items)
    assert out.dtype == torch.float32
    out.sum().backward()
    assert queries.grad.dtype == table.grad.dtype == torch.bfloat16
    torch.testing.assert_close(out, (table.float()[items] * queries.float()[:, None]).sum(-1))


def test_gather_dot_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"items must be \[3, S\], got \(2, 4\)"):
        gather_dot(torch.zeros(3, 2), torch.zeros(5, 2), torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="must fit"):
        gather_dot(torch.zeros(3, 2), torch.zeros(5, 3), torch.zeros(3, 4, dtype=torch.long))


@pytest.mark.parametrize("own", [True, False])
def test_sampled_softmax_is_its_formula(own):
    queries, table, negatives = _inputs(6, 30, 8, 4)
    negatives = negatives if own else negatives[0]
    queries, table = queries.detach(), table.detach()
    positives = torch.arange(6)
    log_q = torch.randn(30, dtype=torch.float64)
    loss = sampled_softmax_loss(
        queries,
        table,
        positives,
        negatives,
        log_q_positives=log_q[positives],
        log_q_negatives=log_q[negatives],
        temperature=0.7,
        reduction="none",
    )
    for n in range(6):
        mine = negatives[n] if own else negatives
        s = lambda item: float(queries[n] @ table[item]) / 0.7 - float(log_q[item])  # noqa: B023, E731
        bottom = math.exp(s(n)) + sum(math.exp(s(j)) for j in mine.tolist() if j != n)
        assert loss[n].item() == pytest.approx(-s(n) + math.log(bottom))


def test_log_q_is_subtracted():
    """A negative that is drawn twice as often counts half: one draw at Q = 2q equals half a draw at Q = q."""
    queries, table = torch.zeros(1, 2), torch.zeros(3, 2)
    positives = torch.tensor([0])
    q = 0.25
    popular = sampled_softmax_loss(
        queries, table, positives, torch.tensor([[1]]), log_q_negatives=torch.tensor([[math.log(2 * q)]])
    )
    assert popular.item() == pytest.approx(math.log(1 + 1 / (2 * q)))


def test_the_correction_makes_the_partition_function_unbiased():
    """mean over draws of sum exp(s - log(S Q)) is the full sum: with the wrong sign it is far off."""
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(40, generator=g, dtype=torch.float64)
    sampler = FrequencySampler(torch.randint(1, 100, (40,), generator=g), power=1.0)
    draws = sampler.sample((400_000,), torch.device("cpu"), g)
    estimate = (scores[draws] - sampler.log_q(draws)).exp().mean()
    assert estimate.item() == pytest.approx(scores.exp().sum().item(), rel=0.02)
    assert (scores[draws] + sampler.log_q(draws)).exp().mean().item() < 0.1 * estimate.item()


def test_with_all_items_as_negatives_it_is_the_full_softmax():
    queries, table, _ = _inputs(5, 12, 1, 4)
    positives = torch.tensor([0, 3, 3, 7, 11])
    value = sampled_softmax_loss(queries, table, positives, torch.arange(12))
    torch.testing.assert_close(value, F.cross_entropy(queries @ table.T, positives))


@pytest.mark.parametrize("own", [True, False])
def test_accidental_hits_are_left_out(own):
    queries, table, _ = _inputs(2, 9, 1, 4)
    positives = torch.tensor([4, 5])
    negatives = torch.tensor([4, 1, 5]) if not own else torch.tensor([[4, 1, 2], [5, 5, 5]])
    value = sampled_softmax_loss(queries, table, positives, negatives, reduction="none")
    s = queries @ table.T
    rest = [[1, 5], [4, 1]] if not own else [[1, 2], []]
    for n in range(2):
        bottom = torch.stack([s[n, positives[n]], *(s[n, j] for j in rest[n])]).logsumexp(0)
        torch.testing.assert_close(value[n], bottom - s[n, positives[n]])
    # A row whose negatives are all hits learns nothing and poisons nothing.
    value.sum().backward()
    assert queries.grad.isfinite().all() and table.grad.isfinite().all()
    assert not own or queries.grad[1].abs().max() < 1e-12
    kept = sampled_softmax_loss(queries, table, positives, negatives, mask_hits=False, reduction="none")
    assert (kept > value).all()


def test_nce_is_its_formula():
    queries, table, negatives = _inputs(4, 20, 6, 3)
    queries, table = queries.detach(), table.detach()
    positives = torch.arange(4)
    log_q = torch.log_softmax(torch.randn(20, dtype=torch.float64), 0)
    value = nce_loss(
        queries,
        table,
        positives,
        negatives,
        log_q_positives=log_q[positives],
        log_q_negatives=log_q[negatives],
        reduction="none",
    )
    for n in range(4):
        delta = lambda j: float(queries[n] @ table[j]) - math.log(6) - float(log_q[j])  # noqa: B023, E731
        expected = math.log1p(math.exp(-delta(n))) + sum(math.log1p(math.exp(delta(j))) for j in negatives[n].tolist())
        assert value[n].item() == pytest.approx(expected)


def test_uniform_and_frequency_samplers_draw_what_they_say():
    g = torch.Generator().manual_seed(1)
    uniform = UniformSampler(6, first=2)
    items = uniform.sample((40_000,), torch.device("cpu"), g)
    assert items.min() == 2 and items.max() == 5
    assert uniform.log_q(items[:3]).tolist() == pytest.approx([math.log(1 / 4)] * 3)
    counts = torch.tensor([0, 1, 16, 81, 0])
    sampler = FrequencySampler(counts, power=0.5)
    drawn = sampler.sample((60_000,), torch.device("cpu"), g).bincount(minlength=5) / 60_000
    torch.testing.assert_close(drawn, torch.tensor([0, 1, 4, 9, 0]) / 14, atol=0.01, rtol=0)
    torch.testing.assert_close(sampler.log_q(torch.tensor([1, 2, 3])).exp(), torch.tensor([1.0, 4, 9]) / 14)
    assert sampler.log_q(torch.tensor([0])).isfinite().all()
    with pytest.raises(ValueError, match="counts must be finite"):
        FrequencySampler(torch.zeros(3))


def test_streaming_frequency_finds_the_probability_of_being_in_a_batch():
    stream = StreamingFrequency(3, rate=0.1)
    for step in range(400):
        stream.update(torch.tensor([0, 0] + [1] * (step % 4 == 0)))
    estimate = stream.log_q(torch.tensor([0, 1, 2])).exp()
    torch.testing.assert_close(estimate[:2], torch.tensor([1.0, 0.25]), atol=1e-3, rtol=0)
    assert estimate[2] == pytest.approx(1 / 400)
    again = StreamingFrequency(3, rate=0.1)
    again.load_state_dict(stream.state_dict())
    assert torch.equal(again.log_q(torch.arange(3)), stream.log_q(torch.arange(3)))


@pytest.mark.parametrize("negatives", ["uniform", "frequency", "in_batch", "all"])
@pytest.mark.parametrize("loss", ["sampled_softmax", "nce", "bpr"])
@pytest.mark.parametrize("shared", [True, False])
def test_a_retrieval_head_learns_its_items(negatives, loss, shared):
    if negatives == "all" and loss != "sampled_softmax":
        with pytest.raises(ValueError, match="full softmax"):
            MultiTaskHeads(4, [TaskSpec("sku", "retrieval", 9, loss=loss, head_options={"negatives": "all"})])
        return
    torch.manual_seed(0)
    options = {"negatives": negatives, "shared": shared, "num_negatives": 5, "counts": torch.arange(1, 10), "d_item": 8}
    heads = MultiTaskHeads(9, [TaskSpec("sku", "retrieval", 9, loss=loss, head_options=options)])
    optimiser = torch.optim.Adam(heads.parameters(), 0.1)
    x = torch.eye(9)
    for _ in range(60):
        optimiser.zero_grad()
        heads.losses(x, {"sku": torch.arange(9)}).values.sum().backward()
        optimiser.step()
    head = heads.head("sku")
    assert (head.scores(heads(x)["sku"]).argmax(-1) == torch.arange(9)).float().mean() > 0.85


def test_a_tied_table_is_the_models_own():
    table = torch.nn.Embedding(9, 4)
    heads = MultiTaskHeads(6, [TaskSpec("sku", "retrieval", 9)], tables={"sku": table})
    assert heads.head("sku").table is table
    assert all(p is not table.weight for p in heads.task_parameters())
    heads.losses(torch.randn(5, 6), {"sku": torch.arange(5)}).values.sum().backward()
    assert table.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="table of task 'sku' must have 8 rows, got 9"):
        MultiTaskHeads(6, [TaskSpec("sku", "retrieval", 8)], tables={"sku": table})


def test_bpr_prefers_the_positive():
    assert bpr_loss(torch.tensor([2.0]), torch.tensor([0.0])) < bpr_loss(torch.tensor([0.0]), torch.tensor([2.0]))
