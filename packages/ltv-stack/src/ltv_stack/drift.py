"""Drift of features between windows."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from .features import Matrix

Floats = npt.NDArray[np.float64]
_LEVELS = np.arange(101) / 100


@dataclass
class Reference:
    """The distribution of every feature in the training sample: percentiles, mean, share missing [F, 101], [F], [F]."""

    percentiles: Floats
    mean: Floats
    missing: Floats

    @classmethod
    def fit(cls, matrix: Matrix) -> "Reference":
        """Describe a matrix of features [N, F]."""
        width = matrix.shape[1]
        percentiles, mean, missing = np.full((width, len(_LEVELS)), np.nan), np.full(width, np.nan), np.ones(width)
        for j in range(width):
            column = matrix[:, j].astype(np.float64)
            known = column[np.isfinite(column)]
            missing[j] = 1.0 - len(known) / max(len(column), 1)
            if len(known):
                percentiles[j], mean[j] = np.quantile(known, _LEVELS), known.mean()
        return cls(percentiles, mean, missing)

    def compare(self, matrix: Matrix, names: list[str]) -> pd.DataFrame:
        """Drift of each feature of a matrix [N, F], largest first.

        psi: population stability index over tenths of the reference, missing values a bin of their own; above 0.25 is
        a large shift. ks: largest distance of the distribution functions of the known values.

        Args:
            matrix: features [N, F] in the order of the training sample's.
            names: of the features [F].

        Returns:
            one row a feature.
        """
        rows = []
        for j, name in enumerate(names):
            column = matrix[:, j].astype(np.float64)
            known = np.sort(column[np.isfinite(column)])
            missing = 1.0 - len(known) / max(len(column), 1)
            psi, ks = self._distance(j, known, missing)
            mean = float(known.mean()) if len(known) else float("nan")
            rows.append((name, psi, ks, self.mean[j], mean, self.missing[j], missing))
        columns = ["feature", "psi", "ks", "mean_reference", "mean", "missing_reference", "missing"]
        table = pd.DataFrame(rows, columns=columns)
        return table.sort_values("psi", ascending=False, kind="stable", ignore_index=True)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready form, read back by `from_json`."""

        def plain(values: Floats) -> list[Any]:
            return [None if np.isnan(v) else float(v) for v in values]

        return {
            "percentiles": [plain(row) for row in self.percentiles],
            "mean": plain(self.mean),
            "missing": plain(self.missing),
        }

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> "Reference":
        """What `to_json` wrote."""
        return cls(*(np.array(state[name], dtype=np.float64) for name in ("percentiles", "mean", "missing")))

    def _distance(self, j: int, known: Floats, missing: float) -> tuple[float, float]:
        grid = self.percentiles[j]
        if np.isnan(grid).any() or not len(known):
            psi = _psi(np.array([1 - self.missing[j], self.missing[j]]), np.array([1 - missing, missing]))
            return psi, float("nan")
        edges = np.unique(grid[10:100:10])
        # Shares of the reference between the edges, from its own percentiles (ties may fill several tenths).
        below = np.array([_share_below(grid, edge) for edge in edges])
        expected = np.diff(np.concatenate([[0.0], below, [1.0]])) * (1 - self.missing[j])
        at = np.searchsorted(known, edges, side="right") / len(known)
        seen = np.diff(np.concatenate([[0.0], at, [1.0]])) * (1 - missing)
        psi = _psi(np.append(expected, self.missing[j]), np.append(seen, missing))
        points = np.unique(grid)
        here = np.searchsorted(known, points, side="right") / len(known)
        there = np.array([_share_below(grid, point) for point in points])
        return psi, float(np.abs(here - there).max())


def drift_table(reference: Matrix, current: Matrix, names: list[str]) -> pd.DataFrame:
    """Drift of every feature between two matrices of features [N, F] and [M, F]; see `Reference.compare`.

    Args:
        reference: features to compare with [N, F].
        current: features that may have drifted [M, F].
        names: of the features [F].
    """
    return Reference.fit(reference).compare(current, names)


def _share_below(grid: Floats, point: float) -> float:
    """Share of the reference at or below a point, by its percentiles."""
    return float(_LEVELS[max(int(np.searchsorted(grid, point, side="right")) - 1, 0)])


def _psi(expected: Floats, seen: Floats) -> float:
    expected, seen = np.maximum(expected, 1e-4), np.maximum(seen, 1e-4)
    return float(((seen - expected) * np.log(seen / expected)).sum())
