"""The feature cache: narrow float32 Parquet shards on disk, labels in memory, LightGBM data sets streamed from it."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from .columns import Floats, as_text, label_numbers
from .data import Dataset, drawn, row_hashes
from .engine import Engine, LocalEngine
from .features import FeatureBuilder, Matrix
from .moments import row_seconds
from .schema import Schema

log = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]
_SHARD_ROWS = 1 << 16


@dataclass(frozen=True)
class Shard:
    """One Parquet file of features: rows start .. start + rows of the training data."""

    path: Path
    start: int
    rows: int


@dataclass
class FeatureCache:
    """Features of all training rows on disk; labels, times and hashes in memory.

    Args:
        names: features in order.
        categorical: those that hold dictionary ids.
        shards: files in order of rows.
        labels: column -> amounts or flags, NaN where null [N].
        time: unix seconds [N]; the row's number where rows have no time.
        hashes: uniform hash of every row, the same whatever chunks or engine [N].
        segment: text of the segment column [N], or None.
        sample: rows whose features are also in memory, ascending [S].
        sample_matrix: their features [S, F].
    """

    names: list[str]
    categorical: list[str]
    shards: list[Shard]
    labels: dict[str, Floats]
    time: Floats
    hashes: npt.NDArray[np.uint64]
    segment: npt.NDArray[np.object_] | None
    sample: Ints
    sample_matrix: Matrix

    @property
    def rows(self) -> int:
        """Number of training rows."""
        return len(self.time)

    def matrices(self) -> Iterator[tuple[Shard, Matrix]]:
        """Every shard with its features, one in memory at a time."""
        for shard in self.shards:
            yield shard, read_shard(shard.path)

    def take(self, rows: Ints) -> Matrix:
        """Features of these rows, ascending [K, F]."""
        result = np.empty((len(rows), len(self.names)), np.float32)
        for shard in self.shards:
            first, last = np.searchsorted(rows, [shard.start, shard.start + shard.rows])
            if last > first:
                result[first:last] = read_shard(shard.path)[rows[first:last] - shard.start]
        return result

    def dataset(self, rows: Ints, parameters: dict[str, Any]) -> lgb.Dataset:
        """A LightGBM data set of these rows, ascending, binned by the sample and streamed shard by shard.

        Args:
            rows: ascending [K].
            parameters: of LightGBM, which binning depends on.
        """
        # Models with smaller leaves than those the bins were made for share this data.
        settings = dict(parameters) | {"verbosity": -1, "feature_pre_filter": False}
        chosen = np.flatnonzero(np.isin(self.sample, rows))
        reference = lgb.Dataset(
            self.sample_matrix[chosen],
            np.zeros(len(chosen)),
            feature_name=lightgbm_names(self.names),
            categorical_feature=[self.names.index(name) for name in self.categorical],
            params=settings,
            free_raw_data=True,
        ).construct()
        sequences: list[lgb.Sequence] = []
        for shard in self.shards:
            first, last = np.searchsorted(rows, [shard.start, shard.start + shard.rows])
            if last > first:
                sequences.append(_ShardRows(shard.path, rows[first:last] - shard.start))
        data = lgb.Dataset(sequences, reference=reference, params=settings, free_raw_data=True)
        return data.construct()


def build_cache(
    builder: FeatureBuilder,
    dataset: Dataset,
    folder: Path,
    *,
    label_columns: Sequence[str],
    segment: str | None = None,
    sample_rows: int = 100_000,
    seed: int = 0,
    engine: Engine | None = None,
) -> FeatureCache:
    """Transform the training data once, partition by partition, into shards under `folder`.

    Args:
        builder: fitted features.
        dataset: the training data.
        folder: where shards go; with Dask, a path that all workers see.
        label_columns: labels read along.
        segment: column whose text is kept for calibration by segment.
        sample_rows: rows kept in memory to find the histogram bins from.
        seed: of the row hashes.
        engine: where the work runs.

    Returns:
        the cache, whose shards stay on disk.

    Raises:
        ValueError: the dataset has no rows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    task = _PartitionTransform(builder, dataset, folder, list(label_columns), segment, sample_rows, seed)
    parts = list((engine or LocalEngine()).map(task, list(range(len(dataset.partitions)))))
    shards: list[Shard] = []
    start = 0
    for part in parts:
        for path, rows in part.files:
            shards.append(Shard(Path(path), start, rows))
            start += rows
    if start == 0:
        raise ValueError("dataset: got no rows, needs at least one to train on")
    hashes = np.concatenate([part.hashes for part in parts])
    time = np.concatenate([part.time for part in parts])
    labels = {name: np.concatenate([part.labels[name] for part in parts]) for name in label_columns}
    offsets = np.cumsum([0, *(len(part.hashes) for part in parts)])
    sample = np.concatenate([part.sample + begin for part, begin in zip(parts, offsets, strict=False)])
    matrix = np.concatenate([part.matrix for part in parts])
    if len(sample) > sample_rows:
        keep = np.sort(np.argsort(hashes[sample], kind="stable")[:sample_rows])
        sample, matrix = sample[keep], matrix[keep]
    return FeatureCache(
        builder.names,
        builder.categorical,
        shards,
        labels,
        np.where(np.isfinite(time), time, np.arange(start, dtype=np.float64)),
        hashes,
        np.concatenate([part.segment for part in parts]) if segment else None,
        sample.astype(np.int64),
        matrix,
    )


