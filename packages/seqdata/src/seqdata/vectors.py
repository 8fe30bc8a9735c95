"""Vectors written as text, "[109  77 ... 98]", or as lists, to one matrix."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from seqdata.fields import Vector, is_list, is_text


def parse_vectors(values: pa.Array, spec: Vector, width: int | None, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Matrix [n, width] of an array without nulls, and a bool mask [n] of the values that are no such vector.

    width: numbers per vector; None takes the width of the first value.
    """
    if is_list(values.type):
        return _from_lists(values, spec, width)
    if is_text(values.type):
        return _from_texts(values, spec, width)
    raise ValueError(f"{where}: has type {values.type}; a Vector needs text such as '[109 77 98]' or lists")


def _from_lists(values: pa.Array, spec: Vector, width: int | None) -> tuple[np.ndarray, np.ndarray]:
    lengths = pc.list_value_length(values).to_numpy(zero_copy_only=False)
    width = width or (int(lengths[0]) if len(lengths) else 1)
    bad = lengths != width
    good = values.filter(pa.array(~bad)) if bad.any() else values
    flat = good.flatten()
    numbers = pc.fill_null(flat.cast(pa.float64()), np.nan).to_numpy(zero_copy_only=False).reshape(-1, width)
    return _place(numbers, bad, width, spec)


def _from_texts(values: pa.Array, spec: Vector, width: int | None) -> tuple[np.ndarray, np.ndarray]:
    # whitespace, commas and brackets only separate; what remains must be `width` numbers
    texts = pc.utf8_trim(values.cast(pa.string()), characters=" \t\n\r[]()")
    texts = pc.replace_substring_regex(texts, r"[\s,;]+", " ")
    pieces = pc.split_pattern(texts, " ")
    lengths = pc.list_value_length(pieces).to_numpy(zero_copy_only=False)
    width = width or (int(lengths[0]) if len(lengths) else 1)
    bad = lengths != width
    good = pieces.filter(pa.array(~bad)) if bad.any() else pieces
    flat = good.flatten()
    try:
        numbers = flat.cast(pa.float64()).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid:
        numbers = np.array([_number(text) for text in flat.to_pylist()])
    return _place(numbers.reshape(-1, width), bad, width, spec)


def _place(numbers: np.ndarray, bad: np.ndarray, width: int, spec: Vector) -> tuple[np.ndarray, np.ndarray]:
    wrong = ~np.isfinite(numbers).all(axis=1)
    if spec.dtype == "uint8":
        wrong |= ((numbers < 0) | (numbers > 255) | (numbers != np.floor(numbers))).any(axis=1)
    out = np.zeros((len(bad), width), spec.dtype)
    out[~bad] = np.where(wrong[:, None], 0, numbers).astype(spec.dtype)
    bad = bad.copy()
    bad[~bad] = wrong
    return out, bad


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return np.nan
