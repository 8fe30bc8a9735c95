"""Vectors written as text, "[109  77 ... 98]", or as lists, to one matrix."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from seqdata.fields import Vector, is_list, is_text

# floats hold every integer up to here
EXACT = 1 << 53
SEPARATORS = np.zeros(256, bool)
SEPARATORS[list(b" \t\n\r[](),;")] = True


def parse_vectors(values: pa.Array, spec: Vector, width: int | None, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Matrix [n, width] of an array without nulls, and a bool mask [n] of the values that are no such vector.

    Args:
        values: text such as "[109 77 98]", or lists [n]
        spec: how vectors are stored
        width: numbers per vector; None takes the width of the first value
        where: what the column is called in messages

    Raises:
        ValueError: the array has another type
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
    if flat.null_count or not (pa.types.is_floating(flat.type) or pa.types.is_integer(flat.type)):
        flat = pc.fill_null(flat.cast(pa.float64()), np.nan)
    numbers = flat.to_numpy(zero_copy_only=False).reshape(-1, width)
    return _place(numbers, bad, width, spec)


def _from_texts(values: pa.Array, spec: Vector, width: int | None) -> tuple[np.ndarray, np.ndarray]:
    if spec.dtype == "uint8" and width is not None and len(values):
        out, plain = _digits(values.cast(pa.large_string()), width)
        bad = np.zeros(len(values), bool)
        rest = np.flatnonzero(~plain)
        if len(rest):
            out[rest], bad[rest] = _any_text(values.take(pa.array(rest)), spec, width)
        return out, bad
    return _any_text(values, spec, width)


def _digits(texts: pa.Array, width: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 matrix [n, width], and a mask [n] of the texts that are `width` numbers of one to three digits up to 255.

    All bytes of all texts are looked at together; what is written otherwise is left to the general parser.
    """
    count = len(texts)
    _, offsets, data = texts.buffers()
    ends = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + count + 1]
    raw = np.frombuffer(data, np.uint8)[ends[0] : ends[-1]] if data is not None else np.zeros(0, np.uint8)
    ends = ends - ends[0]
    # three bytes more than there are, so that looking ahead needs no care
    padded = np.append(raw, np.zeros(3, np.uint8)) - np.uint8(48)
    digit = padded < 10
    odd = ~digit[: len(raw)] & ~SEPARATORS[raw]
    # a number begins at a digit after no digit, or at the first byte of a text
    goes_on = digit.copy()
    goes_on[1:] &= digit[:-1]
    goes_on[0] = False
    goes_on[ends] = False
    at = np.flatnonzero(digit & ~goes_on)
    value = padded[at].astype(np.int32)
    more = np.ones(len(at), bool)
    for step in (1, 2, 3):
        more &= goes_on[at + step]
        # a fourth digit makes it too large for a byte, whatever it is
        value = np.where(more, value * 10 + padded[at + step] + 256 * (step == 3), value)
    border = np.searchsorted(at, ends)
    wrong = np.append(0, np.cumsum(value > 255))
    strange = np.append(0, np.cumsum(odd))
    plain = (np.diff(border) == width) & (np.diff(wrong[border]) == 0) & (np.diff(strange[ends]) == 0)
    out = np.zeros((count, width), np.uint8)
    rows = np.flatnonzero(plain)
    out[rows] = value[border[rows][:, None] + np.arange(width)]
    return out, plain


def _any_text(values: pa.Array, spec: Vector, width: int | None) -> tuple[np.ndarray, np.ndarray]:
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
    if spec.dtype != "float32" and numbers.dtype != np.dtype(spec.dtype):
        low, high = (0, 255) if spec.dtype == "uint8" else (-EXACT, EXACT)
        wrong |= ((numbers < low) | (numbers > high) | (numbers != np.floor(numbers))).any(axis=1)
    if not bad.any() and not wrong.any():
        return numbers.astype(spec.dtype, copy=False), bad
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
