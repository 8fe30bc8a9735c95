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

from seqdata import Vector, positions_of
from seqdata.vectors import parse_vectors
from ubt.prepare import Prepared

# Multi-hot label -> column of the outcome rows.
COLUMN_OF = {"category": "category", "sku": "sku", "new_sku": "sku", "price": "price"}


@dataclass
class Labels:
    """Labels of one window for the users [U] of a prepared log.

    Args:
        start: start of the window, UTC; features for these labels may use events before it only
        churn: 1 = no outcome in the window, 0 = at least one, NaN = not part of the task [U]
        conversion: the same for every user asked, active before or not; NaN = not asked [U]
        category: whether an outcome of each target category lies in the window, sparse [U, C]
        sku: the same for the target skus, sparse [U, S]
        new_sku: the same for the skus that are new in the target windows, sparse [U, N]
        price_buckets: the same for the target price buckets, sparse [U, P]
        price: price bucket of the first outcome that has one, NaN = none [U]
        name: name vector of the first outcome that has one, bytes scaled to [-1, 1], NaN = none [U, W]
        item: id in the store's vocabulary of the first outcome's item that it knows, 0 = none [U]
        asked: whether a user takes part in the propensity tasks [U]
    """

    start: datetime
    churn: NDArray[np.float32]
    conversion: NDArray[np.float32]
    category: csr_array
    sku: csr_array
    new_sku: csr_array
    price_buckets: csr_array
    price: NDArray[np.float32]
    name: NDArray[np.float32]
    item: NDArray[np.int64]
    asked: NDArray[np.bool_]


def window_labels(prepared: Prepared, window: str) -> Labels:
    """Return the labels of the "train" or the "validation" window, as the challenge defines them.

    Churn is asked of the active users: 1 if no outcome row lies in the window. The others are asked of all users;
    a task the log knows nothing of has width 0, or NaN everywhere.
    """
    start = {"train": prepared.train_start, "validation": prepared.valid_start}[window]
    outcomes = _Outcomes.read(prepared, [f"{window}_target"])
    return outcomes.labels(start, np.ones(len(outcomes.user), bool), prepared.active, prepared.asked)


def earlier_labels(prepared: Prepared, number: int, span: int = 1) -> list[Labels]:
    """Return labels that start 1, 2, ..., `number` windows before the train window, newest first.

    Each covers `span` windows, but nothing from valid_start on. A user is active, or asked, from the first event on.
    """
    if number == 0:
        return []
    length = prepared.valid_start - prepared.train_start
    outcomes = _Outcomes.read(prepared, ["history_target", "train_target"])
    rows = pq.read_table(prepared.folder / "target" / "active_since.parquet")
    since_client, since = _ids(rows.column("client_id")), rows.column("since").to_numpy().astype("datetime64[us]")
    position = positions_of(since_client, prepared.users)
    active_since = np.full(len(prepared.users), np.datetime64("9999-01-01", "us"))
    active_since[position[position >= 0]] = since[position >= 0]
    result = []
    for k in range(1, number + 1):
        start = prepared.train_start - k * length
        end = min(start + span * length, prepared.valid_start)
        inside = (outcomes.time >= np.datetime64(start, "us")) & (outcomes.time < np.datetime64(end, "us"))
        active = prepared.active & (active_since < np.datetime64(start, "us"))
        result.append(outcomes.labels(start, inside, active, prepared.asked & prepared.seen(start)))
    return result


