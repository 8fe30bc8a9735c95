"""`ltv dashboard`: what a run left behind, ready to be looked at; ``page.py`` draws it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ltv.predict import load_pipeline
from ltv_stack import LTVPipeline
from runkit.errors import SettingError
from runkit.run import Run

SHOWN_POINTS = 4000


@dataclass
class Evaluated:
    """One evaluated split of one run: its predictions with labels, its metrics, and rows to explain."""

    run: Run
    split: str
    predictions: pd.DataFrame
    metrics: dict[str, Any]
    rows: pa.Table


def serve(runs: str | Path, port: int) -> None:
    """Start the page on localhost and stay until it is stopped.

    Raises:
        SettingError: if there is no run with an evaluation below `runs`; says how to make one.
        RuntimeError: if Streamlit is not installed.
    """
    if not find_runs(runs):
        raise SettingError(f"runs: no run with an evaluation in {runs}; run `ltv train` or `ltv evaluate` first")
    if importlib.util.find_spec("streamlit") is None:
        raise RuntimeError("the dashboard needs Streamlit: pip install 'ltv[dashboard]'")
    page = Path(__file__).with_name("page.py")
    options = ["--server.port", str(port), "--server.address", "localhost", "--server.headless", "true"]
    options += ["--browser.gatherUsageStats", "false", "--client.toolbarMode", "minimal"]
    command = [sys.executable, "-m", "streamlit", "run", str(page), *options, "--", str(Path(runs).resolve())]
    subprocess.run(command, check=True)


def find_runs(folder: str | Path) -> dict[str, Path]:
    """Return the run directories in or below `folder` that hold an evaluation, by their path seen from there."""
    folder = Path(folder)
    found = {path.parents[2] for path in folder.glob("**/evaluation/*/rows.parquet") if _whole(path)}
    return {str(path.relative_to(folder)) if path != folder else path.name: path for path in sorted(found)}


def splits_of(run: Path) -> list[str]:
    """Return the splits of a run that were evaluated."""
    return sorted(path.parent.name for path in run.glob("evaluation/*/rows.parquet") if _whole(path))


def load_evaluated(folder: Path, split: str) -> Evaluated:
    """Read one evaluated split from its files."""
    run, place = Run(folder), folder / "evaluation" / split
    predictions = pq.read_table(place / "predictions.parquet").to_pandas()
    return Evaluated(run, split, predictions, run.metrics().get(split, {}), pq.read_table(place / "rows.parquet"))


def table_of(evaluated: Evaluated, name: str) -> pd.DataFrame | None:
    """Return a table the evaluation wrote as CSV, or None where it wrote none of that name."""
    path = evaluated.run.folder / "evaluation" / evaluated.split / f"{name}.csv"
    return pd.read_csv(path) if path.exists() else None


def within(predictions: pd.DataFrame, column: str | None, values: list[str]) -> pd.DataFrame:
    """Return the rows of a slice: those whose `column` is one of `values`; all of them where nothing is chosen."""
    return predictions if not column or not values else predictions[predictions[column].astype(str).isin(values)]


def log_histogram(columns: dict[str, np.ndarray], bins: int = 40) -> pd.DataFrame:
    """Return counts of amounts in bins that are equal in log1p, zeros in a bin of their own.

    Returns:
        series, from, to (amounts) and rows: one line a series and bin; the bin of the zeros goes from 0 to 0.
    """
    top = max((float(np.max(values)) for values in columns.values() if len(values)), default=0.0)
    edges = np.expm1(np.linspace(0.0, np.log1p(max(top, 0.01)), bins + 1))
    lines = []
    for name, values in columns.items():
        counts, _ = np.histogram(values[values > 0], edges)
        lines.append((name, 0.0, 0.0, int((values <= 0).sum())))
        lines += [(name, a, b, int(n)) for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)]
    return pd.DataFrame(lines, columns=["series", "from", "to", "rows"])


def points(predictions: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Return at most 4,000 rows to draw as points, always the same ones."""
    if len(predictions) <= SHOWN_POINTS:
        return predictions
    return predictions.sample(SHOWN_POINTS, random_state=seed)


def scalar_columns(rows: pa.Table, pipe: LTVPipeline) -> list[str]:
    """Return the columns of a what-if: features of the model that hold one number or text a row."""
    features = set(pipe.schema.feature_columns)
    return [f.name for f in rows.schema if f.name in features and not pa.types.is_nested(f.type)]


def with_values(row: pa.Table, values: dict[str, Any]) -> pa.Table:
    """Return the one-row table with some columns replaced, each in its own Arrow type."""
    for name, value in values.items():
        place = row.schema.get_field_index(name)
        row = row.set_column(place, row.schema.field(place), pa.array([value], row.schema.field(place).type))
    return row


def predict_row(pipe: LTVPipeline, row: pa.Table) -> dict[str, float]:
    """Return everything the pipeline says about a one-row table, by column name."""
    from ltv_stack import from_table

    batch = next(iter(pipe.predict(from_table(row))))
    return {name: batch.column(name)[0].as_py() for name in batch.schema.names if name != pipe.schema.id}


def contributions(pipe: LTVPipeline, row: pa.Table, horizon: str, most: int = 12) -> pd.DataFrame:
    """Return the features that moved one row's prediction most, and what they add up to with the rest.

    Returns:
        feature, value and contribution (in the model's own scale), largest first; the rest summed in one line.
    """
    batch = row.combine_chunks().to_batches()[0]
    names, parts = pipe.explain(batch, horizon)
    values = pipe.builder.transform(batch)[0]
    table = pd.DataFrame({"feature": names[:-1], "value": values, "contribution": parts[0, :-1]})
    table = table.reindex(table["contribution"].abs().sort_values(ascending=False, kind="stable").index)
    rest = table["contribution"][most:].sum()
    tail = pd.DataFrame({"feature": [f"{len(table) - most} others"], "value": [np.nan], "contribution": [rest]})
    return pd.concat([table[:most], tail], ignore_index=True) if len(table) > most else table


def pipeline_of(folder: Path) -> LTVPipeline:
    """Load the pipeline of a run."""
    return load_pipeline(Run(folder))


def _whole(rows: Path) -> bool:
    """Whether an evaluation was finished: what a killed one leaves has a hidden name."""
    return not rows.parent.name.startswith(".")
