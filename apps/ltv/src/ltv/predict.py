"""`ltv predict`: stream a slice through the saved pipeline into one file per partition, and write submission.csv."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from ltv.config import Config, Slice
from ltv.rundir import Run, files_hash, fingerprint, peak_memory_mb, read_json, temporary_file, write_json
from ltv.slices import content_of, engine_of, open_slice
from ltv_stack import LTVPipeline

log = logging.getLogger("ltv.predict")


def predict(config: Config, rows: Slice, resume: bool = False) -> Path:
    """Write ``<run_dir>/predictions/<split>/<partition>.parquet`` and, from them, ``submissions/submission.csv``.

    Another split than "test" gets a file of its own, ``submissions/submission_<split>.csv``.

    Memory holds one chunk and one partition's predictions. Predictions do not depend on the chunk size. With `resume`
    the partitions an interrupted run of the same models on the same data finished are kept.

    Returns:
        the folder of the predictions.

    Raises:
        FileNotFoundError: if the run has no models.
        ValueError: if the slice holds no row.
        RuntimeError: if a row's horizons are out of order, which would be a defect of the pipeline.
    """
    run = Run(config.run_dir)
    pipe = load_pipeline(run)
    folder = run.predictions / rows.split
    with run.command("predict", config) as facts:
        data = open_slice(config, rows)
        if not data.num_rows:
            raise ValueError(
                f"slice: none of the {sum(p.total for p in data.partitions)} rows of the window is asked for"
            )
        identity = {
            "model": files_hash(run.models),
            "rows": content_of(data),
            "slice": fingerprint(asdict(rows) | {"chunk_size": None}),
        }
        if not (resume and read_json(folder / "request.json") == identity):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_json(folder / "request.json", identity)
        asked = [p for p in data.partitions if p.rows]
        left = [p for p in asked if not (folder / f"{p.name}.parquet").exists()]
        kept = len(asked) - len(left)
        if kept:
            log.info("%d of %d partitions were predicted before: kept", kept, len(asked))
        began = time.perf_counter()
        with engine_of(config) as engine:
            batches = pipe.predict(replace(data, partitions=tuple(left)), engine=engine)
            for partition, table in zip(left, _by_partition(batches, [p.rows for p in left]), strict=True):
                check_order(table, pipe.horizons)
                with temporary_file(folder / f"{partition.name}.parquet") as path:
                    pq.write_table(table, path)
        seconds, number = time.perf_counter() - began, sum(p.rows for p in left)
        facts |= {"rows": data.num_rows, "predicted_rows": number, "kept_partitions": kept}
        facts |= {"data_fingerprint": identity["rows"], "skipped_files": list(data.skipped)}
        if number:
            rate = 1000 * seconds / number
            log.info("%d rows in %.2f s: %.4f ms per row, peak memory %.0f MB", number, seconds, rate, peak_memory_mb())
            facts |= {"seconds": round(seconds, 3), "ms_per_row": round(rate, 5)}
        else:
            log.info("all %d rows were predicted before", data.num_rows)
            before = run.metadata().get("commands", {}).get("predict", {})
            if before.get("data_fingerprint") == identity["rows"]:
                facts |= {key: before[key] for key in ("seconds", "ms_per_row") if key in before}
        target = config.inference.target
        if pipe.schema.id not in data.column_names:
            log.warning("no submission: the data has no column %s, which names its lines", pipe.schema.id)
        elif target in pipe.horizons:
            place = run.submission
            if rows.split != "test":
                place = place.with_stem(f"{place.stem}_{rows.split}")
            lines = write_submission(folder, place, pipe.schema.id, target)
            log.info("%s: %d lines", place, lines)
            facts["submission_rows"] = lines
        else:
            log.warning("no submission: inference.target %s is not among the fitted %s", target, list(pipe.horizons))
    return folder


def load_pipeline(run: Run) -> LTVPipeline:
    """Load the run's pipeline.

    Raises:
        FileNotFoundError: if there is none; names the command that makes one.
    """
    if not (run.models / "pipeline.json").exists():
        raise FileNotFoundError(f"run_dir: {run.models} holds no models; run `ltv train` with the same run_dir first")
    return LTVPipeline.load(run.models)


def check_order(table: pa.Table, horizons: list[str]) -> None:
    """Raise RuntimeError where a later horizon holds less than an earlier one, or a value is missing or negative."""
    # revenue_<horizon><rest>: the point, the bounds of both intervals, the quantiles. A horizon may lack some.
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


def write_submission(folder: Path, target: Path, id_column: str | None, horizon: str) -> int:
    """Write row_id and iap_revenue_<horizon> of all prediction files as CSV; return the number of lines."""
    schema = pa.schema([("row_id", pa.string()), (f"iap_revenue_{horizon}", pa.float64())])
    total = 0
    options = pa_csv.WriteOptions(quoting_style="needed")
    with temporary_file(target) as path, pa_csv.CSVWriter(path, schema, write_options=options) as writer:
        for file in sorted(folder.glob("*.parquet")):
            table = pq.read_table(file, columns=[str(id_column), f"revenue_{horizon}"])
            columns = [column.cast(field.type) for column, field in zip(table.columns, schema, strict=True)]
            writer.write_table(pa.table(columns, schema=schema))
            total += table.num_rows
    return total


def _by_partition(batches: Iterator[pa.RecordBatch], sizes: list[int]) -> Iterator[pa.Table]:
    """Cut the stream of predictions where the partitions end."""
    held: list[pa.RecordBatch] = []
    for size in sizes:
        while sum(batch.num_rows for batch in held) < size:
            batch = next(batches, None)
            if batch is None:
                raise RuntimeError(f"predictions ended early: a partition of {size} rows got fewer")
            held.append(batch)
        table = pa.Table.from_batches(held) if held else pa.table({})
        yield table.slice(0, size)
        rest = table.slice(size)
        held = rest.to_batches() if rest.num_rows else []
