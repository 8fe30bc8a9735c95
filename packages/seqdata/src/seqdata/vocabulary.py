"""Values and ids of a categorical field."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from seqdata import layout
from seqdata.fields import FIRST_VALUE, MISSING, UNKNOWN


class Vocabulary:
    """Ids of a field: 0 is missing, 1 unknown, 2.. the values; `len()` counts all ids."""

    def __init__(self, path: Path, entry: dict[str, Any]) -> None:
        self.kind = pa.int64() if entry["values"] == "int64" else pa.string()
        table = layout.read_table(path)
        if len(table) + FIRST_VALUE != entry["size"]:
            raise layout.StoreError(f"{path} holds {len(table)} values; schema.json says {entry['size'] - FIRST_VALUE}")
        self._values = _one(table.column("value"))
        self.counts = table.column("count").to_numpy()
        self._sorted: tuple[np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self._values) + FIRST_VALUE

    @property
    def values(self) -> np.ndarray:
        """[len - 2] values; the i-th one has id 2 + i."""
        return self._values.to_numpy(zero_copy_only=False)

    def encode(self, values: Iterable[Any] | pa.Array) -> np.ndarray:
        """int32 ids of values; null is 0, a value the vocabulary lacks is 1."""
        if not isinstance(values, pa.Array):
            if isinstance(values, pa.ChunkedArray):
                values = _one(values)
            else:
                values = pa.array(values if isinstance(values, np.ndarray) else list(values), from_pandas=True)
        if values.type != self.kind:
            try:
                values = values.cast(self.kind)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                raise TypeError(
                    f"encode: got values of type {values.type}; this vocabulary holds {self.kind}"
                ) from None
        ids = self._encode_integers(values) if self.kind == pa.int64() else self._encode_text(values)
        ids[values.is_null().to_numpy(zero_copy_only=False)] = MISSING
        return ids

    def decode(self, ids: Any) -> list[Any]:
        """Values of ids; missing (0) and unknown (1) decode to None."""
        ids = np.asarray(ids, np.int64).ravel()
        if len(ids) and (ids.min() < 0 or ids.max() >= len(self)):
            raise IndexError(f"decode: ids {ids.min()}..{ids.max()}; this vocabulary has ids 0..{len(self) - 1}")
        return self._values.take(pa.array(ids - FIRST_VALUE, mask=ids < FIRST_VALUE)).to_pylist()

    def _encode_integers(self, values: pa.Array) -> np.ndarray:
        if self._sorted is None:
            plain = self._values.to_numpy()
            order = np.argsort(plain, kind="stable")
            self._sorted = plain[order], order.astype(np.int32)
        known, order = self._sorted
        wanted = pc.fill_null(values, 0).to_numpy()
        if not len(known):
            return np.full(len(wanted), UNKNOWN, np.int32)
        at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        return np.where(known[at] == wanted, order[at] + np.int32(FIRST_VALUE), np.int32(UNKNOWN))

    def _encode_text(self, values: pa.Array) -> np.ndarray:
        found = pc.index_in(values, self._values)
        return pc.fill_null(pc.add(found, FIRST_VALUE), UNKNOWN).to_numpy(zero_copy_only=False).astype(np.int32)


def _one(column: pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks()
    return pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array
