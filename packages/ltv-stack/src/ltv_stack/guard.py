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

from .data import Dataset, drawn, from_table, row_hashes, row_seconds
from .errors import LeakageError
from .feature_groups import FeatureConfig
from .features import FeatureBuilder
from .kinds import as_read, check_types
from .nested import Bools, Floats, Ints, column_numbers, flatten_nested, is_nested, nested_statistics
from .schema import Schema
from .stages import predict, threads_for

log = logging.getLogger(__name__)

# Share of rows that may hold a time after their own before a column counts as dated in the future: clocks differ.
_FUTURE_SHARE = 0.01
_CLOCK_SECONDS = 3600.0
# One raw column that alone ranks buyers this well, or follows the amounts this closely, is the label in disguise.
_DERIVED_AUC = 0.985
_DERIVED_CORRELATION = 0.98
_FEWEST_BUYERS = 30
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
    alone as good as the label), "label_copy" (holds exactly the label's values, in this or another order),
    "future_dated" (holds times after the row's own) and "unpredictable_label" (no feature knows anything about this
    label though there are buyers enough to tell: it looks shuffled or misaligned).

    Args:
        dataset: the training data.
        schema: its declared columns.
        config: feature groups used for the label's own test; columns it excludes are not looked at.
        rows: rows looked at, the same ones for the same seed.
        seed: of the sample.
        num_threads: of the quick model that tests the labels; 0 to choose by the rows.
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
    for label, target in labels.items():
        buyers = int((target > 0).sum())
        if buyers < _FEWEST_BUYERS:
            log.warning("guard: copies of %s were not looked for: %d of %d rows buy", label, buyers, len(target))
    for name in names:
        finding = _look(sample, schema, name, now, labels, half)
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


def _look(
    sample: pa.RecordBatch, schema: Schema, name: str, now: Floats | None, labels: dict[str, Floats], half: Bools
) -> Finding | None:
    array = as_read(sample.column(name), name)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    kind = schema[name].kind
    nested = is_nested(array.type)
    parts = nested_statistics(array, ("max", "sum", "count")) if nested else {"value": column_numbers(array)}
    views = list(parts.values())
    # That a value is there at all, and how many are.
    absent = np.asarray(array.is_null(nan_is_null=pa.types.is_floating(array.type))).astype(np.float64)
    presence = [absent, *([parts["count"]] if nested else [])]
    if now is not None:
        declared = kind in ("unix_seconds", "nested_time")
        times = _as_seconds(array, views[0], now, declared)
        known = np.isfinite(times) & np.isfinite(now)
        if known.any():
            share = float((times[known] > now[known] + _CLOCK_SECONDS).mean())
            if share > _FUTURE_SHARE:
                return Finding(name, "future_dated", f"{share:.1%} of its rows hold a time after the row's own")
            # A time may well lie close before the outcome; only that it is there at all must not tell.
            views = []
    views += presence
    groups = _groups(array)
    for label, target in labels.items():
        for view in views:
            finding = _label_in_disguise(name, view, label, target)
            if finding:
                return finding
        for group in groups:
            finding = _label_by_group(name, group, label, target, half)
            if finding:
                return finding
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


def _groups(array: pa.Array) -> list[Ints]:
    """Ways to group the rows by a column: by its values, or by whether a frequent key or element is there."""
    if is_nested(array.type):
        entries = flatten_nested(array)
        held = entries.values if entries.keys is None else entries.keys
        if not len(held):
            return []
        codes = _codes(held)
        rows = entries.rows
        groups = []
        for code in np.argsort(-np.bincount(codes))[:_MOST_KEYS]:
            there = np.zeros(len(array), dtype=np.int64)
            there[rows[codes == code]] = 1
            groups.append(there)
        return groups
    if pa.types.is_struct(array.type) or pa.types.is_union(array.type):
        return []
    codes = _codes(array)
    return [codes] if codes.max(initial=0) < _MOST_VALUES else []


def _codes(array: pa.Array) -> Ints:
    """A number for each distinct value, null included."""
    encoded = pc.dictionary_encode(array, null_encoding="encode") if not pa.types.is_dictionary(array.type) else array
    return pc.fill_null(encoded.indices, len(encoded.dictionary)).to_numpy(zero_copy_only=False).astype(np.int64)


def _label_by_group(name: str, group: Ints, label: str, target: Floats, half: Bools) -> Finding | None:
    """A column whose groups, their rates learnt on the other half of the rows, rank buyers too well."""
    known = np.isfinite(target)
    buyers = target > 0
    if (buyers & known).sum() < _FEWEST_BUYERS or buyers[known].all():
        return None
    size = int(group.max()) + 1
    counts = [
        [np.bincount(group[side & wanted], minlength=size) for wanted in (known & buyers, known & ~buyers)]
        for side in (half, ~half)
    ]
    one, other = counts
    least = np.min([_grouped_auc(_rates(*other), *one), _grouped_auc(_rates(*one), *other)])
    if least > _DERIVED_AUC:
        detail = f"its groups alone rank {label} > 0 of the other half of the rows with AUC {least:.4f}"
        return Finding(name, "label_derived", detail)
    return None


def _rates(positives: Ints, negatives: Ints) -> Floats:
    """Share of positives of each group, drawn towards that of all [G]."""
    base = positives.sum() / max(positives.sum() + negatives.sum(), 1)
    shares: Floats = (positives + base) / (positives + negatives + 1.0)
    return shares


def _grouped_auc(rates: Floats, positives: Ints, negatives: Ints) -> float:
    """AUC of rows that are scored by the rate of their group; NaN where a class is missing."""
    _, place = np.unique(rates, return_inverse=True)
    above, below = (np.bincount(place, side.astype(np.float64)) for side in (positives, negatives))
    total = above.sum() * below.sum()
    return float((above * (np.cumsum(below) - below / 2)).sum() / total) if total else float("nan")


def _label_in_disguise(name: str, column: Floats, label: str, target: Floats) -> Finding | None:
    known = np.isfinite(target)
    target, column = target[known], column[known]
    buyers = target > 0
    if buyers.sum() < _FEWEST_BUYERS or buyers.all():
        return None
    filled = np.where(np.isfinite(column), column, np.nanmin(column, initial=0.0) - 1.0)
    # Amounts differ from buyer to buyer; the values of a flag would match any other flag's.
    if len(np.unique(target[buyers])) > 10:
        own = np.sort(column[np.isfinite(column) & (column != 0)])
        if len(own) == int(buyers.sum()) and np.allclose(own, np.sort(target[buyers]), rtol=1e-6):
            return Finding(name, "label_copy", f"holds exactly the values of {label}, in this or another order")
        held = np.isfinite(column[buyers])
        # Ranks, so that any monotone function of the amounts is seen.
        if held.sum() >= _FEWEST_BUYERS and len(np.unique(column[buyers][held])) > 5:
            follows = abs(_rank_correlation(column[buyers][held], target[buyers][held]))
            if follows > _DERIVED_CORRELATION:
                return Finding(name, "label_derived", f"rank correlation {follows:.3f} with {label} among buyers")
    auc = float(roc_auc_score(buyers, filled))
    auc = max(auc, 1 - auc)
    if auc > _DERIVED_AUC:
        return Finding(name, "label_derived", f"alone ranks {label} > 0 with AUC {auc:.4f}")
    return None


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


def _rank_correlation(left: Floats, right: Floats) -> float:
    ranks = [np.argsort(np.argsort(side, kind="stable"), kind="stable").astype(float) for side in (left, right)]
    if np.ptp(left) == 0 or np.ptp(right) == 0:
        return 0.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


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
