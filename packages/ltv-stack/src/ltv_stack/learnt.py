"""What the features learn from rows: vocabularies, local distributions, and the sums both come from."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from .columns import Floats, as_text

_GRID = 32


@dataclass
class Vocabulary:
    """A fitted dictionary: id 0 is missing, 1 rare or unseen, 2.. the values by falling frequency, ties by value."""

    values: list[str]
    counts: list[int]
    total: int

    @classmethod
    def of(cls, counts: Counter[str | None], rows: int, min_count: int, max_size: int) -> "Vocabulary":
        """The `max_size` values that come most often, each at least `min_count` times.

        Args:
            counts: value -> rows that have it; None for missing.
            rows: all rows, those without a value too.
            min_count: rows that a value needs.
            max_size: most values.
        """
        kept = [(v, n) for v, n in counts.items() if v is not None and n >= min_count]
        kept = sorted(kept, key=lambda pair: (-pair[1], pair[0]))[:max_size]
        return cls([v for v, _ in kept], [n for _, n in kept], rows)

    def encode(self, column: pa.Array) -> Floats:
        """Ids of a text column [N].

        Args:
            column: text, or what can be read as text [N].
        """
        text = as_text(column)
        found = pc.index_in(text, value_set=pa.array(self.values, pa.large_string()))
        ids = np.asarray(found.fill_null(-1)).astype(np.float64) + 2
        return np.where(np.asarray(pc.is_valid(text)), ids, 0.0)

    def frequency(self, codes: Floats) -> Floats:
        """Log of each id's share of the rows, smoothed [N]; NaN for missing.

        Args:
            codes: ids that `encode` gave [N].
        """
        table = np.log1p([0, 0, *self.counts]) - np.log1p(self.total)
        table[0] = np.nan
        return table[codes.astype(np.int64)]


@dataclass
class LocalTable:
    """Per group of one column: a grid of quantiles and the mean of one feature; row 0 is all groups together."""

    grid: Floats
    mean: Floats

    @classmethod
    def of(cls, feature: Floats, codes: npt.NDArray[np.int64], size: int, min_rows: int) -> "LocalTable":
        """Learn from a feature [N] and the group of each row [N]; groups of fewer rows take those of all rows."""
        levels = (np.arange(_GRID) + 0.5) / _GRID
        known = np.isfinite(feature)
        grid = np.full((size, _GRID), np.nan)
        mean = np.full(size, np.nan)
        overall = feature[known]
        if len(overall):
            grid[:] = np.quantile(overall, levels)
            mean[:] = overall.mean()
        for code in range(2, size):
            own = feature[known & (codes == code)]
            if len(own) >= min_rows:
                grid[code] = np.quantile(own, levels)
                mean[code] = own.mean()
        return cls(grid, mean)

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> "LocalTable":
        """The table `to_json` wrote."""
        return cls(*(np.array(state[name], dtype=np.float64) for name in ("grid", "mean")))

    def to_json(self) -> dict[str, Any]:
        """JSON-ready: NaN becomes null."""
        return {"grid": [_nulls(row) for row in self.grid], "mean": _nulls(self.mean)}

    def rank(self, feature: Floats, codes: npt.NDArray[np.int64]) -> Floats:
        """Each row's place in 0 .. 1 among its group's values [N]; NaN where the feature is."""
        grid = self.grid[codes]
        rank = ((grid < feature[:, None]).sum(1) + (grid <= feature[:, None]).sum(1)) / (2.0 * _GRID)
        return np.where(np.isnan(feature), np.nan, rank)


@dataclass
class Partial:
    """What one partition adds to the fit; sums of these do not depend on their order."""

    rows: int = 0
    nulls: Counter[str] = field(default_factory=Counter)
    counts: dict[str, Counter[str | None]] = field(default_factory=dict)
    hashes: npt.NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    sample: dict[str, Floats] = field(default_factory=dict)
    groups: dict[str, npt.NDArray[np.object_]] = field(default_factory=dict)

    def add(self, other: "Partial", keep: int) -> None:
        self.rows += other.rows
        self.nulls.update(other.nulls)
        for name, counts in other.counts.items():
            self.counts.setdefault(name, Counter()).update(counts)
        hashes = np.concatenate([self.hashes, other.hashes])
        order = np.argsort(hashes, kind="stable")[:keep]
        self.hashes = hashes[order]
        _merge(self.sample, other.sample, order)
        _merge(self.groups, other.groups, order)


def _merge(mine: dict[str, Any], theirs: dict[str, Any], order: npt.NDArray[np.int64]) -> None:
    for name, column in theirs.items():
        both = np.concatenate([mine[name], column]) if name in mine else column
        mine[name] = both[order]


def _nulls(row: Floats) -> list[float | None]:
    return [None if np.isnan(x) else x for x in row.tolist()]
