"""Batches for the network: packed events of a view, and labels of the same users, shared by several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from seqdata import Batch, View
from seqdata.gather import Gather
from ubt.config import Config
from ubt.encoder import Family, Sequences
from ubt.labels import Labels
from ubt.prepare import Prepared, seconds

ID_FAMILIES = ("event_type", "category", "price", "item", "url")


@dataclass
class Example:
    """Users with their labels at K moments.

    Args:
        sequences: events before the last moment
        targets: task -> labels [B, K, ...]; NaN, or 0 for an item, where there is none
        cutoffs: the moments, ascending, in seconds since 1970 [K]
    """

    sequences: Sequences
    targets: dict[str, Tensor]
    cutoffs: Tensor


class Reader:
    """Turn batches of the store into the network's input.

    Args:
        prepared: the log
        max_ids: most frequent skus and URLs that keep their id; the rest become 1, "unknown"
    """

    def __init__(self, prepared: Prepared, max_ids: int):
        self.prepared, self.max_ids = prepared, max_ids
        self.fields = list(prepared.families.values())
        self.families: dict[str, Family] = {}
        self._vectors: dict[str, np.ndarray] = {}
        store = prepared.store
        for name, field in prepared.families.items():
            if name in ID_FAMILIES:
                size = len(store.vocabulary(field))
                self.families[name] = Family("id", min(size, max_ids + 2))
            elif "." in field:
                self.families[name] = Family("vector", store.item_column(*field.split(".")).shape[1])
            else:
                self._vectors[name] = store.vectors(field)
                self.families[name] = Family("vector", self._vectors[name].shape[1])
        # Position among the users asked for of every user of the store.
        self.row = np.full(store.num_users, -1, np.int64)
        self.row[prepared.history(prepared.train_start).user_index] = prepared.known

    def sequences(self, batch: Batch) -> Sequences:
        """Return a batch as the network reads it; the bytes of name and query vectors are scaled to [-1, 1]."""
        values = batch.jagged.values
        features = {}
        for name, field in self.prepared.families.items():
            value = np.asarray(values[field])
            if name in self._vectors:
                value = self._vectors[name][value]
            if self.families[name].kind == "id":
                ids = np.where(value < self.families[name].size, value, 1).astype(np.int64)
                features[name] = torch.from_numpy(ids)
            else:
                features[name] = torch.from_numpy(_scaled(value))
        return Sequences(
            features, torch.as_tensor(values["timestamp"]), torch.as_tensor(batch.jagged.offsets, dtype=torch.int64)
        )


def examples(reader: Reader, batch: Batch, labels: list[Labels], tasks: Iterable[str]) -> Example:
    """Return a batch with its labels for some tasks; `labels` are in ascending order of their windows."""
    rows = reader.row[np.asarray(batch.user_index)]
    targets = {}
    for task in tasks:
        target = np.stack([TARGETS[task](one, rows) for one in labels], 1)
        if task == "product_propensity":
            # Rare skus share one vector, which is no label.
            target = np.where(target < reader.families["item"].size, target, 0)
        targets[task] = torch.from_numpy(target)
    cutoffs = [seconds(one.start) for one in labels]
    return Example(reader.sequences(batch), targets, torch.tensor(cutoffs))


class UserBatches:
    """Shuffled batches of the training users, ordered ones of the users kept apart.

    Several processes share every batch: process r reads the rows r, r + processes, ... of it. So they train on the same
    batches as one process would, nobody is left out or seen twice, and all of them take the same number of steps.
    """

    def __init__(self, reader: Reader, labels: list[Labels], config: Config, tasks: Iterable[str]):
        self.reader, self.config, self.tasks = reader, config, list(tasks)
        self.train_labels = labels[:-1] if config.train.hold_out_newest else labels
        self.valid_labels = labels[-1:]
        prepared = reader.prepared
        # Those whose first event comes later are in the store because of it, so they must not be among them.
        users = np.random.default_rng([config.seed, 7]).permutation(np.flatnonzero(prepared.seen(prepared.train_start)))
        number = max(1, round(len(users) * config.train.valid_share))
        valid, rest = np.sort(users[:number]), np.sort(users[number:])
        self.train_view = prepared.store.as_of(self.train_labels[-1].start).select(prepared.users[rest])
        self.valid_view = prepared.store.as_of(prepared.train_start).select(prepared.users[valid])

    def train(self, epoch: int, rank: int = 0, processes: int = 1) -> _Batches:
        """Return one process's share of the batches of an epoch, in an order drawn from the seed and the epoch."""
        return _Batches(self, self.train_view, self.train_labels, epoch, rank, processes)

    def valid(self, rank: int = 0, processes: int = 1) -> _Batches:
        """Return one process's share of the users kept apart, with the labels of the train window."""
        return _Batches(self, self.valid_view, self.valid_labels, None, rank, processes)


@dataclass
class _Batches:
    data: UserBatches
    view: View
    labels: list[Labels]
    epoch: int | None
    rank: int
    processes: int

    def __len__(self) -> int:
        return -(-len(self.view) // self.data.config.train.batch_size)

    def __iter__(self) -> Iterator[Example]:
        config = self.data.config
        gather = Gather(self.view.store, self.data.reader.fields)
        plan = self.view.plan(
            config.train.batch_size, shuffle=self.epoch is not None, seed=config.seed, epoch=self.epoch or 0
        )
        for rows in plan:
            batch = self.view.batch(rows[self.rank :: self.processes], gather, config.model.max_seq_length)
            yield examples(self.data.reader, batch, self.labels, self.data.tasks)


def _categories(labels: Labels, rows: np.ndarray) -> np.ndarray:
    return np.where(labels.asked[rows, None], labels.category[rows].toarray(), np.float32(np.nan))


# Task -> labels of one window for users [B]: [B], or [B, outputs].
TARGETS: dict[str, Callable[[Labels, np.ndarray], np.ndarray]] = {
    "churn": lambda labels, rows: labels.churn[rows],
    "category_propensity": _categories,
    "product_propensity": lambda labels, rows: labels.item[rows],
    "price": lambda labels, rows: labels.price[rows],
    "name": lambda labels, rows: labels.name[rows],
}


def _scaled(vectors: np.ndarray) -> np.ndarray:
    """Map bytes to [-1, 1] and leave missing vectors, all zero, at zero."""
    scaled = vectors.astype(np.float32)
    if vectors.dtype == np.uint8:
        scaled = np.where((vectors != 0).any(-1, keepdims=True), scaled / 127.5 - 1, scaled)
    return scaled
