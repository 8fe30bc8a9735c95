"""Sizes and checksums of the files of a store, and what differs from them.

STORE/fitted/00000/checksums.json has {"crc32": ..., "files": {"shards/00000/time.npy": {"bytes": 136, "crc32":
"0f1e2d3c"}, ...}}: every file of a generation, its schema.json among them, by its path below the store. The first
checksum is that of the rest, so that damage of this file is not taken for damage of the others.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from seqdata import layout

BLOCK = 1 << 22


def seal(store: Path, schema: dict[str, Any], previous: int | None = None) -> None:
    """Writes a generation's schema and checksums, and last of all STORE/schema.json, which makes it the newest.

    Args:
        store: folder whose shards and fitted things are complete
        schema: what schema.json shall hold
        previous: generation that the shards which it names are taken over from; they are not read again
    """
    home = layout.fitted(store, schema["generation"])
    layout.write_json(home / "schema.json", schema)
    known = {} if previous is None else _read(store, previous) or {}
    files = {"schema.json": _measure(home / "schema.json")}
    shards = [path for shard in schema["shards"] for path in (store / "shards" / shard["folder"]).iterdir()]
    fitted = [path for path in home.rglob("*") if path.is_file() and path.name != "checksums.json"]
    for path in sorted([*shards, *fitted]):
        name = path.relative_to(store).as_posix()
        files[name] = known.get(name) or _measure(path)
    layout.write_json(home / "checksums.json", _signed(files))
    layout.write_json(store / "schema.json", schema)


def damage(store: Path, generation: int) -> Iterator[str]:
    """Yields a sentence for every file of a generation that is missing or not as it was written."""
    files = _read(store, generation)
    if files is None:
        yield f"{_path(store, generation)} is missing or damaged: a store that an older seqdata wrote has none"
        return
    for name, wanted in files.items():
        found = _differs(store / name, wanted)
        # the newest schema.json is a later generation's once there is one
        if found and not (name == "schema.json" and _superseded(store, generation)):
            yield found


def _differs(path: Path, wanted: dict[str, Any]) -> str | None:
    try:
        found = _measure(path)
    except OSError as error:
        return f"{path} is missing or unreadable: {error.strerror}"
    if found["bytes"] != wanted["bytes"]:
        return f"{path} has {found['bytes']:,} bytes; {wanted['bytes']:,} were written"
    if found["crc32"] != wanted["crc32"]:
        return f"{path} is not as it was written: crc32 {found['crc32']}, needs {wanted['crc32']}"
    return None


def _path(store: Path, generation: int) -> Path:
    return layout.fitted(store, generation) / "checksums.json"


def _read(store: Path, generation: int) -> dict[str, Any] | None:
    try:
        text = _path(store, generation).read_text(encoding="utf-8")
        files = json.loads(text)["files"]
        if text != layout.to_json(_signed(files)):
            return None
        for name in files:
            layout.inside(name)
        return files
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _superseded(store: Path, generation: int) -> bool:
    try:
        return layout.read_schema(store).get("generation") != generation
    except (OSError, layout.StoreError):
        return False


def _signed(files: dict[str, Any]) -> dict[str, Any]:
    return {"crc32": f"{zlib.crc32(json.dumps(files, sort_keys=True).encode()):08x}", "files": files}


def _measure(path: Path) -> dict[str, Any]:
    total = size = 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            total, size = zlib.crc32(block, total), size + len(block)
    return {"bytes": size, "crc32": f"{total:08x}"}
