"""Files and folders that appear whole or not at all, strict JSON, and hashes of what they hold.

A folder is written under a hidden name beside its place and published in one step. The hidden name says which process
of which machine made it, so what a killed process left is known, and the next writer sweeps it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import math
import os
import platform
import re
import secrets
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import yaml

MARK = ".runkit.json"
_HOST = f"{zlib.crc32(platform.node().encode()):08x}"
# Names this process is writing under: whatever else bears its number is from a dead process that had the same one.
_in_use: set[str] = set()


@contextlib.contextmanager
def atomic_file(final: str | Path) -> Iterator[Path]:
    """Give a file name beside `final` with its suffix; it takes that place when the block ends well, else it vanishes.

    Args:
        final: the file; its folder is made where it is missing, a link is followed

    Raises:
        IsADirectoryError: if `final` is a folder
    """
    final = _prepared(final)
    if final.is_dir():
        raise IsADirectoryError(f"{final}: is a folder, needs the name of a file")
    with _beside(final) as path:
        yield path
        _flush(path)
        os.replace(path, final)
        _flush(final.parent)


@contextlib.contextmanager
def atomic_folder(final: str | Path, kind: str) -> Iterator[Path]:
    """Give an empty folder beside `final`; all of it takes that place when the block ends well, else it vanishes.

    A folder of the same kind that stands there is exchanged in one step where the system can, else it is set aside for
    the moment of two renames; a process killed between them leaves it to the next `sweep`, which brings it back.

    Args:
        final: the folder; a link is followed
        kind: what the folder is, kept in its mark

    Raises:
        FileExistsError: if `final` holds something and does not bear our mark of this kind
    """
    final = _prepared(final)
    _check_ours(final, kind)
    with _beside(final) as folder:
        folder.mkdir()
        yield folder
        (folder / MARK).write_text(json.dumps({"kind": kind}) + "\n")
        for path in (*folder.rglob("*"), folder):
            _flush(path)
        _publish(folder, final, kind)
        _flush(final.parent)


def remove_folder(folder: str | Path, kind: str) -> None:
    """Delete a folder that bears our mark of this kind, at once; one that is missing is none.

    Raises:
        FileExistsError: if it does not bear that mark
    """
    folder = _prepared(folder)
    if folder.exists():
        _check_ours(folder, kind, empty=False)
        with _beside(folder) as away:
            os.rename(folder, away)


def sweep(final: str | Path) -> None:
    """Remove what killed processes left beside `final`; a folder they had set aside comes back if `final` is gone."""
    final = Path(os.path.realpath(final))
    if not final.parent.is_dir():
        return
    pattern = re.compile(
        re.escape(f".{final.name}.{_HOST}-") + r"(\d+)-[0-9a-f]{8}\.(new|old)" + re.escape(final.suffix)
    )
    for name in os.listdir(final.parent):
        found = pattern.fullmatch(name)
        if found is None or name in _in_use or _alive(int(found[1])):
            continue
        if found[2] == "old" and not final.exists():
            # Another process may sweep at the same time.
            with contextlib.suppress(FileNotFoundError):
                os.rename(final.parent / name, final)
        else:
            _remove(final.parent / name)


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write `content` as indented strict JSON: numbers of numpy become plain ones, one that is none becomes null."""
    with atomic_file(path) as name:
        name.write_text(json.dumps(_plain(content), indent=2, allow_nan=False, ensure_ascii=False) + "\n", "utf-8")


def read_json(path: str | Path) -> dict[str, Any]:
    """Return what a JSON file holds, an empty dict where there is no such file.

    Raises:
        ValueError: if it holds anything but one strict JSON object
    """
    try:
        content = json.loads(Path(path).read_text("utf-8"), parse_constant=_refuse)
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, needs strict JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: got {type(content).__name__}, needs an object such as {{}}")
    return content


def write_yaml(path: str | Path, content: dict[str, Any]) -> None:
    """Write `content` as YAML in its own order."""
    with atomic_file(path) as name:
        name.write_text(yaml_text(content), "utf-8")


