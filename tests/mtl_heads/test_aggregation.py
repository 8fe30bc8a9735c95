"""Aggregators against closed forms, torchjd's results on random Jacobians, and the mask contract."""

import math
import re
from pathlib import Path

import pytest
import torch

from mtl_heads import (
    AGGREGATORS,
    MGDA,
    AlignedMTL,
    CAGrad,
    MultiTaskHeads,
    NashMTL,
    PCGrad,
    SharedBottom,
    SumAggregator,
    TaskLosses,
    TaskSpec,
    TorchJDAggregator,
)
from mtl_heads.aggregation import aligned_mtl_weights, cagrad_weights, mgda_weights, nash_mtl_weights, pcgrad_weights

WHY = "torchjd is not installed: pip install 'mtl-heads[torchjd]'"
ORTHOGONAL = torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
CONFLICT = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)


def _jacobian(seed, k=None, p=None):
    g = torch.Generator().manual_seed(seed)
    k = k or int(torch.randint(2, 7, (), generator=g))
    p = p or int(torch.randint(k, 20, (), generator=g))
    return torch.randn(k, p, generator=g, dtype=torch.float64)


def _close(one, two, tolerance=1e-5):
    torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)


# Closed forms


def test_pcgrad_by_hand():
    # g1 = (1, 0), g2 = (-1, 1), g1 . g2 = -1. g1 loses -1/2 g2: (0.5, 0.5). g2 loses -1 g1: (0, 1). Sum (0.5, 1.5).
    _close(PCGrad(2)(CONFLICT), torch.tensor([0.5, 1.5], dtype=torch.float64))
    _close(PCGrad(2)(ORTHOGONAL), torch.tensor([3.0, 4.0], dtype=torch.float64))


def test_pcgrad_projects_off_the_original_gradients_in_the_order_given():
    j = _jacobian(3, k=3, p=4)
    orders = [[2, 0, 1], [1, 2, 0], [0, 1, 2]]
    total = torch.zeros(4, dtype=torch.float64)
    for i, order in enumerate(orders):
        g = j[i].clone()
        for other in order:
            if other != i and g @ j[other] < 0:
                g -= (g @ j[other]) / (j[other] @ j[other]) * j[other]
        total += g
    _close(pcgrad_weights(j @ j.T, orders) @ j, total, 1e-12)


