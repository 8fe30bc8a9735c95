"""Labels of one window, from outcome rows to arrays aligned with the users asked for, without a loop over rows."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.sparse import csr_array

from ubt.prepare import Prepared


@dataclass
class Labels:
    """Labels of one window for the users [U] of a prepared log.

    Args:
        start: start of the window, UTC; features for these labels may use events before it only
        churn: 1 = no outcome in the window, 0 = at least one, NaN = not part of the task [U]
        category: whether an outcome of each target category lies in the window, sparse [U, C]
        asked: whether a user takes part in the propensity task [U]
    """

    start: datetime
    churn: NDArray[np.float32]
    category: csr_array
    asked: NDArray[np.bool_]


def window_labels(prepared: Prepared, window: str) -> Labels:
    """Return the labels of the "train" or the "validation" window, as the challenge defines them.

    Churn is asked of the active users: 1 if no outcome row lies in the window. Category propensity is asked of all
    users: multi-hot over the target categories.
    """
    start = {"train": prepared.train_start, "validation": prepared.valid_start}[window]
    client, _, category = _outcomes(prepared.folder / "target" / f"{window}_target.parquet")
    return _labels(prepared, start, client, category, prepared.active, prepared.asked)


def earlier_labels(prepared: Prepared, number: int, span: int = 1) -> list[Labels]:
    """Return labels that start 1, 2, ..., `number` windows before the train window, newest first.

    Each covers `span` windows, but nothing from valid_start on. A user is active, or asked, from the first event on.
    """
    if number == 0:
        return []
    length = prepared.valid_start - prepared.train_start
    parts = [_outcomes(prepared.folder / "target" / f"{name}_target.parquet") for name in ("history", "train")]
    client, time, category = (np.concatenate([part[i] for part in parts]) for i in range(3))
    rows = pq.read_table(prepared.folder / "target" / "active_since.parquet")
    since_client, since = _ids(rows.column("client_id")), rows.column("since").to_numpy().astype("datetime64[us]")
    position, known = positions(prepared.users, since_client)
    active_since = np.full(len(prepared.users), np.datetime64("9999-01-01", "us"))
    active_since[position[known]] = since[known]
    result = []
    for k in range(1, number + 1):
        start = prepared.train_start - k * length
        end = min(start + span * length, prepared.valid_start)
        inside = (time >= np.datetime64(start, "us")) & (time < np.datetime64(end, "us"))
        active = prepared.active & (active_since < np.datetime64(start, "us"))
        seen = np.zeros(len(prepared.users), bool)
        seen[prepared.known] = prepared.history(start).lengths() > 0
        result.append(_labels(prepared, start, client[inside], category[inside], active, prepared.asked & seen))
    return result


def positions(users: NDArray, ids: NDArray) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the position of each id [n] among the distinct `users` [U], and whether it is there."""
    order = np.argsort(users, kind="stable")
    if not len(order):
        return np.zeros(len(ids), np.int64), np.zeros(len(ids), bool)
    place = np.searchsorted(users, ids, sorter=order)
    position = order[np.minimum(place, len(order) - 1)]
    return position, users[position] == ids


def _labels(
    prepared: Prepared, start: datetime, client: NDArray, category: NDArray, active: NDArray, asked: NDArray
) -> Labels:
    users, position_known = positions(prepared.users, client)
    churn = np.where(active, np.float32(1), np.float32(np.nan))
    churn[users[position_known]] *= 0
    columns, category_known = positions(prepared.categories, category)
    hit = position_known & category_known
    shape = (len(prepared.users), len(prepared.categories))
    pairs = np.unique(users[hit] * max(shape[1], 1) + columns[hit])
    ones = np.ones(len(pairs), np.float32)
    multi_hot = csr_array((ones, (pairs // max(shape[1], 1), pairs % max(shape[1], 1))), shape=shape)
    return Labels(start, churn.astype(np.float32), multi_hot, asked)


def _outcomes(path: Path) -> tuple[NDArray, NDArray, NDArray]:
    names = pq.read_schema(path).names
    table = pq.read_table(path, columns=[name for name in ("client_id", "timestamp", "category") if name in names])
    if "category" in names:
        # An outcome without a category still is an outcome; no target category has this value.
        column = table.column("category")
        missing = "" if str(column.type) in ("string", "large_string") else -1
        category = _ids(pc.fill_null(column, missing))
    else:
        category = np.full(len(table), -1)
    return _ids(table.column("client_id")), table.column("timestamp").to_numpy().astype("datetime64[us]"), category


def _ids(column: pa.ChunkedArray) -> NDArray:
    values = column.to_numpy()
    return values.astype(str) if values.dtype == object else values
