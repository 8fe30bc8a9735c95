"""Reports of an evaluation: charts as PNG, one HTML page that holds them, and a model card (extra `report`)."""

import base64
import html
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .columns import column_numbers
from .evaluation import Evaluation
from .metrics import lorenz
from .pipeline import LTVPipeline

_SHOWN = (
    "msle",
    "rmsle",
    "rmse",
    "mae",
    "r2",
    "gini",
    "mutual_gini",
    "nrmse",
    "nmae",
    "bias_ratio",
    "ambe",
    "spearman",
)
_STYLE = (
    "body{font-family:sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0;font-size:90%}td,th{border:1px solid #ccc;padding:.3em .6em;"
    "text-align:right}th{background:#f3f3f3}img{max-width:100%}pre{background:#f7f7f7;padding:1em;white-space:pre-wrap}"
)


def write_report(
    evaluation: Evaluation,
    pipe: LTVPipeline,
    out_dir: str | Path,
    *,
    title: str = "Revenue report",
    drift: pd.DataFrame | None = None,
    importance: pd.DataFrame | None = None,
) -> Path:
    """Write `report.html` (self-contained), the charts as PNG, `metrics.json` and `model_card.md` into a folder.

    Args:
        evaluation: what `evaluate` found.
        pipe: the pipeline it was found on.
        out_dir: folder, made when absent.
        title: of the page.
        drift: table of `pipe.drift`; left out when None.
        importance: table of `pipe.importance`; left out when None.

    Returns:
        the path of the page.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("write_report needs the extra: pip install 'ltv-stack[report]'") from error
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    body = [f"<h1>{html.escape(title)}</h1>", _summary(evaluation, pipe)]
    for name, heading, draw in _charts(evaluation, pipe.config.estimand, drift, importance):
        figure = _figure()
        draw(figure.subplots())
        figure.tight_layout()
        _write(out / f"{name}.png", partial(figure.savefig, dpi=110, format="png"))
        image = base64.b64encode((out / f"{name}.png").read_bytes()).decode()
        body.append(
            f'<h2>{html.escape(heading)}</h2><img alt="{html.escape(heading)}" src="data:image/png;base64,{image}">'
        )
    for name, table in evaluation.tables.items():
        body.append(f"<h3>{html.escape(name.replace(':', ' '))}</h3>{_table(table)}")
    for name, extra in (("Largest drift", drift), ("Most important features", importance)):
        if extra is not None:
            body.append(f"<h3>{name}</h3>{_table(extra.head(30))}")
    card = model_card(pipe, evaluation)
    body.append(f"<h2>Model card</h2><pre>{html.escape(card)}</pre>")
    page = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
    page += f"<style>{_STYLE}</style></head><body>{''.join(body)}</body></html>"
    _write(out / "metrics.json", lambda path: path.write_text(json.dumps(evaluation.to_json(), indent=2)))
    _write(out / "model_card.md", lambda path: path.write_text(card))
    _write(out / "report.html", lambda path: path.write_text(page))
    return out / "report.html"


def model_card(pipe: LTVPipeline, evaluation: Evaluation | None = None) -> str:
    """What the model is, what its numbers mean, what it was trained on and how it did, as Markdown.

    Args:
        pipe: fitted pipeline.
        evaluation: how it did; that part is left out when None.
    """
    config, facts = pipe.config, pipe.report_
    estimands = {
        "log1p": "exp(E[log(1 + revenue)]) - 1, the value that squared log error asks for; it is below the mean",
        "mean": "the mean of revenue, the value to bid with",
        "median": "the median of revenue",
    }
    meaning = estimands.get(config.estimand, f"the quantile of revenue at level {config.estimand.partition(':')[2]}")
    lines = [
        "# Model card",
        "",
        f"- Model: `{config.model}`; horizons {', '.join(pipe.horizons)}.",
        f"- `revenue_*` is {meaning}.",
        "- Order: revenue never falls from one horizon to the next, in points, quantiles and interval bounds.",
        f"- Trained on {facts.get('training_rows')} rows with {facts.get('buyers')} buyers by {pipe.main}; "
        f"calibrated on {facts.get('held_out_rows')} rows held out ({config.split} split, embargo {config.embargo}).",
        f"- Features: {len(pipe.builder.names)} from {len(pipe.builder.kinds)} columns. Sampling: {config.sampling}.",
    ]
    if config.intervals is not None:
        lines.append(
            f"- `_lo`/`_hi` hold {config.intervals:.0%} of rows, Mondrian by buyer probability; `_buyer_lo`/"
            f"`_buyer_hi` hold {config.intervals:.0%} of the rows that buy. Where more than that share is zero, [0, 0] "
            "covers more."
        )
    lines += [f"- Horizon {name} is not predicted: {reason}." for name, reason in pipe.skipped_horizons.items()]
    if facts.get("rows_over_the_cap"):
        lines.append(f"- {facts['rows_over_the_cap']} training rows over `max_rows` were left out.")
    lines += [f"- Leak reported: {leak}." for leak in facts.get("leaks", [])]
    if evaluation is not None:
        lines += ["", f"## On {evaluation.rows} rows it has not seen", "", _markdown(_metric_table(evaluation))]
        if evaluation.coverage:
            lines += ["", "## Coverage of the intervals", "", _markdown(_coverage_table(evaluation))]
    return "\n".join(lines) + "\n"


def _summary(evaluation: Evaluation, pipe: LTVPipeline) -> str:
    parts = [
        f"<p>{evaluation.rows:,} rows, {1000 * evaluation.seconds / max(evaluation.rows, 1):.3f} ms a row; "
        f"model <b>{pipe.config.model}</b>, estimand <b>{html.escape(pipe.config.estimand)}</b>.</p>",
        "<h2>Metrics</h2>",
        _table(_metric_table(evaluation)),
    ]
    if "buyer" in evaluation.metrics:
        parts.append(_table(pd.DataFrame([evaluation.metrics["buyer"]])))
    if evaluation.coverage:
        parts += ["<h2>Coverage of the intervals</h2>", _table(_coverage_table(evaluation))]
    return "".join(parts)


def _metric_table(evaluation: Evaluation) -> pd.DataFrame:
    names = [n for n in evaluation.metrics if n != "buyer"]
    return pd.DataFrame([{"rows of": n, **{k: evaluation.metrics[n][k] for k in ("rows", *_SHOWN)}} for n in names])


def _coverage_table(evaluation: Evaluation) -> pd.DataFrame:
    return pd.DataFrame([{"interval": name, **values} for name, values in evaluation.coverage.items()])


def _charts(
    evaluation: Evaluation, estimand: str, drift: pd.DataFrame | None, importance: pd.DataFrame | None
) -> list[tuple[str, str, Callable[[Any], None]]]:
    table = evaluation.predictions
    assert table is not None
    charts: list[tuple[str, str, Callable[[Any], None]]] = []
    for horizon in evaluation.horizons:
        truth = column_numbers(table[f"true_{horizon}"])
        known = np.isfinite(truth)
        y, predicted = truth[known], column_numbers(table[f"revenue_{horizon}"])[known]
        deciles, lift = evaluation.tables[f"deciles:{horizon}"], evaluation.tables[f"lift:{horizon}"]

        def draw_deciles(axes: Any, deciles: pd.DataFrame = deciles) -> None:
            axes.bar(deciles["bin"] - 0.2, deciles["mean_true"], 0.4, label="true")
            axes.bar(deciles["bin"] + 0.2, deciles["mean_predicted"], 0.4, label="predicted")
            axes.set_xticks(deciles["bin"])
            axes.set(xlabel="decile of predicted revenue (1 = highest)", ylabel="mean revenue a row [money]")
            if estimand != "mean":
                axes.set_title(f"predicted is the estimand {estimand}, not the mean", fontsize=9)
            axes.legend(loc="upper right")

        def draw_lift(axes: Any, lift: pd.DataFrame = lift) -> None:
            axes.plot([0, *lift["fraction"]], [0, *lift["revenue_share"]], marker="o", label="revenue")
            axes.plot([0, *lift["fraction"]], [0, *lift["buyer_share"]], marker="s", label="buyers")
            axes.plot([0, 1], [0, 1], "--", color="grey", label="chance")
            axes.set(xlabel="share of rows, highest predicted first", ylabel="share of the total", ylim=(0, 1.02))
            axes.legend(loc="lower right")

        def draw_lorenz(axes: Any, y: Any = y, predicted: Any = predicted) -> None:
            for amounts, label in ((y, "true"), (np.maximum(predicted, 0.0), "predicted")):
                if amounts.sum() > 0:
                    axes.plot(*(side[:: max(1, len(side) // 2000)] for side in lorenz(amounts)), label=label)
            axes.set(xlabel="share of rows, poorest first", ylabel="share of revenue")
            axes.legend(loc="upper left")

        def draw_calibration(axes: Any, y: Any = y, predicted: Any = predicted) -> None:
            unit, space = ("log(1 + revenue)", np.log1p) if estimand == "log1p" else ("revenue [money]", np.asarray)
            said, true = map(np.array, calibration_points(space(y), space(np.maximum(predicted, 0.0))))
            ends = [side[side > 0] for side in (said, true)]
            if all(map(len, ends)):
                low, high = min(side.min() for side in ends), max(side.max() for side in ends)
                axes.plot([low, high], [low, high], "--", color="grey", label="as predicted")
                axes.set(xscale="log", yscale="log")
                axes.legend(loc="upper left")
            axes.plot(said, true, marker="o")
            axes.set(xlabel=f"mean predicted {unit}, twentieths of the rows", ylabel=f"mean true {unit}")

        def draw_distribution(axes: Any, y: Any = y, predicted: Any = predicted) -> None:
            bins = np.linspace(0, max(float(np.log1p(y).max()), float(np.log1p(predicted).max()), 1e-3), 60).tolist()
            axes.hist(np.log1p(y), bins, alpha=0.6, label="true", log=True)
            axes.hist(np.log1p(predicted), bins, alpha=0.6, label="predicted", log=True)
            axes.set(xlabel="log(1 + revenue)", ylabel="rows")
            axes.legend(loc="upper right")

        charts += [
            (f"deciles_{horizon}", f"Revenue by decile, {horizon}", draw_deciles),
            (f"lift_{horizon}", f"Share of revenue and buyers found, {horizon}", draw_lift),
            (f"lorenz_{horizon}", f"Lorenz curves, {horizon}", draw_lorenz),
            (f"calibration_{horizon}", f"Calibration, {horizon}", draw_calibration),
            (f"distribution_{horizon}", f"Distribution of revenue, {horizon}", draw_distribution),
        ]
        for name, segment in evaluation.tables.items():
            if name.startswith(f"calibration:{horizon}:"):
                column = name.rpartition(":")[2]
                charts.append(
                    (f"segment_{horizon}_{column}", f"Money by {column}, {horizon}", _draw_segment(segment, column))
                )
    if "buyer" in evaluation.metrics:
        charts.append(("buyers", "Buyer probability against the share that bought", _draw_buyers(evaluation)))
    if importance is not None:
        charts += _importance_charts(importance)
    if drift is not None:
        top = drift.head(20).iloc[::-1]
        charts.append(
            ("drift", "Features that moved most", _draw_bars(top["feature"], top["psi"], "PSI (0.25: large)"))
        )
    return charts


def _importance_charts(importance: pd.DataFrame) -> list[tuple[str, str, Callable[[Any], None]]]:
    charts = []
    for model, own in importance.groupby("model", sort=False):
        for measure in ("gain", "shap"):
            if measure in own and own[measure].notna().any():
                top = own.nlargest(20, measure).iloc[::-1]
                label = "total gain" if measure == "gain" else "mean |SHAP|"
                draw = _draw_bars(top["feature"], top[measure], label)
                charts.append((f"importance_{model}_{measure}", f"Most important features, {model}, {label}", draw))
    return charts


def _draw_segment(table: pd.DataFrame, column: str) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        top = table.head(15)
        at = np.arange(len(top))
        axes.bar(at - 0.2, top["mean_true"], 0.4, label="true")
        axes.bar(at + 0.2, top["mean_predicted"], 0.4, label="predicted")
        axes.set_xticks(at, [str(name)[:14] for name in top["segment"]], rotation=60, ha="right")
        axes.set(xlabel=f"{column} (most rows first)", ylabel="mean revenue a row [money]")
        axes.legend(loc="upper right")

    return draw


def _draw_buyers(evaluation: Evaluation) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        table = evaluation.predictions
        assert table is not None
        truth = column_numbers(table["true_buyer"])
        known = np.isfinite(truth)
        points = calibration_points(truth[known], column_numbers(table["buyer_probability"])[known])
        top = 1.05 * max(*points[0], *points[1], 1e-9)
        axes.plot([0, top], [0, top], "--", color="grey", label="as predicted")
        axes.plot(points[0], points[1], marker="o")
        axes.set(xlabel="mean buyer probability, twentieths of the rows", ylabel="share that bought")
        axes.legend(loc="upper left")

    return draw


def calibration_points(truth: Any, probability: Any, bins: int = 20) -> tuple[list[float], list[float]]:
    """Mean probability and mean truth of equal parts of the rows by probability."""
    parts = np.array_split(np.argsort(probability, kind="stable"), min(bins, len(truth)))
    return [float(probability[p].mean()) for p in parts], [float(truth[p].mean()) for p in parts]


def _draw_bars(names: pd.Series, values: pd.Series, label: str) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        axes.barh([str(name)[:42] for name in names], values)
        axes.set_xlabel(label)
        axes.tick_params(axis="y", labelsize=7)

    return draw


def _figure() -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5))
    FigureCanvasAgg(figure)
    return figure


def _table(table: pd.DataFrame) -> str:
    return table.to_html(index=False, float_format=lambda value: f"{value:,.4g}", na_rep="-", border=0)


def _markdown(table: pd.DataFrame) -> str:
    rows = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row] for row in table.itertuples(index=False)]
    lines = ["| " + " | ".join(map(str, table.columns)) + " |", "|" + "---|" * len(table.columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    temporary.rename(path)