def test_mgda_of_two_tasks_is_its_closed_form():
    for seed in range(20):
        j = _jacobian(seed, k=2)
        a, b = j
        share = float(((b - a) @ b / (a - b).square().sum()).clamp(0, 1))
        _close(MGDA(2)(j), share * a + (1 - share) * b, 1e-12)
    # Orthogonal (3, 0), (0, 4): w = (16, 9) / 25, the foot of the height.
    _close(mgda_weights(ORTHOGONAL @ ORTHOGONAL.T), torch.tensor([16.0, 9.0], dtype=torch.float64) / 25, 1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_mgda_meets_the_optimality_conditions(seed):
    g = torch.Generator().manual_seed(seed)
    k, p = int(torch.randint(3, 9, (), generator=g)), int(torch.randint(1, 9, (), generator=g))
    j = torch.randn(k, p, generator=g, dtype=torch.float64)
    d = MGDA(k)(j)
    # The shortest point of the hull: no gradient has less than |d|^2 along d.
    assert (j @ d).min() >= d @ d - 1e-6


def test_cagrad_of_two_orthogonal_unit_gradients():
    # By symmetry w = (1/2, 1/2): d = (1 + c) g_0.
    j = torch.eye(2, dtype=torch.float64)
    _close(CAGrad(2, c=0.4)(j), torch.full((2,), 0.7, dtype=torch.float64), 1e-6)
    _close(CAGrad(2, c=0.4, rescale=True)(j), torch.full((2,), 0.7 / 1.16, dtype=torch.float64), 1e-6)
    _close(CAGrad(2, c=0.0)(j), torch.full((2,), 0.5, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(20))
def test_cagrad_serves_the_worst_task_best_inside_its_ball(seed):
    j = _jacobian(seed)
    k, c = len(j), (0.2, 0.5, 0.9)[seed % 3]
    d, mean = CAGrad(k, c=c)(j), j.mean(0)
    assert (d - mean).norm().item() == pytest.approx(c * float(mean.norm()), rel=1e-6)
    worst = (j @ d).min()
    # Duality: with w the optimum, worst gain = g_w . g_0 + c |g_0| |g_w|.
    w = cagrad_weights(j @ j.T, c) - 1 / k
    w = w / w.sum()
    g_w = w @ j
    assert (w >= -1e-12).all()
    assert worst.item() == pytest.approx(float(g_w @ mean + c * mean.norm() * g_w.norm()), rel=1e-5, abs=1e-6)
    g = torch.Generator().manual_seed(seed)
    tries = torch.randn(2000, j.shape[1], generator=g, dtype=torch.float64)
    tries = mean + c * mean.norm() * tries / tries.norm(dim=-1, keepdim=True)
    assert (tries @ j.T).min(-1).values.max() <= worst + 1e-6


def test_aligned_mtl_is_its_closed_form():
    # Orthogonal gradients become equally long: the shorter length, "rmse" the root mean square.
    _close(AlignedMTL(2)(ORTHOGONAL), torch.full((2,), 1.5, dtype=torch.float64), 1e-12)
    expected = torch.full((2,), math.sqrt(12.5) / 2, dtype=torch.float64)
    _close(AlignedMTL(2, scale="rmse")(ORTHOGONAL), expected, 1e-12)
    for seed in range(10):
        j = _jacobian(seed)
        u, s, v = torch.linalg.svd(j, full_matrices=False)
        aligned = s.min() * u @ v
        _close(AlignedMTL(len(j))(j), aligned.mean(0), 1e-9)


def test_aligned_mtl_of_dependent_gradients_stays_in_their_span():
    j = torch.tensor([[1.0, 0, 0], [2.0, 0, 0], [0, 1.0, 0]], dtype=torch.float64)
    out = AlignedMTL(3)(j)
    assert out.isfinite().all() and out[2] == 0
    assert aligned_mtl_weights(torch.zeros(2, 2, dtype=torch.float64)).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("seed", range(20))
def test_nash_solves_its_equation(seed):
    j = _jacobian(seed)
    gramian = j @ j.T
    m = nash_mtl_weights(gramian)
    assert (m > 0).all()
    _close(gramian @ m, 1 / m, 1e-6)


def test_nash_by_hand_and_its_cut():
    # Orthogonal gradients: m_k = 1 / |g_k|, each task gains alike.
    _close(nash_mtl_weights(ORTHOGONAL @ ORTHOGONAL.T), torch.tensor([1 / 3, 1 / 4], dtype=torch.float64), 1e-8)
    direction = NashMTL(2)(ORTHOGONAL)
    _close(direction, torch.full((2,), math.sqrt(0.5), dtype=torch.float64), 1e-8)
    assert NashMTL(2, max_norm=0.0)(ORTHOGONAL).norm() > 1


def test_nash_keeps_its_weights_between_solutions():
    aggregator = NashMTL(2, max_norm=0.0, update_every=3)
    first = aggregator(ORTHOGONAL)
    kept = aggregator.last_weights.clone()
    aggregator(CONFLICT)
    assert torch.equal(aggregator.last_weights, kept) and first.isfinite().all()
    aggregator(CONFLICT)
    aggregator(CONFLICT)
    assert not torch.equal(aggregator.last_weights, kept)


@pytest.mark.parametrize("name", ["mgda", "cagrad", "nash_mtl", "aligned_mtl", "pcgrad"])
def test_degenerate_gradients_are_finite(name):
    zero = torch.zeros(3, 4)
    same = torch.ones(3, 4)
    opposite = torch.stack([torch.ones(4), -torch.ones(4), torch.zeros(4)])
    for j in (zero, same, opposite, same * 1e-12, same * 1e12):
        out = AGGREGATORS[name](3)(j)
        assert out.isfinite().all(), (name, j)
    assert MGDA(3)(opposite).norm() < 1e-4


# torchjd


def _tight_solver(monkeypatch):
    """torchjd hands CAGrad's problem to CLARABEL at a tolerance of 1e-8 of the value, which is 1e-4 of the weights."""
    import cvxpy

    solve = cvxpy.Problem.solve
    tight = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-14)
    monkeypatch.setattr(cvxpy.Problem, "solve", lambda self, solver=None: solve(self, solver, **tight))


@pytest.mark.parametrize("seed", range(12))
def test_torchjd_agrees(seed):
    theirs = pytest.importorskip("torchjd.aggregation", reason=WHY)
    j = _jacobian(seed)
    k = len(j)
    torch.manual_seed(seed)
    _close(PCGrad(k, seed=seed)(j), theirs.PCGrad()(j))
    for scale in ("min", "median", "rmse"):
        _close(AlignedMTL(k, scale=scale)(j), theirs.AlignedMTL(scale_mode=scale)(j))
    _close(SumAggregator(k)(j), theirs.Sum()(j))


@pytest.mark.parametrize("seed", range(12))
def test_torchjd_agrees_on_mgda(seed):
    """Its Frank-Wolfe creeps where the solution leaves gradients out: there it has to come near from above."""
    theirs = pytest.importorskip("torchjd.aggregation", reason=WHY)
    j = _jacobian(seed, k=2 + seed % 3)
    mine, other = MGDA(len(j))(j), theirs.MGDA(epsilon=1e-12, max_iters=3000)(j)
    if bool((mgda_weights(j @ j.T) > 0.05).all()):
        _close(mine, other)
    assert mine @ mine <= other @ other + 1e-9
    assert other @ other <= mine @ mine + 1e-2


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.filterwarnings("ignore")
def test_torchjd_agrees_on_cagrad(seed, monkeypatch):
    theirs = pytest.importorskip("torchjd.aggregation", reason=WHY)
    pytest.importorskip("clarabel", reason="torchjd[cagrad] is not installed")
    _tight_solver(monkeypatch)
    j = _jacobian(seed)
    for c in (0.2, 0.5, 0.9):
        _close(CAGrad(len(j), c=c)(j), theirs.CAGrad(c=c)(j))


@pytest.mark.filterwarnings("ignore")
def test_torchjd_agrees_on_nash():
    """Wherever its solver gets there: on some Jacobians ECOS gives up and leaves its starting point."""
    theirs = pytest.importorskip("torchjd.aggregation", reason=WHY)
    pytest.importorskip("ecos", reason="torchjd[nash_mtl] is not installed")
    compared = 0
    for seed in range(12):
        j = _jacobian(seed)
        other = theirs.NashMTL(n_tasks=len(j), optim_niter=200, max_norm=0.0)
        weighting = other.weighting
        # It stops at a residual of 1e-3: let it go on until the weights stand still.
        weighting._stop_criteria = lambda gtg, a, w=weighting: (
            w.alpha_param.value is None or float(abs(w.alpha_param.value - w.prvs_alpha_param.value).max()) < 1e-9
        )
        weights, gramian = weighting(j), j @ j.T
        if (gramian @ weights - 1 / weights).abs().max() < 1e-3:
            _close(NashMTL(len(j), max_norm=0.0)(j), weights @ j)
            compared += 1
    assert compared >= 8


@pytest.mark.parametrize("name", ["UPGrad", "IMTLG", "DualProj"])
def test_torchjd_aggregators_can_be_used(name):
    theirs = pytest.importorskip("torchjd.aggregation", reason=WHY)
    pytest.importorskip("qpsolvers", reason="torchjd[quadprog_projector] is not installed")
    j = _jacobian(1, k=3)
    aggregator = TorchJDAggregator(3, getattr(theirs, name)())
    _close(aggregator(j), getattr(theirs, name)()(j), 1e-6)


def test_torchjd_aggregators_that_do_not_weigh_are_refused():
    theirs = pytest.importorskip("torchjd.aggregation", reason=WHY)
    with pytest.raises(ValueError, match="that weighs gradients"):
        TorchJDAggregator(2, theirs.GradDrop())


# backward


def _model(seed=0):
    torch.manual_seed(seed)
    tasks = [TaskSpec("a", "binary"), TaskSpec("b", "regression"), TaskSpec("c", "multiclass", 3)]
    return SharedBottom(5, ("a", "b", "c"), [6]), MultiTaskHeads(6, tasks)


def _batch(seed=0, absent=()):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 5, generator=g)
    targets = {"a": (x[:, 0] > 0).float(), "b": x[:, 1] - x[:, 0], "c": (x[:, 2] > 0).long() + (x[:, 0] > 0)}
    return x, {name: t for name, t in targets.items() if name not in absent}


