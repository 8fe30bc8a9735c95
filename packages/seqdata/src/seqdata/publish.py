"""How a store appears all at once or not at all, and who may change it; nothing that is no store is replaced.

A build works in the hidden folder .NAME.building beside STORE, which carries a lock, and swaps the two when it is done.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from seqdata import layout, pins

LOCK = ".lock"
STORE_NAMES = {"schema.json", "schema.json.part", "shards", "fitted", ".work", LOCK}
BUILDING_NAMES = STORE_NAMES | {"work"}
AT_CWD, NO_REPLACE, EXCHANGE = -100, 1, 2


@contextlib.contextmanager
def new_folder(out: str | os.PathLike, overwrite: bool, keep: bool = False) -> Iterator[Path]:
    """A hidden sibling of `out` to write into; becomes `out` when the block ends well and disappears when it does not.

    The sibling may hold what a killed process left; one that a living process holds is an error. Its folder "work" is
    not part of the store.

    Args:
        out: folder to appear; a link to a folder stays one
        overwrite: replace the store that is at `out`; anything else there is never touched
        keep: leave the sibling when the block fails, for a later attempt

    Raises:
        FileExistsError: something is at `out`, or appeared there meanwhile, that may not be replaced, or another
            process builds it.
        OSError: the disk is full.
    """
    out = Path(os.path.realpath(out))
    _check_replaceable(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.parent / f".{out.name}.building"
    lock = _claim(folder, out)
    try:
        yield folder
        with _set_aside(folder / "work", out.parent / f".{out.name}.built"):
            (folder / LOCK).unlink()
            _publish(folder, out, overwrite)
    except BaseException as error:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
        raise_if_full(error, f"building {out}")
        raise
    finally:
        lock.release()


@contextlib.contextmanager
def locked(store: Path) -> Iterator[None]:
    """Holds the store for writing; a second writer gets a FileExistsError.

    Args:
        store: its folder

    Raises:
        FileExistsError: another process holds it
    """
    lock = FileLock(store / LOCK, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise FileExistsError(f"another process is changing {store} at this moment") from None
    try:
        yield
    finally:
        (store / LOCK).unlink(missing_ok=True)
        lock.release()


def raise_if_full(error: BaseException, doing: str) -> None:
    """Turns what the system says of a full disk into what it means for the store.

    Args:
        error: what was caught
        doing: what was being done, for the message

    Raises:
        OSError: the disk is full
    """
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise OSError(
            error.errno,
            f"no space left while {doing} ({error.strerror}); nothing of it was kept, what stood there is untouched",
        ) from error


def _check_replaceable(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{out} exists already; pass overwrite=True to replace it once the new store is complete")
    if (why := _foreign(out)) is not None:
        raise FileExistsError(f"{out} exists and is no store of seqdata's alone ({why}); refusing to replace it")


def _foreign(folder: Path) -> str | None:
    """What shows that a folder is not a store and nothing else; None where it is one, or is empty."""
    if not folder.is_dir():
        return "it is a file"
    names = set(os.listdir(folder))
    if not names:
        return None
    try:
        layout.read_schema(folder)
    except layout.StoreError as error:
        return str(error)
    strange = sorted(names - STORE_NAMES)
    return f"it holds {strange[0]!r}" if strange else None


def _claim(folder: Path, out: Path) -> FileLock:
    folder.mkdir(exist_ok=True)
    strange = sorted(set(os.listdir(folder)) - BUILDING_NAMES)
    if strange:
        raise FileExistsError(f"{folder} holds {strange[0]!r}, which no build left there; move it away to build {out}")
    # the lock dies with its process, so a folder that can be locked is free or a leftover
    lock = FileLock(folder / LOCK, blocking=False)
    try:
        lock.acquire()
    except (Timeout, FileNotFoundError):
        raise FileExistsError(f"another process is building {out} at this moment") from None
    return lock


@contextlib.contextmanager
def _set_aside(folder: Path, place: Path) -> Iterator[None]:
    """Moves the working files away at once, so that no attempt meets half of them, and back if the block fails."""
    shutil.rmtree(place, ignore_errors=True)
    os.rename(folder, place)
    try:
        yield
    except BaseException:
        os.rename(place, folder)
        raise
    shutil.rmtree(place, ignore_errors=True)


def _publish(folder: Path, out: Path, overwrite: bool) -> None:
    if not overwrite or not out.exists():
        _rename_new(folder, out)
    else:
        with locked(out) if (out / "schema.json").exists() else contextlib.nullcontext():
            _check_replaceable(out, overwrite)
            _exchange(folder, out)
        # what was there at the very moment of the exchange
        if (why := _foreign(folder)) is not None:
            _exchange(folder, out)
            raise FileExistsError(f"{out} changed while it was to be replaced ({why}); it was left as it is")
        pins.retire(folder, out.name)
    _flush(out.parent)


def _rename_new(folder: Path, out: Path) -> None:
    if not _rename(folder, out, NO_REPLACE):
        # without an atomic rename that replaces nothing there is a moment between look and move
        if out.exists():
            raise FileExistsError(f"{out} appeared while it was being built; it was left as it is")
        os.rename(folder, out)


def _exchange(folder: Path, out: Path) -> None:
    if not _rename(folder, out, EXCHANGE):
        # without an atomic exchange the old store is moved aside for the moment of two renames
        aside = out.parent / f".{out.name}.aside"
        os.rename(out, aside)
        os.rename(folder, out)
        os.rename(aside, folder)


def _rename(one: Path, other: Path, flag: int) -> bool:
    """renameat2 with a flag; False where the system or the file system does not have it."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    if call(AT_CWD, os.fsencode(one), AT_CWD, os.fsencode(other), flag) == 0:
        return True
    if ctypes.get_errno() == errno.EEXIST:
        raise FileExistsError(f"{other} appeared while it was being built; it was left as it is")
    return False


def _flush(folder: Path) -> None:
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        # a folder cannot be opened, nor need be, everywhere
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
