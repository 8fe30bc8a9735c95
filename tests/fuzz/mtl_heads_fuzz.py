"""Random heads, losses, masks and dtypes against plain float64 code; absent rows hold NaN and infinities.

What stands at an absent place must reach no loss, no gradient, no weight of a weighting, no metric.
"""

import math
import random
import time
from collections import Counter

import torch

from mtl_heads import WEIGHTINGS, MultiTaskHeads, TaskSpec
from mtl_heads.metrics import AUROC, CalibrationError, RankingMetrics

KINDS = ("binary", "multilabel", "multiclass", "regression", "vector", "ordinal", "ziln", "retrieval")
POISON = (math.nan, math.inf, -math.inf, 1e30)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 6e-2}


def tries(seed: int, seconds: float) -> dict[str, int]:
    """Fuzz for some seconds.

    Args:
        seed: of everything drawn.
        seconds: after which no new try begins.

    Returns:
        How many tries of each kind held.

    Raises:
        AssertionError: On the first that did not, naming the try's own seed.
    """
    counts: Counter[str] = Counter()
    end = time.monotonic() + seconds
    number = 0
    while time.monotonic() < end:
        own = seed * 1_000_003 + number
        for name, one in (("heads", _heads), ("weightings", _weightings), ("metrics", _metrics)):
            try:
                one(random.Random(own), torch.Generator().manual_seed(own))
            except Exception as error:
                raise AssertionError(f"{name}: try {own} (seed {seed}, number {number}): {error}") from error
            counts[name] += 1
        number += 1
    return dict(counts)


def _heads(draw: random.Random, g: torch.Generator) -> None:
    """Losses and gradients of heads against :func:`_plain` on the present rows alone."""
    dtype = draw.choice(list(TOLERANCE))
    tasks = [_task(draw, g, i) for i in range(draw.randint(1, 4))]
    rows = draw.choice((1, 2, 7, 33))
    torch.manual_seed(draw.randrange(10**9))
    heads = MultiTaskHeads(5, tasks).to(dtype)
    features = torch.randn(rows, 5, generator=g).to(dtype)
    targets, masks = {}, {}
    for task in tasks:
        if draw.random() < 0.1:
            continue
        labels, mask = _labels(task, rows, g), torch.rand(rows, generator=g) < draw.choice((0.0, 0.5, 1.0))
        targets[task.name], masks[task.name] = _poisoned(labels, mask, draw), mask
    nobody = torch.ones(rows, dtype=torch.bool)
    for mask in masks.values():
        nobody &= ~mask
    x = torch.where(nobody[:, None], draw.choice(POISON), features).to(dtype).requires_grad_()
    out = heads.losses(x, targets, masks)
    out.values.sum().backward()
    assert torch.equal(x.grad[nobody], torch.zeros_like(x.grad[nobody])), "an absent row got a gradient"
    gradients = [p.grad for p in heads.parameters()]
    assert all(grad is not None and grad.isfinite().all() for grad in gradients), "a gradient is missing or not finite"

    wide = features.detach().double().requires_grad_()
    weights = {name: p.detach().double().requires_grad_() for name, p in heads.named_parameters()}
    total = torch.zeros((), dtype=torch.float64)
    for i, task in enumerate(tasks):
        mask = masks.get(task.name, torch.zeros(rows, dtype=torch.bool))
        assert out.counts[i] == mask.sum() * (task.size if task.kind == "multilabel" else 1), "count"
        if not mask.any():
            assert out.values[i] == 0, "a task without a label has a loss"
            continue
        outputs = heads.head(task.name)(features[mask]).detach().double() if dtype == torch.bfloat16 else None
        prefix = f"heads.{task.name}."
        own = {name.removeprefix(prefix): p for name, p in weights.items() if name.startswith(prefix)}
        value = _plain(task, heads.head(task.name), own, wide[mask], targets[task.name][mask], outputs)
        _near(out.values[i], value, dtype, f"loss of {task}")
        total = total + value
    if dtype != torch.bfloat16 and total.requires_grad:
        total.backward()
        got = torch.zeros_like(wide) if wide.grad is None else wide.grad
        _near(x.grad, got, dtype, "gradient of the features")
        for name, p in heads.named_parameters():
            expected = weights[name].grad
            if expected is not None:
                _near(p.grad, expected, dtype, f"gradient of {name}")


