"""Weightings against their papers' closed forms, torchjd's results, and the mask contract."""

import copy
import math

import pytest
import torch

from mtl_heads import (
    DWA,
    FAMO,
    WEIGHTINGS,
    GradNorm,
    MultiTaskHeads,
    RandomWeighting,
    SharedBottom,
    StaticWeighting,
    TaskLosses,
    TaskSpec,
    UncertaintyWeighting,
)
from mtl_heads.weighting.gradnorm import gradnorm_gradient
from mtl_heads.weighting.task_adam import TaskAdam


def _losses(values, counts=None):
    names = tuple("abcdefgh"[: len(values)])
    tensor = torch.tensor(values, requires_grad=True)
    return tensor, TaskLosses(names, tensor, torch.tensor(counts or [4.0] * len(values)))


def test_static_weights_multiply_the_losses():
    leaf, losses = _losses([2.0, 3.0])
    weighting = StaticWeighting("ab", {"b": 0.5})
    total = weighting(losses)
    total.backward()
    assert total.item() == 3.5 and leaf.grad.tolist() == [1.0, 0.5]
    assert weighting.effective_weights() == {"a": 1.0, "b": 0.5}


def test_uncertainty_is_its_formula_and_settles_where_the_variance_is_the_loss():
    leaf, losses = _losses([4.0, 0.25])
    weighting = UncertaintyWeighting("ab", init=0.3)
    total = weighting(losses)
    assert total.item() == pytest.approx(sum(0.5 * math.exp(-0.3) * v + 0.15 for v in (4.0, 0.25)))
    total.backward()
    torch.testing.assert_close(leaf.grad, torch.full((2,), 0.5 * math.exp(-0.3)))
    optimiser = torch.optim.Adam(weighting.parameters(), 0.05)
    for _ in range(400):
        optimiser.zero_grad()
        weighting(TaskLosses(("a", "b"), torch.tensor([4.0, 0.25]), torch.ones(2))).backward()
        optimiser.step()
    torch.testing.assert_close(weighting.log_variance.exp(), torch.tensor([4.0, 0.25]), rtol=1e-3, atol=1e-3)


def test_static_weights_do_not_move_the_uncertainties():
    """Inside the formula a static weight would only shift s and cancel; outside it stays a weight."""
    weighting = UncertaintyWeighting("ab", {"a": 10.0})
    weighting(TaskLosses(("a", "b"), torch.tensor([4.0, 4.0]), torch.ones(2))).backward()
    gradient = weighting.log_variance.grad
    assert gradient[0] == pytest.approx(10 * float(gradient[1]))
    assert weighting.effective_weights() == {"a": 5.0, "b": 0.5}


def test_dwa_is_its_formula():
    weighting = DWA("ab", temperature=2.0)
    for epoch in ([(2.0, 8.0), (4.0, 8.0)], [(1.0, 6.0), (2.0, 6.0)]):
        for batch in epoch:
            assert weighting(_losses(list(batch))[1]).item() == pytest.approx(sum(batch))
        weighting.end_epoch()
    rates = torch.tensor([1.5 / 3.0, 6.0 / 8.0])
    expected = 2 * (rates / 2.0).softmax(0)
    total = weighting(_losses([1.0, 1.0])[1])
    torch.testing.assert_close(weighting.last_weights, expected)
    assert total.item() == pytest.approx(2.0)


def test_dwa_counts_only_batches_with_labels():
    with_gaps, without = DWA("ab"), DWA("ab")
    for _ in range(2):
        with_gaps(_losses([2.0, 8.0])[1])
        with_gaps(_losses([4.0, 0.0], [3.0, 0.0])[1])
        with_gaps.end_epoch()
        without(_losses([2.0, 8.0])[1])
        without(_losses([4.0, 8.0])[1])
        without.end_epoch()
    assert torch.equal(with_gaps.history, without.history)
    # A whole epoch without labels of b leaves its history alone.
    before = with_gaps.history[:, 1].clone()
    with_gaps(_losses([1.0, 0.0], [3.0, 0.0])[1])
    with_gaps.end_epoch()
    assert torch.equal(with_gaps.history[:, 1], before)
    assert with_gaps.history[:, 0].tolist() == [3.0, 1.0]


