"""A run directory: one command at a time, its settings, its log, and the record of what it did.

RUN/config.yaml     settings of the last command, complete
    metadata.json   versions, commit, machine, seed, and per command: when, how long, how much memory, its facts
    metrics.json    what was measured
    logs/<command>.log
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from runkit.errors import SettingError
from runkit.files import read_json, write_json, write_yaml

log = logging.getLogger("runkit")


class BusyError(RuntimeError):
    """Another command works in the run directory."""


class Run:
    """One run directory. Everything a command leaves behind is below `folder`.

    Args:
        folder: the directory; made by the first command
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.checkpoints = self.folder / "checkpoints"
        self.plots = self.folder / "plots"
        self.logs = self.folder / "logs"

    @contextlib.contextmanager
    def command(self, name: str, config: Any = None, packages: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
        """Hold the run directory, log to ``logs/<name>.log``, and record the facts that the block fills in.

        The lock dies with its process. A command may stand inside another one of the same thread. In the processes that
        torchrun or lightning started beside the first one nothing is locked or written.

        Args:
            name: the command
            config: dataclass of its settings, written to ``config.yaml``; its ``seed`` goes into the record
            packages: installed packages whose versions are recorded; the first is the app's own

        Raises:
            BusyError: if another command holds the directory; names it and its process
            OSError: if the directory cannot be written
        """
        facts: dict[str, Any] = {}
        if is_helper():
            yield facts
            return
        self._make()
        with self._held(name), self._logged(name):
            # A damaged record must not be found out after hours of work.
            self.metadata(), self.metrics()
            if config is not None:
                write_yaml(self.folder / "config.yaml", asdict(config))
            began = time.perf_counter()
            yield facts
            took = {"wall_seconds": round(time.perf_counter() - began, 2), "peak_memory_mb": peak_memory()}
            log.info("%s: %.1f s, peak memory %s MB", name, took["wall_seconds"], took["peak_memory_mb"])
            self._record(name, took | facts, config, packages)

    def metadata(self) -> dict[str, Any]:
        """Return what ``metadata.json`` holds, empty where there is none."""
        return read_json(self.folder / "metadata.json")

    def metrics(self) -> dict[str, Any]:
        """Return what ``metrics.json`` holds, empty where there is none."""
        return read_json(self.folder / "metrics.json")

    def add_metrics(self, name: str, metrics: dict[str, Any]) -> None:
        """Put what was measured into ``metrics.json`` under a name, beside what else is there."""
        write_json(self.folder / "metrics.json", self.metrics() | {name: metrics})

    def _make(self) -> None:
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror or str(error)
            raise OSError(f"run_dir: got {self.folder}, needs a folder that can be written: {reason}") from None

    @contextlib.contextmanager
    def _held(self, name: str) -> Iterator[None]:
        lock = FileLock(self.folder.resolve() / ".lock", is_singleton=True)
        holder = self.folder / ".running.json"
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise BusyError(_busy(self.folder, holder)) from None
        outermost = lock.lock_counter == 1
        try:
            if outermost:
                write_json(holder, {"process": os.getpid(), "command": name, "since": _now()})
            yield
        finally:
            if outermost:
                holder.unlink(missing_ok=True)
            lock.release()

    @contextlib.contextmanager
    def _logged(self, name: str) -> Iterator[None]:
        path = self.logs / f"{name}.log"
        handler = logging.FileHandler(path, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root = logging.getLogger()
        level = root.level
        root.addHandler(handler)
        root.setLevel(min(level or logging.INFO, logging.INFO))
        try:
            handler.handle(_line(logging.INFO, f"{name} begins in process {os.getpid()}"))
            yield
        except BaseException as error:
            handler.handle(_failure(name, error))
            # The command line says where the traceback is.
            if not hasattr(error, "runkit_log"):
                with contextlib.suppress(AttributeError, TypeError):
                    error.runkit_log = str(path)  # type: ignore[attr-defined]
            raise
        finally:
            root.setLevel(level)
            root.removeHandler(handler)
            handler.close()

    def _record(self, name: str, facts: dict[str, Any], config: Any, packages: Sequence[str]) -> None:
        content = self.metadata() | {
            "format": 1,
            "versions": {"python": platform.python_version(), **{one: _version(one) for one in packages}},
            "commit": _commit(_source(config, packages)),
            "machine": machine(),
        }
        if hasattr(config, "seed"):
            content["seed"] = config.seed
        content["commands"] = content.get("commands", {}) | {name: {"finished": _now()} | facts}
        write_json(self.folder / "metadata.json", content)


def is_helper() -> bool:
    """Return whether this process only helps another one to train, as torchrun and lightning start them."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) > 0


def share_processes(asked: int, default: int = 1, setting: str = "train.processes") -> int:
    """Return how many processes train together: what torchrun started, else what is asked for.

    Raises:
        SettingError: if something else than what torchrun started is asked for
    """
    started = int(os.environ.get("WORLD_SIZE", asked))
    if asked not in (started, default):
        raise SettingError(f"{setting}: got {asked}, needs {started}, the processes that were started (WORLD_SIZE)")
    return started


def peak_memory() -> float | None:
    """Return the highest resident memory of this process so far in MB (2^20 bytes), None where nobody counts it."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


def machine() -> str:
    """Return processor, usable cores and system in one line."""
    model, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} cores, {platform.system()} {platform.machine()}"


def _busy(folder: Path, holder: Path) -> str:
    try:
        found = read_json(holder)
    except (OSError, ValueError):
        found = {}
    who = "another command"
    if found:
        who = f"`{found.get('command')}`, process {found.get('process')}, since {found.get('since')}"
    return f"run_dir: got {folder}, in use by {who}; needs the end of that command, or another folder"


def _failure(name: str, error: BaseException) -> logging.LogRecord:
    if isinstance(error, KeyboardInterrupt):
        return _line(logging.ERROR, f"{name} interrupted")
    return _line(logging.ERROR, f"{name} failed: {error}", error)


def _line(level: int, text: str, error: BaseException | None = None) -> logging.LogRecord:
    trace = (type(error), error, error.__traceback__) if error is not None else None
    return log.makeRecord(log.name, level, __file__, 0, text, (), trace)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _source(config: Any, packages: Sequence[str]) -> str | None:
    """The app's own source file: that of its settings, else of its package."""
    module = sys.modules.get(type(config).__module__) if config is not None else None
    if module is not None and getattr(module, "__file__", None):
        return module.__file__
    with contextlib.suppress(ImportError, ValueError, IndexError):
        spec = find_spec(packages[0].replace("-", "_"))
        return spec.origin if spec else None
    return None


def _commit(source: str | None) -> str | None:
    """The commit of the repository that tracks the file; one that only lies around it says nothing of it."""
    if source is None or not Path(source).exists():
        return None
    outside = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    folder, name = os.path.split(os.path.realpath(source))

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, env=outside, check=False)

    try:
        if git("ls-files", "--error-unmatch", "--", name).returncode:
            return None
        return git("rev-parse", "HEAD").stdout.strip() or None
    except OSError:
        return None