def _task(draw: random.Random, g: torch.Generator, number: int) -> TaskSpec:
    kind = draw.choice(KINDS)
    size = 1 if kind in ("binary", "regression", "ziln") else draw.randint(2, 6)
    loss: str | None = None
    options: dict = {}
    head: dict = {}
    if kind in ("binary", "multilabel"):
        loss = draw.choice(("bce", "focal"))
        options = {"gamma": draw.choice((0.0, 2.0)), "alpha": draw.choice((None, 0.25))} if loss == "focal" else {}
    elif kind == "multiclass":
        loss = draw.choice(("cross_entropy", "focal"))
    elif kind == "regression":
        loss = draw.choice(("mse", "mae", "huber"))
        head = {"transform": draw.choice(("identity", "log1p", "asinh"))}
    elif kind == "vector":
        loss = draw.choice(("mse", "cosine"))
    elif kind == "retrieval":
        negatives = draw.choice(("all", "in_batch"))
        loss = "sampled_softmax" if negatives == "all" else draw.choice(("sampled_softmax", "nce", "bpr"))
        head = {"negatives": negatives}
    return TaskSpec(f"{kind}{number}", kind, size, loss=loss, loss_options=options, head_options=head)


def _labels(task: TaskSpec, rows: int, g: torch.Generator) -> torch.Tensor:
    if task.kind in ("binary", "multilabel"):
        shape = (rows,) if task.kind == "binary" else (rows, task.size)
        return (torch.rand(shape, generator=g) < 0.4).double()
    if task.kind in ("multiclass", "ordinal", "retrieval"):
        return torch.randint(task.size, (rows,), generator=g).double()
    if task.kind == "vector":
        return torch.randn(rows, task.size, generator=g, dtype=torch.float64)
    values = torch.rand(rows, generator=g, dtype=torch.float64) * 20
    return torch.where(torch.rand(rows, generator=g) < 0.5, values, 0.0)


def _poisoned(labels: torch.Tensor, mask: torch.Tensor, draw: random.Random) -> torch.Tensor:
    return torch.where(mask.reshape(-1, *[1] * (labels.dim() - 1)), labels, draw.choice(POISON))


def _plain(
    task: TaskSpec,
    head: torch.nn.Module,
    own: dict[str, torch.Tensor],
    x: torch.Tensor,
    y: torch.Tensor,
    outputs: torch.Tensor | None,
) -> torch.Tensor:
    """The mean loss of a task, written out in float64; ``outputs`` replace the head's own where they are rounded."""
    z = x @ own["out.weight"].T + own["out.bias"]
    if task.kind == "ordinal":
        rises = torch.cat([own["first"][None], (1 + own["steps"].exp()).log()]).cumsum(0)
        z = z - rises
    if task.kind in ("binary", "regression"):
        z = z[:, 0]
    z = z if outputs is None else outputs
    softplus = torch.nn.functional.softplus
    if task.kind in ("binary", "multilabel"):
        cross = y * softplus(-z) + (1 - y) * softplus(z)
        if head.loss_name == "focal":
            miss = torch.where(y > 0, torch.sigmoid(-z), torch.sigmoid(z))
            alpha = task.loss_options["alpha"]
            cross = cross * miss ** task.loss_options["gamma"]
            cross = cross if alpha is None else cross * torch.where(y > 0, alpha, 1 - alpha)
        return cross.mean()
    if task.kind == "multiclass":
        log_p = z.log_softmax(-1)[torch.arange(len(z)), y.long()]
        return (-log_p * ((1 - log_p.exp()) ** 2 if head.loss_name == "focal" else 1)).mean()
    if task.kind == "regression":
        name = task.head_options["transform"]
        y = y if name == "identity" else torch.log1p(y) if name == "log1p" else torch.asinh(y)
        gap = (z - y).abs()
        if head.loss_name == "huber":
            return torch.where(gap < 1, gap**2 / 2, gap - 0.5).mean()
        return (gap**2 if head.loss_name == "mse" else gap).mean()
    if task.kind == "vector":
        if head.loss_name == "mse":
            return ((z - y) ** 2).mean()
        return (1 - (z * y).sum(-1) / z.norm(dim=-1) / y.norm(dim=-1)).mean()
    if task.kind == "ordinal":
        above = (y[:, None] > torch.arange(task.size - 1)).double()
        return (above * softplus(-z) + (1 - above) * softplus(z)).sum(-1).mean()
    if task.kind == "ziln":
        positive = y > 0
        log_y = torch.where(positive, y, 1.0).log()
        sigma = softplus(z[:, 2])
        density = log_y + sigma.log() + 0.5 * math.log(2 * math.pi) + ((log_y - z[:, 1]) / sigma) ** 2 / 2
        return torch.where(positive, softplus(-z[:, 0]) + density, softplus(z[:, 0])).mean()
    return _plain_retrieval(task, head, own["table.weight"], z, y.long())


