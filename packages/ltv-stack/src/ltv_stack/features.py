"""Feature groups: what is read from each column, fitted once on a stream and frozen."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from .columns import Floats, as_text, column_numbers
from .data import Dataset, drawn, row_hashes
from .engine import Engine, LocalEngine
from .feature_groups import OPERATIONS, FeatureConfig
from .kinds import as_read, kind_of, require_kind
from .learnt import LocalTable, Partial, Vocabulary
from .moments import cycles, months, row_seconds, year_months
from .nested import nested_lookup, nested_recency, nested_statistics
from .schema import Kind, Schema

log = logging.getLogger(__name__)

Matrix = npt.NDArray[np.float32]
_FLOAT32_MAX = float(np.finfo(np.float32).max)


class FeatureBuilder:
    """Turns record batches into a float32 matrix; all that is learnt is learnt in `fit` and never changes after.

    Args:
        schema: declared columns; only role "feature" is read.
        config: the feature groups, a `FeatureConfig` or the mapping of a `features.yaml`.
        sample_rows: rows kept to learn local distributions from.
        seed: seed of that sample.
    """

    def __init__(
        self,
        schema: Schema,
        config: FeatureConfig | Mapping[str, Any] | None = None,
        *,
        sample_rows: int = 50_000,
        seed: int = 0,
    ) -> None:
        if config is None:
            config = FeatureConfig()
        self.schema = schema
        self.config = config if isinstance(config, FeatureConfig) else FeatureConfig.from_dict(config)
        self.sample_rows = sample_rows
        self.seed = seed
        self.kinds: dict[str, Kind] = {}
        self.optional: set[str] = set()
        self.vocabularies: dict[str, Vocabulary] = {}
        self.indicators: list[str] = []
        self.local: dict[tuple[str, str], LocalTable] = {}
        self.names: list[str] = []
        self.groups: dict[str, str] = {}
        self.source: dict[str, str] = {}

    @property
    def categorical(self) -> list[str]:
        """Names of the features that hold dictionary ids."""
        return [name for name in self.names if name.endswith("__code")]

    @property
    def category_sizes(self) -> dict[str, int]:
        """Feature that holds dictionary ids -> how many ids there are, those of missing and rare values included."""
        return {name: len(self.vocabularies[name[: -len("__code")]].values) + 2 for name in self.categorical}

    @property
    def columns(self) -> list[str]:
        """Raw columns that `transform` reads."""
        lookups = [key for name in self.kinds for key in self._lookup(name)]
        time = [self.schema.time] if self.schema.time else []
        return list(dict.fromkeys([*self.kinds, *lookups, *self.local_by, *time]))

    @property
    def local_by(self) -> list[str]:
        """Columns whose values local distributions are learnt within; never one that is excluded."""
        return [name for name in self.config.local_by if name not in self.config.exclude]

    @property
    def local_features(self) -> list[str]:
        """Features local distributions are learnt of, less those of declared columns that are excluded or not there."""
        unused = [name for name in self.schema.feature_columns if name not in self.kinds]
        return [f for f in self.config.local_features if not any(f == n or f.startswith(f"{n}__") for n in unused)]

    def fit(self, dataset: Dataset, *, engine: Engine | None = None) -> "FeatureBuilder":
        """One streamed pass: vocabularies, missing columns, local distributions. Labels are never read.

        Raises:
            ValueError: the dataset has no rows, or none of the declared features.
        """
        self._resolve(dataset)
        total = Partial()
        fit = _PartitionFit(self, dataset)
        for partial in (engine or LocalEngine()).map(fit, list(range(len(dataset.partitions)))):
            total.add(partial, self.sample_rows)
        if total.rows == 0:
            raise ValueError("dataset: got no rows, needs at least one to fit the features on")
        self.indicators = [name for name in self.kinds if 0 < total.nulls[name] < total.rows]
        for name, counts in total.counts.items():
            self.vocabularies[name] = Vocabulary.of(counts, total.rows, self.config.min_count, self.config.max_size)
        for by in self.local_by:
            if by not in total.groups:
                continue
            codes = self.vocabularies[by].encode(pa.array(total.groups[by], pa.large_string())).astype(np.int64)
            for name in self.local_features:
                size = len(self.vocabularies[by].values) + 2
                self.local[(name, by)] = LocalTable.of(total.sample[name], codes, size, self.config.local_min_rows)
        self._name(dataset)
        log.info("features: %d from %d columns, fitted on %d rows", len(self.names), len(self.kinds), total.rows)
        return self

    def check(self, dataset: Dataset) -> None:
        """Look at the Arrow type of every column in every file of data to transform, before anything is read.

        Raises:
            ValueError: a map or list where one value a row is needed, or the other way round; names column and file.
        """
        for place, one in dataset.fields():
            if one.name in self.kinds:
                require_kind(f"column {one.name} in {place}", self.kinds[one.name], one.type)

    def transform(self, batch: pa.RecordBatch) -> Matrix:
        """The features of a batch [N, F] in the order of `names`; NaN where a value is not known.

        Raises:
            ValueError: the batch lacks a column that was always there at fit time, or nothing was fitted.
        """
        if not self.names:
            raise ValueError("FeatureBuilder is not fitted: call fit(dataset) first")
        values = self._all(batch)
        result = np.empty((batch.num_rows, len(self.names)), np.float32)
        for position, name in enumerate(self.names):
            result[:, position] = np.clip(values[name], -_FLOAT32_MAX, _FLOAT32_MAX)
        return result

    def to_json(self) -> dict[str, Any]:
        """Everything fitted, JSON-ready."""
        return {
            "schema": self.schema.to_dict(),
            "config": self.config.to_dict(),
            "sample_rows": self.sample_rows,
            "seed": self.seed,
            "kinds": self.kinds,
            "optional": sorted(self.optional),
            "vocabularies": {
                name: {"values": v.values, "counts": v.counts, "total": v.total}
                for name, v in self.vocabularies.items()
            },
            "indicators": self.indicators,
            "local": [{"feature": name, "by": by, **table.to_json()} for (name, by), table in self.local.items()],
            "names": self.names,
            "groups": self.groups,
            "source": self.source,
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> "FeatureBuilder":
        """The builder `to_json` wrote."""
        builder = cls(
            Schema.from_dict(state["schema"]),
            FeatureConfig.restore(state["config"]),
            sample_rows=state["sample_rows"],
            seed=state["seed"],
        )
        builder.kinds = dict(state["kinds"])
        builder.optional = set(state["optional"])
        builder.vocabularies = {name: Vocabulary(**v) for name, v in state["vocabularies"].items()}
        builder.indicators = list(state["indicators"])
        builder.local = {(one["feature"], one["by"]): LocalTable.from_json(one) for one in state["local"]}
        builder.names = list(state["names"])
        builder.groups = dict(state["groups"])
        builder.source = dict(state["source"])
        return builder

    def _resolve(self, dataset: Dataset) -> None:
        """Decide how each declared feature is read, from its declaration or its Arrow type."""
        types = {one.name: one.type for one in dataset.schema}
        declared = [name for name in self.schema.feature_columns if name not in self.config.exclude]
        unknown = sorted(set(self.config.exclude) - set(self.schema.feature_columns))
        if unknown:
            log.warning("exclude: %s are no declared features", ", ".join(unknown))
        undeclared = sorted(set(types) - {column.name for column in self.schema.columns} - {self.schema.time})
        if undeclared:
            log.info("not declared, not used: %s", ", ".join(undeclared))
        absent = [name for name in declared if name not in types]
        if absent:
            log.warning("declared but not in the data, not used: %s", ", ".join(absent))
        self.kinds, self.optional = {}, set()
        for name in declared:
            if name not in types or name == self.schema.time:
                continue
            kind = self.schema[name].kind
            if kind == "auto":
                kind = kind_of(types[name])
            if kind == "auto":
                empty = pa.types.is_null(types[name])
                reason = "it holds no values" if empty else "this type is not read; flatten it or make it a map"
                log.warning("column %s of Arrow type %s is not used: %s", name, types[name], reason)
                continue
            self.kinds[name] = kind
        if not self.kinds:
            raise ValueError(f"schema: none of the declared features {declared[:5]} is in the data {sorted(types)[:5]}")
        self._check_terms()
        missing_by = sorted(set(self.config.local_by) - set(self.schema.feature_columns))
        if missing_by:
            raise ValueError(
                f"local_distribution.by: {missing_by} are not declared features; labels are never grouped by"
            )
        left_out = sorted({*self.config.local_by, *self.config.local_features} - {*self.local_by, *self.local_features})
        if left_out:
            log.warning("local_distribution of %s is left out: their columns are not used", ", ".join(left_out))
        for partition in dataset.partitions:
            present = set(replace(dataset, partitions=(partition,)).schema.names)
            self.optional |= set(self.columns) - present

    def _check_terms(self) -> None:
        """A term of a feature that no declared column and no earlier term can give is a mistake in the settings."""
        made, columns = set(cycles(np.empty(0))), self.schema.feature_columns
        for term in (*self.config.interactions, *self.config.behavioural):
            for side in (term.left, term.right):
                if side not in made and not any(side == n or side.startswith(f"{n}__") for n in columns):
                    raise ValueError(
                        f"term {term.name}: {side!r} is no feature; needs <column> or <column>__<statistic> of a "
                        "declared feature, or a term before it"
                    )
            made.add(term.name)

    def _name(self, dataset: Dataset) -> None:
        """Fix names, order, groups and sources by computing an empty batch."""
        schema = dataset.schema
        empty = pa.RecordBatch.from_arrays([pa.nulls(0, f.type) for f in schema], names=schema.names)
        self.groups, self.source = {}, {}
        self.names = list(self._all(empty))

    def _all(self, batch: pa.RecordBatch) -> dict[str, Floats]:
        """Every feature of a batch, in order."""
        with np.errstate(all="ignore"):
            values = self._base(batch)
            self._encode(batch, values)
            self._combine(batch, values)
        return values

    def _base(self, batch: pa.RecordBatch) -> dict[str, Floats]:
        """Features that need nothing fitted."""
        config, schema, rows = self.config, self.schema, batch.num_rows
        now = row_seconds(batch, schema.time) if schema.time else np.full(rows, np.nan)
        values: dict[str, Floats] = {}

        def put(name: str, column: Floats, group: str, source: str) -> None:
            values[name] = column
            self.groups.setdefault(name, group)
            self.source.setdefault(name, source)

        for name, kind in self.kinds.items():
            array = self._column(batch, name)
            keys = self._lookup(name)
            require_kind(f"column {name}", kind, array.type)
            if kind == "number":
                put(name, column_numbers(array), "numbers", name)
            elif kind == "unix_seconds" and config.recency:
                self._put_recency(put, name, (now - column_numbers(array)) / 86400.0, "days_ago", name)
            elif kind == "year_month":
                month = months(now) if schema.time else np.zeros(rows)
                put(f"{name}__months_ago", month - year_months(array), "recency", name)
            elif kind == "nested" and config.nested:
                for statistic, column in nested_statistics(array, config.statistics).items():
                    put(f"{name}__{statistic}", column, "nested", name)
                for key in keys:
                    put(f"{name}__at_{key}", nested_lookup(array, self._column(batch, key)), "lookups", name)
            elif kind == "nested_time" and config.nested:
                put(f"{name}__count", nested_statistics(array, ("count",))["count"], "nested", name)
                if config.recency:
                    bounds = nested_recency(array, now)
                    self._put_recency(put, name, bounds["days_ago"], "days_ago", name)
                    put(f"{name}__oldest_days_ago", bounds["oldest_days_ago"], "recency", name)
                    for key in keys:
                        newest = nested_lookup(array, self._column(batch, key), "max")
                        put(f"{name}__days_ago_at_{key}", (now - newest) / 86400.0, "lookups", name)
            elif kind == "set" and config.nested:
                for statistic, column in nested_statistics(array, ("count", "distinct")).items():
                    put(f"{name}__{statistic}", column, "nested", name)
                for key in keys:
                    put(f"{name}__at_{key}", nested_lookup(array, self._column(batch, key), "count"), "lookups", name)
        if config.temporal and schema.time:
            for name, column in cycles(now).items():
                put(name, column, "temporal", schema.time)
        return values

    def _lookup(self, name: str) -> list[str]:
        """Columns whose values are looked up among the keys of this one; never an excluded one."""
        wanted = self.schema[name].lookup if self.config.lookups and self.config.nested else ()
        return [key for key in wanted if key not in self.config.exclude]

    def _put_recency(
        self, put: Callable[[str, Floats, str, str], None], name: str, days: Floats, label: str, source: str
    ) -> None:
        put(f"{name}__{label}", days, "recency", source)
        # A half-life halves: exp(-ln 2 · days / half_life).
        put(f"{name}__decay", np.exp(-math.log(2) * days / self.config.half_life_days), "recency", source)

    def _encode(self, batch: pa.RecordBatch, values: dict[str, Floats]) -> None:
        """Dictionary ids, frequencies and missing indicators."""
        for name in self.indicators if self.config.missing_indicators else []:
            null = np.asarray(pc.is_null(self._column(batch, name))).astype(np.float64)
            self._put(values, f"{name}__missing", null, "missing_indicators", name)
        if not self.config.categorical:
            return
        for name, kind in self.kinds.items():
            if kind != "category":
                continue
            vocabulary = self.vocabularies[name]
            codes = vocabulary.encode(self._column(batch, name))
            self._put(values, f"{name}__code", codes, "categorical", name)
            if self.config.frequency:
                self._put(values, f"{name}__freq", vocabulary.frequency(codes), "categorical", name)

    def _combine(self, batch: pa.RecordBatch, values: dict[str, Floats]) -> None:
        """Interactions, behavioural aggregates and local distributions, of features made before."""
        config = self.config
        for group, terms in (("interactions", config.interactions), ("behavioural", config.behavioural)):
            for term in terms:
                absent = [side for side in (term.left, term.right) if side not in values]
                if absent:
                    # Said once, while the names are being fixed.
                    if not self.names:
                        log.warning("%s term %s is left out: no feature %s", group, term.name, ", ".join(absent))
                    continue
                column = OPERATIONS[term.op](values[term.left], values[term.right])
                self._put(values, term.name, column, group, self.source[term.left])
        for (name, by), table in self.local.items():
            codes = self.vocabularies[by].encode(self._column(batch, by)).astype(np.int64)
            own = values[name]
            self._put(values, f"{name}__rank_in_{by}", table.rank(own, codes), "local_distribution", name)
            self._put(values, f"{name}__dev_in_{by}", own - table.mean[codes], "local_distribution", name)

    def _put(self, values: dict[str, Floats], name: str, column: Floats, group: str, source: str) -> None:
        values[name] = column
        self.groups.setdefault(name, group)
        self.source.setdefault(name, self.source.get(source, source))

    def _column(self, batch: pa.RecordBatch, name: str) -> pa.Array:
        if name in batch.schema.names:
            return as_read(batch.column(name), name)
        if name in self.optional:
            return pa.nulls(batch.num_rows)
        raise ValueError(f"batch: column {name!r} is missing; it was there in every partition at fit time")


class _PartitionFit:
    """The part of `FeatureBuilder.fit` that runs where the partition is; picklable."""

    def __init__(self, builder: FeatureBuilder, dataset: Dataset) -> None:
        self.builder = builder
        self.dataset = dataset

    def __call__(self, number: int) -> Partial:
        builder = self.builder
        partition = self.dataset.partitions[number]
        total = Partial()
        categories = [name for name, kind in builder.kinds.items() if kind == "category"]
        categories = list(dict.fromkeys([*categories, *builder.local_by]))
        for batch in self.dataset.partition_batches(partition, builder.columns):
            one = Partial(rows=batch.num_rows)
            present = set(batch.schema.names)
            for name in builder.kinds:
                one.nulls[name] = batch.column(name).null_count if name in present else batch.num_rows
            for name in categories:
                counted = pc.value_counts(as_text(builder._column(batch, name)))
                one.counts[name] = Counter(
                    dict(zip(counted.field(0).to_pylist(), counted.field(1).to_pylist(), strict=True))
                )
            if builder.local_by and builder.local_features:
                self._sample(batch, partition.name, total.rows, one)
            total.add(one, builder.sample_rows)
        return total

    def _sample(self, batch: pa.RecordBatch, name: str, start: int, one: Partial) -> None:
        builder = self.builder
        hashes = row_hashes(builder.seed + 1, name, start, batch.num_rows)
        # Half as many again as are kept: the smallest hashes of all are surely among them.
        chosen = np.flatnonzero(drawn(hashes, min(1.0, 1.5 * builder.sample_rows / max(self.dataset.num_rows, 1))))
        part = batch.take(pa.array(chosen))
        with np.errstate(all="ignore"):
            values = builder._base(part)
        absent = sorted(set(builder.local_features) - set(values))
        if absent:
            raise ValueError(
                f"local_distribution.features: {absent} are not features; there are {sorted(values)[:8]} ..."
            )
        one.hashes = hashes[chosen]
        one.sample = {name: values[name] for name in builder.local_features}
        for by in builder.local_by:
            one.groups[by] = np.array(as_text(builder._column(part, by)).to_pylist(), dtype=object)