def test_random_weights_are_a_softmax_of_the_generators_normals():
    weighting = RandomWeighting(3, seed=7)
    weighting(torch.ones(3))
    draw = torch.randn(3, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(weighting.last_weights, draw.softmax(0))
    first = weighting.last_weights.clone()
    weighting(torch.ones(3))
    assert not torch.equal(first, weighting.last_weights)


def test_task_adam_is_torchs_adam_where_all_take_part():
    vector, reference = torch.ones(3), torch.nn.Parameter(torch.ones(3))
    adam, optimiser = TaskAdam(3, 0.03, 0.01), torch.optim.Adam([reference], 0.03, weight_decay=0.01)
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        grad = torch.randn(3, generator=g)
        adam(vector, grad, torch.ones(3, dtype=torch.bool))
        reference.grad = grad.clone()
        optimiser.step()
    torch.testing.assert_close(vector, reference.detach(), rtol=1e-5, atol=1e-6)


def test_gradnorm_gradient_by_hand():
    # Sizes m n = (2, 6), mean 4; ratios (1, 0.5), mean 0.75, rates (4/3, 2/3); alpha 1: targets (16/3, 8/3).
    weights, norms = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 3.0])
    both = torch.ones(2, dtype=torch.bool)
    grad = gradnorm_gradient(weights, norms, torch.tensor([1.0, 0.5]), both, alpha=1.0)
    assert grad.tolist() == [-2.0, 3.0]
    # It is the derivative of sum |m n - target| with the target held.
    m = weights.clone().requires_grad_()
    (m * norms - torch.tensor([16 / 3, 8 / 3])).abs().sum().backward()
    assert torch.equal(m.grad, grad)
    # alpha = 0 asks for equal sizes whatever the rates.
    assert gradnorm_gradient(weights, norms, torch.tensor([1.0, 0.01]), both, alpha=0.0).tolist() == [-2.0, 3.0]


def test_gradnorm_uses_each_tasks_own_rate():
    """Of two tasks with equal gradients the one that trains more slowly must gain weight: a mean rate cannot tell."""
    weighting = GradNorm("ab", alpha=1.0, lr=0.1)
    w = torch.ones(3, requires_grad=True)
    for loss in ((1.0, 1.0), (0.9, 0.2), (0.8, 0.1)):
        values = torch.stack([w.sum() * 0 + w[0] + (loss[0] - 1), w[1] + (loss[1] - 1)])
        weighting(TaskLosses(("a", "b"), values, torch.ones(2)), shared=[w])
    assert weighting.weights[0] > 1 > weighting.weights[1]
    assert weighting.weights.sum().item() == pytest.approx(2)
    assert weighting.first_losses.tolist() == pytest.approx([1.0, 1.0])


def test_gradnorm_balances_gradients_of_different_size():
    weighting = GradNorm("ab", alpha=0.0, lr=0.02)
    w = torch.tensor([1.0], requires_grad=True)
    for _ in range(300):
        weighting(torch.stack([9 * w.sum(), w.sum()]), shared=[w])
    sizes = weighting.weights * torch.tensor([9.0, 1.0])
    assert sizes[0].item() == pytest.approx(sizes[1].item(), rel=0.15)
    with pytest.raises(ValueError, match="shared must be the last shared layer's parameters"):
        weighting(torch.ones(2))


def test_famo_is_its_formula():
    weighting = FAMO("ab", min_losses={"b": 1.0}, weight_decay=0.0, lr=0.1)
    weighting.logits.copy_(torch.tensor([0.4, -0.2]))
    leaf, losses = _losses([2.0, 3.0])
    total = weighting(losses)
    total.backward()
    z, height = torch.tensor([0.4, -0.2]).softmax(0), torch.tensor([2.0, 2.0])
    c = 1 / (z / height).sum()
    torch.testing.assert_close(leaf.grad, c * z / height)
    torch.testing.assert_close(total.detach(), (c * z * height.log()).sum())
    assert leaf.grad.sum().item() == pytest.approx(1)
    weighting.update(torch.tensor([1.0, 2.5]))
    delta = torch.tensor([2.0 / 1.0, 2.0 / 1.5]).log()
    logits = torch.tensor([0.4, -0.2], requires_grad=True)
    logits.softmax(0).backward(delta)
    torch.testing.assert_close(weighting.logits, logits.detach() - 0.1 * logits.grad.sign(), rtol=1e-4, atol=1e-5)


def test_famo_update_needs_a_call_first():
    with pytest.raises(ValueError, match="update must follow a call"):
        FAMO(2).update(torch.ones(2))


