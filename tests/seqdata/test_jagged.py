"""Jagged sequences to padded, to torch, and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from seqdata import Jagged


@pytest.fixture
def jagged():
    return Jagged({"a": np.arange(6), "v": np.arange(12.0).reshape(6, 2)}, np.array([0, 2, 2, 6]))


def test_lengths(jagged):
    assert jagged.lengths.tolist() == [2, 0, 4]
    assert jagged.max_len == 4
    assert len(jagged) == 3
    assert Jagged({}, np.zeros(1, np.int64)).max_len == 0


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_and_back(jagged, kind, side):
    source = jagged if kind == "numpy" else jagged.torch()
    padded, mask = source.to_padded(fill={"a": -1}, side=side)
    rows = {"right": [[0, 1, -1, -1], [-1] * 4, [2, 3, 4, 5]], "left": [[-1, -1, 0, 1], [-1] * 4, [2, 3, 4, 5]]}
    assert padded["a"].tolist() == rows[side]
    assert padded["v"].shape == (3, 4, 2)
    assert mask.sum() == 6
    back = Jagged.from_padded(padded, mask)
    assert back.offsets.tolist() == [0, 2, 2, 6]
    assert back["a"].tolist() == list(range(6))
    assert back["v"].tolist() == jagged["v"].tolist()


def test_padding_to_a_width_keeps_the_last_rows(jagged):
    padded, mask = jagged.to_padded(3)
    assert padded["a"].tolist() == [[0, 1, 0], [0, 0, 0], [3, 4, 5]]
    assert mask.tolist() == [[True, True, False], [False] * 3, [True] * 3]
    with pytest.raises(ValueError, match="side='up'"):
        jagged.to_padded(side="up")


def test_nested_and_back(jagged):
    nested = jagged.to_nested()
    assert [row.tolist() for row in nested["a"].unbind()] == [[0, 1], [], [2, 3, 4, 5]]
    back = Jagged.from_nested(nested)
    assert torch.equal(back["a"], torch.arange(6))
    assert back.offsets.tolist() == [0, 2, 2, 6]


def test_keyed_as_torchrec_lays_it_out():
    jagged = Jagged(
        {"a": np.arange(5), "b": np.arange(5) * 10, "timestamp": np.arange(5), "x": np.ones(5)}, [0, 2, 2, 5]
    )
    jagged = Jagged(jagged.values, np.array(jagged.offsets))
    keyed = jagged.to_keyed_jagged()
    assert keyed["keys"] == ["a", "b"]
    assert keyed["values"].tolist() == [0, 1, 2, 3, 4, 0, 10, 20, 30, 40]
    assert keyed["lengths"].tolist() == [2, 0, 3, 2, 0, 3]
    assert keyed["offsets"].tolist() == [0, 2, 2, 5, 7, 7, 10]
    # feature k of sequence i lies between offsets k * B + i and the next
    assert jagged.to_keyed_jagged(["b"])["values"].tolist() == [0, 10, 20, 30, 40]
    for fields in ([], ["a", "x"]):
        with pytest.raises(ValueError, match="needs one-dimensional fields of one dtype"):
            jagged.to_keyed_jagged(fields)
