"""`ltv predict`: stream a slice through the saved pipeline into one file per partition, and write submission.csv."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from ltv.config import PACKAGES, Config, Slice
from ltv.slices import content_of, engine_of, open_slice
from ltv_stack import LTVPipeline, check_order
from runkit.errors import SettingError
from runkit.files import atomic_file, atomic_folder, content_hash, folder_hash, read_json, write_json
from runkit.run import Run, peak_memory

log = logging.getLogger("ltv.predict")


def predict(config: Config, rows: Slice, resume: bool = False) -> Path:
    """Write ``<run_dir>/predictions/<split>/<partition>.parquet`` and, from them, ``submissions/submission.csv``.

    Another split than "test" gets a file of its own, ``submissions/submission_<split>.csv``.

    Memory holds one chunk and one partition's predictions. Predictions do not depend on the chunk size. With `resume`
    the partitions an interrupted run of the same models on the same data finished are kept.

    Returns:
        the folder of the predictions.

    Raises:
        SettingError: if the run has no models, or the slice holds no row.
        RuntimeError: if a row's horizons are out of order, which would be a defect of the pipeline.
    """
    run = Run(config.run_dir)
    pipe = load_pipeline(run)
    folder = run.folder / "predictions" / rows.split
    with run.command("predict", packages=PACKAGES) as facts:
        data = open_slice(config, rows)
        if not data.num_rows:
            raise SettingError(
                f"slice: none of the {sum(p.total for p in data.partitions)} rows of the window is asked for"
            )
        request = {
            "model": folder_hash(run.folder / "models"),
            "rows": content_of(data),
            "slice": content_hash(asdict(rows) | {"chunk_size": None}),
        }
        # Readers of Parquet pass over names that begin with a dot.
        if not (resume and read_json(folder / ".request.json") == request):
            with atomic_folder(folder, "ltv predictions") as new:
                write_json(new / ".request.json", request)
        files = {p.name: folder / f"{p.name}.parquet" for p in data.partitions if p.rows}
        left = [p for p in data.partitions if p.rows and not files[p.name].exists()]
        kept, number = len(files) - len(left), sum(p.rows for p in left)
        if kept:
            log.info("%d of %d partitions were predicted before: kept", kept, len(files))
        began = time.perf_counter()
        with engine_of(config) as engine:
            batches = pipe.predict(replace(data, partitions=tuple(left)), engine=engine)
            for partition, table in zip(left, _by_partition(batches, [p.rows for p in left]), strict=True):
                check_order(table, pipe.horizons)
                with atomic_file(files[partition.name]) as path:
                    pq.write_table(table, path)
        seconds = time.perf_counter() - began
        facts |= {"rows": data.num_rows, "predicted_rows": number, "kept_partitions": kept}
        facts |= {"data_fingerprint": request["rows"], "skipped_files": list(data.skipped)}
        if number:
            rate = 1000 * seconds / number
            log.info("%d rows in %.2f s: %.4f ms per row, peak memory %s MB", number, seconds, rate, peak_memory())
            facts |= {"seconds": round(seconds, 3), "ms_per_row": round(rate, 5)}
        else:
            log.info("all %d rows were predicted before", data.num_rows)
            before = run.metadata().get("commands", {}).get("predict", {})
            if before.get("data_fingerprint") == request["rows"]:
                facts |= {key: before[key] for key in ("seconds", "ms_per_row") if key in before}
        target = config.inference.target
        if pipe.schema.id not in data.column_names:
            log.warning("no submission: the data has no column %s, which names its lines", pipe.schema.id)
        elif target in pipe.horizons:
            place = submission_of(run, rows.split)
            lines = write_submission(files.values(), place, pipe.schema.id, target)
            log.info("%s: %d lines", place, lines)
            facts["submission_rows"] = lines
        else:
            log.warning("no submission: inference.target %s is not among the fitted %s", target, list(pipe.horizons))
    return folder


def load_pipeline(run: Run) -> LTVPipeline:
    """Load the run's pipeline.

    Raises:
        SettingError: if there is none; names the command that makes one.
    """
    models = run.folder / "models"
    if not (models / "pipeline.json").exists():
        raise SettingError(f"run_dir: {models} holds no models; run `ltv train` with the same run_dir first")
    return LTVPipeline.load(models)


def submission_of(run: Run, split: str = "test") -> Path:
    """Return where the submission of a split lies."""
    return run.folder / "submissions" / ("submission.csv" if split == "test" else f"submission_{split}.csv")


def write_submission(files: Iterable[Path], target: Path, id_column: str | None, horizon: str) -> int:
    """Write row_id and iap_revenue_<horizon> of prediction files as CSV; return the number of lines."""
    schema = pa.schema([("row_id", pa.string()), (f"iap_revenue_{horizon}", pa.float64())])
    total = 0
    options = pa_csv.WriteOptions(quoting_style="needed")
    with atomic_file(target) as path, pa_csv.CSVWriter(path, schema, write_options=options) as writer:
        for file in files:
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
