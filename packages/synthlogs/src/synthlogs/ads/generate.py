"""Write a generated advertising log, hour by hour.

Every chunk has its own random stream, named by split, hour and chunk, and is written before the next one is drawn:
memory does not grow with the log.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from synthlogs.ads.catalogue import Catalogue
from synthlogs.ads.columns import feature_columns
from synthlogs.ads.population import World, draw, labels, solve
from synthlogs.ads.schema import label_types, labelled_schema, unlabelled_schema
from synthlogs.folder import progress, whole_folder, write_mark
from synthlogs.settings import AdsConfig

PARTITION = "%Y-%m-%d-%H-%M"
CHUNK_ROWS = 65_536
FILES = tuple(
    f"{split}/datetime=*/part-*.parquet" for split in ("train/train", "test/test", "truth/train", "truth/test")
)


@dataclass(frozen=True)
class Part:
    """One chunk to write: where, when and how many rows."""

    split: str
    moment: datetime
    hour_number: int
    number: int
    rows: int
    progress: float


def generate(folder: str | Path, config: AdsConfig, *, bar: bool = True) -> dict[str, float]:
    """Write ``train/train/datetime=*/part-*.parquet`` (84 columns), ``test/test/...`` (67, no labels) and ``truth/``.

    The folder ``truth`` has the same partitions with row_id, the labels (of the test split too) and the best possible
    predictions given the latents; ``generated.json`` records the config and what came out. The same config gives the
    same bytes. The folder appears in one step, when it is complete.

    Args:
        bar: show a progress bar where stderr is a terminal

    Returns:
        Rows, partitions, buyers and their money.

    Raises:
        ValueError: if a size, rate or date of the config cannot be.
        FileExistsError: if `folder` holds something that this function did not write.
    """
    config.check()
    totals = dict.fromkeys(("train_rows", "train_buyers_d7", "test_rows", "partitions", "train_revenue_d7"), 0.0)
    rows = config.rows + config.test_rows
    with whole_folder(folder, FILES) as new, progress(rows, "generate", "row", bar) as shown:
        catalogue = Catalogue.draw(np.random.default_rng([config.seed, 0]))
        world = solve(catalogue, config.buyer_rate, config.drift, np.random.default_rng([config.seed, 1]))
        for part in _parts(config):
            features, truth, tags = _chunk(catalogue, world, part, config.seed)
            _write(new, part, features, truth, tags)
            shown.update(part.rows)
            totals["partitions"] += part.number == 0
            totals[f"{part.split}_rows"] += part.rows
            if part.split == "train":
                totals["train_buyers_d7"] += int(tags["buyer_d7"].sum())
                totals["train_revenue_d7"] += float(tags["iap_revenue_d7"].sum())
        totals["buyer_rate_d7"] = totals["train_buyers_d7"] / totals["train_rows"]
        totals["mean_revenue_d7"] = totals["train_revenue_d7"] / totals["train_rows"]
        settings = {one.name: getattr(config, one.name) for one in fields(AdsConfig)}
        write_mark(new, {"config": settings, "world": asdict(world), "result": totals})
    return totals


def _parts(config: AdsConfig) -> Iterator[Part]:
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