def _plain_retrieval(
    task: TaskSpec, head: torch.nn.Module, table: torch.Tensor, z: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    scores = z @ table.T
    if head.sampler is None:
        return -scores.log_softmax(-1)[torch.arange(len(y)), y].mean()
    log_q = head.sampler.log_q(torch.arange(task.size)).double()
    terms = []
    for n, item in enumerate(y.tolist()):
        others = [j for j in y.tolist() if j != item]
        s = scores[n] - log_q
        if head.loss_name == "sampled_softmax":
            terms.append(torch.stack([s[j] for j in [item, *others]]).logsumexp(0) - s[item])
        elif head.loss_name == "nce":
            shift = math.log(max(len(others), 1))
            noise = [torch.nn.functional.softplus(s[j] - shift) for j in others]
            terms.append(torch.nn.functional.softplus(shift - s[item]) + sum(noise))
        else:
            gaps = [torch.nn.functional.softplus(scores[n, j] - scores[n, item]) for j in others]
            terms.append(sum(gaps) / len(gaps) if gaps else scores[n, item] * 0)
    return torch.stack(terms).mean()


def _near(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, what: str) -> None:
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        got.detach().double(), expected.detach(), rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}"
    )


def _weightings(draw: random.Random, g: torch.Generator) -> None:
    """A task whose rows are all absent and poisoned changes no weight and no statistic of a dynamic weighting."""
    name = draw.choice(list(WEIGHTINGS))
    tasks = [TaskSpec(n, "binary") for n in "abc"]
    torch.manual_seed(draw.randrange(10**9))
    heads = MultiTaskHeads(5, tasks)
    shared = torch.nn.Linear(4, 5)
    weighting = WEIGHTINGS[name]("abc")
    for _ in range(3):
        x, labels = torch.randn(9, 4, generator=g), (torch.rand(9, generator=g) < 0.5).float()
        gone = torch.full((9,), draw.choice(POISON))
        masks = {"b": torch.zeros(9, dtype=torch.bool)}
        state = {k: v.clone() for k, v in weighting.state_dict().items() if isinstance(v, torch.Tensor)}
        losses = heads.losses(shared(x), {"a": labels, "b": gone, "c": 1 - labels}, masks)
        weighting(losses, shared=shared.parameters()).backward()
        if hasattr(weighting, "update"):
            weighting.update(losses.values.detach() * 0.9)
        weighting.end_epoch()
        assert weighting.effective_weights()["b"] == 0, f"{name} weighs a task without labels"
        for key, value in weighting.state_dict().items():
            if isinstance(value, torch.Tensor):
                assert key == "first_losses" or value.isfinite().all(), f"{name}: {key} is not finite"
                if value.shape == (3,):
                    before, after = state[key][1].nan_to_num(-1), value[1].nan_to_num(-1)
                    assert torch.equal(before, after), f"{name}: {key} of the absent task moved"
        assert all(p.grad.isfinite().all() for p in shared.parameters()), f"{name}: a gradient is not finite"


def _metrics(draw: random.Random, g: torch.Generator) -> None:
    """Metrics over poisoned absent rows equal metrics over the present rows alone, in other batches."""
    rows, items = draw.randint(1, 40), draw.randint(2, 9)
    scores = torch.randint(0, 5, (rows, items), generator=g).double() / 4
    relevant, mask = torch.rand(rows, items, generator=g) < 0.3, torch.rand(rows, generator=g) < 0.6
    spoiled = torch.where(mask[:, None], scores, draw.choice(POISON[:3]))
    labels = _poisoned(relevant.double(), mask, draw)
    step = draw.randint(1, rows)
    for make in (lambda: RankingMetrics((1, 3)), lambda: AUROC(items), lambda: CalibrationError(4)):
        whole, parts = make(), make()
        whole.update(scores[mask], relevant[mask])
        for first in range(0, rows, step):
            at = slice(first, first + step)
            parts.update(spoiled[at], labels[at], mask=mask[at])
        one, two = whole.compute(), parts.compute()
        one, two = (v if isinstance(v, dict) else {"value": v} for v in (one, two))
        for key in one:
            a, b = torch.as_tensor(one[key]).double(), torch.as_tensor(two[key]).double()
            torch.testing.assert_close(
                a, b, rtol=1e-12, atol=1e-12, equal_nan=True, msg=f"{type(whole).__name__} {key}"
            )
