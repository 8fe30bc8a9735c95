"""`ltv submit`: check submission.csv against the rows that were asked for, put it in their order, and hand it in."""

from __future__ import annotations

import logging
import shutil
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from ltv.config import PACKAGES, Config, Slice, Submission
from ltv.predict import submission_of
from ltv.slices import open_slice, schema_of
from runkit.errors import SettingError
from runkit.files import atomic_file
from runkit.run import Run

log = logging.getLogger("ltv.submit")


def submit(config: Config, request: Submission, rows: Slice) -> Path:
    """Check ``<run_dir>/submissions/submission.csv``, align it where asked, and pass it to the ``kaggle`` command.

    Every id that is asked for must be there once, nothing else may be, and every amount must be a number >= 0.

    Returns:
        the file that was, or would be, handed in.

    Raises:
        SettingError: if there is no submission, or no such sample_submission.
        FileNotFoundError: if there is no ``kaggle`` command to hand it in with.
        ValueError: if ids are missing, unknown or repeated, or an amount is missing or negative; with counts and an
            example of each.
    """
    run = Run(config.run_dir)
    submission = submission_of(run)
    if not submission.exists():
        raise SettingError(f"run_dir: {submission} does not exist; run `ltv predict --split test` first")
    with run.command("submit", packages=PACKAGES) as facts:
        kinds = pa_csv.ConvertOptions(column_types={"row_id": pa.string()})
        table = pa_csv.read_csv(submission, convert_options=kinds)
        wanted = _wanted(config, request, rows)
        check_submission(table, wanted)
        if request.align_order:
            order = pc.index_in(wanted, value_set=table["row_id"].combine_chunks())
            if pc.all(pc.equal(order, pa.array(range(len(order)), pa.int32()))).as_py():
                log.info("the lines are in the order that is asked for")
            else:
                with atomic_file(submission) as path:
                    options = pa_csv.WriteOptions(quoting_style="needed")
                    pa_csv.write_csv(table.take(order), path, write_options=options)
                log.info("the lines were put into the order that is asked for")
        facts |= {"lines": table.num_rows, "dry_run": request.dry_run}
        log.info("%s: %d lines, all asked for, none missing", submission, table.num_rows)
        if request.dry_run:
            log.info("dry run: nothing was handed in")
        else:
            _hand_in(submission, request)
    return submission


def check_submission(table: pa.Table, wanted: pa.Array) -> None:
    """Raise ValueError unless every wanted id is there once and every amount is a number >= 0.

    Args:
        table: the columns row_id and one amount
        wanted: the ids that are asked for
    """
    if table.num_columns != 2 or table.column_names[0] != "row_id":
        raise ValueError(f"submission: got the columns {table.column_names}, needs row_id and one amount")
    ids, amount = table["row_id"].combine_chunks(), table.column(1)
    counts = pc.value_counts(ids)
    problems = {
        "missing": wanted.filter(pc.invert(pc.is_in(wanted, value_set=ids))),
        "not asked for": ids.filter(pc.invert(pc.is_in(ids, value_set=wanted))),
        "repeated": counts.field("values").filter(pc.greater(counts.field("counts"), 1)),
        "without an amount >= 0": ids.filter(
            pc.invert(pc.fill_null(pc.and_(pc.is_finite(amount), pc.greater_equal(amount, 0)), False))
        ),
    }
    found = [f"{len(rows)} ids {what} (e.g. {rows[0]})" for what, rows in problems.items() if len(rows)]
    if found:
        raise ValueError(f"submission: {'; '.join(found)}")


def _wanted(config: Config, request: Submission, rows: Slice) -> pa.Array:
    if request.sample_submission is not None:
        path = Path(request.sample_submission)
        if not path.is_file():
            raise SettingError(f"sample_submission: {path} does not exist")
        with pa_csv.open_csv(path) as reader:
            first = reader.schema.names[0]
        table = pa_csv.read_csv(path, convert_options=pa_csv.ConvertOptions(column_types={first: pa.string()}))
        return table.column(0).combine_chunks()
    name = str(schema_of(config).id)
    chunks = [batch.column(name) for batch in open_slice(config, rows).batches([name])]
    return pa.concat_arrays(chunks).cast(pa.string())


def _hand_in(path: Path, request: Submission) -> None:
    if shutil.which("kaggle") is None:
        raise FileNotFoundError(
            f"submit: there is no `kaggle` command; `pip install kaggle` and its API token hand {path} in; "
            "`--dry-run` only checks it"
        )
    command = ["kaggle", "competitions", "submit", "-c", request.competition, "-f", str(path), "-m", request.message]
    subprocess.run(command, check=True)
