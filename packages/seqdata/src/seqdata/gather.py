"""Events out of a store: jagged batches of chosen fields at chosen places."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from seqdata.jagged import Jagged, to_tensor
from seqdata.vocabulary import Vocabulary


class Events(Protocol):
    """What a view needs of a store: events of all users, each user's in time order."""

    path: Path
    schema: dict[str, Any]
    num_users: int
    num_events: int
    offsets: np.ndarray
    time: np.ndarray

    @property
    def fields(self) -> list[str]: ...
    @property
    def users(self) -> np.ndarray: ...
    @property
    def item_columns(self) -> dict[str, tuple[str, str]]: ...
    def index_of(self, users: Iterable[Any]) -> np.ndarray: ...
    def entry(self, name: str) -> dict[str, Any]: ...
    def take(self, name: str, positions: np.ndarray) -> np.ndarray: ...
    def item_column(self, field: str, name: str) -> np.ndarray: ...
    def vocabulary(self, name: str) -> Vocabulary: ...
    def vectors(self, name: str) -> np.ndarray: ...


@dataclass(frozen=True)
class Batch:
    """Sequences of some users: ids [B], their positions in store.users [B], and the jagged fields."""

    users: Any
    user_index: Any
    jagged: Jagged

    def __len__(self) -> int:
        return len(self.user_index)

    def __repr__(self) -> str:
        return f"Batch({len(self)} users, {self.jagged})"

    def torch(self) -> Batch:
        """The same with torch tensors; text user ids stay numpy."""
        users = _tensor(self.users) if self.users.dtype != object else self.users
        return Batch(users, _tensor(self.user_index), self.jagged.torch())

    def to(self, device: Any, non_blocking: bool = False) -> Batch:
        """The same with its jagged fields on a torch device; users stay where they are.

        Args:
            device: a torch device or its name
            non_blocking: do not wait for the copy, which takes pinned memory
        """
        return Batch(self.users, self.user_index, self.jagged.to(device, non_blocking))

    def pin_memory(self) -> Batch:
        """The same with its jagged fields in page-locked memory, as torch's DataLoader asks for."""
        return Batch(self.users, self.user_index, self.jagged.pin_memory())


class Gather:
    """Takes events out of a store: a call with positions [T] and lengths [B] gives a Jagged of the chosen fields."""

    def __init__(self, store: Events, fields: Sequence[str] | None = None) -> None:
        self.store = store
        self.fields = list(store.fields if fields is None else fields)
        for name in self.fields:
            if name != "timestamp":
                store.entry(name)

    def __call__(self, positions: np.ndarray, lengths: np.ndarray) -> Jagged:
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return Jagged(self.values(positions), offsets)

    def values(self, positions: np.ndarray) -> dict[str, np.ndarray]:
        """{field: [T, ...]} at positions [T] of the store's columns."""
        store = self.store
        values: dict[str, np.ndarray] = {}
        keys: dict[str, np.ndarray] = {}
        for name in self.fields:
            if name == "timestamp":
                continue
            if name in store.schema["fields"]:
                if name not in keys:
                    keys[name] = store.take(name, positions)
                values[name] = keys[name]
            else:
                field, column = store.item_columns[name]
                if field not in keys:
                    keys[field] = store.take(field, positions)
                values[name] = store.item_column(field, column)[keys[field]]
        values["timestamp"] = store.time[positions] // 1_000_000
        return values


def ids_of(store: Events, field: str, values: Iterable[Any]) -> np.ndarray:
    """Stored values of given values of a field or item property; one that the vocabulary lacks is a KeyError.

    Args:
        store: where the field is
        field: its name, or an item property as "field.column"
        values: as they were in the log; of a quantile field the bucket ids

    Returns:
        [n] in the type of the stored column

    Raises:
        KeyError: there is no such field, or a value is not in its vocabulary
    """
    wanted = list(values)
    entry = store.entry(field)
    if entry["kind"] == "numeric":
        # as the column holds them: 0.1 is another number in float32
        return np.asarray(wanted, entry["dtype"])
    if entry["kind"] == "quantiles":
        return np.asarray(wanted, np.int32)
    vocabulary = store.vocabulary(field)
    ids = vocabulary.encode(wanted)
    if vocabulary.hashed is None and (ids < vocabulary.first_value).any():
        unknown = wanted[int(np.argmax(ids < vocabulary.first_value))]
        raise KeyError(f"{field!r} has no value {unknown!r} in its vocabulary")
    return ids


def _tensor(array: Any) -> Any:
    return to_tensor(array) if isinstance(array, np.ndarray) else array
