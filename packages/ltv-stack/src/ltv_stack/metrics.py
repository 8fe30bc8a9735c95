"""Metrics of revenue and of buyers; every one gives the same number however ties are ordered."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    log_loss,
    precision_recall_fscore_support,
    roc_auc_score,
)

Floats = npt.NDArray[np.float64]


def revenue_metrics(y: Floats, prediction: Floats) -> dict[str, float]:
    """All metrics of one horizon's predictions; NaN where one is not defined (no revenue, constant truth).

    msle, rmsle: squared error of log1p and its root. rmse, mae, r2. nrmse, nmae: over mean(y). bias_ratio: sum of
    predictions over sum of truth. ambe: |mean(prediction) - mean(y)|. gini: of truth ordered by prediction, over that
    ordered by itself. mutual_gini: area between the Lorenz curves of truth and prediction. spearman: rank correlation.

    Args:
        y: true amounts, 0 or more [N].
        prediction: predicted amounts [N].

    Returns:
        name -> value.

    Source: Wang et al. 2019 (arXiv 1912.07753) for the normalised Gini; Li et al., CIKM 2022, for Mutual Gini and AMBE.
    """
    y, prediction = _pair(y, prediction)
    error = prediction - y
    mean = float(y.mean())
    spread = float(((y - mean) ** 2).sum())
    # log1p of a prediction of -1 or less has no value; 0 is the least revenue.
    log_error = np.log1p(np.maximum(prediction, 0.0)) - np.log1p(y)
    msle = float((log_error**2).mean())
    rmse = float(np.sqrt((error**2).mean()))
    mae = float(np.abs(error).mean())
    return {
        "rows": float(len(y)),
        "msle": msle,
        "rmsle": float(np.sqrt(msle)),
        "rmse": rmse,
        "mae": mae,
        "r2": 1.0 - float((error**2).sum()) / spread if spread > 0 else float("nan"),
        "nrmse": rmse / mean if mean > 0 else float("nan"),
        "nmae": mae / mean if mean > 0 else float("nan"),
        "bias_ratio": float(prediction.sum()) / float(y.sum()) if y.sum() > 0 else float("nan"),
        "ambe": abs(float(prediction.mean()) - mean),
        "gini": normalized_gini(y, prediction),
        "mutual_gini": mutual_gini(y, prediction),
        "spearman": _correlation(_ranks(y), _ranks(prediction)),
    }


def buyer_metrics(y: Floats, probability: Floats) -> dict[str, float]:
    """AUC, PR-AUC, log loss, Brier score and base rate of buyer probabilities; NaN for AUCs of a single class.

    Args:
        y: true amounts; a row above 0 is a buyer's [N].
        probability: the predicted chance [N].

    Returns:
        name -> value.
    """
    y, probability = _pair((np.asarray(y) > 0).astype(np.float64), probability)
    both = 0 < y.sum() < len(y)
    return {
        "rows": float(len(y)),
        "base_rate": float(y.mean()),
        "auc": float(roc_auc_score(y, probability)) if both else float("nan"),
        "pr_auc": float(average_precision_score(y, probability)) if both else float("nan"),
        "log_loss": float(log_loss(y, np.clip(probability, 1e-12, 1 - 1e-12), labels=[0.0, 1.0])),
        "brier": float(((probability - y) ** 2).mean()),
    }


def call_metrics(buyer: Floats, probability: Floats) -> dict[str, float]:
    """Accuracy, precision, recall and F1 where as many rows are called buyers as there are, and the ROC AUC.

    No metric was tuned on that threshold. Rows as probable as the last one called are called too.

    Args:
        buyer: whether each row bought, 0 or 1 [N]; both kinds must be there.
        probability: the predicted chance [N].

    Returns:
        name -> value.
    """
    bought = buyer > 0
    called = probability >= np.sort(probability)[-int(bought.sum())]
    precision, recall, f1, _ = precision_recall_fscore_support(bought, called, average="binary", zero_division=0)
    return {
        "accuracy": float(accuracy_score(bought, called)),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
        "roc_auc": float(roc_auc_score(bought, probability)),
    }


def lorenz(amounts: Floats, by: Floats | None = None) -> tuple[Floats, Floats]:
    """Lorenz curve: share of rows, poorest first, against their share of the amount, from (0, 0) to (1, 1) [N + 1].

    Args:
        amounts: 0 or more, with a positive sum [N].
        by: what rows are ordered by; the amounts themselves when None. Tied rows share their amount evenly.

    Returns:
        share of rows and share of the amount.
    """
    amounts = np.asarray(amounts, dtype=np.float64)
    by = amounts if by is None else np.asarray(by, dtype=np.float64)
    order = np.argsort(by, kind="stable")
    cumulated = np.cumsum(_tied_means(by[order], amounts[order]))
    rows = np.arange(len(amounts) + 1) / len(amounts)
    return rows, np.concatenate([[0.0], cumulated / cumulated[-1]])


def normalized_gini(y: Floats, prediction: Floats) -> float:
    """Gini of the truth ordered by prediction over that ordered by itself: 1 for a perfect ranking, 0 for none.

    Args:
        y: true amounts, 0 or more [N].
        prediction: predicted amounts [N].
    """
    y, prediction = _pair(y, prediction)
    if y.sum() <= 0 or np.ptp(y) == 0:
        return float("nan")
    return _gini(y, prediction) / _gini(y, y)


def mutual_gini(y: Floats, prediction: Floats) -> float:
    """Area between the Lorenz curves of truth and prediction, each ordered by itself: the integral of |difference|.

    The absolute value is inside the integral, so curves that cross do not cancel; segments that cross are split.

    Args:
        y: true amounts, 0 or more [N].
        prediction: predicted amounts [N].
    """
    y, prediction = _pair(y, np.maximum(prediction, 0.0))
    if y.sum() <= 0 or prediction.sum() <= 0:
        return float("nan")
    _, true = lorenz(y)
    _, said = lorenz(prediction)
    gap = said - true
    a, b = gap[:-1], gap[1:]
    crosses = a * b < 0
    bottom = np.where(crosses, np.abs(a) + np.abs(b), 1.0)
    area = np.where(crosses, (a * a + b * b) / (2 * bottom), (np.abs(a) + np.abs(b)) / 2)
    return float(area.sum() / len(y))


def decile_table(y: Floats, prediction: Floats, bins: int = 10) -> pd.DataFrame:
    """Equal parts by prediction, highest first: rows, buyer rate, mean truth and prediction, share of revenue, lift.

    Ties are cut evenly in expectation: tied rows carry their mean, so the table does not depend on the order of rows.

    Args:
        y: true amounts [N].
        prediction: predicted amounts [N].
        bins: number of parts.

    Raises:
        ValueError: there is no part.
    """
    y, prediction = _pair(y, prediction)
    if bins < 1:
        raise ValueError(f"bins: got {bins}, needs at least 1")
    order = np.argsort(-prediction, kind="stable")
    said = prediction[order]
    true = _tied_means(-said, y[order])
    buyers = _tied_means(-said, (y[order] > 0).astype(np.float64))
    parts = np.array_split(np.arange(len(y)), min(bins, len(y)))
    total = y.sum()
    table = pd.DataFrame(
        {
            "bin": range(1, len(parts) + 1),
            "rows": [len(part) for part in parts],
            "buyer_rate": [buyers[part].mean() for part in parts],
            "mean_true": [true[part].mean() for part in parts],
            "mean_predicted": [said[part].mean() for part in parts],
            "revenue_share": [true[part].sum() / total if total > 0 else np.nan for part in parts],
        }
    )
    table["cumulative_share"] = table["revenue_share"].cumsum()
    overall = y.mean()
    table["lift"] = table["mean_true"] / overall if overall > 0 else np.nan
    return table


def lift_table(
    y: Floats, prediction: Floats, fractions: Sequence[float] = (0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
) -> pd.DataFrame:
    """Share of revenue and of buyers that the top fraction of rows by prediction holds, and the lift over chance.

    Args:
        y: true amounts [N].
        prediction: predicted amounts [N].
        fractions: of the rows, in (0, 1], one a line of the table.
    """
    y, prediction = _pair(y, prediction)
    order = np.argsort(-prediction, kind="stable")
    said = prediction[order]
    total = max(float(y.sum()), 1e-300)
    buyers = (y > 0).astype(np.float64)
    revenue = np.concatenate([[0.0], np.cumsum(_tied_means(-said, y[order]))]) / total
    found = np.concatenate([[0.0], np.cumsum(_tied_means(-said, buyers[order]))]) / max(buyers.sum(), 1.0)
    at = np.array(fractions, dtype=np.float64) * len(y)
    grid = np.arange(len(y) + 1)
    share, caught = np.interp(at, grid, revenue), np.interp(at, grid, found)
    return pd.DataFrame(
        {
            "fraction": list(fractions),
            "revenue_share": share,
            "buyer_share": caught,
            "lift": share / np.array(fractions),
        }
    )


def calibration_table(
    y: Floats, prediction: Floats, segment: Sequence[Any] | None = None, bins: int = 10
) -> pd.DataFrame:
    """Predicted against true money by decile of prediction, or by segment where one is given.

    Args:
        y: true amounts [N].
        prediction: predicted amounts [N].
        segment: of each row [N].
        bins: number of parts where no segment is given.
    """
    y, prediction = _pair(y, prediction)
    if segment is None:
        table = decile_table(y, prediction, bins)[["bin", "rows", "mean_true", "mean_predicted"]].copy()
    else:
        names = ["(missing)" if one is None else str(one) for one in segment]
        frame = pd.DataFrame({"segment": names, "y": y, "p": prediction})
        grouped = frame.groupby("segment", observed=True)
        table = grouped.agg(rows=("y", "size"), mean_true=("y", "mean"), mean_predicted=("p", "mean")).reset_index()
        table = table.sort_values(["rows", "segment"], ascending=[False, True], ignore_index=True)
    true = table["mean_true"].to_numpy()
    table["ratio"] = np.where(true > 0, table["mean_predicted"].to_numpy() / np.where(true > 0, true, 1.0), np.nan)
    return table


def interval_coverage(y: Floats, lower: Floats, upper: Floats, probability: Floats | None = None) -> dict[str, float]:
    """Shares of rows whose amount lies in its interval: all rows, buyers, and rows whose interval is wider than [0, 0].

    Where more rows are zero than the level asks for, [0, 0] covers more than the level and nothing smaller exists;
    `informative` leaves those rows out. With probabilities, also the lowest and highest coverage over their deciles.

    Args:
        y: true amounts [N].
        lower: lower bounds [N].
        upper: upper bounds [N].
        probability: buyer probability [N].

    Returns:
        name -> share.
    """
    y = np.asarray(y, dtype=np.float64)
    inside = (y >= lower) & (y <= upper)
    wide = np.asarray(upper) > 0
    result = {
        "rows": float(len(y)),
        "overall": float(inside.mean()) if len(y) else float("nan"),
        "buyers": float(inside[y > 0].mean()) if (y > 0).any() else float("nan"),
        "informative": float(inside[wide].mean()) if wide.any() else float("nan"),
        "informative_share": float(wide.mean()) if len(y) else float("nan"),
        "mean_width": float((np.asarray(upper) - np.asarray(lower))[wide].mean()) if wide.any() else float("nan"),
    }
    if probability is not None and len(y) >= 10:
        parts = np.array_split(np.argsort(probability, kind="stable"), 10)
        result |= {"lowest": min(float(inside[p].mean()) for p in parts)}
        result |= {"highest": max(float(inside[p].mean()) for p in parts)}
    return result


def _gini(y: Floats, by: Floats) -> float:
    rows, share = lorenz(y, by)
    return 1.0 - 2.0 * float(((share[1:] + share[:-1]) / 2 * np.diff(rows)).sum())


def _tied_means(sorted_by: Floats, amounts: Floats) -> Floats:
    """Amounts in which rows of equal key carry the mean of their group."""
    if not len(amounts):
        return amounts
    starts = np.flatnonzero(np.concatenate([[True], np.diff(sorted_by) != 0]))
    lengths = np.diff(np.append(starts, len(amounts)))
    return np.repeat(np.add.reduceat(amounts, starts) / lengths, lengths)


def _ranks(values: Floats) -> Floats:
    order = np.argsort(values, kind="stable")
    ranks = np.empty(len(values))
    ranks[order] = _tied_means(values[order], np.arange(len(values), dtype=np.float64))
    return ranks


def _correlation(left: Floats, right: Floats) -> float:
    if np.ptp(left) == 0 or np.ptp(right) == 0:
        return float("nan")
    return float(np.corrcoef(left, right)[0, 1])


def _pair(y: Floats, prediction: Floats) -> tuple[Floats, Floats]:
    y, prediction = np.asarray(y, dtype=np.float64), np.asarray(prediction, dtype=np.float64)
    if y.shape != prediction.shape or y.ndim != 1:
        raise ValueError(f"prediction: got shape {prediction.shape}, needs that of y, {y.shape}")
    if len(y) == 0:
        raise ValueError("y: got no rows, needs at least one")
    for name, values in (("y", y), ("prediction", prediction)):
        if not np.isfinite(values).all():
            raise ValueError(f"{name}: {int((~np.isfinite(values)).sum())} of {len(values)} values are not finite")
    if (y < 0).any():
        raise ValueError(f"y: {int((y < 0).sum())} amounts are negative; revenue is 0 or more")
    return y, prediction
