import pytest

from mtl_heads import MultiTaskHeads, TaskSpec, parse_task_weights


def test_parse_task_weights_reads_names_and_numbers():
    assert parse_task_weights("churn:1.0, price:0.5") == {"churn": 1.0, "price": 0.5}
    assert parse_task_weights("a:1e-3") == {"a": 0.001}
    assert parse_task_weights("a:0", tasks=["a", "b"]) == {"a": 0.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("churn", "must look like \"churn:1.0,price:0.5\", got 'churn'"),
        ("", "must look like"),
        ("churn:1,", "must look like"),
        (":1", "must look like"),
        ("churn:much", "weight of task 'churn' must be a number, got 'much'"),
        ("churn:-1", "must be finite and >= 0"),
        ("churn:nan", "must be finite and >= 0"),
        ("churn:inf", "must be finite and >= 0"),
        ("churn:1,churn:2", "'churn' appears twice"),
        ("chrun:1", "unknown task 'chrun' in the task weights, known tasks: churn, price"),
    ],
)
def test_parse_task_weights_explains_itself(text, message):
    with pytest.raises(ValueError, match=message):
        parse_task_weights(text, tasks=["churn", "price"] if "chrun" in text else None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "a.b", "kind": "binary"}, "name must be non-empty without dots"),
        ({"name": "a", "kind": "boolean"}, "kind of task 'a' must be one of binary"),
        ({"name": "a", "kind": "binary", "weight": -1}, "weight of task 'a' must be finite and >= 0"),
        ({"name": "a", "kind": "multiclass"}, "size of multiclass task 'a' must be >= 2"),
        ({"name": "a", "kind": "binary", "size": 3}, "size of binary task 'a' must be 1"),
        ({"name": "a", "kind": "regression", "after": "b"}, "after is for binary tasks only"),
    ],
)
def test_a_task_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TaskSpec(**options)


def test_a_task_list_that_makes_no_sense_is_refused():
    a, b = TaskSpec("a", "binary"), TaskSpec("b", "binary", after="c")
    with pytest.raises(ValueError, match="distinct names"):
        MultiTaskHeads(3, [a, a])
    with pytest.raises(ValueError, match="after of task 'b' must name another task"):
        MultiTaskHeads(3, [a, b])
    with pytest.raises(ValueError, match="must name a binary task of the same rows"):
        MultiTaskHeads(3, [TaskSpec("c", "regression"), b])
    with pytest.raises(ValueError, match="loss of binary task 'a' must be one of bce, focal, got 'mse'"):
        MultiTaskHeads(3, [TaskSpec("a", "binary", loss="mse")])
