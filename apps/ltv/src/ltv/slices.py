"""From settings to rows: the schema of the layout, the feature catalogue, the partitions a command reads."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml

from ltv.config import PARTITION, Config, Slice, Split, partition_time
from ltv.layouts import LAYOUTS
from ltv_stack import DaskEngine, Dataset, LocalEngine, PartitionError, Schema, make_engine, open_partitions
from runkit.errors import SettingError
from runkit.files import content_hash

log = logging.getLogger("ltv.slices")


def open_slice(config: Config, rows: Slice) -> Dataset:
    """Open the partitions of one split, cut as the slice and the config say.

    Raises:
        SettingError: if a window has no end where one is needed, or holds no partition, or a limit cannot be.
        PartitionError: if a partition cannot be read.
    """
    whole = _whole(config, rows.split)
    if rows.split == "val" and whole.start_dt is None and rows.start_dt is None:
        raise SettingError("data.val_start: not set, so there are no validation rows; set it or give --start-dt")
    start, end = rows.start_dt or whole.start_dt, rows.end_dt or whole.end_dt
    for name, text in (("start", start), ("end", end)):
        if text is not None:
            partition_time(text, f"{rows.split} window, {name}")
    try:
        return open_partitions(
            data_root(config) / (config.data.test_dir if rows.split == "test" else config.data.train_dir),
            start=start,
            end=end,
            sample_frac=_first(rows.sample_frac, whole.sample_frac, 1.0),
            max_partitions=_first(rows.max_partitions, whole.max_partitions),
            limit_rows=_first(rows.limit_rows, whole.limit_rows),
            chunk_size=_first(rows.chunk_size, config.inference.chunk_size, config.training.chunk_size),
            seed=config.seed,
            on_error=config.data.on_error,
        )
    except ValueError as error:
        # A file that cannot be read is no fault of the settings.
        if type(error) is PartitionError:
            raise
        raise SettingError(str(error)) from error


def slice_name(config: Config, rows: Slice) -> str:
    """Return the name of the split, or ``<split>_part`` where the slice asks for other rows of it than the config."""
    asked, whole = (asdict(one) | {"chunk_size": None} for one in (rows, _whole(config, rows.split)))
    return rows.split if all(v in (None, "", whole[k]) for k, v in asked.items()) else f"{rows.split}_part"


def open_train(config: Config, rows: Slice) -> Dataset:
    """Open the rows to fit on, less the partitions of the validation window, which no model may have seen.

    Raises:
        SettingError: if nothing is left.
    """
    data, window = open_slice(config, rows), config.data
    if window.val_start is None:
        return data
    first = partition_time(window.val_start, "data.val_start")
    last = None if window.val_end is None else partition_time(window.val_end, "data.val_end")
    kept = tuple(p for p in data.partitions if p.time is None or p.time < first or (last and p.time > last))
    left_out = len(data.partitions) - len(kept)
    if not kept:
        raise SettingError(
            f"train window: all {left_out} partitions lie in the validation window, {window.val_start} .. "
            f"{window.val_end or 'the end'}; widen data.train_*, or move data.val_start"
        )
    if left_out:
        log.info("%d partitions of the validation window are not trained on", left_out)
    return replace(data, partitions=kept)


def content_of(data: Dataset) -> str:
    """Return a hash of the rows asked for and of every file's size and footer: other data, another hash.

    A Parquet footer holds the counts, offsets and statistics of its file.
    """
    return content_hash([(p.name, p.total, p.rows, [_footer_hash(file) for file in p.files]) for p in data.partitions])


def data_root(config: Config) -> Path:
    """Return ``data.root`` with "$NAME" filled from the environment.

    Raises:
        SettingError: if there is no such folder; says how to make one.
    """
    path = Path(os.path.expandvars(config.data.root)).expanduser()
    if not path.is_dir():
        raise SettingError(
            f"data.root: {path} is not a folder; write a log with `ltv generate --data-dir {path}`, transactions with "
            "`ltv import`, or give --data.root"
        )
    return path


def schema_of(config: Config) -> Schema:
    """Return the declared columns of the layout: roles, kinds, and when each becomes known.

    Raises:
        SettingError: if a horizon is not d and a number of days, or they are not in order.
    """
    days = horizon_days(config)
    try:
        return LAYOUTS[config.data.layout].schema(days)
    except ValueError as error:
        raise SettingError(f"data.{error}") from None


def horizon_days(config: Config) -> dict[str, int]:
    """Return the days of every horizon asked for.

    Raises:
        SettingError: if there is none, or one is not d and a number of days.
    """
    wrong = [name for name in config.data.horizons if not re.fullmatch(r"d[1-9]\d*", name)]
    if wrong or not config.data.horizons:
        raise SettingError(f"data.horizons: got {wrong or 'none'}, needs d and a number of days each, e.g. [d1, d7]")
    return {name: int(name[1:]) for name in config.data.horizons}


def features_of(config: Config) -> dict[str, Any]:
    """Return the feature catalogue: the layout's full one, with what the YAML file says on top, group by group.

    Raises:
        SettingError: if the file is no YAML, or names a group that does not exist.
    """
    path = Path(config.features) if config.features else Path(__file__).with_name("config") / "features.yaml"
    try:
        wanted = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingError(f"features: {path} is not YAML: {error}") from error
    if not isinstance(wanted, dict):
        raise SettingError(f"features: {path} holds a {type(wanted).__name__}, needs groups such as `nested:`")
    catalogue: dict[str, Any] = LAYOUTS[config.data.layout].features()
    for group, settings in wanted.items():
        if group not in catalogue:
            raise SettingError(f"features: got group {group!r}, needs one of {', '.join(catalogue)}")
        catalogue[group] = catalogue[group] | settings if isinstance(settings, dict) else settings
    return catalogue


def engine_of(config: Config) -> LocalEngine | DaskEngine:
    """Return the engine the partitions are worked on with; use it in a with statement."""
    return make_engine(config.engine.name, address=config.engine.address, workers=config.engine.workers)


def closed_before(end: str, days: int) -> str:
    """Return the last hour whose labels of `days` days are known at the hour `end`."""
    return (partition_time(end, "end") - timedelta(days=days)).strftime(PARTITION)


def _whole(config: Config, split: Split) -> Slice:
    """The rows of a split as the config has them."""
    data, sampling, inference = config.data, config.training.sampling, config.inference
    if split == "test":
        limits = (inference.sample_frac, inference.max_partitions, inference.limit_rows)
        return Slice(split, data.test_start, data.test_end, *limits)
    if split == "val":
        share = _first(sampling.val_frac, sampling.frac)
        return Slice(split, data.val_start, data.val_end, share, sampling.max_val_partitions)
    joint = config.training.split.strategy == "stratified_random"
    window = (data.model_start, data.model_end) if joint else (data.train_start, data.train_end)
    share = _first(sampling.train_frac, sampling.frac)
    return Slice(split, *window, share, sampling.max_train_partitions, sampling.limit_rows)


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _footer_hash(path: str) -> tuple[int, str]:
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 8, 0))
        length = int.from_bytes(file.read(4), "little")
        file.seek(max(size - 8 - length, 0))
        return size, hashlib.sha256(file.read()).hexdigest()
