"""Area under the ROC curve with a standard error, also of a difference and of a mean over labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass
class Auroc:
    """One AUROC, or the mean of several.

    Args:
        value: the area, between 0 and 1
        influence: contribution of each row to the error of `value` [n]; their squares sum to its variance
        labels: number of labels the mean is over; labels with a single class are left out
    """

    value: float
    influence: NDArray[np.float64]
    labels: int

    @property
    def standard_error(self) -> float:
        return float(np.sqrt(np.sum(self.influence**2)))

    def minus(self, other: Auroc) -> tuple[float, float]:
        """Return the difference to another AUROC on the same rows and its standard error."""
        error = np.sqrt(np.sum((self.influence - other.influence) ** 2))
        return self.value - other.value, float(error)


def auroc(truth: NDArray, score: NDArray) -> Auroc:
    """Return the AUROC of `score` [n] for the 0/1 `truth` [n]; ties count half.

    The error is DeLong's: the share of the other class that a row beats, minus the mean, over the class size
    (E. DeLong et al., Biometrics 1988).

    Raises:
        ValueError: if a score is NaN or the truth has one class only
    """
    positive = np.asarray(truth) > 0.5
    n_pos, n_neg = int(positive.sum()), int((~positive).sum())
    if not n_pos or not n_neg:
        raise ValueError(f"truth: got {n_pos} positive and {n_neg} negative rows, needs both")
    if np.isnan(score).any():
        raise ValueError(f"score: got {int(np.isnan(score).sum())} NaN")
    beaten = np.empty(len(score))
    beaten[positive] = _share_below(score[positive], score[~positive])
    beaten[~positive] = 1 - _share_below(score[~positive], score[positive])
    value = float(beaten[positive].mean())
    influence = np.empty(len(score))
    for rows, number in ((positive, n_pos), (~positive, n_neg)):
        # The mean is estimated from the same rows; a single row says nothing of its spread and counts from chance.
        spread = (beaten[rows] - value) * np.sqrt(number / (number - 1)) if number > 1 else beaten[rows] - 0.5
        influence[rows] = spread / number
    return Auroc(value, influence, 1)


def macro_auroc(truth: NDArray, score: NDArray) -> Auroc:
    """Return the mean AUROC over the columns of `score` [n, C]; columns whose truth has one class are left out.

    The challenge's own metric counts a column without positives as 0 instead; this is the honest mean.

    Raises:
        ValueError: if no column has two classes
    """
    usable = [c for c in range(truth.shape[1]) if 0 < truth[:, c].sum() < len(truth)]
    if not usable:
        raise ValueError("truth: no label has both classes in this window")
    value, influence = 0.0, np.zeros(len(truth))
    for c in usable:
        one = auroc(truth[:, c], score[:, c])
        value += one.value / len(usable)
        influence += one.influence / len(usable)
    return Auroc(value, influence, len(usable))


def roc_curve(truth: NDArray, score: NDArray) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return false and true positive rates [m] at every distinct threshold, from (0, 0) to (1, 1)."""
    order = np.argsort(-score, kind="stable")
    positive = np.asarray(truth)[order] > 0.5
    last = np.flatnonzero(np.r_[np.diff(score[order]) != 0, True])
    true, false = np.cumsum(positive)[last], np.cumsum(~positive)[last]
    return np.r_[0.0, false / max(false[-1], 1)], np.r_[0.0, true / max(true[-1], 1)]


def _share_below(values: NDArray, others: NDArray) -> NDArray[np.float64]:
    others = np.sort(others)
    low, high = np.searchsorted(others, values, side="left"), np.searchsorted(others, values, side="right")
    return (low + high) / (2 * len(others))
