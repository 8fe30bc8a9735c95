"""Which generations of a store are in use: whoever has one open holds a shared lock on its folder of fitted things.

A writer that replaces a generation removes its files only after it got that lock alone, so readers, and what they
pickled, find what they opened for as long as they hold it. The system gives a lock back when its process ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def hold(folder: Path) -> int | None:
    """A descriptor that keeps a generation's folder until it is closed; None if the folder is gone, or going."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        _lock(handle, shared=True)
        if os.path.samestat(os.fstat(handle), os.stat(folder)):
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        # a file system without locks: nothing can be held, and what is mapped stays readable all the same
        return handle
    os.close(handle)
    return None


def remove_generation(folder: Path) -> bool:
    """Removes a generation's folder if nobody holds it; says whether it is gone."""
    with _alone([folder]) as free:
        if free:
            shutil.rmtree(folder, ignore_errors=True)
        return free


def retire(store: Path, name: str) -> None:
    """Removes a store that another one has replaced, and those that were held when they were replaced earlier.

    Args:
        store: the replaced store's folder, hidden beside the new one; kept under another hidden name while it is held
        name: of the new store's folder
    """
    for earlier in replaced(store.parent / name):
        remove_store(earlier)
    if not remove_store(store):
        number = max((int(one.name.split(".")[-2]) for one in replaced(store.parent / name)), default=0)
        store.rename(store.parent / f".{name}.{number + 1}.replaced")


def remove_store(store: Path) -> bool:
    """Removes a store that was replaced if nobody holds any of its generations; says whether it is gone."""
    generations = sorted((store / "fitted").iterdir()) if (store / "fitted").is_dir() else []
    with _alone(generations) as free:
        if free:
            shutil.rmtree(store, ignore_errors=True)
        return free


def replaced(store: Path) -> list[Path]:
    """Folders beside a store with what it replaced and somebody still held."""
    head, tail = f".{store.name}.", ".replaced"
    names = (one.name for one in os.scandir(store.parent) if one.name.startswith(head) and one.name.endswith(tail))
    return [store.parent / name for name in sorted(names) if name[len(head) : -len(tail)].isdigit()]


@contextlib.contextmanager
def _alone(folders: list[Path]) -> Iterator[bool]:
    """Whether nobody else holds any of the folders, which then nobody can until the block ends."""
    with contextlib.ExitStack() as stack:
        free = True
        for folder in folders:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                handle = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, handle)
                try:
                    _lock(handle, shared=False)
                except BlockingIOError:
                    free = False
                except OSError:
                    pass
        yield free


def _lock(handle: int, shared: bool) -> None:
    """Locks a folder at once, or raises a BlockingIOError; another OSError where there are no such locks."""
    try:
        import fcntl
    except ImportError:
        raise OSError("this system has no locks of folders") from None
    fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