def _fill(aggregator, absent=(), scaler=None):
    trunk, heads = _model()
    x, targets = _batch(absent=absent)
    losses = heads.losses(trunk(x), targets)
    total = aggregator.backward(losses, shared=trunk.parameters(), task_parameters=heads.parameters(), scaler=scaler)
    return total, losses, trunk, heads


@pytest.mark.parametrize("name", AGGREGATORS)
def test_backward_fills_the_direction_and_plain_gradients_of_the_heads(name):
    aggregator = AGGREGATORS[name](("a", "b", "c"))
    total, losses, trunk, heads = _fill(aggregator)
    trunk_too, heads_too = _model()
    x, targets = _batch()
    losses_too = heads_too.losses(trunk_too(x), targets)
    rows = []
    for loss in losses_too.values:
        grads = torch.autograd.grad(loss, list(trunk_too.parameters()), retain_graph=True)
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    direction = AGGREGATORS[name](("a", "b", "c"))(torch.stack(rows))
    got = torch.cat([p.grad.reshape(-1) for p in trunk.parameters()])
    _close(got, direction)
    losses_too.values.sum().backward()
    for mine, plain in zip(heads.parameters(), heads_too.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, plain.grad)
    assert total.item() == pytest.approx(losses.values.sum().item())


def test_the_sum_is_backward_of_the_sum():
    _, _, trunk, _ = _fill(SumAggregator(("a", "b", "c"), {"b": 0.25}))
    trunk_too, heads_too = _model()
    x, targets = _batch()
    (heads_too.losses(trunk_too(x), targets).values * torch.tensor([1.0, 0.25, 1.0])).sum().backward()
    for mine, plain in zip(trunk.parameters(), trunk_too.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, plain.grad)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_gradients_accumulate_like_backwards(name):
    aggregator = AGGREGATORS[name](("a", "b", "c"))
    _, _, trunk, heads = _fill(aggregator)
    once = [p.grad.clone() for p in trunk.parameters()]
    again = AGGREGATORS[name](("a", "b", "c"))
    x, targets = _batch()
    again.backward(heads.losses(trunk(x), targets), shared=trunk.parameters(), task_parameters=heads.parameters())
    for p, g in zip(trunk.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * g)


