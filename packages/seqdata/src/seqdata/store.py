"""An opened store: memory-mapped columns, nothing read before it is asked for."""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from seqdata import generations, layout
from seqdata.checksums import damage
from seqdata.view import View
from seqdata.vocabulary import Vocabulary

REQUIRED = ("fields", "shards", "generation", "items", "user", "num_users", "num_events")


def open_store(path: str | os.PathLike) -> Store:
    """Opens the store at `path` without reading it.

    Args:
        path: folder of the store

    Raises:
        FileNotFoundError: nothing is there
        StoreError: the store is incomplete or damaged, or was written by a newer version
    """
    return Store(Path(path))


class Store:
    """Events of all users, each user's in time order; open one with `open_store`.

    A store is held as it was when it was opened: whatever is appended, compacted or built over it, this object, its
    views and what is unpickled from them read the same events, ids and vocabularies until it is closed, which happens
    when it is no longer used or by `close`.

    Args:
        path: folder of the store
    """

    # `seqdata.append` and `seqdata.compact` of this store.
    append: ClassVar[Callable[..., Store]]
    compact: ClassVar[Callable[..., Store]]

    def __init__(self, path: Path) -> None:
        self._open(path.absolute(), None)

    def _open(self, path: Path, key: str | None) -> None:
        while True:
            found = generations.find(path, key)
            release = weakref.finalize(self, os.close, found.handle)
            try:
                self._map(path, found.root, found.schema)
            except layout.StoreError:
                if found.stands():
                    raise
            if found.stands():
                break
            # replaced while it was being opened
            release()
        self.key, self._release = found.key, release

    def _map(self, path: Path, root: Path, schema: dict[str, Any]) -> None:
        self.path, self.schema = path, schema
        for key in REQUIRED:
            if key not in schema:
                raise layout.StoreError(f"{path}/schema.json lacks {key!r}")
        self.num_users: int = schema["num_users"]
        self.num_events: int = schema["num_events"]
        self.fitted = layout.fitted(root, schema["generation"])
        self._shards = [(root / "shards" / shard["folder"], shard["events"]) for shard in schema["shards"]]
        self._bases = np.cumsum([0, *(events for _, events in self._shards)])
        # everything is mapped now, because the files may move or go while this is open
        self._columns = {name: self._column(entry) for name, entry in schema["fields"].items()}
        self._vectors: dict[str, np.ndarray] = {}
        self._items: dict[str, np.ndarray] = {}
        self._vocabularies: dict[str, Vocabulary] = {}
        self._texts: dict[str, tuple[Path, np.ndarray]] = {}
        for name, entry in schema["fields"].items():
            if entry["kind"] == "vector":
                file = self.fitted / "vectors" / f"{entry['file']}.npy"
                self._vectors[name] = layout.read_array(file, (entry["size"], entry["width"]))
        for name in self.item_columns:
            entry, size = self.entry(name), schema["fields"][self.item_columns[name][0]]["size"]
            shape = (size, entry["width"]) if entry["kind"] == "vector" else (size,)
            self._items[name] = layout.read_array(self.fitted / "items" / f"{entry['file']}.npy", shape)
        for name in [*schema["fields"], *self.item_columns]:
            entry = self.entry(name)
            if entry["kind"] == "categorical":
                file = self.fitted / "vocabularies" / f"{entry['file']}.arrow"
                self._texts[name] = file, layout.map_bytes(file)
        several = len(self._shards) > 1
        self.home = home = self.fitted / "index" if several else self._shards[0][0]
        # the place of every event in the shards laid end to end, where there is more than one
        self.order = layout.read_array(home / "order.npy", (self.num_events,)) if several else None
        self.offsets = layout.read_array(home / "offsets.npy", (self.num_users + 1,))
        if self.offsets[0] != 0 or self.offsets[-1] != self.num_events:
            raise layout.StoreError(
                f"{home}/offsets.npy goes from {self.offsets[0]} to {self.offsets[-1]}; schema.json says 0 to"
                f" {self.num_events}"
            )
        self.time = layout.read_array(home / "time.npy", (self.num_events,))
        if self.text_users:
            self._user_table = layout.read_table(home / "users.arrow")
            if len(self._user_table) != self.num_users:
                raise layout.StoreError(
                    f"{home}/users.arrow holds {len(self._user_table)} users; schema.json says {self.num_users}"
                )
        else:
            self._user_ids = layout.read_array(home / "users.npy", (self.num_users,))

    def close(self) -> None:
        """Lets go of the files: an append, compaction or build may remove them, if nobody else holds them.

        What is in memory stays readable; what was pickled may no longer open.
        """
        self._release()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}: {self.num_users:,} users, {self.num_events:,} events, fields {self.fields})"

    def __getstate__(self) -> tuple[Path, str]:
        return self.path, self.key

    def __setstate__(self, state: tuple[Path, str]) -> None:
        # worker processes map the files anew instead of receiving them
        self._open(*state)

    @property
    def fields(self) -> list[str]:
        """Names of the event fields, time and user not among them."""
        return list(self.schema["fields"])

    @property
    def text_users(self) -> bool:
        """Whether user ids are text."""
        return self.schema["user"]["dtype"] == "string"

    @functools.cached_property
    def users(self) -> np.ndarray:
        """[U] sorted user ids, int64 or text (object)."""
        return self._user_table.column("user").to_numpy() if self.text_users else self._user_ids

    def column(self, name: str) -> np.ndarray:
        """[E] stored values of a field in the order of `time`: int32 ids, numbers, or int32 vector codes.

        Memory-mapped where the store is one shard; over several it is put together in memory.

        Args:
            name: an event field

        Raises:
            KeyError: there is no such field
        """
        pieces = self._pieces(name)
        return pieces[0] if self.order is None else np.concatenate(pieces)[self.order]

    def take(self, name: str, positions: np.ndarray) -> np.ndarray:
        """Stored values of a field at positions [n] in the order of `time`.

        Args:
            name: an event field
            positions: places in the order of `time`, as `View.positions` gives them

        Returns:
            [n] values in the type of the stored column
        """
        pieces = self._pieces(name)
        if self.order is None:
            return pieces[0][positions]
        places = self.order[positions]
        shard = np.searchsorted(self._bases, places, "right") - 1
        out = np.empty(len(places), pieces[0].dtype)
        for i in np.unique(shard):
            here = shard == i
            out[here] = pieces[i][places[here] - self._bases[i]]
        return out

    def vocabulary(self, name: str) -> Vocabulary:
        """Values and ids of a categorical field, or of a categorical item column as "field.column".

        Args:
            name: a field, or an item column as "field.column"

        Raises:
            KeyError: there is no such field, or it is not categorical
        """
        entry = self.entry(name)
        if entry["kind"] not in ("categorical", "hashed"):
            raise KeyError(f"{name!r} is {entry['kind']} and has no vocabulary")
        if name not in self._vocabularies:
            file, mapped = self._texts.get(name, (self.fitted, None))
            self._vocabularies[name] = Vocabulary(file, entry, mapped)
        return self._vocabularies[name]

    def vectors(self, name: str) -> np.ndarray:
        """[n + 1, width] distinct vectors of a vector field; row 0 is the missing vector, zeros.

        Args:
            name: a vector field

        Raises:
            KeyError: there is no such vector field
        """
        entry = self.schema["fields"].get(name)
        if entry is None or entry["kind"] != "vector":
            known = [field for field, one in self.schema["fields"].items() if one["kind"] == "vector"]
            raise KeyError(f"{name!r} is no vector field; the vector fields are {known}")
        return self._vectors[name]

    def item_column(self, field: str, name: str) -> np.ndarray:
        """[len(vocabulary(field))] property of every id of a field; [len, width] where the property is a vector.

        Args:
            field: the categorical field that the item table describes
            name: a column of the item table

        Raises:
            KeyError: there is no such item column
        """
        if f"{field}.{name}" not in self._items:
            raise KeyError(f"no item column {name!r} of {field!r}; there are {list(self._items)}")
        return self._items[f"{field}.{name}"]

    def entry(self, name: str) -> dict[str, Any]:
        """What schema.json says of a field or of an item column "field.column".

        Args:
            name: a field, or an item column as "field.column"

        Raises:
            KeyError: there is no such field
        """
        if name in self.schema["fields"]:
            return self.schema["fields"][name]
        items = self.item_columns
        if name not in items:
            raise KeyError(f"no field {name!r}; there are {self.fields + list(items)}")
        field, column = items[name]
        return self.schema["items"][field]["columns"][column]

    @functools.cached_property
    def item_columns(self) -> dict[str, tuple[str, str]]:
        """{"field.column": (field, column)} of the item tables."""
        tables = self.schema["items"].items()
        return {f"{field}.{column}": (field, column) for field, table in tables for column in table["columns"]}

    def index_of(self, users: Iterable[Any]) -> np.ndarray:
        """int64 positions of user ids in `users`; an unknown id is a KeyError that names it.

        Args:
            users: user ids, integers or text as the store has them

        Raises:
            KeyError: an id is unknown
            TypeError: ids of a store of integers are none
        """
        if self.text_users:
            wanted = pa.array(list(users), pa.string())
            found = pc.index_in(wanted, self._user_table.column("user"))
            if found.null_count:
                missing = wanted[int(np.argmax(found.is_null().to_numpy(zero_copy_only=False)))]
                raise KeyError(f"unknown user id {missing.as_py()!r}")
            return found.to_numpy().astype(np.int64)
        ids = np.asarray(users if isinstance(users, np.ndarray) else list(users))
        if len(ids) and ids.dtype.kind not in "iu":
            raise TypeError(f"user ids of this store are integers; got {ids.dtype}")
        ids = ids.astype(np.int64)
        at = np.minimum(np.searchsorted(self._user_ids, ids), self.num_users - 1)
        wrong = self._user_ids[at] != ids
        if wrong.any():
            raise KeyError(f"unknown user id {int(ids[np.argmax(wrong)])}")
        return at

    def all(self) -> View:
        """Every event of every user."""
        return View(self)

    def as_of(self, cutoff: Any) -> View:
        """Events before `cutoff`, of the users who have one: a datetime, ISO text or integer microseconds since 1970.

        UTC unless it says; integers that can only be seconds or milliseconds are refused.

        Args:
            cutoff: moment that no event of the view reaches

        Raises:
            ValueError: an integer can only be seconds or milliseconds, or a text is no time
        """
        return self.all().as_of(cutoff)

    def verify(self) -> list[str]:
        """Reads every file; a sentence for each that is missing or not as it was written, none if all is well."""
        while True:
            found = generations.find(self.path, self.key)
            try:
                named = list(damage(found.root, found.schema["generation"]))
                # otherwise a build over it moved it aside meanwhile
                if found.stands():
                    return named
            finally:
                os.close(found.handle)

    def sealed(self) -> bool:
        """Whether the store has checksums; those that an older seqdata wrote have none."""
        return (self.fitted / "checksums.json").exists()

    def _pieces(self, name: str) -> list[np.ndarray]:
        if name not in self._columns:
            raise KeyError(f"no field {name!r}; the fields are {self.fields}")
        return self._columns[name]

    def _column(self, entry: dict[str, Any]) -> list[np.ndarray]:
        return [layout.read_array(folder / f"{entry['file']}.npy", (events,)) for folder, events in self._shards]
