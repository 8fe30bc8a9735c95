"""Rows drawn user by user and wanted in time order: scattered to files of one span each, which are read in turn."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class Buckets:
    """Files of packed rows, one for every span of time; memory holds what is added and the one that is read.

    Args:
        folder: a folder of its own, made here and removed at the end
        kind: numpy dtype of a row with named fields
    """

    def __init__(self, folder: Path, kind: np.dtype) -> None:
        self.folder, self.kind = folder, kind
        self.folder.mkdir()

    def __enter__(self) -> Buckets:
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self.folder)

    def add(self, bucket: NDArray[np.int64], columns: dict[str, NDArray]) -> None:
        """Append rows, given by their columns [n], each to its bucket [n] >= 0."""
        order = np.argsort(bucket, kind="stable")
        rows = np.empty(len(bucket), self.kind)
        for name, values in columns.items():
            rows[name] = values[order]
        sizes = np.bincount(bucket)
        for number, part in enumerate(np.split(rows, np.cumsum(sizes)[:-1])):
            if len(part):
                with (self.folder / str(number)).open("ab") as file:
                    part.tofile(file)

    def read(self) -> Iterator[tuple[int, NDArray]]:
        """Yield each bucket that has rows, in order, as its number and its rows as they were added; each one once."""
        for path in sorted(self.folder.iterdir(), key=lambda path: int(path.name)):
            rows = np.fromfile(path, self.kind)
            path.unlink()
            yield int(path.name), rows