@pytest.mark.parametrize("name", AGGREGATORS)
@pytest.mark.parametrize("how", ["no label", "weight 0"])
def test_a_task_that_takes_no_part_changes_nothing(name, how):
    absent = ("b",) if how == "no label" else ()
    static = {"b": 0.0} if how == "weight 0" else None
    aggregator = AGGREGATORS[name](("a", "b", "c"), static)
    _, _, trunk, heads = _fill(aggregator, absent)
    trunk_too, heads_too = _model()
    x, targets = _batch()
    losses = heads_too.losses(trunk_too(x), targets)
    two = TaskLosses(("a", "c"), losses.values[[0, 2]], losses.counts[[0, 2]])
    AGGREGATORS[name](("a", "c")).backward(two, shared=trunk_too.parameters())
    for mine, plain in zip(trunk.parameters(), trunk_too.parameters(), strict=True):
        _close(mine.grad, plain.grad, 1e-6)
    assert aggregator.last_weights[1] == 0 and aggregator.last_gramian[1].isnan().all()
    assert all(p.grad is not None and p.grad.count_nonzero() == 0 for p in heads.head("b").parameters())


@pytest.mark.parametrize("name", AGGREGATORS)
def test_static_weights_multiply_the_methods(name):
    plain, preferring = AGGREGATORS[name](("a", "b", "c")), AGGREGATORS[name](("a", "b", "c"), {"c": 3.0})
    _fill(plain)
    _fill(preferring)
    torch.testing.assert_close(preferring.last_weights, plain.last_weights * torch.tensor([1.0, 1.0, 3.0]))


