"""The .npy files of a log: who is asked for, who is active, what is asked about. They are data and never run code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray


def read_arrays(folder: Path) -> dict[str, NDArray]:
    """Return a layout's own arrays by stem: who is asked for, who is active, the targets and their popularity.

    Raises:
        FileNotFoundError: if a popularity has no targets
        ValueError: if a file is damaged, or holds no ids; names it
    """
    paths = [folder / "input" / "relevant_clients.npy", folder / "target" / "active_clients.npy"]
    paths += sorted((folder / "target").glob("*propensity_*.npy"))
    for path in paths:
        asked = path.with_name(path.name.removeprefix("popularity_"))
        if not asked.exists() and asked != path:
            raise FileNotFoundError(f"target/{asked.name}: missing beside target/{path.name}")
    return {path.stem: _load(path) for path in paths if path.exists()}


def _load(path: Path) -> NDArray:
    try:
        with path.open("rb") as file:
            array = _read(file)
    # Bytes that are no pickle can fail in any way.
    except Exception:
        raise ValueError(
            f"{path}: damaged, or no array; needs whole numbers or text (popularity: numbers), written by numpy.save"
        ) from None
    if array.ndim != 1:
        raise ValueError(f"{path}: got shape {array.shape}, needs one dimension")
    if not path.stem.startswith("popularity") and array.dtype.kind not in "iuU":
        raise ValueError(f"{path}: got {array.dtype} {array[:3]}, needs whole numbers or text as ids")
    return array


def _read(file: BinaryIO) -> NDArray:
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    if header(file)[2].hasobject:
        # The organisers save some of these as arrays of objects.
        return _Objects(file).array()
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


class _Objects(pickle.Unpickler):
    """Reads numbers and text out of a pickled array; nothing in the file is looked up, imported or called."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype", "scalar"):
            return _Held
        raise pickle.UnpicklingError(f"{module}.{name}: needs numbers or text")

    def array(self) -> NDArray:
        _, shape, _, _, values = self.load().state
        return np.array([_plain(value) for value in values]).reshape(shape)


class _Held:
    """What numpy would have been called with, as it stands in the file."""

    def __init__(self, *arguments: Any):
        self.arguments, self.state = arguments, ()

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _plain(value: Any) -> Any:
    if not isinstance(value, _Held):
        return value
    kind, content = value.arguments
    return np.frombuffer(content, kind.state[1] + kind.arguments[0])[0]
