"""How a store lies on disk, and how it appears there all at once or not at all.

STORE/schema.json                 written last; a folder without it is no store
STORE/shards/00000/users.npy      sorted user ids, int64 (text ids: users.arrow)
                   offsets.npy    int64 [users + 1]
                   time.npy       int64 microseconds UTC [events]
                   <column>.npy   one raw column each [events]
STORE/fitted/00000/               what an append replaces, numbered by generation
                   schema.json, checksums.json   schema.json as of this generation; size and crc32 of its files
                   vocabularies/<field>.arrow    value, count, in the order of the ids
                   vectors/<field>.npy           [distinct + 1, width], row 0 zeros
                   items/<field>.<column>.npy    one row per id of the field
                   index/                        one order over several shards: users, offsets, order, time
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from seqdata.mapping import map_array, map_file
from seqdata.schema import check

FORMAT = "seqdata"
VERSION = 1
HEADER = 128


class StoreError(ValueError):
    """A folder that is not a complete store this version can read."""


def fitted(store: Path, generation: int) -> Path:
    """Folder of what a generation of a store was fitted to."""
    return store / "fitted" / f"{generation:05d}"


def inside(name: str) -> PurePosixPath:
    """A path that a file of a store names, below the store; one that leads out of it is a StoreError.

    Args:
        name: as the file has it

    Raises:
        StoreError: it leads out of the store, or is no path
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise StoreError(f"the store names a file {name!r}; needs a path inside the store")
    return path


def to_json(value: Any) -> str:
    """The text that `write_json` writes."""
    return json.dumps(value, indent=1, ensure_ascii=False, default=_plain) + "\n"


def write_json(path: Path, value: Any) -> None:
    """JSON written whole: to a temporary name, flushed, renamed."""
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(to_json(value))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_schema(path: Path, name: str = "schema.json") -> dict[str, Any]:
    """schema.json of a store, or of one of its generations, checked for format and version.

    Args:
        path: folder of the store or the generation
        name: of the file

    Raises:
        FileNotFoundError: there is no such folder
        StoreError: the file is missing, damaged or of a newer version, or a link leads out of the store
    """
    if not path.is_dir():
        raise FileNotFoundError(f"no store at {path}: no such folder")
    try:
        schema = json.loads((path / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{path} is not a complete store: it has no schema.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StoreError(f"{path}/{name} is damaged: {error}") from None
    if not isinstance(schema, dict) or schema.get("format") != FORMAT:
        raise StoreError(f"{path}/{name} does not describe a seqdata store")
    if not isinstance(schema.get("version"), int) or schema["version"] > VERSION:
        raise StoreError(
            f"{path} has format version {schema.get('version')}; this seqdata reads up to {VERSION}: upgrade it with"
            " pip install -U seqdata"
        )
    try:
        check(schema)
    except ValueError as error:
        raise StoreError(f"{path}/{name} is not as this package writes it: {error}") from None
    folders = ["shards", "fitted", f"fitted/{schema['generation']:05d}"]
    for folder in [*folders, *(f"shards/{shard['folder']}" for shard in schema["shards"])]:
        if (path / folder).is_symlink():
            raise StoreError(f"{path / folder} is a link; needs a folder inside the store")
    return schema


class ArrayWriter:
    """Appends to a .npy file, whose header says at the end how long it became; `width` makes it a matrix."""

    def __init__(self, path: Path, dtype: Any, width: int | None = None) -> None:
        self.dtype, self.length, self.width = np.dtype(dtype), 0, width
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115
        self._file.write(bytes(HEADER))

    def append(self, values: np.ndarray) -> None:
        write_all(self._file, np.ascontiguousarray(values, self.dtype))
        self.length += len(values)

    def __enter__(self) -> ArrayWriter:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            shape = f"({self.length},)" if self.width is None else f"({self.length}, {self.width})"
            about = f"{{'descr': {self.dtype.str!r}, 'fortran_order': False, 'shape': {shape}, }}"
            start = np.lib.format.magic(1, 0) + (HEADER - 10).to_bytes(2, "little")
            self._file.seek(0)
            self._file.write(start + about.encode().ljust(HEADER - 11) + b"\n")
        self._file.close()


def write_all(file: Any, values: np.ndarray) -> None:
    """Writes an array whole, or raises what the disk said."""
    view = values.reshape(-1).view(np.uint8).data
    while len(view):
        view = view[file.write(view) :]


def write_array(path: Path, values: np.ndarray) -> None:
    """One array as .npy."""
    with open(path, "wb", buffering=0) as file:
        np.lib.format.write_array_header_1_0(
            file, np.lib.format.header_data_from_array_1_0(np.ascontiguousarray(values))
        )
        write_all(file, np.ascontiguousarray(values))


def read_array(path: Path, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """A .npy file as a read-only memory map; a file that is missing, cut or of another shape is a StoreError.

    Args:
        path: the file
        shape: what it must have; None takes any

    Raises:
        StoreError: the file is missing, cut or of another shape
    """
    try:
        values = map_array(path)
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} is missing or damaged: {error}") from None
    if shape is not None and values.shape != shape:
        raise StoreError(f"{path} has shape {values.shape}; schema.json says {shape}")
    return values


def map_bytes(path: Path) -> np.ndarray:
    """uint8 [bytes] of a file, mapped read-only; a file that is missing is a StoreError.

    Raises:
        StoreError: the file is missing or damaged
    """
    try:
        return map_file(path)
    except OSError as error:
        raise StoreError(f"{path} is missing or damaged: {error}") from None


def write_table(path: Path, table: pa.Table) -> None:
    """An Arrow table as an uncompressed IPC file that opens without being read."""
    with open(path, "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table.combine_chunks())


def one_chunk(column: pa.ChunkedArray) -> pa.Array:
    """The single array of a chunked column, copied only where there are several."""
    if column.num_chunks == 1:
        return column.chunk(0)
    array = column.combine_chunks()
    return pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array


def read_table(path: Path, mapped: np.ndarray | None = None) -> pa.Table:
    """An Arrow IPC file, memory-mapped; `mapped` is the file where that happened before.

    Args:
        path: the file
        mapped: uint8 [bytes] of it; None maps it here

    Raises:
        StoreError: the file is missing or damaged
    """
    try:
        return pa.ipc.open_file(pa.py_buffer(map_file(path) if mapped is None else mapped)).read_all()
    except (pa.ArrowException, OSError) as error:
        raise StoreError(f"{path} is missing or damaged: {error}") from None


def file_name(number: int, name: str) -> str:
    """A file name for a column of any name."""
    return f"{number:03d}_{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)[:60]}"


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} does not go into schema.json")
