"""A build described in YAML."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from seqdata.fields import ItemTable
from seqdata.sources import Sql

KEYS = (
    "sources", "out", "user", "time", "fields", "items", "event_field", "fit_before", "null_user", "dedup", "time_unit",
    "time_format", "types", "engine", "scheduler", "memory_limit", "shards", "progress", "overwrite", "resume",
)  # fmt: skip


def load_config(path: str | os.PathLike) -> dict[str, Any]:
    """Arguments of `build` from a YAML file, or from one that ships with the package by its name, such as "rees46".

    ${NAME} and ${NAME:-default} stand for environment variables. A source is a path, glob or list, or {sql: query}, or
    a mapping {table: source}. Item tables are {field: {source: ..., key: ..., fields: {...}}}.

    Args:
        path: a file, or the name of one that ships with the package

    Raises:
        ValueError: the text is no YAML, no mapping or has an unknown key; names the file
    """
    text = _find(path).read_text(encoding="utf-8")
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(raw, Mapping):
        raise ValueError(f"{path}: needs a mapping of build's arguments, such as sources, out, user, time")
    unknown = sorted(set(raw) - set(KEYS))
    if unknown:
        raise ValueError(f"{path}: unknown key(s) {unknown}; known are {sorted(KEYS)}")
    config = {key: _expand(value, path) for key, value in raw.items()}
    if "sources" in config:
        config["sources"] = _source(config["sources"])
    if "items" in config:
        config["items"] = {field: _item_table(field, table, path) for field, table in config["items"].items()}
    return config


def shipped() -> list[str]:
    """Names of the configurations that ship with the package."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _folder().iterdir() if entry.name.endswith(".yaml"))


def _folder() -> Any:
    return resources.files("seqdata") / "configs"


def _find(path: str | os.PathLike) -> Any:
    if Path(path).exists():
        return Path(path)
    name = os.fspath(path).removesuffix(".yaml")
    if name in shipped():
        return _folder() / f"{name}.yaml"
    raise FileNotFoundError(f"no configuration {os.fspath(path)!r}; the package brings {shipped()}")


def _expand(value: Any, path: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _expand(one, path) for key, one in value.items()}
    if isinstance(value, list):
        return [_expand(one, path) for one in value]
    return (
        re.sub(r"\$\{(\w+)(?::-([^}]*))?\}", lambda m: _variable(m, path), value) if isinstance(value, str) else value
    )


def _variable(match: re.Match[str], path: Any) -> str:
    value = os.environ.get(match[1], match[2])
    if value is None:
        raise ValueError(f"{path}: uses ${{{match[1]}}}, which the environment does not set")
    return value


def _source(source: Any) -> Any:
    if isinstance(source, Mapping):
        if set(source) == {"sql"}:
            return Sql(source["sql"])
        return {name: _source(one) for name, one in source.items()}
    return source


def _item_table(field: str, table: Any, path: Any) -> ItemTable:
    if not isinstance(table, Mapping) or not {"source", "key"} <= set(table) <= {"source", "key", "fields"}:
        raise ValueError(f"{path}: items.{field} needs source and key, and may have fields; got {table!r}")
    return ItemTable(_source(table["source"]), table["key"], table.get("fields"))
