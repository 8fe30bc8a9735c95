"""Files mapped into memory without keeping them open."""

from __future__ import annotations

import ctypes
import io
import mmap
import os
import weakref
from pathlib import Path

import numpy as np

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
FAILED = ctypes.c_void_p(-1).value


def map_file(path: Path) -> np.ndarray:
    """uint8 [bytes] of a file, mapped read-only; valid after the file is removed, and no descriptor stays open.

    Python's own mmap keeps a descriptor for every file (until 3.13, where `trackfd` came), and a store has one file for
    every column of every shard.

    Args:
        path: the file

    Raises:
        OSError: it cannot be opened or mapped
    """
    with open(path, "rb", opener=_open_no_link) as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            return np.zeros(0, np.uint8)
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address == FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    memory = (ctypes.c_char * size).from_address(address)
    # not at exit: arrays may be in use until the very end, and the system unmaps then anyway
    weakref.finalize(memory, _libc.munmap, address, size).atexit = False
    return np.frombuffer(memoryview(memory).toreadonly(), np.uint8)


def _open_no_link(path: str, flags: int) -> int:
    # a link in a store may lead anywhere
    return os.open(path, flags | os.O_NOFOLLOW)


def map_array(path: Path) -> np.ndarray:
    """The array of a .npy file, mapped read-only; a ValueError where the file is not exactly one plain array.

    Args:
        path: the file

    Raises:
        ValueError: it is not exactly one plain array
    """
    raw = map_file(path)
    head = io.BytesIO(raw[:4096].tobytes())
    try:
        version = np.lib.format.read_magic(head)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(head)
    except Exception as error:
        # numpy evaluates the header as Python text, so a flipped bit may give any error at all
        raise ValueError(f"its header cannot be read: {error}") from None
    if dtype.hasobject or (fortran and len(shape) > 1):
        raise ValueError(f"holds {dtype} in {'Fortran' if fortran else 'C'} order; needs plain numbers in C order")
    data, size = raw[head.tell() :], int(np.prod(shape)) * dtype.itemsize
    if len(data) != size:
        raise ValueError(f"holds {len(data):,} bytes of data; its header says {size:,}")
    return data.view(dtype).reshape(shape)