def test_torchjd_agrees_on_its_scalarizers():
    scalarization = pytest.importorskip("torchjd.scalarization", reason="torchjd is not installed: the torchjd extra")
    g = torch.Generator().manual_seed(0)
    mine = {"dwa": DWA(3), "famo": FAMO(3), "uncertainty": UncertaintyWeighting(3)}
    theirs = {"dwa": scalarization.DWA(), "famo": scalarization.FAMO(3), "uncertainty": scalarization.UW(3)}
    for step in range(12):
        values, after = torch.rand(3, generator=g) + 0.1, torch.rand(3, generator=g) + 0.1
        for name in mine:
            a, b = values.clone().requires_grad_(), values.clone().requires_grad_()
            one, two = mine[name](a), theirs[name](b)
            one.backward()
            two.backward()
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)
        mine["famo"].update(after)
        theirs["famo"].update(after)
        if step % 3 == 2:
            mine["dwa"].end_epoch()
            theirs["dwa"].step()


def _make(name, tasks="ab", **options):
    return WEIGHTINGS[name](tasks, **options)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_the_static_weight_times_the_methods_weight_is_applied(name):
    plain, preferring = _make(name), _make(name, static={"b": 3.0})
    w = torch.randn(4)
    for weighting in (plain, preferring):
        for step in range(3):
            leaf = (w + step).clone().requires_grad_()
            losses = TaskLosses(
                ("a", "b"), torch.stack([leaf[:2].square().sum(), leaf[1:].square().mean()]), torch.ones(2)
            )
            weighting(losses, shared=[leaf])
            if name == "famo":
                weighting.update(losses.values.detach() * 0.9)
    torch.testing.assert_close(preferring.last_weights, plain.last_weights * torch.tensor([1.0, 3.0]))


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("how", ["no label", "weight 0"])
def test_a_task_that_takes_no_part_changes_nothing(name, how):
    """Weights and statistics of the others are those of a run without the task; its own stay as they were."""
    alone = _make(name, "ab")
    static = {"c": 0.0} if how == "weight 0" else None
    both = WEIGHTINGS[name]("abc", static=static)
    start = {key: value.clone() for key, value in both.state_dict().items() if isinstance(value, torch.Tensor)}
    g = torch.Generator().manual_seed(0)
    for _ in range(4):
        w = torch.rand(3, generator=g)
        leaves = w.clone().requires_grad_(), w.clone().requires_grad_()
        for weighting, leaf in zip((alone, both), leaves, strict=True):
            losses = [leaf[:2].square().sum() + 0.1, leaf[1:].exp().mean()]
            counts = [5.0, 5.0]
            if weighting is both:
                losses.append(leaf.sum() * 0 if how == "no label" else leaf.sum() * 7)
                counts.append(0.0 if how == "no label" else 5.0)
            bundle = TaskLosses(weighting.tasks, torch.stack(losses), torch.tensor(counts))
            weighting(bundle, shared=[leaf]).backward()
            if name == "famo":
                weighting.update(bundle.values.detach() * torch.linspace(0.5, 0.9, len(losses)))
        alone.end_epoch()
        both.end_epoch()
        if name != "random":
            torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
            torch.testing.assert_close(both.last_weights[:2], alone.last_weights)
        assert both.last_weights[2] == 0
    for key, value in both.state_dict().items():
        if isinstance(value, torch.Tensor) and value.shape == (3,) and key != "static":
            assert torch.equal(value[2].nan_to_num(-1), start[key][2].nan_to_num(-1)), key
    if name == "uncertainty":
        assert both.log_variance.grad[2] == 0


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_no_labels_at_all_is_a_zero_with_a_graph(name):
    weighting = _make(name)
    leaf = torch.ones(3, requires_grad=True)
    total = weighting(
        TaskLosses(("a", "b"), torch.stack([leaf.sum() * 0, leaf.sum() * 0]), torch.zeros(2)), shared=[leaf]
    )
    total.backward()
    assert total == 0 and torch.equal(leaf.grad, torch.zeros(3))


def _train(weighting, model, steps, first=0):
    trunk, heads, optimiser = model
    last = trunk.shared_parameters()[-2:]
    for step in range(first, first + steps):
        g = torch.Generator().manual_seed(step)
        x = torch.randn(16, 5, generator=g)
        targets = {"a": (x[:, 0] > 0).float(), "b": x[:, 1] * 3}
        if step % 3 == 0:
            targets["b"] = torch.full_like(targets["b"], float("nan"))
        losses = heads.losses(trunk(x), targets)
        optimiser.zero_grad()
        weighting(losses, shared=last).backward()
        optimiser.step()
        if isinstance(weighting, FAMO):
            with torch.no_grad():
                weighting.update(heads.losses(trunk(x), targets))
        if step % 4 == 3:
            weighting.end_epoch()


