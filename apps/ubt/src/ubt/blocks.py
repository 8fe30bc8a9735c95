"""Blocks of user vectors on disk: the network's, aggregates and collaborative ones, alone and side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runkit.files import atomic_folder, file_hash, read_json, write_json
from seqdata import positions_of
from ubt.cf import collaborative
from ubt.config import Config, parse_blocks
from ubt.features import Features, aggregates, official_features
from ubt.prepare import Prepared

MAX_DIMS = 2048
CHUNK = 1 << 15
# Standardised features are cut here, in standard deviations.
LIMIT = 10.0
# Largest number that float16 holds.
LARGEST = 65504.0
# Organisers' features as they come, the rival of every block; not a block one may ask for.
BASELINE = "official baseline"


def write_blocks(prepared: Prepared, config: Config, baseline: bool = True) -> dict[str, Path]:
    """Write the blocks that `config.blocks` names and their concatenation below the embeddings folder.

    Each lies in a folder of its own, as ``embeddings.npy`` float16 and ``client_ids.npy``, in the order of the users
    asked for: ``blocks/<name>``, standardised over the users and cut at ten standard deviations; ``all``, the blocks
    side by side; ``blocks/official baseline``, raw, where `baseline` asks for it. All are made of events before
    train_start. A user without events has zeros, which is the average user, in all but the network's block. Memory does
    not grow with the users; what is on disk already is kept.

    Returns:
        The folder of every block, of the baseline, and of "all" where there are several.

    Raises:
        FileNotFoundError: if the network's embeddings are missing; names the command that helps
        ValueError: if they are no entry the challenge accepts, or all together have more than 2048 dims
    """
    names = parse_blocks(config.blocks)
    before, settings = prepared.train_start, config.features
    windows = settings.windows_days
    made: dict[str, Callable[[], Iterator[Features]]] = {
        "aggregates": lambda: aggregates(prepared, before, windows),
        "cf": lambda: collaborative(prepared, before, settings, config.seed),
        BASELINE: lambda: official_features(prepared, before, windows),
    }
    folders = {}
    for name in [*names, *([BASELINE] if baseline else [])]:
        folders[name] = config.embeddings / "blocks" / name
        state = _state(prepared, config, name)
        if read_json(folders[name] / "block.json") == state:
            continue
        with atomic_folder(folders[name], "ubt block") as new:
            if name == "hstu":
                parts, present = _network_parts(prepared, config.embeddings), np.ones(len(prepared.users), bool)
            else:
                parts, present = made[name](), prepared.seen(before)
            _write(new, parts, prepared.users, present, standardise=name != BASELINE)
            write_json(new / "block.json", state)
    if len(names) > 1:
        folders["all"] = config.embeddings / "all"
        _concatenate(folders["all"], [folders[name] for name in names], prepared)
    return folders


def check_entry(vectors: NDArray, ids: NDArray, users: NDArray) -> None:
    """Check that vectors [U, D] and client ids [U] are an entry that the challenge accepts.

    Raises:
        ValueError: if the vectors are not float16 with 1 to 2048 dims and finite, or the ids are not each of `users`
            [U] once; names what was found
    """
    if vectors.ndim != 2 or vectors.dtype != np.float16 or not 0 < vectors.shape[1] <= MAX_DIMS:
        raise ValueError(f"embeddings.npy: got {vectors.dtype} {vectors.shape}, needs float16 [users, 1..{MAX_DIMS}]")
    if ids.ndim != 1 or ids.dtype != users.dtype:
        raise ValueError(f"client_ids.npy: got {ids.dtype} {ids.shape}, needs {users.dtype} [users]")
    if len(ids) != len(vectors) or not np.array_equal(np.sort(ids), np.sort(users)):
        raise ValueError(
            f"client_ids.npy: got {len(ids)} ids for {len(vectors)} rows, needs each of the {len(users)} relevant "
            f"clients once; {len(np.setdiff1d(users, ids))} are missing, {len(np.setdiff1d(ids, users))} are unknown"
        )
    for start in range(0, len(vectors), CHUNK):
        finite = np.isfinite(vectors[start : start + CHUNK]).all(1)
        if not finite.all():
            where = ids[start : start + CHUNK][~finite][0]
            raise ValueError(f"embeddings.npy: NaN or infinite in the row of client {where}")


def open_entry(folder: str | Path, users: NDArray) -> tuple[NDArray[np.float16], NDArray]:
    """Return vectors [U, D], memory-mapped, and client ids [U] of a folder after `check_entry`.

    Raises:
        FileNotFoundError: if a file is missing; names the command that helps
    """
    folder = Path(folder)
    for name in ("embeddings.npy", "client_ids.npy"):
        if not (folder / name).exists():
            raise FileNotFoundError(
                f"{folder / name}: not found; run `ubt embed` with the same --config and --run-dir first"
            )
    vectors, ids = np.load(folder / "embeddings.npy", mmap_mode="r"), np.load(folder / "client_ids.npy")
    check_entry(vectors, ids, users)
    return vectors, ids


def _network_parts(prepared: Prepared, folder: Path) -> Iterator[Features]:
    vectors, ids = open_entry(folder, prepared.users)
    rows = positions_of(prepared.users, ids)
    names = [f"hstu {i}" for i in range(vectors.shape[1])]
    for start in range(0, len(rows), CHUNK):
        stop = min(start + CHUNK, len(rows))
        yield Features(np.arange(start, stop), vectors[rows[start:stop]].astype(np.float32), names)


def _write(
    folder: Path, parts: Iterator[Features], users: NDArray, present: NDArray[np.bool_], standardise: bool
) -> None:
    """Stream features to disk as float16, zeros for users not `present`; then, where asked, standardise them."""
    out: np.memmap | None = None
    names: list[str] = []
    total = square = np.zeros(0)
    for part in parts:
        if out is None:
            names, shape = part.names, (len(users), part.values.shape[1])
            if shape[1] > MAX_DIMS:
                raise ValueError(f"{folder.name}: has {shape[1]} dims, the challenge accepts {MAX_DIMS}")
            out = np.lib.format.open_memmap(folder / "embeddings.npy", mode="w+", dtype=np.float16, shape=shape)
            total = square = np.zeros(shape[1])
        here = present[part.rows]
        values = np.clip(part.values[here], -LARGEST, LARGEST).astype(np.float16)
        out[part.rows[here]] = values
        exact = values.astype(np.float64)
        total, square = total + exact.sum(0), square + (exact**2).sum(0)
    if out is None or not present.any():
        raise ValueError("log: none of the users asked for has an event before train_start")
    if standardise:
        mean = total / present.sum()
        scale = np.sqrt(np.maximum(square / present.sum() - mean**2, 0))
        # A constant feature becomes zero.
        scale[scale < 1e-6 * np.maximum(np.abs(mean), 1)] = np.inf
        for start in range(0, len(out), CHUNK):
            chunk = slice(start, start + CHUNK)
            values = ((out[chunk].astype(np.float64) - mean) / scale).clip(-LIMIT, LIMIT)
            out[chunk] = np.where(present[chunk, None], values, 0)
    out.flush()
    np.save(folder / "client_ids.npy", users)
    (folder / "features.txt").write_text("".join(f"{name}\n" for name in names))


def _concatenate(folder: Path, parts: list[Path], prepared: Prepared) -> None:
    blocks = [np.load(part / "embeddings.npy", mmap_mode="r") for part in parts]
    dims = [block.shape[1] for block in blocks]
    if sum(dims) > MAX_DIMS:
        listed = " + ".join(f"{dim} ({part.name})" for dim, part in zip(dims, parts, strict=True))
        raise ValueError(f"blocks: {listed} = {sum(dims)} dims, the challenge accepts {MAX_DIMS}; use fewer or smaller")
    with atomic_folder(folder, "ubt block") as new:
        shape = (len(prepared.users), sum(dims))
        out = np.lib.format.open_memmap(new / "embeddings.npy", mode="w+", dtype=np.float16, shape=shape)
        for start in range(0, shape[0], CHUNK):
            out[start : start + CHUNK] = np.concatenate([block[start : start + CHUNK] for block in blocks], 1)
        out.flush()
        np.save(new / "client_ids.npy", prepared.users)
        widths = {part.name: dim for part, dim in zip(parts, dims, strict=True)}
        write_json(new / "block.json", {"log": prepared.fingerprint, "blocks": widths})


def _state(prepared: Prepared, config: Config, name: str) -> dict[str, object]:
    """What a block on disk was made of."""
    state: dict[str, object] = {"log": prepared.fingerprint, "block": name}
    if name == "hstu":
        files = [config.embeddings / file for file in ("embeddings.npy", "client_ids.npy")]
        state["embeddings"] = [file_hash(path) for path in files if path.exists()]
    else:
        state |= {"features": asdict(config.features), "seed": config.seed}
    return json.loads(json.dumps(state))
