"""The leakage guard: what tells the future or the label is refused by name, whatever it is called."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import lightgbm as lgb
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from sklearn.metrics import roc_auc_score

from .columns import Floats, column_numbers, is_nested
from .data import Dataset, drawn, from_table, row_hashes
from .disguise import Target, targets_of, told_by_groups, told_by_values
from .errors import LeakageError
from .feature_groups import FeatureConfig
from .features import FeatureBuilder
from .kinds import as_read, check_types, kind_of
from .moments import row_seconds
from .nested import Bools, Entries, Ints, flatten_nested, nested_lookup, nested_statistics
from .schema import Schema
from .stages import predict, threads_for

log = logging.getLogger(__name__)

# Share of rows that may hold a time after their own before a column counts as dated in the future: clocks differ.
_FUTURE_SHARE = 0.01
_CLOCK_SECONDS = 3600.0
_SIGNAL_BUYERS = 200
# Text with more distinct values than this is looked at no further, nor are keys beyond so many of the most frequent.
_MOST_VALUES = 2000
_MOST_KEYS = 20
_SIGNAL_Z = 2.0


@dataclass(frozen=True)
class Finding:
    """One refusal: the column, what kind of leak it is, and what was seen."""

    column: str
    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{self.column}: {self.kind}: {self.detail}"


def audit(
    dataset: Dataset,
    schema: Schema,
    config: FeatureConfig | Mapping[str, Any] | None = None,
    *,
    rows: int = 30_000,
    seed: int = 0,
    num_threads: int = 0,
) -> list[Finding]:
    """Look for columns that leak, by declaration first and then in a sample of the data.

    Kinds: "declared_future" (declared available after the row), "label_derived" (declared derived from a label, or
    alone as good as any label or the difference of two), "label_copy" (holds exactly the label's values, in this or
    another order), "future_dated" (holds times after the row's own) and "unpredictable_label" (no feature knows
    anything about this label though there are buyers enough to tell: it looks shuffled or misaligned).

    Args:
        dataset: the training data.
        schema: its declared columns.
        config: feature groups used for the label's own test; columns it excludes are not looked at.
        rows: rows looked at, the same ones for the same seed.
        seed: of the sample.
        num_threads: of the quick model that tests the labels; 0 to choose by the rows.

    Returns:
        what was found; empty when nothing leaks.
    """
    config = config if isinstance(config, FeatureConfig) else FeatureConfig.from_dict(config or {})
    findings = [finding for finding in declared_leaks(schema) if finding.column not in config.exclude]
    known = {finding.column for finding in findings} | set(config.exclude)
    check_types(dataset, schema, config.exclude)
    sample = _sample(dataset, schema, rows, seed)
    if sample.num_rows == 0:
        return findings
    names = [n for n in schema.feature_columns if n in sample.schema.names and n not in known]
    labels = _labels(sample, schema)
    now = row_seconds(sample, schema.time) if schema.time and schema.time in sample.schema.names else None
    half = _half(sample.num_rows, seed)
    targets = _targets(sample, schema, labels)
    for name in names:
        finding = _look(sample, schema, name, now, targets, half)
        if finding:
            findings.append(finding)
    known |= {finding.column for finding in findings}
    if set(names) - known:
        rest = replace(config, exclude=tuple(sorted(known)))
        findings += _shuffled_labels(sample, schema, rest, labels, seed, num_threads)
    return findings


def declared_leaks(schema: Schema) -> list[Finding]:
    """What the declaration alone refuses: features known only after the row, or derived from such a column."""
    late = {c.name for c in schema.columns if c.role == "label" or _is_late(c.available_at)}
    findings = []
    for column in schema.columns:
        if column.role != "feature":
            continue
        if _is_late(column.available_at):
            detail = f"declared available {column.available_at} after the row"
            findings.append(Finding(column.name, "declared_future", detail))
        parents = sorted(_ancestors(schema, column.name) & late)
        if parents:
            findings.append(Finding(column.name, "label_derived", f"declared derived from {', '.join(parents)}"))
    return findings


def refuse(findings: list[Finding]) -> None:
    """Raise for any finding.

    Raises:
        LeakageError: naming every column found.
    """
    if findings:
        lines = "\n  ".join(str(finding) for finding in findings)
        raise LeakageError(
            f"these columns leak the future or the label:\n  {lines}\nremove them, or correct their roles"
        )


def _targets(sample: pa.RecordBatch, schema: Schema, labels: dict[str, Floats]) -> list[Target]:
    revenue = {h.revenue: labels[h.revenue] for h in schema.horizons if h.revenue in labels}
    others = {name: values for name, values in labels.items() if name not in revenue}
    for column in schema.columns:
        if column.role == "label" and column.name in sample.schema.names and column.name not in labels:
            values = sample.column(column.name)
            if kind_of(values.type) == "number":
                others[column.name] = column_numbers(values)
    targets = targets_of(revenue, others)
    for label in labels.keys() - {target.name for target in targets}:
        buyers = int((labels[label] > 0).sum())
        log.warning("guard: copies of %s were not looked for: %d of %d rows buy", label, buyers, sample.num_rows)
    return targets


def _look(
    sample: pa.RecordBatch, schema: Schema, name: str, now: Floats | None, targets: list[Target], half: Bools
) -> Finding | None:
    array = as_read(sample.column(name), name)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    nested = is_nested(array.type)
    parts = nested_statistics(array) if nested else {"max": column_numbers(array)}
    entries = flatten_nested(array) if nested else None
    # That a value is there at all, and how many are.
    absent = np.asarray(array.is_null(nan_is_null=pa.types.is_floating(array.type))).astype(np.float64)
    views = [absent, *([parts["count"]] if nested else [])]
    dated = np.zeros(len(array), dtype=bool)
    if now is not None:
        times = _as_seconds(array, parts["max"], now, schema[name].kind in ("unix_seconds", "nested_time"))
        dated = np.isfinite(times) & np.isfinite(now)
        share = float((times[dated] > now[dated] + _CLOCK_SECONDS).mean()) if dated.any() else 0.0
        if share > _FUTURE_SHARE:
            return Finding(name, "future_dated", f"{share:.1%} of its rows hold a time after the row's own")
    # A time may well lie close before the outcome; only that it is there at all must not tell.
    if not dated.any():
        views += [view for statistic, view in parts.items() if statistic != "count"]
        if entries is not None:
            views += _values_of_keys(entries)
            keys = [key for key in schema[name].lookup if key in sample.schema.names]
            views += [nested_lookup(array, sample.column(key)) for key in keys]
    for view in views:
        found = told_by_values(view, targets)
        if found:
            return Finding(name, *found)
    for group in _groups(array, entries):
        found = told_by_groups(group, targets, half)
        if found:
            return Finding(name, *found)
    return None


def _as_seconds(array: pa.Array, values: Floats, now: Floats, declared: bool) -> Floats:
    """The column as unix seconds, NaN where it holds no time; all NaN where it is none.

    Numbers are read as seconds, milliseconds, microseconds or nanoseconds, text as ISO 8601.
    """
    none = np.full(len(now), np.nan)
    if pa.types.is_timestamp(array.type) or pa.types.is_date(array.type):
        return values
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        # Digits alone may be anything; a date has hyphens.
        dated = pc.fill_null(pc.match_substring(array, "-"), False)
        if pc.sum(dated).as_py() < max(20, 0.95 * (len(array) - array.null_count)):
            return none
        parsed = pd.to_datetime(pd.Series(array.to_pylist(), dtype=object), format="ISO8601", errors="coerce", utc=True)
        if parsed.notna().sum() < 0.95 * (len(array) - array.null_count):
            return none
        return (parsed - pd.Timestamp(0, tz="UTC")).dt.total_seconds().to_numpy(np.float64)
    # Undeclared times: nearly every value, but for zeros that stand for none, lies within thirty years of its row's
    # time, on one of the usual scales.
    known = np.isfinite(values) & np.isfinite(now) & (values != 0)
    if known.sum() >= 20 and now[known].min() > 1e8:
        for scale in (1.0, 1e3, 1e6, 1e9):
            if (np.abs(values[known] / scale - now[known]) < 30 * 365.25 * 86400).mean() > 0.95:
                return values / scale
    return values if declared else none


def _values_of_keys(entries: Entries) -> list[Floats]:
    """What each row holds under each of the frequent keys, NaN where the key is not there; none without keys."""
    if entries.keys is None:
        return []
    values, rows = column_numbers(entries.values), entries.rows
    found = []
    for own in _frequent(entries.keys):
        own = own[np.isfinite(values[own])]
        there = np.full(len(entries.lengths), np.nan)
        there[rows[own]] = 0.0
        np.add.at(there, rows[own], values[own])
        found.append(there)
    return found


def _groups(array: pa.Array, entries: Entries | None) -> list[Ints]:
    """Ways to group the rows by a column: by its values, or by whether a frequent key or element is there."""
    if entries is not None:
        held = entries.values if entries.keys is None else entries.keys
        groups = []
        for own in _frequent(held):
            there = np.zeros(len(array), dtype=np.int64)
            there[entries.rows[own]] = 1
            groups.append(there)
        return groups
    if pa.types.is_struct(array.type) or pa.types.is_union(array.type):
        return []
    codes = _codes(array)
    return [codes] if codes.max(initial=0) < _MOST_VALUES else []


def _frequent(held: pa.Array) -> list[Ints]:
    """Places of each of the most frequent keys or elements."""
    if not len(held):
        return []
    codes = _codes(held)
    return [np.flatnonzero(codes == code) for code in np.argsort(-np.bincount(codes), kind="stable")[:_MOST_KEYS]]


def _codes(array: pa.Array) -> Ints:
    """A number for each distinct value, null included."""
    encoded = pc.dictionary_encode(array, null_encoding="encode") if not pa.types.is_dictionary(array.type) else array
    return pc.fill_null(encoded.indices, len(encoded.dictionary)).to_numpy(zero_copy_only=False).astype(np.int64)


def _shuffled_labels(
    sample: pa.RecordBatch,
    schema: Schema,
    config: FeatureConfig,
    labels: dict[str, Floats],
    seed: int,
    num_threads: int,
) -> list[Finding]:
    findings = []
    matrix: npt.NDArray[np.float32] | None = None
    for label, target in labels.items():
        known = np.isfinite(target)
        buyers = (target > 0)[known]
        positives, negatives = int(buyers.sum()), int((~buyers).sum())
        if min(positives, negatives) < _SIGNAL_BUYERS:
            seen = (
                f"{positives} of {positives + negatives} rows of the sample buy, {_SIGNAL_BUYERS} of either are needed"
            )
            log.warning("guard: whether %s is shuffled was not tested: %s", label, seen)
            continue
        if matrix is None:
            data = from_table(sample, chunk_size=None)
            matrix = FeatureBuilder(schema, config, sample_rows=10_000, seed=seed).fit(data).transform(sample)
        rows = matrix[known]
        half = _half(len(buyers), seed)
        score = np.empty(len(buyers))
        parameters = {
            "objective": "binary",
            "num_leaves": 15,
            "min_data_in_leaf": 50,
            "verbosity": -1,
            "seed": seed,
            "feature_fraction": 0.5,
            "deterministic": True,
            "force_col_wise": True,
            "learning_rate": 0.05,
            "num_threads": threads_for(len(rows), num_threads),
        }
        for side in (half, ~half):
            model = lgb.train(parameters, lgb.Dataset(rows[~side], buyers[~side].astype(float)), 40)
            score[side] = predict(model, rows[side], num_threads)
        auc = np.mean([roc_auc_score(buyers[side], score[side]) for side in (half, ~half)])
        # Standard error of an AUC without signal (Mann-Whitney).
        error = float(np.sqrt((positives + negatives + 1) / (12.0 * positives * negatives)))
        if auc < 0.5 + _SIGNAL_Z * error:
            detail = (
                f"AUC {auc:.3f} of a held-out half with {positives} buyers (chance is 0.5 ± {error:.3f}): shuffled?"
            )
            findings.append(Finding(label, "unpredictable_label", detail))
    return findings


def _half(rows: int, seed: int) -> Bools:
    return (row_hashes(seed, "guard", 0, rows) & np.uint64(1)).astype(bool)


def _sample(dataset: Dataset, schema: Schema, rows: int, seed: int) -> pa.RecordBatch:
    """Rows spread over the whole dataset, the same ones whatever the chunks."""
    wanted = [c.name for c in schema.columns if c.role in ("feature", "label")]
    wanted += [schema.time] if schema.time else []
    # Partitions spread over the window, four times as many rows as wanted, so that not all data is read once more.
    wanted_partitions = max(8, math.ceil(len(dataset.partitions) * 4 * rows / max(dataset.num_rows, 1)))
    step = max(1, len(dataset.partitions) // wanted_partitions)
    partitions = dataset.partitions[::step]
    share = min(1.0, rows / max(sum(p.rows for p in partitions), 1))
    kept = []
    for partition in partitions:
        start = 0
        for batch in dataset.partition_batches(partition, wanted):
            hashes = row_hashes(seed + 2, partition.name, start, batch.num_rows)
            start += batch.num_rows
            keep = drawn(hashes, share)
            kept.append(pa.Table.from_batches([batch.filter(pa.array(keep))]))
    if not kept:
        return pa.RecordBatch.from_arrays([], names=[])
    table = pa.concat_tables(kept, promote_options="permissive")
    columns = [pa.concat_arrays(c.chunks) if c.num_chunks else pa.nulls(0, c.type) for c in table.columns]
    return pa.RecordBatch.from_arrays(columns, names=table.column_names)


def _labels(sample: pa.RecordBatch, schema: Schema) -> dict[str, Floats]:
    names = [name for h in schema.horizons for name in (h.revenue, h.buyer) if name]
    return {name: column_numbers(sample.column(name)) for name in names if name in sample.schema.names}


def _is_late(available_at: object) -> bool:
    return isinstance(available_at, timedelta) and available_at > timedelta(0)


def _ancestors(schema: Schema, name: str) -> set[str]:
    """Everything this column was computed from, through any number of steps."""
    found: set[str] = set()
    pending = list(schema[name].derived_from)
    while pending:
        parent = pending.pop()
        if parent in found:
            continue
        found.add(parent)
        pending += schema[parent].derived_from if parent in schema else ()
    return found
