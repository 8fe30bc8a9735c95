"""The run directory: files that appear whole or not at all, and the record of what was run."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HOUSE = ("ubt", "seqdata", "hstu-kernels", "mtl-heads")
PACKAGES = (*HOUSE, "torch", "lightning", "numpy", "duckdb", "lightgbm", "scikit-learn")


@contextmanager
def temporary_directory(final: str | Path) -> Iterator[Path]:
    """Give an empty folder beside `final`; move it there when the block ends well, remove it when it fails.

    What a killed process left there is swept first.
    """
    final = Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    for left in final.parent.glob(f".{final.name}.*.tmp"):
        # A process that was killed could not remove its own.
        if not _alive(left.name.split(".")[-2]):
            shutil.rmtree(left, ignore_errors=True)
    folder = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    folder.mkdir()
    try:
        yield folder
        shutil.rmtree(final, ignore_errors=True)
        folder.rename(final)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def temporary_file(final: str | Path) -> Iterator[Path]:
    """Give a file name beside `final` with the same suffix; rename it when the block ends well."""
    final = Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    path = final.with_name(f".{final.stem}.{os.getpid()}.tmp{final.suffix}")
    try:
        yield path
        path.replace(final)
    finally:
        path.unlink(missing_ok=True)


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write `content` as indented JSON."""
    with temporary_file(path) as name:
        name.write_text(json.dumps(content, indent=2, default=str) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """Return the content of a JSON file, or an empty dict when there is none."""
    path = Path(path)
    return json.loads(path.read_text()) if path.exists() else {}


def file_hash(path: str | Path) -> str:
    """Return the hash of a file's bytes."""
    total = hashlib.blake2b(digest_size=16)
    with Path(path).open("rb") as file:
        while block := file.read(1 << 22):
            total.update(block)
    return total.hexdigest()


def content_hash(content: Any) -> str:
    """Return the hash of what can be written as JSON."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def record(run_dir: str | Path, stage: str, seconds: float, **facts: Any) -> None:
    """Add one stage's wall time, the peak memory so far and other facts to ``metadata.json``."""
    path = Path(run_dir) / "metadata.json"
    content = read_json(path)
    content["versions"] = {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
    content["commit"] = _commit()
    content.update(facts)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    finished = datetime.now(timezone.utc).isoformat(timespec="seconds")
    content.setdefault("stages", {})[stage] = {
        "finished": finished,
        "wall_seconds": round(seconds, 1),
        "peak_memory_mb": round(peak),
    }
    write_json(path, content)


def _alive(process: str) -> bool:
    if not process.isdigit() or int(process) == os.getpid():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None
