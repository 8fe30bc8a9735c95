"""Scoring a pipeline on a window it has not seen: metrics, tables by decile and segment, coverage."""

import time as clock
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from .columns import column_numbers, label_numbers
from .data import Dataset
from .engine import Engine, LocalEngine
from .metrics import (
    buyer_metrics,
    calibration_table,
    decile_table,
    interval_coverage,
    lift_table,
    revenue_metrics,
)
from .pipeline import LTVPipeline

Floats = npt.NDArray[np.float64]


@dataclass
class Evaluation:
    """What `evaluate` found.

    Args:
        metrics: horizon -> revenue metrics; "buyer" -> buyer metrics; "buyers_only:<h>" -> revenue metrics of buyers.
        coverage: horizon -> coverage of the intervals, "<h>:buyer" of those for rows that buy.
        tables: "deciles:<h>", "lift:<h>", "calibration:<h>", "calibration:<h>:<segment>" -> table.
        predictions: id, predicted columns, true_<h>, true_buyer and the segment columns, row by row.
        seconds: time of prediction.
        rows: rows scored.
    """

    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    coverage: dict[str, dict[str, float]] = field(default_factory=dict)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    predictions: pa.Table | None = None
    seconds: float = 0.0
    rows: int = 0

    @property
    def horizons(self) -> list[str]:
        """Horizons that have labels, in order."""
        return [name for name in self.metrics if name != "buyer" and ":" not in name]

    def to_json(self) -> dict[str, Any]:
        """Metrics, coverage and latency, JSON-ready: NaN becomes null."""
        plain = {
            group: {name: {k: None if np.isnan(v) else v for k, v in one.items()} for name, one in values.items()}
            for group, values in (("metrics", self.metrics), ("coverage", self.coverage))
        }
        latency = 1000.0 * self.seconds / max(self.rows, 1)
        return {**plain, "rows": self.rows, "seconds": self.seconds, "ms_per_row": latency}


def evaluate(
    pipe: LTVPipeline, dataset: Dataset, *, engine: Engine | None = None, segments: Sequence[str] = ()
) -> Evaluation:
    """Predict a labelled dataset as a stream and score every horizon.

    A row whose label is null is left out of that horizon; a horizon without labels is left out.

    Args:
        pipe: fitted pipeline.
        dataset: rows with labels, of a later window than the training data.
        engine: where prediction runs.
        segments: columns by whose values money is compared; the schema's segments that the data has when empty.

    Raises:
        ValueError: no rows, or no horizon with labels.
    """
    pipe.check(dataset)
    started = clock.perf_counter()
    names = set(dataset.column_names)
    segments = [name for name in (segments or pipe.schema.segments) if name in names]
    task = _EvaluatePartition(pipe, dataset, tuple(segments))
    tables = [t for part in (engine or LocalEngine()).map(task, list(range(len(dataset.partitions)))) for t in part]
    if not tables:
        raise ValueError("dataset: got no rows, needs at least one to evaluate")
    table = pa.concat_tables(tables, promote_options="permissive")
    result = Evaluation(predictions=table, seconds=clock.perf_counter() - started, rows=table.num_rows)
    for horizon in pipe.horizons:
        if f"true_{horizon}" in table.column_names:
            _score(result, table, horizon, segments)
    if not result.metrics:
        raise ValueError(f"dataset: no labels of the horizons {pipe.horizons} are there to evaluate on")
    truth = column_numbers(table["true_buyer"]) if "true_buyer" in table.column_names else np.empty(0)
    known = np.isfinite(truth)
    if known.any():
        result.metrics["buyer"] = buyer_metrics(truth[known], column_numbers(table["buyer_probability"])[known])
    return result


