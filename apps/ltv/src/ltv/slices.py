"""From settings to rows: the schema of the layout, the feature catalogue, the partitions a command reads."""

from __future__ import annotations

import os
from datetime import timedelta
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from ltv.config import PARTITION, Config, Slice, partition_time
from ltv_stack import (
    Column,
    DaskEngine,
    Dataset,
    Horizon,
    LocalEngine,
    Schema,
    make_engine,
    open_partitions,
    smadex_features,
    smadex_schema,
)

TRANSACTION_NUMBERS = (
    "orders",
    "active_days",
    "repeat_days",
    "recency_days",
    "spend_per_repeat_day",
    "spend",
    "spend_per_order",
    "first_order",
    "largest_order",
    "last_order",
    "units",
    "lines",
    "returned",
    "mean_gap_days",
    "first_weekday",
    "first_hour",
)


def open_slice(config: Config, rows: Slice) -> Dataset:
    """Open the partitions of one split, cut as the slice and the config say.

    Raises:
        ValueError: if a window has no end where one is needed, or an end that is no hour.
        PartitionError: if there is no partition in the window, or one cannot be read.
    """
    data, sampling, inference = config.data, config.training.sampling, config.inference
    if rows.split == "test":
        folder, window = data.test_dir, (data.test_start, data.test_end)
        limits = (inference.sample_frac, inference.max_partitions, inference.limit_rows)
    elif rows.split == "val":
        folder, window = data.train_dir, (data.val_start, data.val_end)
        share = sampling.frac if sampling.val_frac is None else sampling.val_frac
        limits = (share, sampling.max_val_partitions, None)
        if window[0] is None and rows.start_dt is None:
            raise ValueError("data.val_start: not set, so there are no validation rows; set it or give --start-dt")
    else:
        folder = data.train_dir
        joint = config.training.split.strategy == "stratified_random"
        window = (data.model_start, data.model_end) if joint else (data.train_start, data.train_end)
        share = sampling.frac if sampling.train_frac is None else sampling.train_frac
        limits = (share, sampling.max_train_partitions, sampling.limit_rows)
    start, end = (own or given for own, given in zip((rows.start_dt, rows.end_dt), window, strict=True))
    for name, text in (("start", start), ("end", end)):
        if text is not None:
            partition_time(text, f"{rows.split} window, {name}")
    return open_partitions(
        data_root(config) / folder,
        start=start,
        end=end,
        sample_frac=limits[0] if rows.sample_frac is None else rows.sample_frac,
        max_partitions=rows.max_partitions or limits[1],
        limit_rows=rows.limit_rows or limits[2],
        chunk_size=rows.chunk_size or inference.chunk_size or config.training.chunk_size,
        seed=config.seed,
        on_error=data.on_error,
    )


def data_root(config: Config) -> Path:
    """Return ``data.root`` with "$NAME" filled from the environment.

    Raises:
        FileNotFoundError: if there is no such folder; says how to make one.
    """
    path = Path(os.path.expandvars(config.data.root)).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(
            f"data.root: {path} is not a folder; write a log with `ltv generate --data-dir {path}`, transactions with "
            "`ltv import`, or give --data.root"
        )
    return path


def schema_of(config: Config) -> Schema:
    """Return the declared columns of the layout: roles, kinds, and when each becomes known."""
    if config.data.layout == "advertising":
        return smadex_schema(horizons=tuple(config.data.horizons))
    columns = [Column(name, kind="number") for name in TRANSACTION_NUMBERS]
    columns += [Column(name, kind="unix_seconds") for name in ("first_time", "last_time")]
    columns += [Column(name, kind="nested") for name in ("spend_by_day", "spend_by_item")]
    columns += [Column("country", kind="category"), Column("customer", role="id"), Column("datetime", role="time")]
    for name in config.data.horizons:
        known = timedelta(days=int(name.removeprefix("d")))
        columns += [Column(f"{kind}_{name}", role="label", available_at=known) for kind in ("revenue", "buyer")]
    horizons = [Horizon(name, revenue=f"revenue_{name}", buyer=f"buyer_{name}") for name in config.data.horizons]
    return Schema(columns, horizons, time="datetime", id="customer", segments=("country",))


def features_of(config: Config) -> dict[str, Any]:
    """Return the feature catalogue: the layout's full one, with what the YAML file says on top, group by group.

    Raises:
        ValueError: if the file names a group or a setting that does not exist.
    """
    shipped = files("ltv") / "config" / "features.yaml"
    text = Path(config.features).read_text() if config.features else shipped.read_text()
    wanted = yaml.safe_load(text) or {}
    catalogue: dict[str, Any] = smadex_features() if config.data.layout == "advertising" else _transaction_features()
    for group, settings in wanted.items():
        if group not in catalogue:
            raise ValueError(f"features: no group {group!r}; there are {', '.join(catalogue)}")
        catalogue[group] = catalogue[group] | settings if isinstance(settings, dict) else settings
    return catalogue


def engine_of(config: Config) -> LocalEngine | DaskEngine:
    """Return the engine the partitions are worked on with; use it in a with statement."""
    return make_engine(config.engine.name, address=config.engine.address, workers=config.engine.workers)


def closed_before(end: str, days: int) -> str:
    """Return the last hour whose labels of `days` days are known at the hour `end`."""
    return (partition_time(end, "end") - timedelta(days=days)).strftime(PARTITION)


def _transaction_features() -> dict[str, Any]:
    groups = ("missing_indicators", "nested", "recency", "categorical", "temporal", "interactions", "behavioural")
    catalogue: dict[str, Any] = {group: {"enabled": True} for group in (*groups, "local_distribution")}
    catalogue["categorical"] |= {"min_count": 10}
    catalogue["interactions"]["terms"] = [
        {"name": "spend_per_unit", "op": "ratio", "left": "spend", "right": "units"},
        {"name": "largest_share", "op": "ratio", "left": "largest_order", "right": "spend"},
    ]
    catalogue["local_distribution"]["enabled"] = False
    return catalogue | {"exclude": []}
