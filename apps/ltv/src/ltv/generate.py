"""Write a log in the published 84-column layout, of any size, with signal planted in it and the truth beside it.

``catalogue.py`` draws what is the same in every hour, ``population.py`` who asks and what they will buy (its first
lines state the planted law), ``columns.py`` the 67 feature columns. Every chunk has its own random stream, named by
split, hour and chunk, and is written before the next one is drawn: memory does not grow with the log.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ltv.catalogue import Catalogue
from ltv.columns import feature_columns
from ltv.config import GenerateConfig
from ltv.population import World, draw, labels, solve
from ltv.rundir import temporary_directory
from ltv.schema import label_types, labelled_schema, unlabelled_schema

PARTITION = "%Y-%m-%d-%H-%M"
CHUNK_ROWS = 65_536


@dataclass(frozen=True)
class Part:
    """One chunk to write: where, when and how many rows."""

    split: str
    moment: datetime
    hour_number: int
    number: int
    rows: int
    progress: float


def generate(data_dir: str | Path, config: GenerateConfig) -> dict[str, float]:
    """Write ``train/train/datetime=*/part-*.parquet`` (84 columns), ``test/test/...`` (67, no labels) and ``truth/``.

    The folder ``truth`` has the same partitions with row_id, the labels (of the test split too) and the best possible
    predictions given the latents; ``generated.json`` records the config and what came out. The same config gives the
    same rows. `data_dir` appears in one step, when it is complete.

    Raises:
        ValueError: if a size, rate or date of the config cannot be.
        FileExistsError: if `data_dir` exists and is not empty.
    """
    config.check()
    data_dir = Path(data_dir)
    if data_dir.exists() and any(data_dir.iterdir()):
        raise FileExistsError(f"data_dir: {data_dir} is not empty; remove it or name another folder")
    catalogue = Catalogue.draw(np.random.default_rng([config.seed, 0]))
    world = solve(catalogue, config.buyer_rate, config.drift, np.random.default_rng([config.seed, 1]))
    totals = dict.fromkeys(("train_rows", "train_buyers_d7", "test_rows", "partitions", "train_revenue_d7"), 0.0)
    with temporary_directory(data_dir) as folder:
        for part in _parts(config):
            features, truth, tags = _chunk(catalogue, world, part, config.seed)
            _write(folder, part, features, truth, tags)
            totals["partitions"] += part.number == 0
            totals[f"{part.split}_rows"] += part.rows
            if part.split == "train":
                totals["train_buyers_d7"] += int(tags["buyer_d7"].sum())
                totals["train_revenue_d7"] += float(tags["iap_revenue_d7"].sum())
        totals["buyer_rate_d7"] = totals["train_buyers_d7"] / totals["train_rows"]
        totals["mean_revenue_d7"] = totals["train_revenue_d7"] / totals["train_rows"]
        report = {"config": asdict(config), "world": asdict(world), "result": totals}
        (folder / "generated.json").write_text(json.dumps(report, indent=2) + "\n")
    return totals


def _parts(config: GenerateConfig) -> Iterator[Part]:
    """Spread the rows over the hours, fewer at night, and cut hours that are too long for one chunk."""
    first = datetime.strptime(config.start, PARTITION).replace(tzinfo=timezone.utc)
    test_first = first + timedelta(hours=config.hours + config.gap_hours)
    span = config.hours + config.gap_hours + config.test_hours
    for split, begin, hours, rows in (
        ("train", first, config.hours, config.rows),
        ("test", test_first, config.test_hours, config.test_rows),
    ):
        moments = [begin + timedelta(hours=i) for i in range(hours)]
        weight = np.array([1 + 0.15 * np.cos(2 * np.pi * (moment.hour - 19) / 24) for moment in moments])
        ends = np.round(np.cumsum(weight) / weight.sum() * rows).astype(int) if hours else np.zeros(0, int)
        for i, (moment, size) in enumerate(zip(moments, np.diff(ends, prepend=0).tolist(), strict=True)):
            progress = (moment - first) / timedelta(hours=span)
            for number, start in enumerate(range(0, size, CHUNK_ROWS)):
                yield Part(split, moment, i, number, min(CHUNK_ROWS, size - start), progress)


def _chunk(catalogue: Catalogue, world: World, part: Part, seed: int) -> tuple[dict, dict, dict[str, np.ndarray]]:
    stream = [seed, 2, ("train", "test").index(part.split), part.hour_number, part.number]
    rng = np.random.default_rng(stream)
    second, hour = int(part.moment.timestamp()), part.moment.hour
    people = draw(catalogue, world, part.rows, second=second, hour=hour, progress=part.progress, rng=rng)
    features = feature_columns(catalogue, people, hour, part.moment.weekday(), rng)
    return features, people.oracle(), labels(people, rng)


def _write(folder: Path, part: Part, features: dict, truth: dict, tags: dict[str, np.ndarray]) -> None:
    partition = f"datetime={part.moment.strftime(PARTITION)}"
    name = f"part-{part.number:05d}.c000.snappy.parquet"
    columns = {label: pa.array(tags[label]).cast(kind) for label, kind in label_types().items()}
    schema = labelled_schema() if part.split == "train" else unlabelled_schema()
    rows = features | columns
    table = pa.table([rows[field.name] for field in schema], names=schema.names)
    _save(table, folder / part.split / part.split / partition / name)
    side = {"row_id": features["row_id"]} | columns | {f"oracle_{key}": pa.array(value) for key, value in truth.items()}
    _save(pa.table(side), folder / "truth" / part.split / partition / name)


def _save(table: pa.Table, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # The Arrow schema stays out, so that dictionary-encoded strings are read back as the strings they are.
    pq.write_table(table, path, compression="snappy", store_schema=False)
