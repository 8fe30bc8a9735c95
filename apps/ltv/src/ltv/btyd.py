"""The classical rival: BG/NBD for how often a customer will buy, Gamma-Gamma for how much each time.

Fitted on everything the train customers did before the validation window opens; applied to each row with what its
customer had done by the row's own time. It knows purchases only, no covariates, and predicts the mean.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray
from sklearn.isotonic import IsotonicRegression

from ltv_stack import Dataset

DAY = pd.Timedelta(days=1)
PENALTIES = (0.0, 0.001, 0.01, 0.1)
log = logging.getLogger("ltv.btyd")


def predict_btyd(
    purchases: str | Path, train: Dataset, rows: Dataset, horizons: Sequence[str], recalibrate: bool
) -> dict[str, NDArray[np.float64]]:
    """Return each horizon's expected revenue of every row of `rows` [N], in order.

    Args:
        purchases: ``transactions.parquet`` as `ltv import` writes it
        train: the train rows; their customers are fitted on, up to the first time in `rows`
        rows: the rows to predict
        horizons: "d7", "d28", ...; the number is the days
        recalibrate: map the mean to E[log1p revenue] (given back as expm1 of it) by an isotonic curve through the train
            rows, which is what MSLE asks for

    Raises:
        ImportError: without the library; names the extra.
    """
    try:
        from lifetimes import BetaGeoFitter, GammaGammaFitter
    except ImportError:
        raise ImportError("BG/NBD needs the library `lifetimes`: pip install 'ltv[btyd]'") from None
    sales = pd.read_parquet(purchases, columns=["customer", "time", "amount"])
    sales = sales[sales["amount"] > 0]
    old, new = (_customers(data) for data in (train, rows))
    history = sales[sales["customer"].isin(old["customer"])]
    fitted = _summary(history, history.groupby("customer")["time"].transform(lambda t: new["datetime"].min()))
    with warnings.catch_warnings():
        # The library divides by zero inside its optimiser and recovers; its own code is not ours to mend.
        warnings.simplefilter("ignore")
        count = _fit(BetaGeoFitter, fitted["frequency"], fitted["recency"], fitted["T"])
        again = fitted[fitted["frequency"] > 0]
        # The optimiser starts near one: money is measured in mean repeat purchases.
        unit = float(again["monetary"].mean())
        amount = _fit(GammaGammaFitter, again["frequency"], again["monetary"] / unit)

        def mean(customers: pd.DataFrame) -> dict[str, NDArray[np.float64]]:
            own = sales.merge(customers, on="customer")
            seen = _summary(own, own["datetime"]).reindex(customers["customer"])
            price = amount.conditional_expected_average_profit(seen["frequency"], seen["monetary"] / unit).to_numpy()
            out = {}
            for name in horizons:
                days = int(name.removeprefix("d"))
                expected = count.conditional_expected_number_of_purchases_up_to_time(
                    days, seen["frequency"], seen["recency"], seen["T"]
                )
                out[name] = np.maximum(np.asarray(expected) * price * unit, 0.0)
            return out

        predicted = mean(new)
        if not recalibrate:
            return predicted
        known = mean(old)
    for name in horizons:
        curve = IsotonicRegression(out_of_bounds="clip").fit(known[name], np.log1p(old[f"revenue_{name}"]))
        predicted[name] = np.expm1(curve.predict(predicted[name]))
    return predicted


def _fit(model: Any, *columns: pd.Series) -> Any:
    """Fit with the least penalty that converges; the library's own advice where it does not."""
    for penalty in PENALTIES:
        try:
            # The library prints its optimiser's state before it raises.
            with contextlib.redirect_stdout(io.StringIO()):
                return model(penalizer_coef=penalty).fit(*columns)
        except Exception as error:
            # The library's ConvergenceError has no common base of its own.
            if type(error).__name__ != "ConvergenceError":
                raise
            log.info("%s does not converge with penalty %g", model.__name__, penalty)
    raise ValueError(f"BG/NBD and Gamma-Gamma: {model.__name__} does not converge with penalties up to {PENALTIES[-1]}")


def _summary(sales: pd.DataFrame, end: pd.Series) -> pd.DataFrame:
    """Repeat purchase days, days from first to last, days from first to `end`, and mean money of a repeat day."""
    sales = sales.assign(end=end.to_numpy())
    sales = sales[sales["time"] < sales["end"]]
    daily = sales.assign(day=sales["time"].dt.normalize()).groupby(["customer", "day"])
    daily = daily.agg(amount=("amount", "sum"), end=("end", "first")).reset_index()
    daily["repeat"] = daily.groupby("customer").cumcount() > 0
    whole = daily.groupby("customer").agg(first=("day", "min"), last=("day", "max"), end=("end", "first"))
    repeats = daily[daily["repeat"]].groupby("customer")["amount"].agg(["size", "mean"]).reindex(whole.index)
    return pd.DataFrame(
        {
            "frequency": repeats["size"].fillna(0.0),
            "recency": (whole["last"] - whole["first"]) / DAY,
            "T": (whole["end"] - whole["first"]) / DAY,
            "monetary": repeats["mean"].fillna(0.0),
        }
    )


def _customers(data: Dataset) -> pd.DataFrame:
    columns = ["customer", "datetime", *(n for n in data.column_names if n.startswith("revenue_"))]
    table: pa.Table = data.read(columns)
    return table.to_pandas()
