"""`ltv compare`: several models on the same rows, or finished runs side by side."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ltv.btyd import predict_btyd
from ltv.config import PACKAGES, Config, Slice
from ltv.slices import data_root, open_slice, open_train, schema_of, slice_name
from ltv.train import train
from ltv_stack import Evaluation, revenue_metrics
from ltv_stack import compare as compare_evaluations
from runkit.compare import Estimate, markdown_table, mean
from runkit.errors import SettingError
from runkit.files import atomic_file, write_json
from runkit.run import Run, machine

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
CHANCES = {
    "buyer_auc": "AUC",
    "coverage_overall": "covered, all rows",
    "coverage_if_buyer": "covered, buyers",
}


def compare(
    config: Config, rows: Slice, variants: Sequence[str] = (), runs: Sequence[str] = (), resume: bool = False
) -> str:
    """Fit or read the models, write ``compare.md`` and ``compare.json`` to run_dir, and return the Markdown table.

    Raises:
        SettingError: if neither models nor runs are named, a name is not known, or a run has no metrics of the split.
        ValueError: if the models were scored on different rows, or none could be fitted.
    """
    if bool(variants) == bool(runs):
        raise SettingError("variants, runs: got both or neither, needs --variants log1p ziln ... or --runs DIR DIR ...")
    unknown = [name for name in variants if name not in VARIANTS | BTYD]
    if unknown:
        raise SettingError(f"variants: got {', '.join(unknown)}, needs names out of {', '.join(VARIANTS | BTYD)}")
    run = Run(config.run_dir)
    found: dict[str, dict[str, Any]] = {}
    predictions: dict[str, pd.DataFrame] = {}
    failed: dict[str, str] = {}
    with run.command("compare", config, PACKAGES) as facts:
        for name in variants:
            log.info("compare: %s", name)
            try:
                own = Run(run.folder / name)
                found[name] = _btyd(config, own, name) if name in BTYD else _fit(config, own, name, rows, resume)
                predictions[name] = _predictions(own, "val")
            except (ImportError, ValueError) as error:
                # One model that cannot be fitted on these rows must not cost the others; the table says so.
                log.error("%s: %s", name, error)
                failed[name] = str(error)
        split = slice_name(config, rows)
        for folder in runs:
            metrics = Run(folder).metrics().get(split)
            if metrics is None:
                raise SettingError(f"runs: {folder} has no metrics of {split}; run `ltv evaluate`")
            found[folder] = metrics
            predictions[folder] = _predictions(Run(folder), split)
        if not found:
            raise ValueError(f"compare: no model could be fitted: {failed}")
        summary = summary_table(predictions)
        order = summary["model"].tolist()
        text = (
            markdown_table(summary.to_dict("records"))
            + _left_out(predictions)
            + "\n"
            + markdown_table(metrics_table(found, order).to_dict("records"))
            + "".join(f"\nNot fitted: {name}: {reason}\n" for name, reason in failed.items())
        )
        facts |= {"models": list(found), "failed": failed}
    write_json(run.folder / "compare.json", {"models": found, "failed": failed})
    with atomic_file(run.folder / "compare.md") as path:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        commit = run.metadata().get("commit")
        path.write_text(f"{now}, {machine()}, commit {commit}, seed {config.seed}\n\n{text}")
    return text


def summary_table(predictions: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Return one row a model: rows, MSLE of each common horizon, their sum, and how far that lies above the best one's.

    The sum over horizons is what the projection in order never raises, and what the rows are ordered by. The interval
    is that of the paired difference, 95 %, normal.

    Args:
        predictions: model -> true_<h> and revenue_<h> of every row; ids and segments where it has them

    Raises:
        ValueError: if two models were scored on different rows, or no horizon is common to all.
    """
    horizons = common_horizons(predictions)
    _check_rows(predictions, horizons)
    errors = {name: {h: _msle(table, h) for h in horizons} for name, table in predictions.items()}
    sums = {name: reduce(add, own.values()) for name, own in errors.items()}
    order = sorted(sums, key=lambda name: sums[name].value)
    lines = []
    for name in order:
        line: dict[str, Any] = {"model": name, "rows": len(predictions[name])}
        line |= {f"MSLE {h}": error.value for h, error in errors[name].items()} | {"sum": sums[name].value}
        if name != order[0]:
            gap = sums[name] - sums[order[0]]
            line["above the best"] = f"{gap.value:.4g} ± {1.96 * gap.error:.2g}"
        lines.append(line)
    return pd.DataFrame(lines)


def common_horizons(predictions: dict[str, pd.DataFrame]) -> list[str]:
    """Return the horizons whose outcome every table knows.

    Raises:
        ValueError: if there is none.
    """
    own = {name: _horizons(table) for name, table in predictions.items()}
    common = [h for h in next(iter(own.values())) if all(h in horizons for horizons in own.values())]
    if not common:
        raise ValueError(f"no horizon is common to all: {_listed(own)}")
    return common


