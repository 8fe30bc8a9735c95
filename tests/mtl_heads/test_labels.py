"""Labels out of their range are refused where they come in, and half precision loses none of what stands beside it."""

import pytest
import torch

from mtl_heads import FrequencySampler, MultiTaskHeads, TaskSpec

NAN = float("nan")
WRONG = [
    (TaskSpec("b", "binary"), [-1.0, 0.0], "got -1, needs 0, 1 or a probability"),
    (TaskSpec("b", "binary", loss="focal"), [2, 0], "got 2, needs 0, 1"),
    (TaskSpec("l", "multilabel", 2), [[0.0, 1.0], [NAN, 1.5]], "got 1.5, needs 0, 1"),
    (TaskSpec("o", "ordinal", 3), [7, -3], "got -3, 7, needs whole numbers 0 .. 2"),
    (TaskSpec("m", "multiclass", 3), [-100, 0], "got -100, needs whole numbers 0 .. 2"),
    (TaskSpec("m", "multiclass", 3), [1.5, 0.0], "got 1.5, needs whole numbers 0 .. 2"),
    (TaskSpec("z", "ziln"), [-5.0, 1.0], "got -5, needs finite numbers not below 0"),
    (TaskSpec("z", "ziln"), [float("inf"), 1.0], "got inf, needs finite"),
    (TaskSpec("r", "regression"), [float("inf"), 1.0], "got inf, needs finite numbers"),
    (TaskSpec("r", "regression", head_options={"transform": "log1p"}), [-5.0, 1.0], "needs finite numbers above -1"),
    (TaskSpec("v", "vector", 2), [[float("inf"), 1.0], [0.0, 1.0]], "got inf, needs finite numbers"),
    (TaskSpec("i", "retrieval", 9), [9, 0], "got 9, needs items 0 .. 8"),
    (TaskSpec("i", "retrieval", 9), [1234567, 0], "got 1234567, needs items"),
]


@pytest.mark.parametrize(("task", "labels", "message"), WRONG)
def test_a_label_out_of_range_is_an_error_that_names_the_task(task, labels, message):
    heads = MultiTaskHeads(4, [task])
    labels = torch.tensor(labels)
    with pytest.raises(ValueError, match=f"targets of task '{task.name}': .*{message}"):
        heads.losses(torch.ones(2, 4), {task.name: labels})
    # Where it is absent it may be anything.
    mask = torch.tensor([task.kind == "multilabel", False])
    assert heads.losses(torch.ones(2, 4), {task.name: labels}, {task.name: mask}).values.isfinite().all()


def test_labels_of_any_dtype_are_read():
    heads = MultiTaskHeads(4, [TaskSpec("b", "binary"), TaskSpec("m", "multiclass", 3)])
    labels = {"b": torch.tensor([True, False]), "m": torch.tensor([2.0, 0.0])}
    same = {"b": torch.tensor([1.0, 0.0]), "m": torch.tensor([2, 0], dtype=torch.uint8)}
    assert torch.equal(heads.losses(torch.ones(2, 4), labels).values, heads.losses(torch.ones(2, 4), same).values)


def test_a_nan_that_a_mask_calls_present_is_an_error():
    heads = MultiTaskHeads(4, [TaskSpec("r", "regression")])
    with pytest.raises(ValueError, match="targets of task 'r': got nan, needs finite numbers"):
        heads.losses(torch.ones(2, 4), {"r": torch.tensor([1.0, NAN])}, {"r": torch.ones(2, dtype=torch.bool)})