def yaml_text(content: dict[str, Any]) -> str:
    """Return `content` as YAML in its own order, without anything but plain values."""
    return yaml.safe_dump(_plain(content, strict=False), sort_keys=False, allow_unicode=True)


def file_hash(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            total.update(block)
    return total.hexdigest()


def folder_hash(folder: str | Path) -> str:
    """Return a hash of the names and bytes of all files below a folder, but for our mark."""
    folder = Path(folder)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return content_hash([[name, file_hash(folder / name)] for name in names if name != MARK])


def content_hash(content: Any) -> str:
    """Return the SHA-256 of anything JSON can say, in hex: equal content, whatever its order of keys, equal hash."""
    return hashlib.sha256(json.dumps(_plain(content), sort_keys=True).encode()).hexdigest()


def _prepared(final: str | Path) -> Path:
    final = Path(os.path.realpath(final))
    final.parent.mkdir(parents=True, exist_ok=True)
    sweep(final)
    return final


@contextlib.contextmanager
def _beside(final: Path) -> Iterator[Path]:
    """Give a hidden name beside `final`; what bears it when the block ends is removed."""
    path = _hidden(final, "new")
    try:
        yield path
    finally:
        _remove(path)
        _in_use.discard(path.name)


def _hidden(final: Path, role: Literal["new", "old"]) -> Path:
    path = final.with_name(f".{final.name}.{_HOST}-{os.getpid()}-{secrets.token_hex(4)}.{role}{final.suffix}")
    _in_use.add(path.name)
    return path


def _publish(folder: Path, final: Path, kind: str) -> None:
    # Others may publish at the same time: whatever they change between two steps, another round sees.
    while True:
        _check_ours(final, kind)
        with contextlib.suppress(OSError):
            os.rmdir(final)
        if not os.path.lexists(final):
            if _renamed(folder, final):
                return
        elif _exchange(folder, final):
            # `folder` is the old one's name now.
            return
        elif _set_aside(folder, final):
            return


def _set_aside(folder: Path, final: Path) -> bool:
    aside = _hidden(final, "old")
    try:
        return _renamed(final, aside) and _renamed(folder, final)
    finally:
        if os.path.lexists(final):
            _remove(aside)
        elif os.path.lexists(aside):
            os.rename(aside, final)
        _in_use.discard(aside.name)


def _renamed(one: Path, other: Path) -> bool:
    try:
        os.rename(one, other)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where the system or the file system cannot."""
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            return library.renamex_np(os.fsencode(one), os.fsencode(other), ctypes.c_uint(2)) == 0
        at_cwd, swap = -100, 2
        return library.renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), ctypes.c_uint(swap)) == 0
    except (AttributeError, OSError, TypeError):
        return False


def _check_ours(final: Path, kind: str, empty: bool = True) -> None:
    if not os.path.lexists(final) or (empty and final.is_dir() and not any(final.iterdir())):
        return
    try:
        found = read_json(final / MARK).get("kind")
    except (ValueError, OSError):
        found = None
    if found != kind:
        what = f"a folder of the kind {found!r}" if found else "something that was not written here"
        raise FileExistsError(f"{final}: is {what}, needs another name or to be moved away; it is never replaced")


def _flush(path: Path) -> None:
    # A folder cannot be opened on Windows.
    if path.is_symlink() or (os.name == "nt" and path.is_dir()):
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    if process == os.getpid():
        return False
    if os.name == "nt":
        # There the call below would end it.
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _plain(value: Any, strict: bool = True) -> Any:
    """Return what JSON and YAML can say; where `strict`, a number that is none is None."""
    if isinstance(value, dict):
        return {key if isinstance(key, str) else str(_plain(key)): _plain(one, strict) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one, strict) for one in value]
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(one, strict) for one in value), key=str)
    if hasattr(value, "tolist"):
        return _plain(value.tolist(), strict)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) or not strict else None
    return value if value is None or type(value) in (bool, int, str) else str(value)


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no JSON")
