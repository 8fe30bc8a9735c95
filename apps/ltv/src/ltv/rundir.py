"""The run directory: a log, the settings, what was measured, and files that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import resource
import shutil
import subprocess
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from ltv.config import Config

VERSIONS = ("ltv", "ltv-stack", "lightgbm", "numpy", "pandas", "pyarrow", "scikit-learn", "xgboost", "torch")
LOGGED = ("ltv", "ltv_stack")
log = logging.getLogger("ltv")


class Run:
    """One run directory. Everything a command leaves behind is below `folder`.

    Args:
        folder: the directory; made where it is missing
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.models = self.folder / "models"
        self.processed = self.folder / "processed"
        self.predictions = self.folder / "predictions"
        self.submission = self.folder / "submissions" / "submission.csv"
        self.plots = self.folder / "plots"

    @contextmanager
    def command(self, name: str, config: Config | None = None) -> Iterator[dict[str, Any]]:
        """Log to ``logs/<name>.log`` as well, and add the facts the block fills in to ``metadata.json``.

        Wall time and the peak memory of this process so far are among them; an error is logged before it is raised, and
        where it came from is in the file.
        """
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(self.folder / "logs" / f"{name}.log", mode="w")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        loggers = [logging.getLogger(one) for one in LOGGED]
        for logger in loggers:
            logger.setLevel(logging.INFO)
            logger.addHandler(handler)
        facts: dict[str, Any] = {}
        began = time.perf_counter()
        try:
            yield facts
            facts |= {"wall_seconds": round(time.perf_counter() - began, 2), "peak_memory_mb": peak_memory_mb()}
            log.info("%s: %.1f s, peak memory %.0f MB", name, facts["wall_seconds"], facts["peak_memory_mb"])
            self._record(name, facts, config)
        except Exception as error:
            log.error("%s failed: %s", name, error)
            traceback.print_exc(file=handler.stream)
            raise
        finally:
            for logger in loggers:
                logger.removeHandler(handler)
            handler.close()

    def write_config(self, config: Config) -> None:
        """Write the settings as ``config.yaml``, complete, in the order of the dataclasses."""
        with temporary_file(self.folder / "config.yaml") as path:
            path.write_text(yaml.safe_dump(asdict(config), sort_keys=False))

    def metadata(self) -> dict[str, Any]:
        """Return what ``metadata.json`` holds, empty where there is none."""
        return read_json(self.folder / "metadata.json")

    def metrics(self) -> dict[str, Any]:
        """Return what ``metrics.json`` holds, empty where there is none."""
        return read_json(self.folder / "metrics.json")

    def add_metrics(self, split: str, metrics: dict[str, Any]) -> None:
        """Put one split's numbers into ``metrics.json``, beside those of the other splits."""
        write_json(self.folder / "metrics.json", self.metrics() | {split: metrics})

    def _record(self, name: str, facts: dict[str, Any], config: Config | None) -> None:
        content = self.metadata()
        content |= {"versions": _versions(), "commit": _commit(), "machine": machine()}
        if config is not None:
            content["seed"] = config.seed
        content.setdefault("commands", {})[name] = facts
        write_json(self.folder / "metadata.json", content)


@contextmanager
def temporary_directory(final: str | Path) -> Iterator[Path]:
    """Give an empty folder beside `final`; it takes that name when the block ends well and vanishes when it fails."""
    final = Path(final)
    folder = _beside(final)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        shutil.rmtree(final, ignore_errors=True)
        folder.rename(final)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def temporary_file(final: str | Path) -> Iterator[Path]:
    """Give a file name beside `final`; the file takes that name when the block ends well."""
    final = Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    path = _beside(final)
    try:
        yield path
        path.replace(final)
    finally:
        path.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as indented JSON; a number that is none, which JSON cannot say, becomes null."""
    with temporary_file(path) as name:
        name.write_text(json.dumps(_strict(content), indent=2, allow_nan=False, default=_plain) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON file's content, or an empty dict when there is no such file."""
    return json.loads(path.read_text()) if path.exists() else {}


def fingerprint(content: Any) -> str:
    """Return a short hash of anything JSON can say: equal content, equal hash."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def files_hash(folder: Path) -> str:
    """Return a short hash of the names and contents of all files in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return fingerprint([(str(p.relative_to(folder)), hashlib.sha256(p.read_bytes()).hexdigest()) for p in files])


def peak_memory_mb() -> float:
    """Return the highest resident memory of this process so far, in MB (2^20 bytes)."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def machine() -> str:
    """Return processor, usable cores and system in one line."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {platform.system()} {platform.machine()}"


def _beside(final: Path) -> Path:
    return final.with_name(f".{final.stem}.{os.getpid()}.tmp{final.suffix}")


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(one) for one in value]
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _commit() -> str | None:
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:
        return None
