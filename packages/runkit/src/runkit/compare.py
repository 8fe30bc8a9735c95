"""Whether one model beats another on the same units: estimates with their errors, paired differences, tables.

The influence of a unit is what it contributes to the error of an estimate; the squares of all sum to its variance.
Those of a difference are the differences of both, which is what pairing means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, eq=False)
class Estimate:
    """A number estimated from n units, and what each of them contributes to its error.

    Args:
        value: the number
        influence: contribution of each unit to the error [n]; the squares sum to the variance
        units: what the units are called [n], where their order may differ from another estimate's; None = by place
    """

    value: float
    influence: NDArray[np.float64]
    units: NDArray | None = None

    @property
    def error(self) -> float:
        """The standard error."""
        return float(np.sqrt(np.sum(self.influence**2)))

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the normal interval that holds the truth in a share `level` of all samples."""
        if not 0 < level < 1:
            raise ValueError(f"level: got {level}, needs a share between 0 and 1")
        reach = NormalDist().inv_cdf((1 + level) / 2) * self.error
        return self.value - reach, self.value + reach

    def __sub__(self, other: Estimate) -> Estimate:
        return self + other * -1.0

    def __add__(self, other: Estimate) -> Estimate:
        if len(self.influence) != len(other.influence):
            got = f"{len(self.influence)} and {len(other.influence)}"
            raise ValueError(f"units: got {got}, needs the same ones in both estimates")
        if self.units is not None and other.units is not None and not np.array_equal(self.units, other.units):
            raise ValueError("units: got different ones, needs the same ones in the same order in both estimates")
        units = self.units if self.units is not None else other.units
        return Estimate(self.value + other.value, self.influence + other.influence, units)

    def __mul__(self, factor: float) -> Estimate:
        return Estimate(self.value * factor, self.influence * factor, self.units)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Estimate:
        return Estimate(self.value / divisor, self.influence / divisor, self.units)


def mean(values: ArrayLike, units: NDArray | None = None) -> Estimate:
    """Return the mean of values [n], one a unit.

    Raises:
        ValueError: if there are fewer than two, or one is NaN
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"values: got the shape {values.shape}, needs two or more numbers in a row")
    _check_finite("values", values)
    center = values.mean()
    return Estimate(float(center), (values - center) / math.sqrt(len(values) * (len(values) - 1)), units)


def auroc(score: ArrayLike, label: ArrayLike, units: NDArray | None = None) -> Estimate:
    """Return the area under the ROC curve of `score` [n] for the 0/1 `label` [n]; ties count half.

    The error is DeLong's: the share of the other class that a unit beats, minus the mean, over the class size
    (E. DeLong et al., Biometrics 1988).

    Raises:
        ValueError: if a score is NaN or infinite, a label is not 0 or 1, or there is one class only
    """
    score, label = np.asarray(score), np.asarray(label)
    if score.shape != label.shape or score.ndim != 1:
        raise ValueError(f"score, label: got the shapes {score.shape} and {label.shape}, needs [n] twice")
    if not np.isin(label, (0, 1)).all():
        raise ValueError(f"label: got {label[~np.isin(label, (0, 1))][0]}, needs 0 or 1")
    if np.isnan(score).any():
        raise ValueError(f"score: got {int(np.isnan(score).sum())} NaN, needs numbers")
    positive = label.astype(bool)
    n_pos, n_neg = int(positive.sum()), int((~positive).sum())
    if not n_pos or not n_neg:
        raise ValueError(f"label: got {n_pos} positive and {n_neg} negative rows, needs both")
    beaten = np.empty(len(score))
    beaten[positive] = _share_below(score[positive], score[~positive])
    beaten[~positive] = 1 - _share_below(score[~positive], score[positive])
    value = float(beaten[positive].mean())
    influence = np.empty(len(score))
    for rows, number in ((positive, n_pos), (~positive, n_neg)):
        # The mean is estimated from the same rows; a single row says nothing of its spread and counts from chance.
        spread = (beaten[rows] - value) * np.sqrt(number / (number - 1)) if number > 1 else beaten[rows] - 0.5
        influence[rows] = spread / number
    return Estimate(value, influence, units)


def macro_auroc(score: NDArray, label: NDArray, units: NDArray | None = None) -> Estimate:
    """Return the mean AUROC over the columns of `score` [n, C]; columns whose labels have one class are left out.

    Raises:
        ValueError: if no column has two classes
    """
    usable = two_class_columns(label)
    if not usable:
        raise ValueError("label: got no column with both classes, needs at least one")
    value, influence = 0.0, np.zeros(len(label))
    for c in usable:
        one = auroc(score[:, c], label[:, c])
        value += one.value / len(usable)
        influence += one.influence / len(usable)
    return Estimate(value, influence, units)


def two_class_columns(label: NDArray) -> list[int]:
    """Return the columns of the 0/1 `label` [n, C] that have both classes."""
    return [c for c in range(label.shape[1]) if 0 < label[:, c].sum() < len(label)]


def bootstrap(
    statistic: Callable[[NDArray[np.int64]], float], n: int, draws: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Return the percentile interval of a statistic over `draws` samples of n units with replacement.

    Args:
        statistic: takes the places of the units that were drawn [n]
        n: number of units
        draws: number of samples
        seed: of the samples
        level: share of the samples' statistics inside the interval

    Raises:
        ValueError: if a sample's statistic is NaN
    """
    if n < 1 or draws < 1 or not 0 < level < 1:
        raise ValueError(f"n, draws, level: got {n}, {draws}, {level}, needs 1 or more, 1 or more, a share in (0, 1)")
    random = np.random.default_rng(seed)
    found = np.array([statistic(random.integers(0, n, n)) for _ in range(draws)], np.float64)
    _check_finite("statistic", found)
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def verdict(difference: Estimate, errors: float = 2.0) -> str:
    """Return "win", "LOSE", or "tie" within so many standard errors of zero; above zero is better."""
    value, reach = difference.value, errors * difference.error
    if not math.isfinite(value) or not math.isfinite(reach):
        raise ValueError(f"difference: got {value} with the error {difference.error}, needs numbers")
    return "win" if value > reach else "LOSE" if value < -reach else "tie"


