"""The mask contract: absent labels add nothing, bit for bit; a task without labels is an exact zero with a graph."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_heads import PLE, MMoE, MultiTaskHeads, SharedBottom, TaskSpec, losses, split_labels
from mtl_heads.masks import check_mask

NAN = float("nan")


def _loss_cases():
    """name -> (function of (x, mask), rows' inputs that need a gradient) on 7 rows."""
    g = torch.Generator().manual_seed(3)
    n, c, d = 7, 5, 4
    x = torch.randn(n, c, generator=g)
    bits = (torch.rand(n, c, generator=g) < 0.4).float()
    classes = torch.randint(c, (n,), generator=g)
    queries, table = torch.randn(n, d, generator=g), torch.randn(11, d, generator=g)
    items, own = torch.randint(11, (n,), generator=g), torch.randint(11, (n, 6), generator=g)
    shared = torch.randint(11, (6,), generator=g)
    log_q = torch.rand(11, generator=g).log()
    money = torch.where(torch.rand(n, generator=g) < 0.5, torch.rand(n, generator=g) * 50, 0.0)
    popularity = torch.rand(c, generator=g) + 0.1

    def spoil(labels, mask):
        """NaN or an impossible number where the label is absent: it must never be looked at."""
        if mask is None:
            return labels
        mask = mask.reshape(mask.shape + (1,) * (labels.dim() - mask.dim())).expand(labels.shape)
        return torch.where(mask, labels, NAN) if labels.is_floating_point() else torch.where(mask, labels, -999)

    return {
        "bce": (lambda x, m: losses.binary_cross_entropy(x, spoil(bits, m), mask=m, pos_weight=3.0), x),
        "bce_smooth": (lambda x, m: losses.binary_cross_entropy(x, spoil(bits, m), mask=m, label_smoothing=0.1), x),
        "focal": (lambda x, m: losses.focal_loss(x, spoil(bits, m), mask=m, alpha=0.75), x),
        "focal_positives": (lambda x, m: losses.focal_loss(x, spoil(bits, m), mask=m, normalise="positives"), x),
        "softmax": (lambda x, m: losses.softmax_cross_entropy(x, spoil(classes, m), mask=m, label_smoothing=0.1), x),
        "softmax_focal": (lambda x, m: losses.softmax_focal_loss(x, spoil(classes, m), mask=m), x),
        "regression": (lambda x, m: losses.regression_loss(x[:, 0], spoil(money, m), kind="huber", mask=m), x),
        "vector": (lambda x, m: losses.vector_loss(x, spoil(bits + 0.1, m), kind="cosine", mask=m), x),
        "ordinal": (lambda x, m: losses.ordinal_loss(x, spoil(classes, m), mask=m), x),
        "ziln": (lambda x, m: losses.ziln_loss(x[:, :3], spoil(money, m), mask=m), x),
        "bpr": (lambda x, m: losses.bpr_loss(x[:, 0], x[:, 1:], mask=m), x),
        "order": (lambda x, m: losses.order_penalty(list(x.T), mask=m), x),
        "novelty": (lambda x, m: losses.novelty_loss(x, popularity, k=2, mask=m), x),
        "diversity": (lambda x, m: losses.diversity_loss(x, mask=m), x),
        "sampled_own": (
            lambda x, m: losses.sampled_softmax_loss(
                x,
                table,
                spoil(items, m),
                spoil(own, m),
                log_q_positives=log_q[items],
                log_q_negatives=log_q[own],
                mask=m,
            ),
            queries,
        ),
        "sampled_shared": (
            lambda x, m: losses.sampled_softmax_loss(x, table, spoil(items, m), shared, mask=m, temperature=0.5),
            queries,
        ),
        "nce": (
            lambda x, m: losses.nce_loss(
                x, table, spoil(items, m), own, log_q_positives=log_q[items], log_q_negatives=log_q[own], mask=m
            ),
            queries,
        ),
        "info_nce": (lambda x, m: losses.info_nce_loss(x, table[:7], mask=m), queries),
        "supcon": (lambda x, m: losses.supervised_contrastive_loss(x, spoil(classes % 2, m), mask=m), queries),
    }


CASES = _loss_cases()


def _value_and_grad(function, x, mask):
    x = x.clone().requires_grad_()
    value = function(x, mask)
    (grad,) = torch.autograd.grad(value, x)
    return value.detach(), grad


@pytest.mark.parametrize("name", CASES)
def test_all_present_equals_no_mask_bit_for_bit(name):
    function, x = CASES[name]
    value, grad = _value_and_grad(function, x, None)
    masked, masked_grad = _value_and_grad(function, x, torch.ones(len(x), dtype=torch.bool))
    assert torch.equal(value, masked)
    assert torch.equal(grad, masked_grad)


@pytest.mark.parametrize("name", CASES)
def test_absent_rows_with_garbage_change_neither_value_nor_gradient(name):
    function, x = CASES[name]
    mask = torch.tensor([True, False, True, True, False, True, False])
    value, grad = _value_and_grad(function, x, mask)
    assert value.isfinite()
    assert torch.equal(grad[~mask], torch.zeros_like(grad[~mask]))
    # Garbage in the model's outputs of absent rows stays there too.
    spoiled = torch.where(mask[:, None], x, NAN)
    value_too, grad_too = _value_and_grad(function, spoiled, mask)
    assert torch.equal(value, value_too)
    assert torch.equal(grad, grad_too)


@pytest.mark.parametrize("name", CASES)
def test_no_label_at_all_is_an_exact_zero_with_a_graph(name):
    function, x = CASES[name]
    value, grad = _value_and_grad(function, x, torch.zeros(len(x), dtype=torch.bool))
    assert value == 0
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("name", ["bce", "focal"])
def test_single_labels_of_a_row_may_be_absent(name):
    function, x = CASES[name]
    mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.6
    value, grad = _value_and_grad(function, x, mask)
    assert value.isfinite() and torch.equal(grad[~mask], torch.zeros_like(grad[~mask]))


@given(st.lists(st.booleans(), min_size=1, max_size=9))
@settings(deadline=None, max_examples=30)
def test_the_masked_mean_is_the_mean_of_the_kept_rows(kept):
    mask = torch.tensor(kept)
    logits = torch.linspace(-2, 2, len(kept))
    targets = (torch.arange(len(kept)) % 2).float()
    value = losses.binary_cross_entropy(logits, targets, mask=mask)
    if mask.any():
        torch.testing.assert_close(value, losses.binary_cross_entropy(logits[mask], targets[mask]))
    else:
        assert value == 0


def test_split_labels_reads_a_value_as_absent_once():
    labels, mask = split_labels(torch.tensor([1.0, NAN, 0.0]))
    assert labels.tolist() == [1.0, 0.0, 0.0] and mask.tolist() == [True, False, True]
    labels, mask = split_labels(torch.tensor([3, -1, 2]), missing=-1)
    assert labels.tolist() == [3, 0, 2] and mask.tolist() == [True, False, True]
    assert split_labels(torch.tensor([3, -1]))[1].all()


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="mask must be boolean"):
        check_mask(torch.ones(3), torch.Size([3]))
    with pytest.raises(ValueError, match=r"mask must have the labels' shape \(3,\).*got \(2,\)"):
        check_mask(torch.ones(2, dtype=torch.bool), torch.Size([3]))
    with pytest.raises(ValueError, match='reduction must be "mean", "sum" or "none"'):
        losses.binary_cross_entropy(torch.zeros(2), torch.zeros(2), reduction="average")


