"""A log's folder: it appears whole or not at all, and only one that the same generator wrote is replaced."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tqdm import tqdm

# Lies in every generated folder and says how it was made.
MARK = "generated.json"


@contextmanager
def whole_folder(final: str | Path, files: Sequence[str]) -> Iterator[Path]:
    """Give an empty folder beside `final`; it takes that name when the block ends well and vanishes when it fails.

    What killed processes left beside `final` is swept first.

    Args:
        files: patterns of everything the generator writes, relative to the folder; an old folder is replaced only if
            it holds the mark ``generated.json`` and nothing that matches none of them

    Raises:
        FileExistsError: if `final` is a file or holds something that this generator did not write.
    """
    final = Path(final).resolve()
    check_replaceable(final, files)
    final.parent.mkdir(parents=True, exist_ok=True)
    for left in final.parent.glob(f".{final.name}.synthlogs-*.tmp"):
        if not _alive(left.name.removesuffix(".tmp").rpartition("-")[2]):
            shutil.rmtree(left, ignore_errors=True)
    folder = final.with_name(f".{final.name}.synthlogs-{os.getpid()}.tmp")
    folder.mkdir()
    try:
        yield folder
        check_replaceable(final, files)
        _publish(folder, final)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_replaceable(folder: Path, files: Sequence[str]) -> None:
    """Raise FileExistsError for a folder that holds something which matches none of `files`, or has no mark."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise FileExistsError(f"folder: {folder} is a file, needs a new name or a folder")
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or path.is_file())
    if not found and any(folder.iterdir()):
        found = [next(folder.iterdir()).name]
    foreign = [name for name in found if not any(fnmatchcase(name, pattern) for pattern in (*files, MARK))]
    if foreign or (found and MARK not in found):
        name = foreign[0] if foreign else found[0]
        raise FileExistsError(
            f"folder: {folder} is not empty and holds {name}, which this generator did not write; it is left alone; "
            "needs another name or an empty folder"
        )


def write_mark(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the mark that says how the folder was made."""
    (folder / MARK).write_text(json.dumps(content, indent=2) + "\n")


def progress(total: int, what: str, unit: str, shown: bool) -> tqdm:
    """Return a bar on stderr, where that is a terminal, that counts up to `total` `unit`s."""
    return tqdm(total=total, desc=what, unit=f" {unit}s", disable=None if shown else True, mininterval=0.5)


def _publish(folder: Path, final: Path) -> None:
    if not final.exists():
        folder.rename(final)
    elif not _exchange(folder, final):
        # Without an atomic exchange the old folder stands aside for the moment of two renames.
        aside = folder.with_suffix(".old")
        final.rename(aside)
        folder.rename(final)
        shutil.rmtree(aside)


def _exchange(one: Path, other: Path) -> bool:
    # renameat2(RENAME_EXCHANGE) swaps two folders in one step; not every system and file system has it.
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    at_cwd, exchange = -100, 2
    return swap(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0


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
