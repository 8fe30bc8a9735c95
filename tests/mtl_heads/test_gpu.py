"""The same numbers on a GPU as on the CPU, from features to weights and metrics."""

import pytest
import torch

from mtl_heads import AGGREGATORS, FAMO, WEIGHTINGS, MMoE, MultiTaskHeads, TaskSpec
from mtl_heads.losses import gather_dot, sampled_softmax_loss
from mtl_heads.metrics import AUROC, CalibrationError, CatalogueCoverage, PropensityScore, RankingMetrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: torch.cuda.is_available() is False"),
]
NAMES = ("a", "b", "c")


def _step(balancer, device):
    torch.manual_seed(0)
    trunk = MMoE(5, NAMES, 3, [8])
    options = {"negatives": "all"}
    tasks = [
        TaskSpec("a", "binary", loss="focal"),
        TaskSpec("b", "regression"),
        TaskSpec("c", "retrieval", 6, head_options=options),
    ]
    heads = MultiTaskHeads(8, tasks)
    trunk, heads, balancer = trunk.to(device), heads.to(device), balancer.to(device)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(32, 5, generator=g)
    targets = {"a": (x[:, 0] > 0).float(), "b": x[:, 1].where(x[:, 2] > 0, torch.nan), "c": torch.arange(32) % 6}
    x, targets = x.to(device), {name: t.to(device) for name, t in targets.items()}
    for _ in range(3):
        losses = heads.losses(trunk(x), targets)
        if hasattr(balancer, "backward"):
            balancer.backward(losses, shared=trunk.shared_parameters(), task_parameters=heads.parameters())
        else:
            balancer(losses, shared=trunk.shared_parameters()[-2:]).backward()
            balancer.end_epoch()
        if isinstance(balancer, FAMO):
            balancer.update(losses.values.detach() * torch.tensor([0.9, 0.8, 0.7], device=device))
    return [p.grad.cpu() for p in trunk.shared_parameters()], balancer.last_weights.cpu()


@pytest.mark.parametrize("name", [*WEIGHTINGS, *AGGREGATORS])
def test_gradients_and_weights_equal_the_cpus(name):
    make = {**WEIGHTINGS, **AGGREGATORS}[name]
    (grads, weights), (grads_gpu, weights_gpu) = _step(make(NAMES), "cpu"), _step(make(NAMES), "cuda")
    torch.testing.assert_close(weights, weights_gpu, rtol=1e-3, atol=1e-4)
    for one, two in zip(grads, grads_gpu, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gather_dot_equals_gather_and_sum(dtype):
    queries = torch.randn(300, 64, device="cuda", dtype=dtype, requires_grad=True)
    table = torch.randn(1000, 64, device="cuda", dtype=dtype, requires_grad=True)
    items = torch.randint(1000, (300, 40), device="cuda")
    fused = gather_dot(queries, table, items)
    plain = (table.double()[items] * queries.double()[:, None]).sum(-1)
    torch.testing.assert_close(fused.double(), plain, rtol=1e-3, atol=1e-3)
    weight = torch.randn_like(fused)
    mine = torch.autograd.grad((fused * weight).sum(), (queries, table))
    theirs = torch.autograd.grad((plain * weight).sum(), (queries, table))
    for one, two in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one.double(), two.double(), rtol=2e-2, atol=2e-2)
    assert sampled_softmax_loss(queries, table, items[:, 0], items[0]).isfinite()


def test_metrics_equal_the_cpus():
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    g = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(50, 9, generator=g), torch.rand(50, 9, generator=g) < 0.3
    results = []
    for device in ("cpu", "cuda"):
        z, y = scores.to(device), labels.to(device)
        metrics = [RankingMetrics((3,)), CalibrationError(), CatalogueCoverage(9, 2), PropensityScore(torch.ones(9))]
        metrics = [metric.to(device) for metric in metrics]
        metrics[0].update(z, y)
        metrics[1].update(z.sigmoid(), y)
        metrics[2].update(z)
        metrics[3].update(z, y)
        order = AUROC(9)
        order.update(z, y)
        results.append([metric.compute() for metric in metrics] + [order.compute()["macro"]])
    for one, two in zip(*results, strict=True):
        assert one == pytest.approx(two, abs=1e-5)
