"""Values and ids of a categorical field."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from seqdata import layout
from seqdata.encode import hashed_ids
from seqdata.fields import MISSING, UNKNOWN, Hashed
from seqdata.hashing import bucket
from seqdata.layout import one_chunk

# a text vocabulary so many times longer than what is looked for is not made into a hash table for it
SEVERAL = 4


class Vocabulary:
    """Ids of a field: 0 is missing, 1 unknown (1..k with k unknown buckets), then the values; `len()` counts all ids.

    A hashed field has no values; it still encodes.
    """

    def __init__(self, path: Path, entry: dict[str, Any], mapped: np.ndarray | None = None) -> None:
        self.kind = pa.int64() if entry["values"] == "int64" else pa.string()
        self.hashed = Hashed(entry["buckets"], entry["seed"]) if entry["kind"] == "hashed" else None
        self.buckets: int = entry.get("oov_buckets", 1)
        self.first_value = UNKNOWN + self.buckets
        self._size: int = entry["size"]
        if self.hashed is not None:
            self.table = pa.table({"value": pa.array([], self.kind), "count": pa.array([], pa.int64())})
        else:
            self.table = layout.read_table(path, mapped)
            if len(self.table) + self.first_value != self._size:
                raise layout.StoreError(
                    f"{path} holds {len(self.table)} values; schema.json says {self._size - self.first_value}"
                )
        # a long vocabulary is several chunks; they stay on disk
        self._values = self.table.column("value")
        self._starts = np.cumsum([0, *map(len, self._values.chunks)])
        self._sorted: tuple[np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return self._size

    @property
    def values(self) -> np.ndarray:
        """Values in the order of their ids; the first one has id `first_value`, 2 unless there are unknown buckets."""
        return self._values.to_numpy()

    @property
    def counts(self) -> np.ndarray:
        """int64 events before the fit cutoff of each value."""
        return self.table.column("count").to_numpy()

    def encode(self, values: Iterable[Any] | pa.Array) -> np.ndarray:
        """int32 ids of values; null is 0, a value the vocabulary lacks is 1 (or its unknown bucket).

        Args:
            values: integers or text as the field holds them, [n]

        Raises:
            TypeError: values of another type
        """
        array = _to_arrow(values)
        if array.type != self.kind:
            try:
                array = array.cast(self.kind)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                raise TypeError(f"encode: got values of type {array.type}; this vocabulary holds {self.kind}") from None
        valid = array.is_valid().to_numpy(zero_copy_only=False)
        ids = np.full(len(array), MISSING, np.int32)
        known = array.drop_null()
        if self.hashed is not None:
            ids[valid] = hashed_ids(known, self.hashed)
            return ids
        found = self._find_integers(known) if self.kind == pa.int64() else self._find_texts(known)
        unknown = found < 0
        found += np.int32(self.first_value)
        if unknown.any():
            found[unknown] = bucket(known.filter(pa.array(unknown)), self.buckets)
        ids[valid] = found
        return ids

    def decode(self, ids: Any) -> list[Any]:
        """Values of ids; missing and unknown ids decode to None.

        Args:
            ids: any number of ids, flattened

        Raises:
            IndexError: an id is not in the vocabulary
            TypeError: a hashed field keeps no values
        """
        ids = np.asarray(ids, np.int64).ravel()
        if len(ids) and (ids.min() < 0 or ids.max() >= len(self)):
            raise IndexError(f"decode: ids {ids.min()}..{ids.max()}; this vocabulary has ids 0..{len(self) - 1}")
        if self.hashed is not None:
            raise TypeError("decode: a hashed field does not keep its values")
        return self.take(ids).to_pylist()

    def take(self, ids: np.ndarray) -> pa.Array:
        """Arrow array of the values of ids [n], null for missing and unknown ones."""
        places = np.asarray(ids, np.int64) - self.first_value
        if self._values.num_chunks <= 1:
            return one_chunk(self._values).take(pa.array(places, mask=places < 0))
        order = np.argsort(places, kind="stable")
        borders = np.searchsorted(places[order], self._starts)
        found = [pa.nulls(int(borders[0]), self.kind)]
        for i, chunk in enumerate(self._values.chunks):
            found.append(chunk.take(pa.array(places[order[borders[i] : borders[i + 1]]] - self._starts[i])))
        back = np.empty(len(order), np.int64)
        back[order] = np.arange(len(order))
        return pa.concat_arrays(found).take(pa.array(back))

    def to_parquet(self, path: str | os.PathLike) -> None:
        """Writes (id, value, count), one row a value.

        Args:
            path: the file to write
        """
        ids = (
            pa.array(np.arange(self.first_value, len(self), dtype=np.int32))
            if self.hashed is None
            else pa.array([], pa.int32())
        )
        temporary = f"{os.fspath(path)}.part"
        pq.write_table(
            pa.table({"id": ids, "value": self.table.column("value"), "count": self.table.column("count")}), temporary
        )
        os.replace(temporary, path)

    def _find_integers(self, values: pa.Array) -> np.ndarray:
        if self._sorted is None:
            plain = self._values.to_numpy()
            order = np.argsort(plain, kind="stable")
            self._sorted = plain[order], order.astype(np.int32)
        known, order = self._sorted
        wanted = values.to_numpy()
        if not len(known):
            return np.full(len(wanted), -1, np.int32)
        at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        return np.where(known[at] == wanted, order[at], np.int32(-1))

    def _find_texts(self, values: pa.Array) -> np.ndarray:
        if len(self._values) < SEVERAL * len(values):
            found = pc.fill_null(pc.index_in(values, one_chunk(self._values)), -1)
            return np.array(found.to_numpy(zero_copy_only=False), np.int32)
        # few values are looked for in the long vocabulary as it streams by, not the other way round
        coded = values.dictionary_encode()
        places = np.full(len(coded.dictionary), -1, np.int32)
        for start, chunk in zip(self._starts, self._values.chunks, strict=False):
            at = pc.index_in(chunk, coded.dictionary)
            hits = np.flatnonzero(at.is_valid().to_numpy(zero_copy_only=False))
            places[at.drop_null().to_numpy()] = start + hits
        return places[coded.indices.to_numpy()]


def _to_arrow(values: Any) -> pa.Array:
    if isinstance(values, pa.ChunkedArray):
        return one_chunk(values)
    if isinstance(values, pa.Array):
        return values
    return pa.array(values if isinstance(values, np.ndarray) else list(values), from_pandas=True)
