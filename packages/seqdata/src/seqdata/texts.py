"""Order and spread of texts, blobs and integers, eight bytes at a time."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from seqdata.hashing import mix
from seqdata.spool import stable_order


def text_order(values: pa.Array) -> np.ndarray:
    """int64 positions [n] that sort integers, texts or blobs [n] without nulls; texts by their UTF-8 bytes."""
    if pa.types.is_integer(values.type):
        return stable_order(values.to_numpy(zero_copy_only=False).astype(np.int64, copy=False))
    if len(values) < 2:
        return np.arange(len(values))
    # eight bytes behind what all values share tell most of them apart; only the rest is compared whole
    words = Bytes(values).words(_shared(values))
    order = np.argsort(words, kind="stable")
    words = words[order]
    same = words[1:] == words[:-1]
    tied = np.append(False, same) | np.append(same, False)
    if tied.any():
        rest = order[tied]
        order[tied] = rest[pc.sort_indices(values.take(pa.array(rest))).to_numpy()]
    return order


def spread(values: pa.Array) -> np.ndarray:
    """uint64 hash [n] of integers, texts or blobs [n] without nulls, to deal them out; it may change with a version."""
    if pa.types.is_integer(values.type):
        return mix(values.to_numpy(zero_copy_only=False).astype(np.int64, copy=False).view(np.uint64))
    texts = Bytes(values)
    hashes = texts.lengths.astype(np.uint64)
    longest = int(texts.lengths.max(initial=0))
    live: slice | np.ndarray = slice(None)
    for at in range(0, longest, 8):
        if at:
            live = np.flatnonzero(texts.lengths > at)
        hashes[live] = mix(hashes[live] ^ texts.words(at, live))
    return mix(hashes)


class Bytes:
    """The bytes of an array of texts or blobs."""

    def __init__(self, values: pa.Array) -> None:
        wide = pa.large_binary() if pa.types.is_binary(values.type) else pa.large_string()
        _, offsets, data = values.cast(wide).buffers()
        ends = np.frombuffer(offsets, np.int64)[: len(values) + 1]
        self.starts, self.lengths = ends[:-1], np.diff(ends)
        self._last = int(ends[-1])
        # arrays of Arrow's end on whole words, so that only the last few values need a copy with room behind it
        raw = b"" if data is None else memoryview(data)[: self._last]
        self._raw = np.frombuffer(bytes(raw) + bytes(8), np.uint8)

    def words(self, at: int, rows: slice | np.ndarray = slice(None)) -> np.ndarray:
        """uint64 of the eight bytes from byte `at` on, the first one highest; zeros behind the end of a value."""
        places = np.ndarray(len(self._raw) - 7, ">u8", self._raw, strides=(1,))
        starts, left = self.starts[rows] + at, np.clip(self.lengths[rows] - at, 0, 8)
        words = places[np.minimum(starts, self._last)].astype(np.uint64)
        gone = ((8 - left) * 8).astype(np.uint64)
        return np.where(left > 0, words >> gone << gone, np.uint64(0))


def _shared(values: pa.Array) -> int:
    extremes = pc.min_max(values)
    low, high = (extremes[key].as_py() for key in ("min", "max"))
    if isinstance(low, str):
        low, high = low.encode(), high.encode()
    size = min(len(low), len(high))
    differ = np.frombuffer(low, np.uint8, size) != np.frombuffer(high, np.uint8, size) if size else np.zeros(0, bool)
    return int(np.argmax(differ)) if differ.any() else size
