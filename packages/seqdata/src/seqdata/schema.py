"""What schema.json may say: a store can come from anywhere, so nothing in it is taken on trust."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

# as layout.file_name makes them: no way out of a folder
FILE = re.compile(r"(?!\.)[A-Za-z0-9_.-]{1,80}")
FOLDER = re.compile(r"[0-9]{5,12}")
KINDS = ("categorical", "hashed", "numeric", "quantiles", "vector")
MOST = 1 << 62


def check(schema: dict[str, Any]) -> None:
    """Checks that nothing in a schema is missing or not as `build` writes it.

    Args:
        schema: what schema.json holds

    Raises:
        ValueError: says what is missing or wrong
    """
    for key in ("generation", "num_users", "num_events"):
        _whole(schema, key, "")
    for key, kind in (("fields", dict), ("items", dict), ("user", dict), ("time", dict), ("shards", list)):
        if not isinstance(schema.get(key), kind):
            raise ValueError(f"it lacks {key!r}, or that is no {kind.__name__}")
    if schema["user"].get("dtype") not in ("int64", "string"):
        raise ValueError(f"user ids of type {schema['user'].get('dtype')!r}; needs 'int64' or 'string'")
    if not schema["shards"]:
        raise ValueError("it names no shard")
    for shard in schema["shards"]:
        _name(shard, "folder", FOLDER, "a shard")
        for key in ("users", "events"):
            _whole(shard, key, "a shard's ")
    events = sum(shard["events"] for shard in schema["shards"])
    if events != schema["num_events"]:
        raise ValueError(f"its shards hold {events:,} events; schema.json says {schema['num_events']:,}")
    for name, entry in schema["fields"].items():
        _column(name, entry)
    for field, table in schema["items"].items():
        if field not in schema["fields"] or not isinstance(table, dict) or not isinstance(table.get("columns"), dict):
            raise ValueError(f"its item table {field!r} has no field or no columns")
        for name, entry in table["columns"].items():
            _column(f"{field}.{name}", entry)


def _column(name: str, entry: Any) -> None:
    place = f"field {name!r}"
    _name(entry, "file", FILE, place)
    if entry.get("kind") not in KINDS:
        raise ValueError(f"{place} is {entry.get('kind')!r}; needs one of {KINDS}")
    try:
        known = np.dtype(entry.get("dtype")).kind in "fiu" and isinstance(entry["dtype"], str)
    except (TypeError, KeyError):
        known = False
    if not known:
        raise ValueError(f"{place} has the dtype {entry.get('dtype')!r}; needs a number's")
    needed = {"categorical": ("size", "oov_buckets"), "hashed": ("size", "buckets")}
    if entry["kind"] == "quantiles":
        borders = entry.get("borders")
        if not isinstance(borders, list) or not all(type(one) in (int, float) for one in borders):
            raise ValueError(f"{place} has the borders {borders!r}; needs a list of numbers")
        for key in ("size", "n"):
            _whole(entry, key, f"{place}: ")
    for key in needed.get(entry["kind"], ()):
        _whole(entry, key, f"{place}: ")
    if entry["kind"] == "hashed" and type(entry.get("seed")) is not int:
        raise ValueError(f"{place} has the seed {entry.get('seed')!r}; needs a whole number")
    if entry["kind"] == "vector":
        _whole(entry, "width", f"{place}: ")
    if entry["kind"] in needed and entry.get("values") not in ("int64", "string"):
        raise ValueError(f"{place} has values of type {entry.get('values')!r}; needs 'int64' or 'string'")


def _whole(entry: dict[str, Any], key: str, place: str) -> None:
    if type(entry.get(key)) is not int or not 0 <= entry[key] < MOST:
        raise ValueError(f"{place}{key!r} is {entry.get(key)!r}; needs a whole number")


def _name(entry: Any, key: str, pattern: re.Pattern[str], place: str) -> None:
    if not isinstance(entry, dict) or not isinstance(entry.get(key), str) or not pattern.fullmatch(entry[key]):
        found = entry.get(key) if isinstance(entry, dict) else entry
        raise ValueError(f"{place} has the {key} {found!r}; needs a plain name inside the store")
