"""Finding a generation of a store, the newest or the very one that something was made of, and holding it."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seqdata import layout, pins

ATTEMPTS, PAUSE = 20, 0.02


@dataclass(frozen=True)
class Generation:
    """A generation that is held: its folder lies below `root`, and `key` names its content."""

    root: Path
    schema: dict[str, Any]
    key: str
    handle: int

    def stands(self) -> bool:
        """Whether what was read below `root` since it was held is this generation's."""
        try:
            now = os.stat(layout.fitted(self.root, self.schema["generation"]))
        except OSError:
            return False
        return os.path.samestat(os.fstat(self.handle), now)


def find(path: Path, key: str | None) -> Generation:
    """Holds the newest generation of the store at `path`, or the one of a key wherever it is now.

    Args:
        path: folder of the store
        key: of a generation; None takes the newest

    Raises:
        FileNotFoundError: if nothing is at `path`
        layout.StoreError: if that is no store, or the generation of that key is gone
    """
    for _ in range(ATTEMPTS):
        for root, name in [(path, "schema.json")] if key is None else _places(path):
            try:
                found = _key(root / name)
                if key not in (None, found):
                    continue
                schema = layout.read_schema(root, name)
            except (OSError, layout.StoreError):
                if key is None:
                    layout.read_schema(root, name)
                continue
            handle = pins.hold(layout.fitted(root, schema["generation"]))
            if handle is not None:
                if _key(root / name) == found:
                    return Generation(root, schema, found, handle)
                os.close(handle)
        # a writer is at work just now, or there is nothing to find
        time.sleep(PAUSE)
    if key is None:
        raise layout.StoreError(f"{path} is damaged: {layout.fitted(path, schema['generation'])} is missing")
    raise layout.StoreError(
        f"{path} has changed and nobody held what this was made of, so that is gone; open the store again"
    )


def clean(store: Path, schema: dict[str, Any]) -> None:
    """Removes earlier generations of a store that nobody holds, and the shards that none of the rest names."""
    kept = {shard["folder"] for shard in schema["shards"]}
    for folder in _numbered(store / "fitted"):
        if folder.name == layout.fitted(store, schema["generation"]).name or pins.remove_generation(folder):
            continue
        try:
            kept |= {
                shard["folder"] for shard in layout.read_schema(store, f"fitted/{folder.name}/schema.json")["shards"]
            }
        except layout.StoreError:
            # it does not say what it needs: all shards stay
            return
    for shard in _numbered(store / "shards"):
        if shard.name not in kept:
            shutil.rmtree(shard, ignore_errors=True)
    for replaced in pins.replaced(store):
        pins.remove_store(replaced)


def _places(path: Path) -> Iterator[tuple[Path, str]]:
    """Where a generation may be: the newest, an earlier one, one of a store that was replaced."""
    for root in [path, *pins.replaced(path)]:
        yield root, "schema.json"
        yield from ((root, f"fitted/{one.name}/schema.json") for one in _numbered(root / "fitted"))


def _numbered(folder: Path) -> list[Path]:
    """What this package wrote into a folder of numbered ones."""
    return sorted(one for one in folder.iterdir() if one.name.isdigit()) if folder.is_dir() else []


def _key(file: Path) -> str:
    return hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()