@dataclass
class _Outcomes:
    """Outcome rows [n] of the users asked for, in time order, each value looked up once for all windows.

    Args:
        users: number of users U
        user: position of the row's user [n]
        time: microseconds UTC [n]
        width: number of targets of every multi-hot label
        target: position of the row's value among the targets of every multi-hot label, -1 = none of them [n]
        price: price bucket, NaN = unknown [n]
        name: row of `vectors`, -1 = unknown [n]
        vectors: distinct name vectors, scaled to [-1, 1] [m, W]
        item: id of the row's item in the store's vocabulary, 0 = missing, 1 = unknown [n]
        bought: False where the log itself says that the row's user churned, whatever else the row holds [n]
    """

    users: int
    user: NDArray[np.int64]
    time: NDArray[np.datetime64]
    width: dict[str, int]
    target: dict[str, NDArray[np.int64]]
    price: NDArray[np.float32]
    name: NDArray[np.int64]
    vectors: NDArray[np.float32]
    item: NDArray[np.int64]
    bought: NDArray[np.bool_]

    @classmethod
    def read(cls, prepared: Prepared, files: list[str]) -> _Outcomes:
        paths = [prepared.folder / "target" / f"{name}.parquet" for name in files]
        wanted = ["client_id", "timestamp", "churn", "sku", "category", "price", "name"]
        present = set(pq.read_schema(paths[0]).names)
        parts = [pq.read_table(path, columns=[c for c in wanted if c in present]) for path in paths]
        # Built anew from their columns, because one file may rule nulls out and the other not.
        table = pa.concat_tables(pa.table(dict(zip(part.column_names, part.columns, strict=True))) for part in parts)
        user = positions_of(_ids(table.column("client_id")), prepared.users)
        # An outcome of somebody who is not asked for is no label of anybody.
        table, user = table.filter(pa.array(user >= 0)), user[user >= 0]
        target = {}
        for label, column in COLUMN_OF.items():
            target[label] = np.full(len(user), -1)
            if column in present and len(prepared.targets[label].ids):
                target[label] = _lookup(prepared.targets[label].ids, table.column(column))
        price = np.full(len(user), np.nan, np.float32)
        if "price" in present:
            price = pc.cast(table.column("price"), pa.float32()).to_numpy()
        name, vectors = np.full(len(user), -1), np.zeros((0, prepared.name_width), np.float32)
        if prepared.name_width and "name" in present:
            name, vectors = _names(table.column("name"), prepared.name_width, paths[0])
        item = np.zeros(len(user), np.int64)
        if "item" in prepared.families and "sku" in present:
            item = prepared.store.vocabulary(prepared.families["item"]).encode(table.column("sku")).astype(np.int64)
        bought = np.ones(len(user), bool)
        if "churn" in present:
            bought = pc.fill_null(pc.cast(table.column("churn"), pa.float32()), 0).to_numpy() == 0
        return cls(
            users=len(prepared.users),
            user=user,
            time=table.column("timestamp").to_numpy().astype("datetime64[us]"),
            width={label: len(prepared.targets[label].ids) for label in COLUMN_OF},
            target=target,
            price=price,
            name=name,
            vectors=vectors,
            item=item,
            bought=bought,
        )

    def labels(
        self, start: datetime, inside: NDArray[np.bool_], active: NDArray[np.bool_], asked: NDArray[np.bool_]
    ) -> Labels:
        """Return the labels that the rows `inside` [n] a window give to the users `active` and `asked` [U]."""
        gone = np.ones(self.users, np.float32)
        gone[self.user[inside & self.bought]] = 0
        price = np.full(self.users, np.nan, np.float32)
        user, row = self._first(inside & ~np.isnan(self.price))
        price[user] = self.price[row]
        name = np.full((self.users, self.vectors.shape[1]), np.nan, np.float32)
        user, row = self._first(inside & (self.name >= 0))
        name[user] = self.vectors[self.name[row]]
        item = np.zeros(self.users, np.int64)
        user, row = self._first(inside & (self.item > 1))
        item[user] = self.item[row]
        return Labels(
            start=start,
            churn=np.where(active, gone, np.float32(np.nan)),
            conversion=np.where(asked, gone, np.float32(np.nan)),
            category=self._multi_hot("category", inside),
            sku=self._multi_hot("sku", inside),
            new_sku=self._multi_hot("new_sku", inside),
            price_buckets=self._multi_hot("price", inside),
            price=price,
            name=name,
            item=item,
            asked=asked,
        )

    def _first(self, rows: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        found = np.flatnonzero(rows)
        user, first = np.unique(self.user[found], return_index=True)
        return user, found[first]

    def _multi_hot(self, label: str, inside: NDArray[np.bool_]) -> csr_array:
        shape = (self.users, self.width[label])
        hit = inside & (self.target[label] >= 0)
        places = (self.user[hit], self.target[label][hit])
        multi_hot = csr_array((np.ones(len(places[0]), np.float32), places), shape=shape)
        # Several outcomes of one target are one label.
        multi_hot.sum_duplicates()
        multi_hot.data[:] = 1
        return multi_hot


def _lookup(targets: NDArray, column: pa.ChunkedArray) -> NDArray[np.int64]:
    """Position of every value [n] among the targets, -1 = none of them; a null is none."""
    if pa.types.is_floating(column.type):
        # Whole numbers with nulls among them come as floats from pandas.
        column = pc.cast(column, pa.int64(), safe=False)
    missing = "" if pa.types.is_string(column.type) or pa.types.is_large_string(column.type) else 0
    place = positions_of(_ids(pc.fill_null(column, missing)), targets)
    return np.where(pc.is_valid(column).to_numpy(), place, -1)


def _names(column: pa.ChunkedArray, width: int, path: Path) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Code of every name [n], -1 for a null, and the distinct vectors [m, width]; a broken name is a null."""
    if pa.types.is_nested(column.type):
        codes, values = np.arange(len(column)), pa.array(column.combine_chunks())
        codes = np.where(pc.is_valid(column).to_numpy(), codes, -1)
        values = pc.fill_null(values, pa.scalar([0] * width, values.type))
    else:
        encoded = column.combine_chunks().dictionary_encode()
        codes, values = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False), encoded.dictionary
    matrix, bad = parse_vectors(values, Vector(width), width, str(path))
    # The last entry is that of a null, whose code is -1.
    codes = np.where(np.append(bad, True)[codes], -1, codes)
    return codes, matrix.astype(np.float32) / 127.5 - 1


def _ids(column: pa.ChunkedArray) -> NDArray:
    values = column.to_numpy()
    return values.astype(str) if values.dtype == object else values
