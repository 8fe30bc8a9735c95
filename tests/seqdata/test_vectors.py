"""Vectors in text, against a parser of one line."""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqdata import Vector
from seqdata.vectors import parse_vectors


def one(text: str, width: int) -> list[int] | None:
    pieces = [piece for piece in re.split(r"[\s,;\[\]()]+", text) if piece]
    if len(pieces) != width or not all(re.fullmatch(r"\d+", piece) and int(piece) <= 255 for piece in pieces):
        return None
    return [int(piece) for piece in pieces]


@given(
    st.lists(
        st.one_of(
            st.lists(st.integers(0, 300), min_size=2, max_size=4).map(lambda row: str(row).replace(",", " ")),
            st.lists(st.integers(0, 9999), min_size=3, max_size=3).map(lambda row: " ".join(map(str, row))),
            st.text(alphabet="0123456789 ", min_size=1, max_size=12),
        ),
        min_size=1,
        max_size=20,
    ),
    st.integers(0, 3),
)
def test_bytes_equal_the_simple_parser(texts, skip):
    array = pa.array(["[0 0 0]"] * skip + texts).slice(skip)
    matrix, bad = parse_vectors(array, Vector(3), 3, "here")
    for text, row, wrong in zip(texts, matrix.tolist(), bad.tolist(), strict=True):
        expected = one(text, 3)
        assert wrong == (expected is None), text
        if expected is not None:
            assert row == expected


def test_irregular_spellings():
    texts = [
        "[1 2 3]",
        "1,2,3",
        " [ 1\n2\t3 ]",
        "(1;2;3)",
        "[1. 2. 3.]",
        "[1 2 3.5]",
        "[1 2 -3]",
        "[1 2]",
        "",
        "[1 2 256]",
    ]
    matrix, bad = parse_vectors(pa.array(texts), Vector(3), 3, "here")
    assert bad.tolist() == [False] * 5 + [True] * 5
    assert (matrix[:5] == [1, 2, 3]).all()


def test_floats_and_width_from_the_data():
    matrix, bad = parse_vectors(pa.array(["[0.5 -2e3]", "[1 nan]"]), Vector(dtype="float32"), None, "here")
    assert matrix[0].tolist() == [0.5, -2000.0]
    assert bad.tolist() == [False, True]
    lists = pa.array([[1.5, 2.5], [1.0, None], [1.0]], pa.list_(pa.float32()))
    matrix, bad = parse_vectors(lists, Vector(dtype="float32"), None, "here")
    assert bad.tolist() == [False, True, True]
    with pytest.raises(ValueError, match="needs text such as"):
        parse_vectors(pa.array([1, 2]), Vector(2), 2, "here")
    assert np.array_equal(parse_vectors(pa.array([], pa.string()), Vector(2), 2, "here")[0], np.zeros((0, 2), np.uint8))
