"""Batches for the network: packed events of a view, and labels of the same users."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timezone

import numpy as np
import torch
from torch import Tensor

from seqdata import Batch
from ubt.labels import Labels
from ubt.model import Family, Sequences
from ubt.prepare import Prepared

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
    cutoffs = [int(one.start.replace(tzinfo=timezone.utc).timestamp()) for one in labels]
    return Example(reader.sequences(batch), targets, torch.tensor(cutoffs))


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
