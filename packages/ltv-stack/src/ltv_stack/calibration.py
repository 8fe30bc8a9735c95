"""Calibration of money and probability on held-out rows, by segment where asked."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.isotonic import IsotonicRegression

Floats = npt.NDArray[np.float64]
_ALL = ""


class IsotonicCalibrator:
    """The non-decreasing step-and-line function of the score nearest to the target, one per segment.

    A segment with fewer than `min_rows` rows, or never seen, uses the function of all rows together.

    Args:
        min_rows: rows a segment needs for a function of its own.
    """

    def __init__(self, min_rows: int = 1000) -> None:
        self.min_rows = min_rows
        self.curves: dict[str, tuple[Floats, Floats]] = {}

    def fit(
        self, score: Floats, target: Floats, segment: Sequence[Any] | npt.NDArray[np.object_] | None = None
    ) -> "IsotonicCalibrator":
        """Learn target ~ f(score) [N]; segment [N] or None.

        Args:
            score: what is to be calibrated [N].
            target: what it should have been [N].
            segment: of each row [N], or None for one function.

        Returns:
            the calibrator itself.
        """
        score, target = _pair(score, target)
        self.curves = {_ALL: _isotonic(score, target)}
        for name, rows in _segments(segment, len(score)):
            if len(rows) >= self.min_rows:
                self.curves[name] = _isotonic(score[rows], target[rows])
        return self

    def apply(self, score: Floats, segment: Sequence[Any] | npt.NDArray[np.object_] | None = None) -> Floats:
        """f(score) [N]; scores beyond those seen take the value at the edge.

        Args:
            score: as at fit time [N].
            segment: of each row [N]; all rows together when None.

        Raises:
            ValueError: it is not fitted.
        """
        if not self.curves:
            raise ValueError("IsotonicCalibrator is not fitted: call fit(score, target) first")
        score = np.asarray(score, dtype=np.float64)
        result = np.interp(score, *self.curves[_ALL])
        for name, rows in _segments(segment, len(score)):
            if name in self.curves:
                result[rows] = np.interp(score[rows], *self.curves[name])
        return result

    def to_json(self) -> dict[str, Any]:
        """JSON-ready form, read back by `from_json`."""
        curves = {name: [x.tolist(), y.tolist()] for name, (x, y) in self.curves.items()}
        return {"kind": "isotonic", "min_rows": self.min_rows, "curves": curves}

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> "IsotonicCalibrator":
        """The calibrator `to_json` wrote.

        Args:
            state: as read from the file.
        """
        one = cls(state["min_rows"])
        one.curves = {name: (np.array(x), np.array(y)) for name, (x, y) in state["curves"].items()}
        return one


class BucketCalibrator:
    """Multiplies the score by mean target / mean score of its bucket, shrunk to the overall ratio, per segment.

    Keeps rank inside a bucket and money in total: over the fitted rows calibrated and true sums agree up to the
    shrinkage.

    Args:
        buckets: buckets of equal count; equal scores share one.
        shrink: rows' worth of the overall ratio mixed into each bucket.
        min_rows: rows a segment needs for ratios of its own.
    """

    def __init__(self, buckets: int = 10, shrink: float = 100.0, min_rows: int = 1000) -> None:
        if buckets < 1:
            raise ValueError(f"buckets: got {buckets}, needs at least 1")
        self.buckets, self.shrink, self.min_rows = buckets, shrink, min_rows
        self.tables: dict[str, tuple[Floats, Floats]] = {}

    def fit(
        self, score: Floats, target: Floats, segment: Sequence[Any] | npt.NDArray[np.object_] | None = None
    ) -> "BucketCalibrator":
        """Learn the ratios [N]; segment [N] or None.

        Args:
            score: what is to be calibrated [N].
            target: what it should have been [N].
            segment: of each row [N], or None for one set of ratios.

        Returns:
            the calibrator itself.
        """
        score, target = _pair(score, target)
        self.tables = {_ALL: self._table(score, target)}
        for name, rows in _segments(segment, len(score)):
            if len(rows) >= self.min_rows:
                self.tables[name] = self._table(score[rows], target[rows])
        return self

    def apply(self, score: Floats, segment: Sequence[Any] | npt.NDArray[np.object_] | None = None) -> Floats:
        """Calibrated scores [N].

        Args:
            score: as at fit time [N].
            segment: of each row [N]; all rows together when None.

        Raises:
            ValueError: it is not fitted.
        """
        if not self.tables:
            raise ValueError("BucketCalibrator is not fitted: call fit(score, target) first")
        score = np.asarray(score, dtype=np.float64)
        edges, ratio = self.tables[_ALL]
        result = score * ratio[np.searchsorted(edges, score, side="right")]
        for name, rows in _segments(segment, len(score)):
            if name in self.tables:
                edges, ratio = self.tables[name]
                result[rows] = score[rows] * ratio[np.searchsorted(edges, score[rows], side="right")]
        return result

    def to_json(self) -> dict[str, Any]:
        """JSON-ready form, read back by `from_json`."""
        tables = {name: [e.tolist(), r.tolist()] for name, (e, r) in self.tables.items()}
        settings = {"buckets": self.buckets, "shrink": self.shrink, "min_rows": self.min_rows}
        return {"kind": "bucket", **settings, "tables": tables}

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> "BucketCalibrator":
        """The calibrator `to_json` wrote.

        Args:
            state: as read from the file.
        """
        one = cls(state["buckets"], state["shrink"], state["min_rows"])
        one.tables = {name: (np.array(e), np.array(r)) for name, (e, r) in state["tables"].items()}
        return one

    def _table(self, score: Floats, target: Floats) -> tuple[Floats, Floats]:
        levels = np.arange(1, self.buckets) / self.buckets
        edges = np.unique(np.quantile(score, levels)) if len(score) else np.empty(0)
        bucket = np.searchsorted(edges, score, side="right")
        overall = target.sum() / score.sum() if score.sum() > 0 else 1.0
        extra = self.shrink * max(float(score.mean()), 0.0) if len(score) else 0.0
        size = len(edges) + 1
        true = np.bincount(bucket, weights=target, minlength=size) + extra * overall
        said = np.bincount(bucket, weights=score, minlength=size) + extra
        return edges, np.where(said > 0, true / np.where(said > 0, said, 1.0), overall)


def calibrator_from_json(state: dict[str, Any]) -> IsotonicCalibrator | BucketCalibrator:
    """Whichever calibrator this is."""
    return IsotonicCalibrator.from_json(state) if state["kind"] == "isotonic" else BucketCalibrator.from_json(state)


def _isotonic(score: Floats, target: Floats) -> tuple[Floats, Floats]:
    if len(score) == 0:
        raise ValueError("score: got no rows, needs at least one to calibrate on")
    model = IsotonicRegression(out_of_bounds="clip").fit(score, target)
    return np.asarray(model.X_thresholds_, dtype=np.float64), np.asarray(model.y_thresholds_, dtype=np.float64)


def _pair(score: Floats, target: Floats) -> tuple[Floats, Floats]:
    score, target = np.asarray(score, dtype=np.float64), np.asarray(target, dtype=np.float64)
    if score.shape != target.shape or score.ndim != 1:
        raise ValueError(f"target: got shape {target.shape}, needs that of score, {score.shape}")
    return score, target


def _segments(
    segment: Sequence[Any] | npt.NDArray[np.object_] | None, size: int
) -> list[tuple[str, npt.NDArray[np.int64]]]:
    if segment is None:
        return []
    names = np.array(["\0" if one is None else str(one) for one in segment])
    if len(names) != size:
        raise ValueError(f"segment: got {len(names)} rows, needs {size}")
    return [(str(name), np.flatnonzero(names == name)) for name in np.unique(names) if name != "\0"]
