"""The dashboard's page; Streamlit runs this file with the folder of runs as its argument."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
import pyarrow as pa
import streamlit as st

from ltv import dashboard
from ltv.dashboard import Evaluated
from ltv_stack import LTVPipeline, buyer_metrics, calibration_table, decile_table, lift_table, revenue_metrics
from ltv_stack.report import calibration_points

BLUE, ORANGE, GREY = "#2f6db5", "#d9772b", "#9a9a9a"


@st.cache_resource(show_spinner="loading the models")
def pipeline(folder: str, stamp: float) -> LTVPipeline:
    """Load a run's models anew where `stamp`, the time of its evaluation, is another."""
    return dashboard.pipeline_of(Path(folder))


@st.cache_data(show_spinner="reading the predictions")
def evaluated_run(folder: str, split: str, stamp: float) -> Evaluated:
    """Read an evaluated split anew where `stamp`, the time of its evaluation, is another."""
    return dashboard.load_evaluated(Path(folder), split)


def main(runs: str) -> None:
    """Draw the page."""
    st.set_page_config(page_title="ltv", layout="wide")
    found = dashboard.find_runs(runs)
    if not found:
        st.error(f"No run with an evaluation below {runs}: run `ltv train` or `ltv evaluate` first.")
        return
    with st.sidebar:
        st.title("Revenue predictions")
        folder = found[choose("Run", list(found))]
        split = choose("Split", dashboard.splits_of(folder))
        stamp = (folder / "evaluation" / split / "predictions.parquet").stat().st_mtime
        data = evaluated_run(str(folder), split, stamp)
        pipe = pipeline(str(folder), stamp)
        horizon = choose("Horizon", list(pipe.horizons), list(pipe.horizons).index(pipe.main))
        segments = [name for name in pipe.schema.segments if name in data.predictions]
        column = choose("Slice by", ["(all rows)", *segments])
        chosen: list[str] = []
        if column != "(all rows)":
            values = data.predictions[column].astype(str).value_counts().index.tolist()
            chosen = st.multiselect(f"{column} is one of", values, default=values[:1])
        st.caption(f"{folder}")
    rows = dashboard.within(data.predictions, None if column == "(all rows)" else column, chosen)
    amount = f"true_{horizon}"
    rows = rows[rows[amount].notna()] if amount in rows else rows[:0]
    if rows.empty:
        st.warning(f"The slice holds no rows whose amount at {horizon} is known: choose another horizon or slice.")
        return
    truth, predicted = rows[amount].to_numpy(float), rows[f"revenue_{horizon}"].to_numpy(float)
    probability = rows["buyer_probability"].to_numpy(float)
    headline(rows, truth, predicted, probability, horizon)
    if pipe.config.estimand != "mean":
        st.caption(
            f"Amounts are predictions of the estimand {pipe.config.estimand}, not of the mean: their sum lies far from "
            "the money (the money ratio, predicted over true). For bids train with models.estimand: mean."
        )
    segment = None if column == "(all rows)" else column
    tabs: dict[str, Callable[[], object]] = {
        "Distributions": lambda: draw_distributions(truth, predicted, probability, horizon),
        "Probability and revenue": lambda: draw_scatter(rows, amount, horizon),
        "Deciles, lift, calibration": lambda: draw_deciles(
            rows, truth, predicted, horizon, segment, pipe.config.estimand
        ),
        "One user": lambda: draw_user(data, pipe, horizon),
        "Features and drift": lambda: draw_features(data),
        "Run": lambda: st.json({"metadata": data.run.metadata(), "metrics": data.metrics}),
    }
    for tab, draw in zip(st.tabs(list(tabs)), tabs.values(), strict=True):
        with tab:
            draw()


def choose(label: str, options: list[str], index: int = 0) -> str:
    """Return the option chosen in a select box that always holds one."""
    chosen = st.selectbox(label, options, index=index)
    assert chosen is not None
    return chosen