TASKS = [
    TaskSpec("churn", "binary", loss="focal", hidden=(5,)),
    TaskSpec("category", "multilabel", 4),
    TaskSpec("mission", "multiclass", 3),
    TaskSpec("price", "regression", head_options={"transform": "log1p"}),
    TaskSpec("name", "vector", 3),
    TaskSpec("level", "ordinal", 4),
    TaskSpec("value", "ziln"),
    TaskSpec("sku", "retrieval", 12, head_options={"negatives": "all"}),
]


def _targets(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "churn": (torch.rand(n, generator=g) < 0.5).float(),
        "category": (torch.rand(n, 4, generator=g) < 0.5).float(),
        "mission": torch.randint(3, (n,), generator=g),
        "price": torch.rand(n, generator=g) * 90,
        "name": torch.randn(n, 3, generator=g),
        "level": torch.randint(4, (n,), generator=g),
        "value": torch.where(torch.rand(n, generator=g) < 0.5, torch.rand(n, generator=g) * 9, 0.0),
        "sku": torch.randint(12, (n,), generator=g),
    }


def _heads():
    torch.manual_seed(0)
    return MultiTaskHeads(6, TASKS)


def _grads(heads, features, targets, masks=None):
    features = features.clone().requires_grad_()
    out = heads.losses(features, targets, masks)
    heads.zero_grad()
    out.values.sum().backward()
    return out, features.grad, {name: p.grad.clone() for name, p in heads.named_parameters()}


