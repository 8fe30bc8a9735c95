"""Trunks against their papers' equations, written as plain loops."""

import pytest
import torch

from mtl_heads import AITM, PLE, MMoE, MultiTaskHeads, SharedBottom, TaskSpec

TASKS = ("a", "b", "c")


def test_shared_bottom_gives_every_task_the_same():
    trunk = SharedBottom(4, TASKS, [8, 5])
    out = trunk(torch.randn(3, 4))
    assert list(out) == list(TASKS) and out["a"] is out["c"] and out["a"].shape == (3, 5) and trunk.d_out == 5


def test_mmoe_is_its_equation():
    trunk = MMoE(4, TASKS, num_experts=3, hidden=[6, 5])
    x = torch.randn(7, 4)
    out, gates = trunk(x), trunk.gate_weights(x)
    for task in TASKS:
        gate = (x @ trunk.gates[task].weight.T).softmax(-1)
        expected = sum(gate[:, e : e + 1] * trunk.experts[e](x) for e in range(3))
        torch.testing.assert_close(out[task], expected)
        torch.testing.assert_close(gates[task], gate)


def test_ple_is_its_equations():
    trunk = PLE(4, TASKS, num_task_experts=2, num_shared_experts=1, hidden=[5], num_levels=2)
    x = torch.randn(7, 4)
    first, last = trunk.levels
    own, shared = {}, None
    experts = {t: [e(x) for e in first.task_experts[t]] for t in TASKS}
    common = [e(x) for e in first.shared_experts]
    for t in TASKS:
        gate = (x @ first.gates[t].weight.T).softmax(-1)
        own[t] = sum(gate[:, i : i + 1] * e for i, e in enumerate(experts[t] + common))
    gate = (x @ first.shared_gate.weight.T).softmax(-1)
    everything = experts["a"] + experts["b"] + experts["c"] + common
    assert gate.shape[1] == len(everything) == 7
    shared = sum(gate[:, i : i + 1] * e for i, e in enumerate(everything))
    out = trunk(x)
    for t in TASKS:
        gate = (own[t] @ last.gates[t].weight.T).softmax(-1)
        mixed = [e(own[t]) for e in last.task_experts[t]] + [e(shared) for e in last.shared_experts]
        torch.testing.assert_close(out[t], sum(gate[:, i : i + 1] * e for i, e in enumerate(mixed)))
    assert last.shared_gate is None


def test_ple_with_one_level_is_cgc():
    trunk = PLE(4, TASKS, 1, 2, [5], num_levels=1)
    own = {id(p) for p in trunk.levels[0].task_experts.parameters()}
    assert own.isdisjoint(id(p) for p in trunk.shared_parameters())


def test_aitm_is_its_equations():
    trunk = AITM(4, TASKS, [5])
    x = torch.randn(7, 4)
    out = trunk(x)
    previous = trunk.towers["a"](x)
    torch.testing.assert_close(out["a"], previous)
    for t in ("b", "c"):
        weight = trunk.projections[t].weight
        h1, h2, h3 = weight[:5], weight[5:10], weight[10:]
        candidates = [trunk.info[t](previous), trunk.towers[t](x)]
        scores = torch.stack([((u @ h2.T) * (u @ h3.T)).sum(-1) / 5**0.5 for u in candidates], -1).softmax(-1)
        previous = sum(scores[:, i : i + 1] * (u @ h1.T) for i, u in enumerate(candidates))
        torch.testing.assert_close(out[t], previous)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SharedBottom(4, TASKS, [6]),
        lambda: MMoE(4, TASKS, 3, [6]),
        lambda: PLE(4, TASKS, 1, 2, [6], 1),
        lambda: PLE(4, TASKS, 1, 2, [6], 3),
        lambda: AITM(4, TASKS, [6]),
    ],
)
def test_every_shared_parameter_is_reached_by_more_than_one_task(make):
    torch.manual_seed(0)
    trunk = make()
    out = trunk(torch.randn(40, 4))
    shared = {id(p) for p in trunk.shared_parameters()}
    assert shared.isdisjoint(id(p) for p in trunk.task_parameters())
    assert len(shared) + len(trunk.task_parameters()) == len(list(trunk.parameters()))
    reached = {id(p): 0 for p in trunk.parameters()}
    for task in TASKS:
        grads = torch.autograd.grad(
            out[task].square().sum(), list(trunk.parameters()), retain_graph=True, allow_unused=True
        )
        for p, g in zip(trunk.parameters(), grads, strict=True):
            reached[id(p)] += g is not None
    assert all(reached[p] > 1 for p in shared) and all(count == 1 for p, count in reached.items() if p not in shared)


def test_esmm_is_a_chain_of_tasks():
    tasks = [
        TaskSpec("click", "binary"),
        TaskSpec("cart", "binary", after="click"),
        TaskSpec("buy", "binary", after="cart"),
    ]
    heads = MultiTaskHeads(4, tasks)
    x = torch.randn(6, 4)
    p = [torch.sigmoid(heads.head(t.name)(x)) for t in tasks]
    predicted = heads.predict(x)
    torch.testing.assert_close(predicted["cart"], p[0] * p[1])
    torch.testing.assert_close(predicted["buy"], p[0] * p[1] * p[2])
    # The loss of the last event reaches every head of the chain: the whole space is its training set.
    y = torch.tensor([1.0, 0, 0, 1, 0, 0])
    loss = heads.losses(x, {"buy": y})
    expected = -(y * predicted["buy"].log() + (1 - y) * (1 - predicted["buy"]).log()).mean()
    torch.testing.assert_close(loss["buy"], expected)
    loss.values.sum().backward()
    assert all(heads.head(t.name).out.weight.grad.abs().sum() > 0 for t in tasks)


def test_trunk_and_heads_fit():
    trunk = PLE(4, ("x", "y"), 1, 1, [6])
    heads = MultiTaskHeads(trunk.d_out, [TaskSpec("x", "binary"), TaskSpec("y", "regression")])
    out = heads(trunk(torch.randn(5, 4)))
    assert out["x"].shape == out["y"].shape == (5,)


def test_errors():
    with pytest.raises(ValueError, match="distinct names"):
        MMoE(4, ("a", "a"), 2, [3])
    with pytest.raises(ValueError, match="num_experts must be >= 1, got 0"):
        MMoE(4, TASKS, 0, [3])
    with pytest.raises(ValueError, match="must be >= 1, got 1, 0, 1"):
        PLE(4, TASKS, 1, 0, [3], 1)