def _model(weighting):
    torch.manual_seed(1)
    trunk = SharedBottom(5, ("a", "b"), [8])
    heads = MultiTaskHeads(8, [TaskSpec("a", "binary"), TaskSpec("b", "regression")])
    parameters = [*trunk.parameters(), *heads.parameters(), *weighting.parameters()]
    return trunk, heads, torch.optim.Adam(parameters, 0.01)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_saving_and_resuming_changes_nothing(name, tmp_path):
    whole = _make(name)
    model = _model(whole)
    _train(whole, model, 10)
    torch.save([part.state_dict() for part in (whole, *model)], tmp_path / "state.pt")
    _train(whole, model, 10, first=10)
    resumed = _make(name)
    model_too = _model(resumed)
    for part, state in zip((resumed, *model_too), torch.load(tmp_path / "state.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    _train(resumed, model_too, 10, first=10)
    for one, two in zip(model[0].parameters(), model_too[0].parameters(), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(whole.last_weights, resumed.last_weights)
    assert copy.deepcopy(whole).effective_weights() == resumed.effective_weights()


def test_errors():
    with pytest.raises(ValueError, match=r"static names unknown tasks \['z'\], known tasks: a, b"):
        StaticWeighting("ab", {"z": 1.0})
    with pytest.raises(ValueError, match="static weights must be finite and >= 0"):
        StaticWeighting("ab", {"a": -1.0})
    with pytest.raises(ValueError, match="in this order"):
        StaticWeighting("ba")(_losses([1.0, 2.0])[1])
    with pytest.raises(ValueError, match=r"losses must be \[2\], got \(3,\)"):
        StaticWeighting("ab")(torch.ones(3))


def test_famo_learns_nothing_from_a_batch_without_labels():
    weighting = FAMO("ab")
    weighting(TaskLosses(("a", "b"), torch.zeros(2), torch.zeros(2)))
    weighting.update(TaskLosses(("a", "b"), torch.zeros(2), torch.zeros(2)))
    assert weighting.logits.tolist() == [0.0, 0.0]
    weighting(_losses([2.0, 3.0])[1])
    weighting.update(torch.tensor([1.0, 2.5]))
    assert weighting.logits[0] != 0


def test_famo_names_the_task_whose_loss_lies_below_its_bound():
    needs = r"loss of task 'b': got -2, FAMO needs losses not below 0; give min_losses=\{'b': a lower bound\}"
    with pytest.raises(ValueError, match=needs):
        FAMO("ab")(_losses([1.0, -2.0])[1])
    # A task without a label has no loss to speak of, and one at its bound is fine.
    assert FAMO("ab")(_losses([1.0, -2.0], [4.0, 0.0])[1]).isfinite()
    assert FAMO("ab")(_losses([1.0, 0.0])[1]).isfinite()
    weighting = FAMO("ab", min_losses={"b": -3.0})
    leaf, losses = _losses([1.0, -2.0])
    weighting(losses).backward()
    torch.testing.assert_close(leaf.grad, torch.full((2,), 0.5))
    with pytest.raises(ValueError, match="loss of task 'b': got -4"):
        weighting.update(torch.tensor([1.0, -4.0]))


@pytest.mark.parametrize("epochs", [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0)])
def test_dwa_after_a_loss_of_zero(epochs):
    weighting = DWA("ab")
    for value in epochs:
        weighting(_losses([value, 1.0])[1])
        weighting.end_epoch()
    weighting(_losses([1.0, 1.0])[1])
    rate = 0.0 if epochs == (1.0, 0.0) else 1.0
    torch.testing.assert_close(weighting.last_weights, 2 * (torch.tensor([rate, 1.0]) / 2).softmax(0))


@pytest.mark.parametrize("first", [0.0, -1.0])
def test_gradnorm_with_losses_not_above_zero(first):
    weighting = GradNorm("ab")
    w = torch.ones(2, requires_grad=True)
    for loss in (first, -2.0, 3.0):
        weighting(torch.stack([w[0] - 1 + loss, w[1]]), shared=[w])
    assert weighting.weights.isfinite().all() and weighting.weights.sum().item() == pytest.approx(2)


def test_statistics_stay_exact_when_the_model_is_made_half():
    weighting = DWA("ab").half()
    weighting(_losses([1000.3, 2.0])[1])
    assert weighting.total.dtype == torch.float64 and weighting.total[0].item() == pytest.approx(1000.3, abs=1e-4)
