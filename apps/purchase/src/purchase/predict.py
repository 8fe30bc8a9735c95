"""Write a list of items for every user that is asked for, part by part, so that it can stop and go on at any time.

RUN/predictions.csv               user_id,item_id,rank,score; rank 1 is the best
    predictions/part-00000.csv    finished parts, until the whole is written
"""

from __future__ import annotations

import csv
import logging
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from purchase.config import Config
from purchase.evaluate import DAY, filled, interactions
from purchase.prepare import PACKAGES, Prepared, open_prepared
from purchase.ranking import NetworkRanker, excluded
from purchase.train import load_network
from rankers import Popularity
from runkit.errors import SettingError
from runkit.files import atomic_file, file_hash, read_json, write_json
from runkit.progress import progress
from runkit.run import Run

HEADER = ("user_id", "item_id", "rank", "score")
log = logging.getLogger("purchase")


def predict(config: Config) -> str:
    """Write ``<run_dir>/predictions.csv``."""
    run = Run(config.run_dir)
    with run.command("predict", config, PACKAGES) as facts:
        prepared = open_prepared(config)
        lister = Lister(config, prepared)
        users = _users(config, prepared)
        rows = _rows_of(prepared, users)
        parts = _parts_folder(run, config)
        size = config.predict.part_users
        files = []
        for first in progress(range(0, len(users), size), "predict", "part"):
            files.append(parts / f"part-{first // size:05}.csv")
            if not files[-1].exists():
                here = slice(first, first + size)
                with atomic_file(files[-1]) as path:
                    _write(path, users[here].to_pylist(), *lister.lists(rows[here]), prepared.item_ids)
        with atomic_file(run.folder / "predictions.csv") as path, path.open("wb") as whole:
            whole.write(",".join(HEADER).encode() + b"\n")
            for name in files:
                with name.open("rb") as part:
                    shutil.copyfileobj(part, whole)
        _clear(parts)
        facts |= {"users": len(users), "users_without_history": int((rows < 0).sum())}
    return f"{run.folder / 'predictions.csv'}: {len(users):,} users, {facts['users_without_history']:,} of them unknown"


class Lister:
    """Lists by the network; without a history the most popular items, and behind those the others in order of id.

    Args:
        config: all settings
        prepared: the log
    """

    def __init__(self, config: Config, prepared: Prepared) -> None:
        history = prepared.history()
        self.k, self.num_users = config.predict.items, len(history)
        self.exclude = excluded(history, config.rules.exclude, prepared.num_items)
        network = load_network(config, prepared)
        self.network = NetworkRanker(network, history, config.split.target, config.model.max_len)
        popular = Popularity(config.evaluate.half_life_days * DAY).fit(interactions(prepared, None, config))
        items, scores = popular.recommend([0], self.k)
        self.popular_items = filled(items, np.arange(min(2 * self.k, prepared.num_items))[None])
        self.popular_scores = np.where(items >= 0, scores, 0.0)

    def lists(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Items and scores [U, K] of users at rows of the history, -1 for unknown ones."""
        items = np.repeat(self.popular_items, len(rows), 0)
        scores = np.repeat(self.popular_scores, len(rows), 0)
        known = rows >= 0
        if known.any():
            items[known], scores[known] = self.network.recommend(rows[known], self.k, self.exclude)
        return items, scores


def _users(config: Config, prepared: Prepared) -> pa.Array:
    """The users that want a list."""
    if not config.predict.users:
        return pa.array(prepared.history().users)
    path, name = Path(config.predict.users), config.log.user
    if not path.is_file():
        raise SettingError(f"predict.users: got {path}, needs a CSV or Parquet file")
    kind = "BIGINT" if config.log.whole_ids else "VARCHAR"
    with duckdb.connect() as database:
        columns = database.sql("SELECT * FROM '{}' LIMIT 0".format(str(path).replace("'", "''"))).columns
        if name not in columns:
            raise SettingError(f"predict.users: got the columns {', '.join(columns)} in {path}, needs {name}")
        quoted = str(path).replace("'", "''"), name.replace('"', '""')
        found = database.sql(f"SELECT CAST(\"{quoted[1]}\" AS {kind}) AS u FROM '{quoted[0]}'").to_arrow_table()["u"]
    if found.null_count or len(pc.unique(found)) < len(found):
        raise ValueError(f"predict.users: got a user twice or none in a row of {path}, needs each user once")
    return found.combine_chunks()


def _rows_of(prepared: Prepared, users: pa.Array) -> NDArray[np.int64]:
    """Where the users stand in the history, -1 for unknown ones [U]."""
    at = pc.index_in(users, pa.array(prepared.history().users, users.type))
    return pc.fill_null(at, -1).to_numpy().astype(np.int64)


def _parts_folder(run: Run, config: Config) -> Path:
    """The folder of the parts; parts of anything else than what is asked for now are deleted."""
    parts = run.folder / "predictions"
    wanted: dict[str, Any] = {
        "checkpoint": file_hash(run.checkpoints / "best.ckpt"),
        "users": file_hash(Path(config.predict.users)) if config.predict.users else "",
        "settings": asdict(config.predict) | asdict(config.rules) | asdict(config.split),
        "popularity": [config.evaluate.event_weights, config.evaluate.half_life_days],
    }
    if not config.resume or read_json(parts / "identity.json") != wanted:
        _clear(parts)
    parts.mkdir(exist_ok=True)
    write_json(parts / "identity.json", wanted)
    return parts


def _clear(parts: Path) -> None:
    """Delete what was written here, and nothing else."""
    for path in [*parts.glob("part-*.csv"), parts / "identity.json"]:
        path.unlink(missing_ok=True)
    if parts.is_dir() and not any(parts.iterdir()):
        parts.rmdir()


def _write(path: Path, users: list[Any], items: NDArray[np.int64], scores: NDArray[np.float64], ids: pa.Array) -> None:
    names = ids.take(pa.array(np.maximum(items, 0).ravel())).to_pylist()
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(_lines(users, items, scores, names))


def _lines(users: list[Any], items: NDArray[np.int64], scores: NDArray[np.float64], names: list[Any]) -> Iterator[Any]:
    width = items.shape[1]
    for row, user in enumerate(users):
        for place in range(width):
            if items[row, place] >= 0:
                yield user, names[row * width + place], place + 1, f"{scores[row, place]:.6g}"
