"""Every loss and every head compiles to one graph, forward and backward, and gives the eager numbers."""

import pytest
import torch

from mtl_heads import MultiTaskHeads, TaskSpec
from mtl_heads.losses import gather_dot, product_logit
from tests.mtl_heads.test_masks import CASES

NAN = float("nan")
MASK = torch.tensor([True, False, True, True, False, True, False])
RETRIEVAL = [
    TaskSpec(f"{loss}_{negatives}_{shared}", "retrieval", 12, loss=loss, head_options={
        "negatives": negatives, "shared": shared, "num_negatives": 5, "counts": torch.arange(12) + 1,
    })
    for negatives in ("uniform", "frequency", "in_batch", "all")
    for loss in ("sampled_softmax", "nce", "bpr")
    for shared in (True, False)
    if (negatives != "all" or loss == "sampled_softmax") and (negatives in ("uniform", "frequency") or shared)
]  # fmt: skip
TASKS = [
    TaskSpec("churn", "binary", loss="focal", loss_options={"normalise": "positives"}, hidden=(5,)),
    TaskSpec("buy", "binary", after="churn"),
    TaskSpec("category", "multilabel", 4),
    TaskSpec("mission", "multiclass", 3),
    TaskSpec("mood", "multiclass", 3, loss="focal"),
    TaskSpec("price", "regression", loss="huber", head_options={"transform": "log1p"}),
    TaskSpec("name", "vector", 3, loss="cosine"),
    TaskSpec("level", "ordinal", 4),
    TaskSpec("value", "ziln"),
    TaskSpec("next", "multiclass", 3, per_position=True, missing=-100),
]


def _compiled(function):
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


# Unmasked graphs are parts of the masked ones; the whole grid takes minutes.
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("masked", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_loss_is_one_graph(name, masked):
    function, x = CASES[name]
    mask = MASK if masked else None
    results = []
    for run in (function, _compiled(function)):
        leaf = x.clone().requires_grad_()
        value = run(leaf, mask)
        value.backward()
        results.append((value.detach(), leaf.grad))
    torch.testing.assert_close(results[1], results[0])


def test_scores_and_products_are_one_graph():
    queries, table = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    items = torch.randint(9, (6, 5))
    for function, inputs in (
        (lambda q, t: gather_dot(q, t, items), (queries, table)),
        (lambda q, t: product_logit([q[:, 0], t[:6, 0]]), (queries, table)),
    ):
        expected = torch.autograd.grad(function(*inputs).square().sum(), inputs)
        torch.testing.assert_close(torch.autograd.grad(_compiled(function)(*inputs).square().sum(), inputs), expected)


def _targets(tasks, n=7):
    g = torch.Generator().manual_seed(0)
    draw = {
        "binary": lambda t: (torch.rand(n, generator=g) < 0.5).float(),
        "multilabel": lambda t: (torch.rand(n, t.size, generator=g) < 0.5).float(),
        "multiclass": lambda t: torch.randint(t.size, (n,), generator=g),
        "ordinal": lambda t: torch.randint(t.size, (n,), generator=g),
        "retrieval": lambda t: torch.randint(t.size, (n,), generator=g),
        "regression": lambda t: torch.rand(n, generator=g) * 9,
        "ziln": lambda t: (torch.rand(n, generator=g) - 0.5).clamp_min(0),
        "vector": lambda t: torch.randn(n, t.size, generator=g),
    }
    return {task.name: draw[task.kind](task) for task in tasks}


@pytest.mark.parametrize("task", [*TASKS, *RETRIEVAL], ids=lambda task: task.name)
@pytest.mark.parametrize("how", ["masked", *(pytest.param(how, marks=pytest.mark.slow) for how in ("all", "left out"))])
def test_a_head_is_one_graph(task, how):
    tasks = [TASKS[0], task] if task.after else [task]
    targets, masks = _targets([task]), None
    if how == "masked":
        masks = {task.name: MASK}
        labels = targets[task.name]
        spoil = MASK.reshape(-1, *[1] * (labels.dim() - 1))
        targets[task.name] = torch.where(spoil, labels, NAN if labels.is_floating_point() else -999)
    elif how == "left out":
        targets = {}
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        heads = MultiTaskHeads(6, tasks)
        x = torch.randn(7, 6)
        if how == "masked":
            x = torch.where(MASK[:, None], x, NAN)
        x.requires_grad_()
        run = _compiled(heads.losses) if compiled else heads.losses
        torch.manual_seed(1)
        out = run(x, targets, masks, positions=x)
        out.values.sum().backward()
        gradients = {name: p.grad for name, p in heads.named_parameters()}
        results.append((out.values.detach(), out.counts, x.grad, gradients, dict(heads.named_buffers())))
    # Own negatives are drawn for the rows that have a label, of which a compiled graph has more.
    drawn = "False" in task.name and how == "masked"
    if drawn:
        assert results[1][0].isfinite() and torch.equal(results[1][1], results[0][1])
        assert (results[1][2][~MASK] == 0).all() and all(g.isfinite().all() for g in results[1][3].values())
    else:
        torch.testing.assert_close(results[1], results[0])


def test_one_graph_serves_batches_of_any_size():
    tasks = [TASKS[0], TASKS[5], *(task for task in RETRIEVAL if "in_batch" in task.name)]
    heads = MultiTaskHeads(6, tasks).eval()
    torch.compiler.reset()
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    run = torch.compile(lambda x, y: heads.losses(x, y).values, fullgraph=True, dynamic=True, backend=backend)
    for n in (7, 9, 12):
        x, targets = torch.randn(n, 6), _targets(tasks, n)
        torch.testing.assert_close(run(x, targets), heads.losses(x, targets).values)
    assert len(compiled) == 1


def test_all_heads_together_are_one_graph():
    heads = MultiTaskHeads(6, TASKS)
    x, targets = torch.randn(7, 6), _targets(TASKS)
    run = _compiled(lambda x: heads.losses(x, targets, positions=x).values)
    torch.testing.assert_close(run(x), heads.losses(x, targets, positions=x).values)


def test_a_label_out_of_range_ends_a_compiled_run_too():
    heads = MultiTaskHeads(6, [TaskSpec("churn", "binary")])
    run = _compiled(lambda x, y: heads.losses(x, {"churn": y}).values)
    assert run(torch.randn(3, 6), torch.tensor([0.0, 1.0, NAN])).isfinite().all()
    with pytest.raises(RuntimeError, match="targets of task 'churn': got a label out of range, needs 0, 1 or"):
        run(torch.randn(3, 6), torch.tensor([0.0, 1.0, -1.0]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor_gives_the_eager_numbers():
    tasks = [TASKS[0], TASKS[5], *(task for task in RETRIEVAL if task.name == "nce_in_batch_True")]
    heads = MultiTaskHeads(6, tasks).eval()
    targets = _targets(tasks)
    torch.compiler.reset()
    results = []
    for compiled in (False, True):
        x = torch.randn(7, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()

        def losses(x):
            return heads.losses(x, targets, positions=x).values

        values = (torch.compile(losses, fullgraph=True) if compiled else losses)(x)
        values.sum().backward()
        results.append((values.detach(), x.grad))
    torch.testing.assert_close(results[1], results[0])