@pytest.mark.parametrize("name", AGGREGATORS)
def test_no_labels_at_all_leave_zero_gradients(name):
    total, _, trunk, heads = _fill(AGGREGATORS[name](("a", "b", "c")), ("a", "b", "c"))
    assert total == 0
    assert all(p.grad.count_nonzero() == 0 for p in [*trunk.parameters(), *heads.parameters()])


@pytest.mark.parametrize("name", ["pcgrad", "nash_mtl"])
def test_state_saves_and_resumes(name):
    options = {"update_every": 3} if name == "nash_mtl" else {}
    whole = AGGREGATORS[name](4, **options)
    for seed in range(4):
        whole(_jacobian(seed, k=4))
    resumed = AGGREGATORS[name](4, **options)
    resumed.load_state_dict(whole.state_dict())
    for seed in range(4, 9):
        assert torch.equal(whole(_jacobian(seed, k=4)), resumed(_jacobian(seed, k=4)))


def test_an_overflow_reaches_the_gradients():
    trunk, heads = _model()
    x, targets = _batch()
    x[0, 0] = float("inf")
    aggregator = CAGrad(("a", "b", "c"))
    aggregator.backward(heads.losses(trunk(x), targets), shared=trunk.parameters())
    assert not all(p.grad.isfinite().all() for p in trunk.parameters())


def test_errors():
    with pytest.raises(ValueError, match=r"jacobian must be \[2, P\], got \(3, 4\)"):
        MGDA(2)(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="c must be >= 0"):
        CAGrad(2, c=-1.0)
    with pytest.raises(ValueError, match="scale must be one of"):
        AlignedMTL(2, scale="max")
    with pytest.raises(ValueError, match="update_every must be >= 1"):
        NashMTL(2, update_every=0)


@pytest.mark.parametrize("ratio", [1e2, 1e4, 1e6])
def test_nash_hears_a_gradient_however_small(ratio):
    """Scale-free: m of shrunk gradients is m of the others', stretched."""
    j = _jacobian(5, k=3, p=30)
    scale = torch.tensor([1.0, 1 / ratio, 1.0], dtype=torch.float64)
    small = j * scale[:, None]
    m = nash_mtl_weights(small @ small.T)
    _close(m * (small @ small.T @ m), torch.ones(3, dtype=torch.float64), 1e-7)
    _close(m * scale, nash_mtl_weights(j @ j.T), 1e-7)


@pytest.mark.parametrize("ratio", [1e2, 1e4, 1e5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_aligned_mtl_hears_a_gradient_however_small(ratio, dtype):
    j = _jacobian(6, k=3, p=30)
    j[1] /= ratio
    u, s, v = torch.linalg.svd(j, full_matrices=False)
    for scale, length in (("min", s.min()), ("median", s.median()), ("rmse", s.square().mean().sqrt())):
        expected = (length * u @ v).mean(0)
        got = AlignedMTL(3, scale=scale)(j.to(dtype)).double()
        assert (got - expected).norm() < (1e-3 if dtype == torch.float32 else 1e-4) * expected.norm()


def test_aligned_mtl_still_finds_dependent_gradients_of_different_length():
    for dtype in (torch.float32, torch.float64):
        j = _jacobian(7, k=2, p=30)
        three = torch.cat([j, 1e-4 * (j[:1] + j[1:])]).to(dtype)
        u, s, v = torch.linalg.svd(three.double(), full_matrices=False)
        expected = (s[1] * u[:, :2] @ v[:2]).mean(0)
        assert (AlignedMTL(3)(three).double() - expected).norm() < 1e-4 * expected.norm()


def test_the_torchjd_extra_holds_what_the_readmes_example_runs_on():
    project = Path(__file__).parents[2] / "packages" / "mtl-heads" / "pyproject.toml"
    assert re.search(r'^torchjd = \["torchjd\[quadprog-projector\]>=', project.read_text(), re.M)
