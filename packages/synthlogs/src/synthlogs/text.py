"""Columns of text that is computed rather than looked up: times, vectors of numbers, random ids."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from synthlogs.draws import mixed


def strings(letters: NDArray[np.uint8]) -> pa.Array:
    """Return rows of ASCII letters [n, width] as an Arrow string array [n]."""
    offsets = np.arange(len(letters) + 1, dtype=np.int32) * letters.shape[1]
    return pa.StringArray.from_buffers(len(letters), pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(letters)))


def time_text(seconds: NDArray[np.int64]) -> pa.Array:
    """Return seconds since 1970 [n] as ``YYYY-MM-DD HH:MM:SS`` in an Arrow string array [n]."""
    text = seconds.astype("datetime64[s]").astype("S19")
    letters = np.frombuffer(text.tobytes(), np.uint8).reshape(-1, 19).copy()
    letters[:, 10] = ord(" ")
    return strings(letters)


def vector_text(vectors: NDArray[np.uint8]) -> pa.Array:
    """Return each row [n, width] as numpy would print it, e.g. ``[109  77  31]``, as an Arrow string array [n]."""
    if not len(vectors):
        return pa.array([], pa.string())
    digits = 1 + (vectors.max(1) >= 10).astype(np.int64) + (vectors.max(1) >= 100)
    if (digits == 3).all():
        return _fixed_width_text(vectors, 3)
    order, pieces = [], []
    for width in np.unique(digits):
        order.append(np.flatnonzero(digits == width))
        pieces.append(_fixed_width_text(vectors[order[-1]], int(width)))
    return pa.concat_arrays(pieces).take(pa.array(np.argsort(np.concatenate(order))))


def hexadecimal(digits: int, number: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return `number` random strings of `digits` hexadecimal letters as bytes [number, digits]."""
    return np.frombuffer(b"0123456789abcdef", np.uint8)[rng.integers(0, 16, (number, digits), np.uint8)]


def uuids(number: int, rng: np.random.Generator) -> pa.Array:
    """Return random row ids in the layout of a version-4 UUID."""
    letters = hexadecimal(36, number, rng)
    letters[:, [8, 13, 18, 23]] = ord("-")
    letters[:, 14] = ord("4")
    letters[:, 19] = np.frombuffer(b"89ab", np.uint8)[rng.integers(0, 4, number)]
    return strings(letters)


def uuids_of(numbers: NDArray[np.int64], seed: int) -> pa.Array:
    """Return an id in the layout of a version-4 UUID for each number [n]; the same number has the same id."""
    start = np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
    lanes = [mixed(mixed(numbers.astype(np.uint64) * np.uint64(2) + np.uint64(i)) ^ start) for i in range(2)]
    nibbles = np.stack(lanes, 1).astype(">u8").view(np.uint8).reshape(-1, 16)
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)
    hexadecimals = digits[np.stack([nibbles >> 4, nibbles & 15], 2).reshape(-1, 32)]
    letters = np.full((len(numbers), 36), ord("-"), np.uint8)
    letters[:, np.delete(np.arange(36), [8, 13, 18, 23])] = hexadecimals
    letters[:, 14] = ord("4")
    letters[:, 19] = digits[8 + (nibbles[:, 8] & 3)]
    return strings(letters)


def _fixed_width_text(vectors: NDArray[np.uint8], digits: int) -> pa.Array:
    table = np.array([f"{value:{digits}d} " for value in range(256)], f"S{digits + 1}")
    table = np.frombuffer(table.tobytes(), np.uint8).reshape(256, digits + 1)
    letters = np.empty((len(vectors), 1 + vectors.shape[1] * (digits + 1)), np.uint8)
    letters[:, 0] = ord("[")
    letters[:, 1:] = table[vectors].reshape(len(vectors), -1)
    letters[:, -1] = ord("]")
    return strings(letters)
