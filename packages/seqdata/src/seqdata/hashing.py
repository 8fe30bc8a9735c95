"""A 64-bit hash of integers and texts that never changes, for shards, hashed ids and unknown buckets."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from seqdata.fields import UNKNOWN

PLAIN_PRIME = 0x100000001B3
PRIME = np.uint64(PLAIN_PRIME)
WORD = (1 << 64) - 1
# so many texts left make a pass over a byte position worth its while
FEW = 32
BASIS = np.uint64(0xCBF29CE484222325)


def hash_values(values: pa.Array, seed: int = 0) -> np.ndarray:
    """uint64 hash [n] of an int64 or string array without nulls.

    Integers go through splitmix64, texts through FNV-1a over their UTF-8 bytes and then splitmix64.

    Args:
        values: [n] of int64 or string
        seed: another seed is another hash
    """
    if pa.types.is_integer(values.type):
        return mix(values.to_numpy(zero_copy_only=False).astype(np.int64).view(np.uint64), seed)
    return mix(_fnv(values.cast(pa.large_string())), seed)


def bucket(values: pa.Array, buckets: int) -> np.ndarray:
    """Ids 1..buckets of values outside a vocabulary.

    Args:
        values: [n] of int64 or string, without nulls
        buckets: how many there are
    """
    if buckets == 1:
        return np.full(len(values), UNKNOWN, np.int32)
    return (UNKNOWN + hash_values(values) % np.uint64(buckets)).astype(np.int32)


def mix(words: np.ndarray, seed: int = 0) -> np.ndarray:
    """splitmix64 of uint64 words [n] (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).

    Args:
        words: uint64 [n]
        seed: another seed is another hash
    """
    words = words + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF)
    words ^= words >> np.uint64(30)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words


def _fnv(texts: pa.Array) -> np.ndarray:
    count = len(texts)
    _, offsets, data = texts.buffers()
    out = np.full(count, BASIS, np.uint64)
    if not count or data is None:
        return out
    starts = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + count + 1]
    lengths, starts = np.diff(starts), starts[:-1]
    raw = np.frombuffer(data, np.uint8)
    # one pass per byte position over the texts that are that long, longest texts first
    order = np.argsort(-lengths, kind="stable")
    starts, lengths, words = starts[order], lengths[order], out[order]
    live = np.searchsorted(-lengths, -np.arange(1, int(lengths[0]) + 1), "right")
    passes = int(np.searchsorted(-live, -FEW, "right"))
    for position, alive in enumerate(live[:passes]):
        words[:alive] = (words[:alive] ^ raw[starts[:alive] + position]) * PRIME
    # a pass costs more than the bytes of a few texts one by one
    for i in range(int(live[passes]) if passes < len(live) else 0):
        word = int(words[i])
        for byte in raw[starts[i] + passes : starts[i] + lengths[i]].tobytes():
            word = (word ^ byte) * PLAIN_PRIME & WORD
        words[i] = word
    out[order] = words
    return out