def headline(
    rows: pd.DataFrame, truth: np.ndarray, predicted: np.ndarray, probability: np.ndarray, horizon: str
) -> None:
    """The numbers of the slice."""
    money, buyers = revenue_metrics(truth, predicted), buyer_metrics((truth > 0).astype(float), probability)
    cells = {
        "rows": f"{len(rows):,}",
        "buyers": f"{buyers['base_rate']:.1%}",
        f"MSLE {horizon}": f"{money['msle']:.4f}",
        "RMSLE": f"{money['rmsle']:.4f}",
        "AUC": f"{buyers['auc']:.3f}",
        "Gini": f"{money['gini']:.3f}",
        "money ratio": f"{money['bias_ratio']:.2f}",
    }
    low, high = f"revenue_{horizon}_lo", f"revenue_{horizon}_hi"
    if low in rows:
        inside = (truth >= rows[low].to_numpy()) & (truth <= rows[high].to_numpy())
        cells["in the interval"] = f"{inside.mean():.1%}"
    # Four a line: millions of rows must fit.
    places = [*st.columns(4), *st.columns(4)]
    for place, (name, value) in zip(places, cells.items(), strict=False):
        place.metric(name, value)


def draw_distributions(truth: np.ndarray, predicted: np.ndarray, probability: np.ndarray, horizon: str) -> None:
    """Histograms of true and predicted amounts and of the buyer probability."""
    left, right = st.columns(2)
    table = dashboard.log_histogram({"true": truth, "predicted": predicted})
    zeros = table[table["to"] == 0].set_index("series")["rows"]
    bars = table[(table["to"] > 0) & (table["rows"] > 0)].assign(
        middle=lambda t: np.sqrt((1 + t["from"]) * (1 + t["to"]))
    )
    chart = alt.Chart(bars).mark_line(interpolate="step", strokeWidth=2)
    chart = chart.encode(
        x=logarithmic(alt.X, "middle", f"1 + revenue by {horizon} (currency of the data)"),
        y=logarithmic(alt.Y, "rows", "rows (log scale)"),
        color=colours("series", true=GREY, predicted=BLUE),
    )
    left.subheader("Amounts above zero")
    left.altair_chart(chart, width="stretch")
    left.caption(f"Exactly zero, and not drawn: {zeros['true']:,} true, {zeros['predicted']:,} predicted.")
    counts, edges = np.histogram(probability, 40)
    bought, _ = np.histogram(probability[truth > 0], edges)
    shares = pd.DataFrame({"from": edges[:-1], "to": edges[1:], "all rows": counts, "buyers": bought})
    shares = shares.melt(["from", "to"], var_name="series", value_name="rows").query("rows > 0")
    chart = alt.Chart(shares).mark_bar(opacity=0.75)
    chart = chart.encode(
        x=alt.X("from:Q", title="buyer probability"),
        x2="to:Q",
        y=logarithmic(alt.Y, "rows", "rows (log scale)", stack=None),
        y2=alt.datum(0.5),
        color=colours("series", **{"all rows": GREY, "buyers": ORANGE}),
    )
    right.subheader("Buyer probability")
    right.altair_chart(chart, width="stretch")


def draw_scatter(rows: pd.DataFrame, amount: str, horizon: str) -> None:
    """Buyer probability against predicted revenue, true buyers marked."""
    shown = dashboard.points(rows)
    table = pd.DataFrame(
        {
            "buyer probability": shown["buyer_probability"].to_numpy(),
            "predicted": 1 + shown[f"revenue_{horizon}"].to_numpy(),
            "true": shown[amount].to_numpy(),
            "bought": np.where(shown[amount].to_numpy() > 0, "bought", "did not buy"),
        }
    ).sort_values("true", kind="stable")
    chart = alt.Chart(table).mark_circle(size=28, opacity=0.6)
    chart = chart.encode(
        x="buyer probability:Q",
        y=logarithmic(alt.Y, "predicted", f"1 + predicted revenue by {horizon}"),
        color=colours("bought", **{"did not buy": GREY, "bought": ORANGE}),
        tooltip=["buyer probability", "predicted", "true"],
    )
    st.subheader("Who is likely to buy, and for how much")
    st.altair_chart(chart.properties(height=460), width="stretch")
    st.caption(f"{len(shown):,} of {len(rows):,} rows.")


