"""`ltv evaluate` and `ltv validate`: how good the saved pipeline is on rows whose outcome is known."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ltv.config import PACKAGES, Config, Slice
from ltv.predict import load_pipeline
from ltv.slices import content_of, engine_of, features_of, open_slice, open_train, schema_of, slice_name
from ltv_stack import Dataset, Evaluation, audit, call_metrics, check_order, write_report
from ltv_stack import evaluate as evaluate_pipeline
from runkit.errors import SettingError
from runkit.files import atomic_folder, folder_hash, read_json, write_json
from runkit.run import Run

log = logging.getLogger("ltv.evaluate")
EXPLAINED_ROWS = 2000


def evaluate_split(config: Config, rows: Slice, resume: bool = False) -> dict[str, Any]:
    """Score one slice; write its report, plots, tables and predictions to ``<run_dir>/evaluation/<split>``.

    A part of a split goes to ``<split>_part``, there and in ``metrics.json``: the score of the whole split stays. With
    `resume` a finished evaluation of the same models on the same rows is kept.

    Returns:
        the metrics, which also go into ``metrics.json``: per horizon, of the buyer probability, and interval coverage.

    Raises:
        SettingError: if the split is "val" and the models were fitted on some of its partitions.
    """
    run = Run(config.run_dir)
    pipe = load_pipeline(run)
    with run.command("evaluate", packages=PACKAGES) as facts:
        data = open_slice(config, rows)
        if rows.split == "val":
            refuse_fitted(run, data)
        request = {"model": folder_hash(run.folder / "models"), "rows": content_of(data)}
        name = slice_name(config, rows)
        place = run.folder / "evaluation" / name
        if resume and name in run.metrics() and read_json(place / "request.json") == request:
            log.info("%s is from these models and rows: kept", place)
            return run.metrics()[name]
        if name != rows.split:
            log.info("a part of %s: written to %s, the score of the whole split stays", rows.split, place)
        with atomic_folder(place, "ltv evaluation") as folder:
            with engine_of(config) as engine:
                result = evaluate_pipeline(pipe, data, engine=engine, segments=pipe.schema.segments)
            assert result.predictions is not None
            check_order(result.predictions, pipe.horizons)
            write_json(folder / "request.json", request)
            importance, drift = pipe.importance(data), pipe.drift(data)
            title = f"{run.folder.name}: {name}"
            write_report(result, pipe, folder, title=title, drift=drift, importance=importance)
            pq.write_table(result.predictions, folder / "predictions.parquet")
            for key, table in {**result.tables, "importance": importance, "drift": drift}.items():
                table.to_csv(folder / f"{key.replace(':', '_')}.csv", index=False)
            pq.write_table(_explained(data), folder / "rows.parquet")
        metrics: dict[str, Any] = {**result.metrics, "coverage": result.coverage}
        run.add_metrics(name, metrics)
        facts |= {"split": name, "rows": data.num_rows, "partitions": len(data.partitions)}
        log_table(result)
    return metrics


def validate(config: Config, rows: Slice, name: str) -> dict[str, Any]:
    """Check the data and the three stages on train and validation rows; log it to ``logs/validation_<name>.log``.

    Returns:
        findings of the leakage audit, row and buyer counts, and the metrics of each stage per split. Numbers only:
        whether they are good enough is the reader's judgement. They also go into ``validation.json``.
    """
    run = Run(config.run_dir)
    pipe = load_pipeline(run)
    with run.command(f"validation_{name}", packages=PACKAGES) as facts:
        report: dict[str, Any] = {"name": name, "splits": {}}
        for split in ("train", "val"):
            own = _of_split(rows, split)
            data = open_train(config, own) if split == "train" else open_slice(config, own)
            if split == "val":
                refuse_fitted(run, data)
            if split == "train":
                findings = audit(data, schema_of(config), features_of(config), seed=config.seed)
                report["findings"] = [f"{f.column}: {f.kind} ({f.detail})" for f in findings]
                for line in report["findings"] or ["no column leaks"]:
                    log.info("audit: %s", line)
            with engine_of(config) as engine:
                report["splits"][split] = _stages(evaluate_pipeline(pipe, data, engine=engine))
            for stage, values in report["splits"][split].items():
                numbers = ", ".join(f"{key} {value:.5g}" for key, value in values.items())
                log.info("%s %s: %s", split, stage, numbers)
        facts |= {"findings": len(report["findings"])}
        write_json(run.folder / "validation.json", report)
    return report


def refuse_fitted(run: Run, data: Dataset) -> None:
    """Raise SettingError if the run's models were fitted on a partition of the data: its numbers would be in-sample."""
    fitted = set(read_json(run.folder / "models" / "trained.json").get("partitions", ()))
    seen = [p.name for p in data.partitions if p.name in fitted]
    if seen:
        raise SettingError(
            f"val window: the models of {run.folder} were fitted on {len(seen)} of its {len(data.partitions)} "
            f"partitions ({seen[0]} .. {seen[-1]}); evaluate later hours, or say --split train"
        )


def log_table(result: Evaluation) -> None:
    """Log one line a horizon: rows, the errors, the ranking, the money."""
    log.info("%-8s %10s %9s %9s %9s %9s %8s %8s", "horizon", "rows", "MSLE", "RMSLE", "RMSE", "MAE", "Gini", "coverage")
    for horizon in result.horizons:
        values = result.metrics[horizon]
        covered = result.coverage.get(horizon, {}).get("overall", float("nan"))
        log.info(
            "%-8s %10d %9.5f %9.5f %9.3f %9.4f %8.4f %8.4f",
            horizon,
            values["rows"],
            values["msle"],
            values["rmsle"],
            values["rmse"],
            values["mae"],
            values["gini"],
            covered,
        )
    buyers = result.metrics.get("buyer", {})
    log.info("buyers   %s", ", ".join(f"{key} {value:.5g}" for key, value in buyers.items()))


def _explained(data: Dataset) -> pa.Table:
    """The first rows of the slice as they are in the files, for the dashboard's explanations."""
    batches, held = [], 0
    for batch in data:
        batches.append(pa.Table.from_batches([batch.slice(0, EXPLAINED_ROWS - held)]))
        held += batches[-1].num_rows
        if held == EXPLAINED_ROWS:
            break
    # A column may be whole numbers in one partition and fractions, or all null, in the next.
    return pa.concat_tables(batches, promote_options="permissive") if batches else data.schema.empty_table()


def _of_split(rows: Slice, split: str) -> Slice:
    limits = {key: value for key, value in vars(rows).items() if key not in ("split", "start_dt", "end_dt")}
    return Slice(split, **limits)  # type: ignore[arg-type]


def _stages(result: Evaluation) -> dict[str, dict[str, float]]:
    """The numbers of the amounts of all rows, of the amounts among buyers, and of the buyer model."""
    stages: dict[str, dict[str, float]] = {}
    for horizon in result.horizons:
        stages[f"amounts_{horizon}"] = result.metrics[horizon]
        if f"buyers_only:{horizon}" in result.metrics:
            stages[f"buyers_{horizon}"] = result.metrics[f"buyers_only:{horizon}"]
    assert result.predictions is not None
    buyer, chance = (result.predictions[name].to_numpy() for name in ("true_buyer", "buyer_probability"))
    buyer, chance = buyer[np.isfinite(buyer)], chance[np.isfinite(buyer)]
    bought = float((buyer > 0).sum())
    stages["data"] = {"rows": float(len(buyer)), "buyers": bought, "buyer_rate": bought / len(buyer)}
    if 0 < bought < len(buyer):
        stages["buyer"] = call_metrics(buyer, chance)
    return stages