def test_heads_with_all_labels_equal_the_unmasked_path_bit_for_bit():
    heads, features, targets = _heads(), torch.randn(9, 6), _targets(9)
    out, grad, params = _grads(heads, features, targets)
    masks = {name: torch.ones(9, dtype=torch.bool) for name in targets}
    out_masked, grad_masked, params_masked = _grads(heads, features, targets, masks)
    assert torch.equal(out.values, out_masked.values) and torch.equal(out.counts, out_masked.counts)
    assert torch.equal(grad, grad_masked)
    assert all(torch.equal(params[name], params_masked[name]) for name in params)


def test_rows_without_labels_change_no_gradient():
    heads, features, targets = _heads(), torch.randn(9, 6), _targets(9)
    out, grad, params = _grads(heads, features, targets)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(5))
    where = order.argsort()[:9].sort().values
    more, masks = torch.randn(16, 6), {}
    more[where] = features
    spread = {}
    for name, labels in targets.items():
        spread[name] = torch.full(
            (16, *labels.shape[1:]), NAN if labels.is_floating_point() else -5, dtype=labels.dtype
        )
        spread[name][where] = labels
        masks[name] = torch.zeros(16, dtype=torch.bool).index_fill(0, where, True)
    out_more, grad_more, params_more = _grads(heads, more, spread, masks)
    assert torch.equal(out.values, out_more.values) and torch.equal(out.counts, out_more.counts)
    assert torch.equal(grad, grad_more[where]) and grad_more.count_nonzero() == grad.count_nonzero()
    assert all(torch.equal(params[name], params_more[name]) for name in params)


TRUNKS = {
    "shared bottom": lambda names: SharedBottom(6, names, hidden=[8]),
    "mmoe": lambda names: MMoE(6, names, num_experts=3, hidden=[8]),
    "ple": lambda names: PLE(6, names, num_task_experts=1, num_shared_experts=2, hidden=[8]),
}


@pytest.mark.parametrize("trunk", TRUNKS)
def test_rows_without_labels_change_no_gradient_below_the_heads(trunk):
    """Through the trunk the sums run over more rows, of which the new ones are exact zeros: equal to rounding."""
    torch.manual_seed(0)
    names = ("churn", "price")
    tasks = [TaskSpec("churn", "binary", loss="focal"), TaskSpec("price", "regression")]
    below, heads = TRUNKS[trunk](names).double(), MultiTaskHeads(8, tasks).double()
    features, targets = torch.randn(9, 6).double(), {name: _targets(9)[name].double() for name in names}

    def gradients(rows, labels):
        below.zero_grad()
        heads.losses(below(rows), labels).values.sum().backward()
        return {name: p.grad.clone() for name, p in below.named_parameters()}

    more = torch.cat([features, 100 * torch.randn(5, 6).double()])
    padded = {name: torch.cat([label, torch.full((5,), NAN).double()]) for name, label in targets.items()}
    expected, got = gradients(features, targets), gradients(more, padded)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-12, atol=1e-14)


def test_nan_labels_are_absent_at_the_border():
    heads, features, targets = _heads(), torch.randn(9, 6), _targets(9)
    mask = torch.tensor([True, False, True, True, False, True, False, True, True])
    masks = {"price": mask, "churn": mask, "name": mask}
    spoiled = dict(targets)
    for name in masks:
        spoiled[name] = torch.where(mask.reshape(9, *[1] * (targets[name].dim() - 1)), targets[name], NAN)
    by_mask, by_nan = heads.losses(features, targets, masks), heads.losses(features, spoiled)
    assert torch.equal(by_mask.values, by_nan.values)
    assert by_nan.counts.tolist() == [6, 36, 9, 6, 6, 9, 9, 9]


@pytest.mark.parametrize("how", ["left out", "masked"])
def test_a_task_without_labels_is_zero_and_its_parameters_get_zero_gradients(how):
    heads, features, targets = _heads(), torch.randn(9, 6), _targets(9)
    for name in heads.names:
        rest = dict(targets)
        masks = {name: torch.zeros(9, dtype=torch.bool)}
        if how == "left out":
            rest.pop(name)
            masks = {}
        out, grad, params = _grads(heads, features, rest, masks)
        assert out[name] == 0 and out.counts[heads.names.index(name)] == 0 and name not in out.as_dict()
        assert grad.isfinite().all()
        for parameter, value in params.items():
            if parameter.startswith(f"heads.{name}."):
                assert value.count_nonzero() == 0, parameter


def test_the_empty_batch():
    heads = _heads()
    out, grad, _ = _grads(heads, torch.zeros(0, 6), {name: t[:0] for name, t in _targets(2).items()})
    assert out.values.tolist() == [0.0] * len(TASKS) and grad.shape == (0, 6)
    assert not out.values.isnan().any()