def draw_deciles(
    rows: pd.DataFrame, truth: np.ndarray, predicted: np.ndarray, horizon: str, segment: str | None, estimand: str
) -> None:
    """Decile chart, lift curve and calibration of the slice, computed from its rows."""
    left, right = st.columns(2)
    deciles = decile_table(truth, predicted)
    bars = deciles.melt("bin", ["mean_true", "mean_predicted"], "series", "mean").replace(
        {"mean_true": "true", "mean_predicted": "predicted"}
    )
    chart = alt.Chart(bars).mark_bar()
    chart = chart.encode(
        x=alt.X("bin:O", title="tenth of the rows by prediction, highest first", axis=alt.Axis(labelAngle=0)),
        xOffset="series:N",
        y=alt.Y("mean:Q", title=f"mean revenue by {horizon}"),
        color=colours("series", true=GREY, predicted=BLUE),
    )
    left.subheader("Deciles")
    left.altair_chart(chart, width="stretch")
    left.dataframe(deciles, hide_index=True, width="stretch")
    lift = lift_table(truth, predicted, np.r_[0.005, np.linspace(0.01, 1, 100)])
    lines = lift.melt("fraction", ["revenue_share", "buyer_share"], "series", "share").replace(
        {"revenue_share": "of the revenue", "buyer_share": "of the buyers"}
    )
    chart = alt.Chart(lines).mark_line(strokeWidth=2)
    chart = chart.encode(
        x=alt.X("fraction:Q", title="share of the rows, highest predictions first", axis=alt.Axis(format="%")),
        y=alt.Y("share:Q", title="share found", axis=alt.Axis(format="%")),
        color=colours("series", **{"of the buyers": ORANGE, "of the revenue": BLUE}),
    )
    right.subheader("Lift")
    right.altair_chart(chart + diagonal([0, 1]), width="stretch")
    left, right = st.columns(2)
    left.subheader("Calibration")
    left.altair_chart(calibration_chart(truth, predicted, estimand, horizon), width="stretch")
    if estimand != "mean":
        left.caption(f"Predictions are the estimand {estimand}; money is below the mean of the rows in the tables.")
    right.subheader(f"Money by {segment}" if segment else "Money by decile")
    table = calibration_table(truth, predicted, rows[segment].astype(str).tolist() if segment else None)
    right.dataframe(table, hide_index=True, width="stretch")


def calibration_chart(truth: np.ndarray, predicted: np.ndarray, estimand: str, horizon: str) -> alt.LayerChart:
    """Mean true against mean predicted value of twentieths of the rows, in the space of the estimand."""
    unit, space = (f"log(1 + revenue by {horizon})", np.log1p) if estimand == "log1p" else ("revenue", np.asarray)
    said, true = calibration_points(space(truth), space(np.maximum(predicted, 0.0)))
    table = pd.DataFrame({"predicted": said, "true": true}).query("predicted > 0 and true > 0")
    ends = [table.to_numpy().min(initial=np.inf), table.to_numpy().max(initial=0.0)] if len(table) else [0.1, 1.0]
    points = alt.Chart(table).mark_circle(size=70, color=BLUE, opacity=1)
    points = points.encode(
        x=logarithmic(alt.X, "predicted", f"mean predicted {unit}", nice=False),
        y=logarithmic(alt.Y, "true", f"mean true {unit}", nice=False),
        tooltip=["predicted", "true"],
    )
    return diagonal(ends) + points


