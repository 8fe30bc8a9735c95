"""An opened store: memory-mapped columns, nothing read before it is asked for."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from seqdata import layout
from seqdata.view import View
from seqdata.vocabulary import Vocabulary

FOREVER = np.iinfo(np.int64).max


def open_store(path: str | os.PathLike) -> Store:
    """Opens the store at `path` without reading it.

    Raises FileNotFoundError when nothing is there and StoreError for an incomplete or damaged store, or one written by
    a newer version.
    """
    return Store(Path(path))


class Store:
    """Events of all users, each user's in time order; open one with `open_store`."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.schema = layout.read_schema(self.path)
        for key in ("fields", "shards", "num_users", "num_events", "user"):
            if key not in self.schema:
                raise layout.StoreError(f"{path}/schema.json lacks {key!r}")
        self.num_users: int = self.schema["num_users"]
        self.num_events: int = self.schema["num_events"]
        self._shard = self.path / "shards" / self.schema["shards"][0]["folder"]
        self._columns: dict[str, np.ndarray] = {}
        for name in ("time", *self.fields):
            self._map(name)
        self.offsets = layout.read_array(self._shard / "offsets.npy", (self.num_users + 1,))
        if self.text_users:
            self._user_table = layout.read_table(self._shard / "users.arrow")
            if len(self._user_table) != self.num_users:
                raise layout.StoreError(
                    f"{self._shard}/users.arrow holds {len(self._user_table)} users; schema.json says {self.num_users}"
                )
        else:
            self._user_ids = layout.read_array(self._shard / "users.npy", (self.num_users,))

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}: {self.num_users:,} users, {self.num_events:,} events, fields {self.fields})"

    def __getstate__(self) -> Path:
        return self.path

    def __setstate__(self, path: Path) -> None:
        # worker processes map the files anew instead of receiving them
        self.__init__(path)

    @property
    def fields(self) -> list[str]:
        """Names of the event fields, time and user not among them."""
        return list(self.schema["fields"])

    @property
    def text_users(self) -> bool:
        return self.schema["user"]["dtype"] == "string"

    @functools.cached_property
    def users(self) -> np.ndarray:
        """[U] sorted user ids, int64 or text (object)."""
        if self.text_users:
            return self._user_table.column("user").to_numpy()
        return self._user_ids

    @property
    def time(self) -> np.ndarray:
        """[E] int64 microseconds UTC, in the order of users and time."""
        return self._map("time")

    def column(self, name: str) -> np.ndarray:
        """[E] stored values of a field: int32 ids, numbers, or int32 vector codes."""
        if name not in self.schema["fields"]:
            raise KeyError(f"no field {name!r}; the fields are {self.fields}")
        return self._map(name)

    def vocabulary(self, name: str) -> Vocabulary:
        """Values and ids of a categorical field, or of a categorical item column as "field.column"."""
        entry = self.entry(name)
        if entry["kind"] not in ("categorical", "hashed"):
            raise KeyError(f"{name!r} is {entry['kind']} and has no vocabulary")
        return self._vocabulary(entry["file"], name)

    def vectors(self, name: str) -> np.ndarray:
        """[n + 1, width] distinct vectors of a vector field; row 0 is the missing vector, zeros."""
        entry = self.entry(name)
        if entry["kind"] != "vector":
            raise KeyError(f"{name!r} is {entry['kind']}, not a vector field")
        if "." in name and name not in self.schema["fields"]:
            return self.item_column(*name.split(".", 1))
        return layout.read_array(self.path / "vectors" / f"{entry['file']}.npy", (entry["size"], entry["width"]))

    def item_column(self, field: str, name: str) -> np.ndarray:
        """[len(vocabulary(field))] property of every id of a field; [len, width] where the property is a vector."""
        return self._item(field, name)

    def entry(self, name: str) -> dict[str, Any]:
        """What schema.json says of a field or of an item column "field.column"."""
        if name in self.schema["fields"]:
            return self.schema["fields"][name]
        for field, table in self.schema["items"].items():
            if name.startswith(field + ".") and name[len(field) + 1 :] in table["columns"]:
                return table["columns"][name[len(field) + 1 :]]
        items = [f"{field}.{column}" for field, table in self.schema["items"].items() for column in table["columns"]]
        raise KeyError(f"no field {name!r}; there are {self.fields + items}")

    def index_of(self, users: Iterable[Any]) -> np.ndarray:
        """int64 positions of user ids in `users`; an unknown id is a KeyError that names it."""
        if self.text_users:
            wanted = pa.array(list(users), pa.string())
            found = pc.index_in(wanted, self._user_table.column("user"))
            if found.null_count:
                raise KeyError(
                    "unknown user id"
                    f" {wanted[int(np.argmax(found.is_null().to_numpy(zero_copy_only=False)))].as_py()!r}"
                )
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
        return View(self, None, None)

    def as_of(self, cutoff: Any) -> View:
        """Every user's events before `cutoff` (a datetime, ISO text or integer microseconds; UTC where no zone is named)."""
        return self.all().as_of(cutoff)

    def _map(self, name: str) -> np.ndarray:
        if name not in self._columns:
            file = (
                "time" if name == "time" and name not in self.schema["fields"] else self.schema["fields"][name]["file"]
            )
            self._columns[name] = layout.read_array(self._shard / f"{file}.npy", (self.num_events,))
        return self._columns[name]

    @functools.cache  # noqa: B019
    def _vocabulary(self, file: str, name: str) -> Vocabulary:
        return Vocabulary(self.path / "vocabularies" / f"{file}.arrow", self.entry(name))

    @functools.cache  # noqa: B019
    def _item(self, field: str, name: str) -> np.ndarray:
        table = self.schema["items"].get(field)
        if table is None or name not in table["columns"]:
            self.entry(f"{field}.{name}")
        return layout.read_array(self.path / "items" / f"{table['columns'][name]['file']}.npy")
