"""`ltv compare`: several models on the same rows, or finished runs side by side."""

from __future__ import annotations

import logging
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ltv.btyd import predict_btyd
from ltv.config import Comparison, Config, Slice
from ltv.rundir import Run, machine, temporary_file, write_json
from ltv.slices import data_root, open_slice, schema_of
from ltv.train import train
from ltv_stack import revenue_metrics

log = logging.getLogger("ltv.compare")
# What a name on the command line changes in the settings; BTYD is not a model of the pipeline.
VARIANTS: dict[str, dict[str, Any]] = {
    **{
        name: {"model": name}
        for name in ("log1p", "tweedie", "two_stage", "document", "stack", "ziln", "odmn", "optdist")
    },
    "document_sampled": {"model": "document", "sampling": "histos+histus"},
}
BTYD = {"btyd": False, "btyd_recalibrated": True}
COLUMNS = {
    "msle": "MSLE",
    "rmsle": "RMSLE",
    "rmse": "RMSE",
    "mae": "MAE",
    "gini": "Gini",
    "mutual_gini": "Mutual Gini",
    "bias_ratio": "money predicted / true",
}


def compare(config: Config, rows: Slice, what: Comparison, resume: bool = False) -> str:
    """Fit or read the models, write ``compare.md`` and ``compare.json`` to run_dir, and return the Markdown table.

    Raises:
        ValueError: if neither models nor runs are named, or a name is not known.
        FileNotFoundError: if a run has no metrics of the split.
    """
    if bool(what.variants) == bool(what.runs):
        raise ValueError("compare: needs either --variants log1p ziln ... or --runs DIR DIR ...")
    unknown = [name for name in what.variants if name not in VARIANTS | BTYD]
    if unknown:
        raise ValueError(f"variants: {', '.join(unknown)} not known; there are {', '.join(VARIANTS | BTYD)}")
    if what.metric not in COLUMNS:
        raise ValueError(f"metric: got {what.metric!r}, needs one of {', '.join(COLUMNS)}")
    run = Run(config.run_dir)
    found: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    with run.command("compare", config) as facts:
        for name in what.variants:
            log.info("compare: %s", name)
            try:
                found[name] = _btyd(config, name) if name in BTYD else _fit(config, name, rows, resume)
            except (ImportError, ValueError) as error:
                # One model that cannot be fitted on these rows must not cost the others; the table says so.
                log.error("%s: %s", name, error)
                failed[name] = str(error)
        for folder in what.runs:
            metrics = Run(folder).metrics().get(rows.split)
            if metrics is None:
                raise FileNotFoundError(f"runs: {folder} has no metrics of the split {rows.split}; run `ltv evaluate`")
            found[folder] = metrics
        table = metrics_table(found, what.metric, what.horizon)
        text = markdown(table) + "".join(f"\nNot fitted: {name}: {reason}\n" for name, reason in failed.items())
        facts |= {"models": list(found), "failed": failed}
    write_json(run.folder / "compare.json", {"models": found, "failed": failed})
    with temporary_file(run.folder / "compare.md") as path:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        commit = run.metadata().get("commit")
        path.write_text(f"{now}, {machine()}, commit {commit}, seed {config.seed}\n\n{text}")
    return text


def metrics_table(found: dict[str, dict[str, Any]], metric: str, horizon: str) -> pd.DataFrame:
    """Return one row a model and horizon; models ordered by `metric` at `horizon`, best first."""
    lines = []
    for name, metrics in found.items():
        for h, values in metrics.items():
            if ":" in h or "msle" not in values:
                continue
            line = {"model": name, "horizon": h} | {title: values.get(key, np.nan) for key, title in COLUMNS.items()}
            line["AUC"] = metrics.get("buyer", {}).get("auc", np.nan)
            covered = metrics.get("coverage", {})
            line["covered, all rows"] = covered.get(h, {}).get("overall", np.nan)
            line["covered, buyers"] = covered.get(f"{h}:buyer", {}).get("overall", np.nan)
            lines.append(line)
    table = pd.DataFrame(lines)
    if table.empty:
        raise ValueError("compare: none of the models has metrics of a horizon")
    at = table[table["horizon"] == horizon].set_index("model")[COLUMNS[metric]]
    place = at.rank(ascending=metric != "gini", method="first")
    return (
        table.assign(place=table["model"].map(place))
        .sort_values(["place", "model"], kind="stable")
        .drop(columns="place")
    )


def markdown(table: pd.DataFrame) -> str:
    """Return the table as Markdown, five significant digits."""
    lines = ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    for row in table.itertuples(index=False):
        cells = [
            "" if isinstance(v, float) and np.isnan(v) else f"{v:.5g}" if isinstance(v, float) else str(v) for v in row
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _fit(config: Config, name: str, rows: Slice, resume: bool) -> dict[str, Any]:
    own = replace(config, run_dir=str(Path(config.run_dir) / name), models=replace(config.models, **VARIANTS[name]))
    metrics = train(own, replace(rows, split="train"), resume)
    if not metrics:
        raise ValueError("data.val_start: not set, so there is nothing to compare the models on")
    return metrics


def _btyd(config: Config, name: str) -> dict[str, Any]:
    purchases = data_root(config) / "transactions.parquet"
    if config.data.layout != "transactions" or not purchases.exists():
        raise ValueError(
            f"variants: {name} needs purchases over time, i.e. data.layout: transactions from `ltv import`"
        )
    rows = open_slice(config, Slice("val"))
    horizons = [horizon.name for horizon in schema_of(config).horizons]
    predicted = predict_btyd(purchases, open_slice(config, Slice("train")), rows, horizons, BTYD[name])
    truth = rows.read([f"revenue_{horizon}" for horizon in horizons])
    return {h: revenue_metrics(truth[f"revenue_{h}"].to_numpy(), predicted[h]) for h in horizons}