def draw_user(data: Evaluated, pipe: LTVPipeline, horizon: str) -> None:
    """One row: prediction, what moved it, and what another value would do."""
    ids = [str(value) for value in data.rows[str(pipe.schema.id)].to_pylist()]
    scored = data.predictions[f"revenue_{horizon}"].to_numpy()[: len(ids)]
    order = np.argsort(-scored, kind="stable")
    st.caption(f"The first {len(ids):,} rows of the split, highest predicted revenue first.")
    number = st.selectbox("User", order.tolist(), format_func=lambda i: f"{ids[i]}  ({scored[i]:.2f})")
    row = data.rows.slice(number, 1)
    said = dashboard.predict_row(pipe, row)
    true = data.predictions.iloc[number]
    lines = [
        {
            "horizon": name,
            "predicted": said[f"revenue_{name}"],
            "from": said.get(f"revenue_{name}_lo"),
            "to": said.get(f"revenue_{name}_hi"),
            "true": true.get(f"true_{name}"),
        }
        for name in pipe.horizons
    ]
    left, right = st.columns([2, 3])
    left.subheader("Prediction")
    left.metric("buyer probability", f"{said['buyer_probability']:.2%}")
    left.dataframe(pd.DataFrame(lines), hide_index=True, width="stretch")
    right.subheader(f"What moved {horizon}")
    table = dashboard.contributions(pipe, row, horizon)
    table["sign"] = np.where(table["contribution"] >= 0, "up", "down")
    table["label"] = table["feature"] + table["value"].map(lambda v: "" if pd.isna(v) else f" = {v:.4g}")
    chart = alt.Chart(table).mark_bar()
    chart = chart.encode(
        x=alt.X("contribution:Q", title="contribution (model's scale)"),
        y=alt.Y("label:N", sort=None, title=None, axis=alt.Axis(labelLimit=340)),
        color=colours("sign", up=BLUE, down=ORANGE).legend(None),
    )
    right.altair_chart(chart, width="stretch")
    st.subheader("What if")
    columns = dashboard.scalar_columns(data.rows, pipe)
    changed = st.multiselect("Change", columns, key="changed", help="columns of the raw row that the model reads")
    values = {name: ask_value(data.rows, row, name) for name in changed}
    if values:
        other = dashboard.predict_row(pipe, dashboard.with_values(row, values))
        names = ["buyer_probability", *(f"revenue_{name}" for name in pipe.horizons)]
        table = pd.DataFrame({"": names, "now": [said[n] for n in names], "what if": [other[n] for n in names]})
        table["change"] = table["what if"] - table["now"]
        st.dataframe(table, hide_index=True, width="stretch")


def ask_value(rows: pa.Table, row: pa.Table, name: str) -> object:
    """Ask for another value of one column: a number, or one of the texts its column holds."""
    kind, now = rows.schema.field(name).type, row[name][0].as_py()
    if pa.types.is_floating(kind) or pa.types.is_integer(kind):
        start = float(now) if now is not None else 0.0
        value = st.number_input(f"{name} (now {now})", value=start, key=f"value_{name}")
        return int(value) if pa.types.is_integer(kind) else value
    known = sorted({str(value) for value in rows[name].to_pylist() if value is not None})
    return st.selectbox(f"{name} (now {now})", known, key=f"value_{name}")


def draw_features(data: Evaluated) -> None:
    """Importance and drift, as the evaluation measured them."""
    tables = {"Importance": "importance", "Drift against the training rows": "drift"}
    for place, (title, name) in zip(st.columns(2), tables.items(), strict=True):
        place.subheader(title)
        table = dashboard.table_of(data, name)
        if table is None:
            place.info(f"The evaluation wrote no {name}.csv.")
        else:
            place.dataframe(table, hide_index=True, width="stretch", height=520)


def colours(field: str, **kinds: str) -> alt.Color:
    """Colour by the kinds of a field, each with its own."""
    return alt.Color(f"{field}:N", scale=alt.Scale(domain=list(kinds), range=list(kinds.values())), title=None)


def logarithmic(axis: Any, field: str, title: str, nice: bool = True, **more: Any) -> Any:
    """An axis, alt.X or alt.Y, of amounts on a log scale."""
    return axis(f"{field}:Q", scale=alt.Scale(type="log", nice=nice), title=title, **more)


def diagonal(ends: list[float]) -> alt.Chart:
    """A dashed line where both axes say the same."""
    return alt.Chart(pd.DataFrame({"x": ends})).mark_line(strokeDash=[4, 4], color=GREY).encode(x="x:Q", y="x:Q")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs")