def metrics_table(found: dict[str, dict[str, Any]], order: list[str]) -> pd.DataFrame:
    """Return one row a model and horizon, models in `order`: errors, ranking, money, coverage of the intervals."""
    evaluations = {}
    for name in order:
        metrics = {key: values for key, values in found[name].items() if key != "coverage"}
        evaluations[name] = Evaluation(metrics, found[name].get("coverage", {}))
    titles = COLUMNS | CHANCES
    # metrics.json holds null for a number that is none.
    table = compare_evaluations(evaluations).reindex(columns=["model", "horizon", *titles]).rename(columns=titles)
    return table.astype(dict.fromkeys(titles.values(), float))


def _msle(table: pd.DataFrame, horizon: str) -> Estimate:
    """The mean squared log error over the rows whose outcome is known; the others have no influence on it."""
    known = table[f"true_{horizon}"].notna().to_numpy()
    gap = np.log1p(table[f"revenue_{horizon}"]) - np.log1p(table[f"true_{horizon}"])
    error = mean(gap[known] ** 2)
    influence = np.zeros(len(table))
    influence[known] = error.influence
    return Estimate(error.value, influence)


def _check_rows(predictions: dict[str, pd.DataFrame], horizons: list[str]) -> None:
    # BTYD's rows come without ids; a table that has them stands for the rest.
    kept = {name: _row_columns(table) for name, table in predictions.items()}
    first = max(kept, key=lambda name: len(kept[name]))
    truth = [f"true_{h}" for h in horizons]
    for name, table in predictions.items():
        columns = [c for c in kept[first] if c in kept[name]] + truth
        if not _equal(predictions[first][columns], table[columns]):
            raise ValueError(
                f"{first} ({len(predictions[first])} rows) and {name} ({len(table)} rows) were scored on "
                "different rows; run `ltv evaluate` of both with the same slice and data"
            )


def _equal(one: pd.DataFrame, other: pd.DataFrame) -> bool:
    if len(one) != len(other):
        return False
    left, right = (table.reset_index(drop=True).astype(object) for table in (one, other))
    return bool(((left == right) | (left.isna() & right.isna())).all(axis=None))


def _row_columns(table: pd.DataFrame) -> list[str]:
    """What a table of predictions says of its rows but the outcome: ids and segments."""
    return [c for c in table if not c.startswith(("true_", "revenue_", "buyer_"))]


def _horizons(table: pd.DataFrame) -> list[str]:
    known = [c.removeprefix("true_") for c in table if c.startswith("true_") and table[c].notna().any()]
    return [h for h in known if f"revenue_{h}" in table]


def _left_out(predictions: dict[str, pd.DataFrame]) -> str:
    """A line that says which horizons are not in the sum; none where all models have the same ones."""
    common = common_horizons(predictions)
    rest = {name: [h for h in _horizons(table) if h not in common] for name, table in predictions.items()}
    rest = {name: horizons for name, horizons in rest.items() if horizons}
    return f"\nSummed over {', '.join(common)}, which all have; left out: {_listed(rest)}.\n" if rest else ""


def _listed(horizons: dict[str, list[str]]) -> str:
    return "; ".join(f"{', '.join(own) or 'none'} ({name})" for name, own in horizons.items())


def _fit(config: Config, run: Run, name: str, rows: Slice, resume: bool) -> dict[str, Any]:
    own = replace(config, run_dir=str(run.folder), models=replace(config.models, **VARIANTS[name]))
    metrics = train(own, replace(rows, split="train"), resume)
    if not metrics:
        raise SettingError("data.val_start: not set, so there is nothing to compare the models on")
    return metrics


def _btyd(config: Config, run: Run, name: str) -> dict[str, Any]:
    purchases = data_root(config) / "transactions.parquet"
    if config.data.layout != "transactions" or not purchases.exists():
        raise SettingError(
            f"variants: {name} needs purchases over time, i.e. data.layout: transactions from `ltv import`"
        )
    rows = open_slice(config, Slice("val"))
    horizons = [horizon.name for horizon in schema_of(config).horizons]
    predicted = predict_btyd(purchases, open_train(config, Slice("train")), rows, horizons, BTYD[name])
    truth = rows.read([f"revenue_{horizon}" for horizon in horizons])
    table = {f"true_{h}": truth[f"revenue_{h}"].to_numpy() for h in horizons}
    table |= {f"revenue_{h}": predicted[h] for h in horizons}
    with atomic_file(_place(run, "val")) as path:
        pd.DataFrame(table).to_parquet(path)
    metrics = {h: revenue_metrics(table[f"true_{h}"], predicted[h]) for h in horizons}
    run.add_metrics("val", metrics)
    return metrics


def _predictions(run: Run, split: str) -> pd.DataFrame:
    return pd.read_parquet(_place(run, split))


def _place(run: Run, split: str) -> Path:
    return run.folder / "evaluation" / split / "predictions.parquet"
