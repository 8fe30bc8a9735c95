"""Heads: shapes, units, transforms, per-position tasks, state."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_heads import MultiTaskHeads, TargetTransform, TaskSpec

TASKS = [
    TaskSpec("churn", "binary", hidden=(5,), dropout=0.1),
    TaskSpec("category", "multilabel", 4),
    TaskSpec("mission", "multiclass", 3, loss="focal"),
    TaskSpec("price", "regression", loss="huber", head_options={"transform": "log1p"}),
    TaskSpec("name", "vector", 16, loss="cosine"),
    TaskSpec("level", "ordinal", 5),
    TaskSpec("value", "ziln"),
    TaskSpec("sku", "retrieval", 12, head_options={"d_item": 7}),
    TaskSpec("next", "binary", per_position=True),
]


@pytest.mark.parametrize("n", [1, 7])
def test_outputs_and_predictions_have_the_documented_shapes(n):
    heads = MultiTaskHeads(6, TASKS).eval()
    out = heads(torch.randn(n, 6), torch.randn(11, 6))
    shapes = {name: tuple(value.shape) for name, value in out.items()}
    assert shapes == {
        "churn": (n,), "category": (n, 4), "mission": (n, 3), "price": (n,), "name": (n, 16), "level": (n, 4),
        "value": (n, 3), "sku": (n, 7), "next": (11,),
    }  # fmt: skip
    predicted = heads.predict(torch.randn(n, 6))
    assert "next" not in predicted
    assert ((predicted["churn"] >= 0) & (predicted["churn"] <= 1)).all()
    torch.testing.assert_close(predicted["mission"].sum(-1), torch.ones(n))
    torch.testing.assert_close(predicted["level"].sum(-1), torch.ones(n))
    assert (predicted["level"] > 0).all() and (predicted["value"] >= 0).all()
    assert heads.head("sku").scores(out["sku"]).shape == (n, 12)


def test_per_position_labels_count_each_position():
    heads = MultiTaskHeads(6, TASKS)
    features, positions = torch.randn(3, 6), torch.randn(8, 6)
    labels = torch.tensor([1.0, 0, float("nan"), 1, float("nan"), 0, 0, 1])
    out = heads.losses(features, {"next": labels}, positions=positions)
    here = ~labels.isnan()
    logits = heads(features, positions)["next"][here]
    torch.testing.assert_close(out["next"], torch.nn.functional.binary_cross_entropy_with_logits(logits, labels[here]))
    assert out.counts[heads.names.index("next")] == 6
    with pytest.raises(ValueError, match="positions must be given for the per-position task 'next'"):
        heads.losses(features, {})


def test_padded_positions_are_rows_too():
    heads = MultiTaskHeads(6, [TaskSpec("next", "multiclass", 3, per_position=True, missing=-100)])
    x, labels = torch.randn(2, 4, 6), torch.tensor([[0, 2, -100, -100], [1, 1, 0, -100]])
    out = heads.losses(x[:, 0], {"next": labels}, positions=x)
    here = labels >= 0
    expected = torch.nn.functional.cross_entropy(heads.head("next")(x[here]), labels[here])
    torch.testing.assert_close(out["next"], expected)


@given(st.lists(st.floats(0, 1e6, width=32), min_size=2, max_size=20), st.sampled_from(["identity", "log1p", "asinh"]))
@settings(deadline=None, max_examples=40)
def test_a_transform_and_its_inverse_cancel(values, name):
    labels = torch.tensor(values)
    transform = TargetTransform(name).fit(labels)
    z = transform(labels)
    assert abs(float(z.double().mean())) < 1e-2
    torch.testing.assert_close(transform.inverse(z), labels, rtol=1e-3, atol=max(values) * 1e-5 + 1e-3)


def test_transforms_are_fitted_on_present_labels_and_saved():
    heads = MultiTaskHeads(6, TASKS)
    heads.fit_transforms({"price": torch.tensor([1.0, float("nan"), 3.0]), "churn": torch.ones(3)})
    transform = heads.head("price").transform
    expected = torch.log1p(torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(transform.mean, expected.mean())
    torch.testing.assert_close(transform.std, expected.std(correction=0))
    again = MultiTaskHeads(6, TASKS)
    again.load_state_dict(heads.state_dict())
    assert torch.equal(again.head("price").transform.std, transform.std)
    with pytest.raises(ValueError, match="at least one present label"):
        transform.fit(torch.zeros(2), torch.zeros(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="transform must be one of"):
        TargetTransform("sqrt")


def test_ordinal_thresholds_rise_whatever_the_parameters():
    heads = MultiTaskHeads(6, [TaskSpec("level", "ordinal", 6)])
    with torch.no_grad():
        heads.head("level").steps.copy_(torch.randn(4) * 20)
    logits = heads(torch.randn(5, 6))["level"]
    assert (logits[:, 1:] <= logits[:, :-1]).all()


def test_each_head_can_learn():
    torch.manual_seed(0)
    heads = MultiTaskHeads(5, [t for t in TASKS if not t.per_position and t.name != "sku"])
    x = torch.randn(64, 5)
    targets = {
        "churn": (x[:, 0] > 0).float(),
        "category": (x[:, :4] > 0).float(),
        "mission": (x[:, 0] > 0).long() + (x[:, 1] > 0),
        "price": (x[:, 0] * 2).exp(),
        "name": x.repeat(1, 4)[:, :16],
        "level": (x[:, 0] * 2).round().clamp(-2, 2).long() + 2,
        "value": torch.where(x[:, 1] > 0, x[:, 0].exp(), 0.0),
    }
    heads.fit_transforms(targets)
    optimiser = torch.optim.Adam(heads.parameters(), 0.05)
    first = heads.losses(x, targets).values.detach()
    for _ in range(80):
        optimiser.zero_grad()
        heads.losses(x, targets).values.sum().backward()
        optimiser.step()
    last = heads.losses(x, targets).values.detach()
    assert (last < 0.7 * first).all(), (first, last)


def test_errors_name_the_task():
    heads = MultiTaskHeads(6, TASKS[:2])
    with pytest.raises(ValueError, match="unknown task 'churns', known tasks: churn, category"):
        heads.losses(torch.zeros(2, 6), {"churns": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"targets of task 'churn' must start with \(2,\), got \(3,\)"):
        heads.losses(torch.zeros(2, 6), {"churn": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"masks\['churn'\] must be boolean"):
        heads.losses(torch.zeros(2, 6), {"churn": torch.zeros(2)}, {"churn": torch.zeros(2)})
