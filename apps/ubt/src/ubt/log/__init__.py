"""Find out how a raw log is laid out and describe it as SQL over its files; nothing is read into Python."""

from __future__ import annotations

from pathlib import Path

import duckdb

from ubt.config import LogConfig
from ubt.log import challenge, described, simple
from ubt.log.base import Log

__all__ = ["Log", "connect", "read_log"]


def read_log(data_dir: str | Path, config: LogConfig) -> Log:
    """Describe the log below `data_dir`: the challenge's raw or split layout, the simple one of input/ and
    target/{train,valid}.parquet, or the one `config` describes.

    Raises:
        FileNotFoundError: if the folder, a table or an array is missing; names it and what is there
        ValueError: if a column is missing or the windows are not in order
    """
    folder = Path(data_dir)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"data_dir: {folder} is not a folder; give --data-dir, or write one with `ubt generate`"
        )
    if config.files:
        return described.read(folder, config, connect())
    layout = simple if (folder / "target" / "train.parquet").exists() else challenge
    return layout.read(folder, connect())


def connect() -> duckdb.DuckDBPyConnection:
    """Return a connection that takes times for UTC and shows no bars."""
    connection = duckdb.connect()
    connection.execute("SET TimeZone = 'UTC'")
    connection.execute("SET enable_progress_bar = false")
    return connection