def test_transforms_are_not_fitted_on_labels_out_of_range():
    heads = MultiTaskHeads(4, [TaskSpec("r", "regression", head_options={"transform": "log1p"})])
    with pytest.raises(ValueError, match="targets of task 'r': got -5, needs finite numbers above -1"):
        heads.fit_transforms({"r": torch.tensor([1.0, -5.0, NAN])})
    heads.fit_transforms({"r": torch.tensor([1.0, NAN, 3.0])})
    with pytest.raises(ValueError, match="labels: got -5, needs finite numbers above -1"):
        heads.head("r").transform.fit(torch.tensor([-5.0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_models_keep_exact_statistics_and_labels(dtype):
    tasks = [TaskSpec("r", "regression"), TaskSpec("b", "binary")]
    tasks += [
        TaskSpec(f"{n}_{loss}", "retrieval", 9, loss=loss, head_options={"negatives": n, "counts": torch.arange(9) + 1})
        for n in ("in_batch", "frequency", "uniform")
        for loss in ("sampled_softmax", "nce", "bpr")
    ]
    heads = MultiTaskHeads(8, tasks)
    heads.fit_transforms({"r": torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 300 + 1234.5})
    before = {name: buffer.clone() for name, buffer in heads.named_buffers()}
    heads.to(dtype)
    for name, buffer in heads.named_buffers():
        assert torch.equal(buffer, before[name]), name
    items = torch.arange(4)
    targets = {task.name: items for task in tasks if task.kind == "retrieval"}
    targets |= {"r": torch.full((4,), 1234.5), "b": torch.tensor([0.0, 1.0, 1.0, 0.3])}
    out = heads.losses(torch.zeros(4, 8, dtype=dtype), targets)
    out.values.sum().backward()
    assert out.values.dtype == torch.float32 and out.values.isfinite().all()
    z = (1234.5 - before["heads.r.transform.mean"]) / before["heads.r.transform.std"]
    bias = heads.head("r").out.bias.detach().float()
    torch.testing.assert_close(out["r"], (bias[0] - z) ** 2)


def test_a_frequency_sampler_draws_the_same_in_half():
    sampler = FrequencySampler(torch.arange(1, 3000))
    g = torch.Generator().manual_seed(0)
    expected = sampler.sample((50,), torch.device("cpu"), g)
    assert torch.equal(sampler.half().sample((50,), torch.device("cpu"), g.manual_seed(0)), expected)


@pytest.mark.parametrize("loss", ["sampled_softmax", "nce", "bpr"])
def test_in_batch_negatives_are_the_other_positives(loss):
    """Rows with the same item are no negatives of each other, nor is the row's own positive."""
    torch.manual_seed(0)
    head = MultiTaskHeads(4, [TaskSpec("i", "retrieval", 9, loss=loss, head_options={"negatives": "in_batch"})])
    x, items = torch.randn(4, 4), torch.tensor([3, 5, 3, 7])
    head.losses(x, {"i": items})
    head.eval()
    value = head.losses(x, {"i": items})["i"]
    retrieval = head.head("i")
    scores, log_q = retrieval.scores(retrieval(x)), retrieval.sampler.log_q(torch.arange(9))
    terms = []
    for n, item in enumerate(items.tolist()):
        others = [j for j in items.tolist() if j != item]
        s = scores[n] - log_q
        if loss == "sampled_softmax":
            terms.append(torch.stack([s[item], *(s[j] for j in others)]).logsumexp(0) - s[item])
        elif loss == "nce":
            shift = torch.tensor(float(len(others))).log()
            noise = sum(torch.nn.functional.softplus(s[j] - shift) for j in others)
            terms.append(torch.nn.functional.softplus(shift - s[item]) + noise)
        else:
            gaps = torch.stack([scores[n, j] - scores[n, item] for j in others])
            terms.append(torch.nn.functional.softplus(gaps).mean())
    torch.testing.assert_close(value, torch.stack(terms).mean())


def test_a_batch_of_one_row_has_no_negative():
    tasks = [
        TaskSpec(loss, "retrieval", 30, loss=loss, head_options={"negatives": "in_batch"}) for loss in ("bpr", "nce")
    ]
    heads = MultiTaskHeads(8, tasks)
    x = torch.randn(1, 8)
    assert heads.losses(x, {"bpr": torch.tensor([3])})["bpr"] == 0
    optimiser = torch.optim.Adam(heads.parameters(), 0.05)
    for _ in range(200):
        optimiser.zero_grad()
        heads.losses(x, {"nce": torch.tensor([3])})["nce"].backward()
        optimiser.step()
    assert heads.head("nce").scores(heads(x)["nce"])[0, 3].sigmoid() > 0.95
