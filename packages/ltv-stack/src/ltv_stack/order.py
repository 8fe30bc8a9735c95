"""Order over horizons: the projection onto the monotone cone, on which the truth lies."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Floats = npt.NDArray[np.float64]


def project_order(
    values: Floats, weights: Floats | None = None, space: Literal["log1p", "identity"] = "log1p"
) -> Floats:
    """Make every row non-decreasing by the nearest non-decreasing row, in least squares in the given space.

    The truth is non-decreasing and the projection onto a convex set never moves away from its points, so a row's
    (weighted) sum over horizons of squared errors in that space never rises; one horizon alone may. The projection
    also keeps order between rows: of two rows, one nowhere above the other, that stays so; quantiles never cross. Found
    by the min-max form of isotonic regression; rows in order already come back bit by bit.

    Values that the projection leaves where they are keep every bit.

    Args:
        values: one column a horizon, shortest first [N, H]; above -1 for log1p.
        weights: positive weights of the horizons [H]; equal when None.
        space: where distance is measured: "log1p" for MSLE, "identity" for squared money.

    Returns:
        the projected values [N, H].

    Raises:
        ValueError: a shape, the space or the weights do not fit; names it.

    Source: Robertson, Wright, Dykstra, Order Restricted Statistical Inference (1988), theorem 1.4.4.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2:
        raise ValueError(f"values: got shape {values.shape}, needs [rows, horizons]")
    if space not in ("log1p", "identity"):
        raise ValueError(f"space: got {space!r}, needs 'log1p' or 'identity'")
    horizons = values.shape[1]
    w = np.ones(horizons) if weights is None else np.asarray(weights, dtype=np.float64)
    if w.shape != (horizons,) or not (w > 0).all():
        raise ValueError(f"weights: got {weights}, needs {horizons} positive numbers")
    wrong = (np.diff(values, axis=1) < 0).any(axis=1) if horizons > 1 else np.zeros(len(values), dtype=bool)
    if not wrong.any():
        return values.copy()
    x = values[wrong]
    if space == "log1p":
        x = np.log1p(x)
    projected = _min_max(x, w)
    kept = projected == x
    if space == "log1p":
        projected = np.expm1(projected)
    # There and back through the logarithm may cost the last bit.
    projected = np.where(kept, values[wrong], projected)
    result = values.copy()
    # Rounding may leave a last-bit step down.
    result[wrong] = np.maximum.accumulate(projected, axis=1)
    return result


def check_order(table: pa.Table, horizons: Sequence[str]) -> None:
    """Look at every ordered column of predictions: the point, the bounds of both intervals, the quantiles.

    Args:
        table: what the pipeline predicted
        horizons: shortest first; one may lack some of the columns

    Raises:
        RuntimeError: where a later horizon holds less than an earlier one, or a value is missing, infinite or negative
    """
    # Their names are revenue_<horizon><rest>.
    stems = [f"revenue_{h}" for h in horizons]
    rests = {n.removeprefix(s) for n in table.column_names for s in stems if n == s or n.startswith(f"{s}_")}
    series = [[f"{s}{rest}" for s in stems if f"{s}{rest}" in table.column_names] for rest in sorted(rests)]
    for names in series:
        for before, after in pairwise(names):
            wrong = np.flatnonzero(table[before].to_numpy() > table[after].to_numpy())
            if len(wrong):
                raise RuntimeError(
                    f"predictions out of order: {before} > {after} in {len(wrong)} rows, first {wrong[0]}"
                )
    for name in (n for names in series for n in names):
        values = table[name].to_numpy()
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise RuntimeError(f"predictions: {name} holds a missing, infinite or negative amount")


def widen_order(lower: Floats, upper: Floats) -> tuple[Floats, Floats]:
    """Interval bounds made non-decreasing over horizons by widening only, so that no interval covers less [N, H]."""
    return np.minimum.accumulate(lower[:, ::-1], axis=1)[:, ::-1].copy(), np.maximum.accumulate(upper, axis=1)


def _min_max(x: Floats, w: Floats) -> Floats:
    """x_i = max over j <= i of min over k >= i of the mean of j..k."""
    rows, horizons = x.shape
    mean = np.empty((horizons, horizons, rows))
    for j in range(horizons):
        total, weight = np.zeros(rows), 0.0
        for k in range(j, horizons):
            total = total + w[k] * x[:, k]
            weight += w[k]
            mean[j, k] = total / weight
    result = np.empty_like(x)
    for i in range(horizons):
        best = np.full(rows, -np.inf)
        for j in range(i + 1):
            best = np.maximum(best, mean[j, i:].min(axis=0))
        result[:, i] = best
    return result