def compare(evaluations: Mapping[str, Evaluation]) -> pd.DataFrame:
    """One row a model and horizon: the metrics and coverage of several evaluations on the same rows.

    Args:
        evaluations: name of the model -> what `evaluate` found.
    """
    rows = []
    for name, one in evaluations.items():
        for horizon in one.horizons:
            buyer = {f"buyer_{k}": v for k, v in one.metrics.get("buyer", {}).items() if k in ("auc", "pr_auc")}
            kept = {f"coverage_{k}": v for k, v in one.coverage.get(horizon, {}).items() if k != "rows"}
            bought = one.coverage.get(f"{horizon}:buyer", {})
            kept |= {"coverage_if_buyer": bought["overall"]} if bought else {}
            rows.append({"model": name, "horizon": horizon, **one.metrics[horizon], **buyer, **kept})
    return pd.DataFrame(rows)


def _score(result: Evaluation, table: pa.Table, horizon: str, segments: Sequence[str]) -> None:
    truth = column_numbers(table[f"true_{horizon}"])
    known = np.isfinite(truth)
    if not known.any():
        return
    y, predicted = truth[known], column_numbers(table[f"revenue_{horizon}"])[known]
    result.metrics[horizon] = revenue_metrics(y, predicted)
    if (y > 0).any():
        result.metrics[f"buyers_only:{horizon}"] = revenue_metrics(y[y > 0], predicted[y > 0])
    result.tables[f"deciles:{horizon}"] = decile_table(y, predicted)
    result.tables[f"lift:{horizon}"] = lift_table(y, predicted)
    result.tables[f"calibration:{horizon}"] = calibration_table(y, predicted)
    for segment in segments:
        names = table[segment].filter(pa.array(known)).to_pylist()
        result.tables[f"calibration:{horizon}:{segment}"] = calibration_table(y, predicted, names)
    chance = column_numbers(table["buyer_probability"])[known]
    for kind, label in (("", horizon), ("buyer_", f"{horizon}:buyer")):
        if f"revenue_{horizon}_{kind}lo" not in table.column_names:
            continue
        low, high = (column_numbers(table[f"revenue_{horizon}_{kind}{end}"])[known] for end in ("lo", "hi"))
        rows = y > 0 if kind else np.ones(len(y), dtype=bool)
        if rows.any():
            result.coverage[label] = interval_coverage(y[rows], low[rows], high[rows], chance[rows])


class _EvaluatePartition:
    """Prediction of one partition beside its labels, where the partition is; picklable."""

    def __init__(self, pipe: LTVPipeline, dataset: Dataset, segments: tuple[str, ...]) -> None:
        self.pipe, self.dataset, self.segments = pipe, dataset, segments
        horizons = {h.name: h for h in pipe.schema.horizons}
        names = set(dataset.column_names)
        self.labels = {f"true_{n}": horizons[n].revenue for n in pipe.horizons if horizons[n].revenue in names}
        main = horizons[pipe.main]
        flag = main.buyer if main.buyer in names else main.revenue
        if flag in names:
            self.labels["true_buyer"] = flag
        wanted = [*pipe.builder.columns, pipe.schema.id, pipe.config.calibrate_by, *segments, *self.labels.values()]
        self.columns = list(dict.fromkeys(name for name in wanted if name))

    def __call__(self, number: int) -> list[pa.Table]:
        return [
            self._one(batch) for batch in self.dataset.partition_batches(self.dataset.partitions[number], self.columns)
        ]

    def _one(self, batch: pa.RecordBatch) -> pa.Table:
        table = pa.Table.from_batches([self.pipe.predict_batch(batch)])
        for name, column in self.labels.items():
            assert column is not None
            present = column in batch.schema.names
            label = label_numbers(batch.column(column), column) if present else np.full(batch.num_rows, np.nan)
            table = table.append_column(name, pa.array(np.maximum(label, 0.0), from_pandas=True))
        for segment in self.segments:
            if segment not in table.column_names:
                present = segment in batch.schema.names
                column = batch.column(segment) if present else pa.nulls(batch.num_rows)
                table = table.append_column(segment, column)
        return table