def against(estimates: Mapping[str, Estimate], baseline: str) -> list[dict[str, Any]]:
    """Return one row a method: its estimate, the paired difference to the baseline, and the verdict on it.

    Raises:
        ValueError: if the baseline is not among them, or two have different units
    """
    if baseline not in estimates:
        raise ValueError(f"baseline: got {baseline!r}, needs one of {', '.join(estimates)}")
    rows = []
    for name, estimate in estimates.items():
        row: dict[str, Any] = {"method": name, "score": estimate}
        if name != baseline:
            difference = estimate - estimates[baseline]
            row |= {f"minus {baseline}": difference, "verdict": verdict(difference)}
        rows.append(row)
    return rows


def text_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a table for a terminal; columns in the order they come, numbers to the right."""
    head, cells = _cells(rows)
    widths = [max(len(row[c]) for row in (head, *cells)) for c in range(len(head))]
    right = [all(isinstance(row.get(name), (int, float, np.number, type(None))) for row in rows) for name in head]
    lines = [
        "  ".join(
            cell.rjust(width) if r else cell.ljust(width) for cell, width, r in zip(row, widths, right, strict=True)
        )
        for row in (head, ["-" * width for width in widths], *cells)
    ]
    return "".join(line.rstrip() + "\n" for line in lines)


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a Markdown table; five significant digits, nothing for None and NaN."""
    head, cells = _cells(rows)
    lines = [head, ["---"] * len(head), *cells]
    escaped = (" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines)
    return "".join(f"| {line} |\n" for line in escaped)


def _cells(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    head = list(dict.fromkeys(name for row in rows for name in row))
    return [_cell(name) for name in head], [[_cell(row.get(name)) for name in head] for row in rows]


def _cell(value: Any) -> str:
    if isinstance(value, Estimate):
        return f"{value.value:.4f} ± {value.error:.4f}"
    if value is None or (isinstance(value, (float, np.floating)) and np.isnan(value)):
        return ""
    return f"{value:.5g}" if isinstance(value, (float, np.floating)) else " ".join(str(value).split())


def _share_below(values: NDArray, others: NDArray) -> NDArray[np.float64]:
    others = np.sort(others)
    low, high = np.searchsorted(others, values, side="left"), np.searchsorted(others, values, side="right")
    return (low + high) / (2 * len(others))


def _check_finite(name: str, values: NDArray[np.float64]) -> None:
    bad = int((~np.isfinite(values)).sum())
    if bad:
        raise ValueError(f"{name}: got {bad} of {len(values)} that are no finite number, needs numbers")