def read_shard(path: Path) -> Matrix:
    """The features of one shard [rows, F]."""
    table = pq.read_table(path, memory_map=False, use_threads=False)
    matrix = np.empty((table.num_rows, table.num_columns), np.float32)
    for position, column in enumerate(table.columns):
        matrix[:, position] = column.to_numpy()
    return matrix


def lightgbm_names(names: Sequence[str]) -> list[str]:
    """Feature names without the characters LightGBM's model file cannot hold, still distinct."""
    clean = ["".join(c if c.isalnum() or c in "_-." else "_" for c in name) for name in names]
    seen: dict[str, int] = {}
    result = []
    for name in clean:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return result


class _ShardRows(lgb.Sequence):
    """Chosen rows of one shard; one slice reads the whole file once and forgets it."""

    def __init__(self, path: Path, rows: Ints) -> None:
        self.path = path
        self.rows = rows
        self.batch_size = max(len(rows), 1)

    def __getitem__(self, index: Any) -> Any:
        return read_shard(self.path)[self.rows[index]]

    def __len__(self) -> int:
        return len(self.rows)


@dataclass
class _Part:
    files: list[tuple[str, int]]
    hashes: npt.NDArray[np.uint64]
    time: Floats
    labels: dict[str, Floats]
    segment: npt.NDArray[np.object_]
    sample: Ints
    matrix: Matrix


class _PartitionTransform:
    """The part of `build_cache` that runs where the partition is; picklable."""

    def __init__(
        self,
        builder: FeatureBuilder,
        dataset: Dataset,
        folder: Path,
        label_columns: list[str],
        segment: str | None,
        sample_rows: int,
        seed: int,
    ) -> None:
        self.builder, self.dataset, self.folder = builder, dataset, folder
        self.label_columns, self.segment = label_columns, segment
        self.seed = seed
        self.share = min(1.0, 1.2 * sample_rows / max(dataset.num_rows, 1))

    def __call__(self, number: int) -> _Part:
        partition = self.dataset.partitions[number]
        part = _Part([], np.empty(0, np.uint64), np.empty(0), {}, np.empty(0, object), np.empty(0, np.int64),
                     np.empty((0, len(self.builder.names)), np.float32))  # fmt: skip
        schema: Schema = self.builder.schema
        columns = list(
            dict.fromkeys([*self.builder.columns, *self.label_columns, *([self.segment] if self.segment else [])])
        )
        hashes, times, segments, samples, matrices = (
            [part.hashes],
            [part.time],
            [part.segment],
            [part.sample],
            [part.matrix],
        )
        labels: dict[str, list[Floats]] = {name: [np.empty(0)] for name in self.label_columns}
        pending: list[Matrix] = []
        start = 0
        for batch in self.dataset.partition_batches(partition, columns):
            rows = batch.num_rows
            matrix = self.builder.transform(batch)
            own = row_hashes(self.seed, partition.name, start, rows)
            hashes.append(own)
            times.append(row_seconds(batch, schema.time) if schema.time else np.full(rows, np.nan))
            for name in self.label_columns:
                present = name in batch.schema.names
                labels[name].append(label_numbers(batch.column(name), name) if present else np.full(rows, np.nan))
            if self.segment:
                # A partition without the column has unknown values of it.
                there = self.segment in batch.schema.names
                text = as_text(batch.column(self.segment)).to_pylist() if there else [None] * rows
                segments.append(np.array(text, dtype=object))
            chosen = np.flatnonzero(drawn(own, self.share))
            samples.append(chosen + start)
            matrices.append(matrix[chosen])
            start += rows
            pending.append(matrix)
            if sum(map(len, pending)) >= _SHARD_ROWS:
                part.files.append(self._write(number, len(part.files), pending))
                pending = []
        if pending:
            part.files.append(self._write(number, len(part.files), pending))
        part.hashes, part.time = np.concatenate(hashes), np.concatenate(times)
        part.segment, part.sample, part.matrix = (
            np.concatenate(segments),
            np.concatenate(samples),
            np.concatenate(matrices),
        )
        part.labels = {name: np.concatenate(columns) for name, columns in labels.items()}
        return part

    def _write(self, number: int, count: int, matrices: list[Matrix]) -> tuple[str, int]:
        matrix = np.concatenate(matrices)
        columns = [pa.array(np.ascontiguousarray(matrix[:, i])) for i in range(matrix.shape[1])]
        path = self.folder / f"features-{number:05d}-{count:03d}.parquet"
        temporary = path.with_suffix(".tmp")
        pq.write_table(
            pa.table(columns, names=self.builder.names),
            temporary,
            compression="lz4",
            use_dictionary=False,
            write_statistics=False,
        )
        temporary.rename(path)
        return str(path), len(matrix)
