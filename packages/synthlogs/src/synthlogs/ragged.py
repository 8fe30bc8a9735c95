"""Lists of unequal length, one per row, and the Arrow columns made of them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


class Ragged:
    """The extents of one list per row: which rows have one, how long it is, and whose each entry is.

    Args:
        present: which rows have a list at all [n]
        lengths: length of every list [n]; ignored where the row has none
    """

    def __init__(self, present: NDArray, lengths: NDArray) -> None:
        self.present = present
        self.lengths = np.where(present, lengths, 0).astype(np.int64)
        self.starts = np.r_[0, np.cumsum(self.lengths)]
        self.row = np.repeat(np.arange(len(present)), self.lengths)
        self.position = np.arange(len(self.row)) - self.starts[self.row]

    def restrict(self, keep: NDArray) -> tuple[Ragged, NDArray]:
        """Return the lists of the rows in `keep` [n] only, and the positions of their entries in this one."""
        return Ragged(self.present & keep, self.lengths), np.flatnonzero(keep[self.row])

    def group(self, key: NDArray, count: int) -> tuple[Ragged, NDArray, NDArray]:
        """Merge a row's entries of equal key; return the merged lists, their keys, and each entry's merged entry.

        Args:
            key: number of the key of every entry, 0 <= key < count
        """
        code, entry = np.unique(self.row * count + key, return_inverse=True)
        return Ragged(self.present, np.bincount(code // count, minlength=len(self.present))), code % count, entry

    def offsets(self) -> pa.Array:
        """Return the offsets Arrow builds the column from; a row without a list has a null one."""
        return pa.array(self.starts.astype(np.int32), mask=np.r_[~self.present, False])

    def map(self, keys: pa.Array, values: NDArray | pa.Array) -> pa.Array:
        """Return a map column from its entries' keys and values."""
        values = values if isinstance(values, pa.Array) else pa.array(values)
        return pa.MapArray.from_arrays(self.offsets(), keys, values)

    def list(self, values: pa.Array) -> pa.Array:
        """Return a list column from its entries' values."""
        return pa.ListArray.from_arrays(self.offsets(), values)


def texts(codes: NDArray, names: pa.Array, missing: NDArray | None = None) -> pa.Array:
    """Return the names of `codes` [n] as a dictionary-encoded string column, null where `missing` [n]."""
    return pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int32), mask=missing), names)
