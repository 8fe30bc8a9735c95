"""Conformal prediction intervals for zero-inflated revenue, Mondrian by buyer probability."""

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
_BIN_ROWS = 500


class ConformalIntervals:
    """Conformalised quantile intervals whose correction is learnt per bin of buyer probability.

    Scores are measured in log1p space. A row whose lower quantile is 0 has a one-sided interval [0, upper]: its lower
    end cannot be missed, so all of the allowed miss goes to the upper end. In every bin the interval covers at least
    `level` of exchangeable rows; it covers more only where that many rows are zero anyway and the interval is [0, 0].

    Args:
        level: share of rows to cover.
        bins: most bins of buyer probability; they hold equal expected buyers and at least 500 rows each.

    Source: Romano, Patterson, Candès, Conformalized Quantile Regression, NeurIPS 2019; Vovk's Mondrian conformal.
    """

    def __init__(self, level: float = 0.9, bins: int = 10) -> None:
        if not 0.0 < level < 1.0:
            raise ValueError(f"level: got {level}, needs a number between 0 and 1")
        if bins < 1:
            raise ValueError(f"bins: got {bins}, needs at least 1")
        self.level, self.bins = level, bins
        self.edges: Floats = np.empty(0)
        self.corrections: Floats = np.empty(0)

    def fit(self, y: Floats, lower: Floats, upper: Floats, probability: Floats) -> "ConformalIntervals":
        """Learn the corrections on rows that no model was fitted on.

        Args:
            y: true amounts [N].
            lower: model's lower quantiles, 0 where zero is likelier than the miss allowed below [N].
            upper: model's upper quantiles [N].
            probability: buyer probability [N].

        Returns:
            the intervals themselves.

        Raises:
            ValueError: there are no rows.
        """
        if len(y) == 0:
            raise ValueError("y: got no rows, needs held-out rows to learn the intervals on")
        self.edges = self._edges(probability)
        score = self._score(y, lower, upper)
        bins = self._bin(probability)
        self.corrections = np.array([self._threshold(score[bins == b]) for b in range(len(self.edges) + 1)])
        return self

    def apply(self, lower: Floats, upper: Floats, probability: Floats) -> tuple[Floats, Floats]:
        """Corrected bounds [N], never below 0; infinite where too few rows were there to promise the level.

        Args:
            lower: model's lower quantiles [N], as at fit time.
            upper: model's upper quantiles [N].
            probability: buyer probability [N].

        Raises:
            ValueError: it is not fitted.
        """
        if not len(self.corrections):
            raise ValueError("ConformalIntervals is not fitted: call fit first")
        shift = self.corrections[self._bin(probability)]
        high = np.expm1(np.maximum(np.log1p(upper) + shift, 0.0))
        low = np.where(lower > 0, np.expm1(np.maximum(np.log1p(lower) - shift, 0.0)), 0.0)
        return np.minimum(low, high), high

    def to_json(self) -> dict[str, Any]:
        """JSON-ready form, read back by `from_json`."""
        corrections = [c if np.isfinite(c) else None for c in self.corrections.tolist()]
        return {"level": self.level, "bins": self.bins, "edges": self.edges.tolist(), "corrections": corrections}

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> "ConformalIntervals":
        """The intervals `to_json` wrote.

        Args:
            state: as read from the file.
        """
        one = cls(state["level"], state["bins"])
        one.edges = np.array(state["edges"], dtype=np.float64)
        one.corrections = np.array([np.inf if c is None else c for c in state["corrections"]], dtype=np.float64)
        return one

    def _edges(self, probability: Floats) -> Floats:
        order = np.sort(probability)
        expected = np.cumsum(order)
        wanted = np.searchsorted(expected, expected[-1] * np.arange(1, self.bins) / self.bins)
        cuts: list[float] = []
        last = 0
        for position in wanted:
            edge = order[min(position, len(order) - 1)]
            start = int(np.searchsorted(order, edge, side="left"))
            if start - last >= _BIN_ROWS and len(order) - start >= _BIN_ROWS:
                cuts.append(float(edge))
                last = start
        return np.array(cuts)

    def _bin(self, probability: Floats) -> npt.NDArray[np.int64]:
        return np.searchsorted(self.edges, probability, side="right").astype(np.int64)

    def _score(self, y: Floats, lower: Floats, upper: Floats) -> Floats:
        above = np.log1p(y) - np.log1p(upper)
        return np.where(lower > 0, np.maximum(above, np.log1p(lower) - np.log1p(y)), above)

    def _threshold(self, score: Floats) -> float:
        rank = int(np.ceil((len(score) + 1) * self.level))
        return float(np.sort(score)[rank - 1]) if 0 < rank <= len(score) else float("inf")
