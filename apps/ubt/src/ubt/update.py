"""New days of a log: embed the users who have new events, from what was kept of their old ones, and nobody else."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import torch
from numpy.typing import NDArray

import seqdata
from runkit.files import atomic_file, file_hash, read_json, write_json
from runkit.progress import progress
from ubt.batches import Reader
from ubt.config import Config, LogConfig
from ubt.embed import BATCH_USERS, Made, embed_users, finite
from ubt.log import challenge, connect, described
from ubt.log.base import COLUMNS
from ubt.log.sql import parse_moment
from ubt.model import UniversalBehavioralTransformer
from ubt.prepare import Prepared, fingerprints, seconds
from ubt.states import CacheWriter, cache_writer, place, read_chunk
from ubt.train import load

# A day more is a shard more, and every shard makes reading slower.
MOST_SHARDS = 8


def append_days(prepared: Prepared, data_dir: str | Path, new_data: str | Path, config: LogConfig) -> Prepared:
    """Add the events in the files of a folder to the prepared log and return it; no file is added twice.

    A file with the content of one that was prepared or added before is passed over, with a line that says so. Of the
    files that were prepared none is read again, unless its size or time has changed.

    Skus, URLs and other values that were not there before train_start stay unknown, as they are for the network.

    Args:
        prepared: the log
        data_dir: folder of the raw log it was made of
        new_data: folder of files laid out as in data_dir; event tables without new rows may be missing
        config: layout of the log

    Raises:
        ValueError: if the layout cannot grow, a new file does not fit, or one that was prepared has changed
    """
    facts = read_json(prepared.folder / "prepared.json")
    old, folder = facts["files"], Path(new_data)
    _need_unchanged(old, Path(data_dir))
    files = _new_files(facts["layout"], folder, config)
    added = _appended(prepared.folder / "updates.json", prepared.store)
    seen = added.keys() | {one["hash"] for one in old.values()}
    # Where the new days lie among the old ones, those that were prepared are known by their place.
    found = fingerprints(files, Path(data_dir), old)
    fresh = {path: one["hash"] for path, one in zip(files, found.values(), strict=True) if one["hash"] not in seen}
    if len(fresh) < len(files):
        print(f"update: {len(files) - len(fresh)} of {len(files)} files are in the log already", flush=True)
    if fresh:
        note = {"files": added, "adding": {key: path.name for path, key in fresh.items()}}
        write_json(prepared.folder / "updates.json", note | {"generation": prepared.store.schema["generation"]})
        seqdata.append(prepared.store, _sources(facts, list(fresh), config, connect()), progress=False)
        write_json(prepared.folder / "updates.json", {"files": added | note["adding"]})
    store = seqdata.open_store(prepared.store.path)
    if len(store.schema["shards"]) > MOST_SHARDS:
        store = seqdata.compact(store)
    return replace(prepared, store=store, known=np.flatnonzero(np.isin(prepared.users, store.users)))


def update(
    prepared: Prepared, checkpoint: str | Path, folder: str | Path, cache: str | Path, config: Config
) -> tuple[int, int, str]:
    """Bring ``embeddings.npy`` up to a later moment: users with new events get a new row, all other rows stay.

    A user's new events are attended to the keys and values that the last `embed` or `update` kept, so the old ones are
    not computed again. From all events in the store are embedded: users of whom nothing was kept, users with an event
    that came late, from before the last update, and users who now have more than max_seq_length events, of which the
    newest max_seq_length count, as in `embed`. Either way the row is what `embed` would write for that moment. The rows
    of all other users stay as of the moment at which they were made.

    Args:
        prepared: the log with its new events
        checkpoint: the network that `embed` used
        folder: where embeddings.npy and client_ids.npy lie
        cache: folder that `embed` or the last `update` wrote; replaced at the end, after the embeddings
        config: `update.until` and `embed.cache_gb`

    Returns:
        Users with a new row, how many of them came from the cache, and the new moment as text.

    Raises:
        FileNotFoundError: if there is no cache; names the command that helps
        ValueError: if the cache is of another network or other embeddings, or `update.until` lies before it
    """
    folder, cache = Path(folder), Path(cache)
    state = read_json(cache / "state.json")
    if not state:
        raise FileNotFoundError(f"{cache}: nothing to go on from; run `ubt embed` with the same --run-dir first")
    if state["checkpoint"] != file_hash(checkpoint):
        raise ValueError(f"{cache}: was written with another network than {checkpoint}; run `ubt embed` again")
    if state.get("embeddings") != place(folder, cache):
        raise ValueError(
            f"{cache}: was not kept for the embeddings in {folder}; run `ubt embed` with this --embeddings-dir first"
        )
    network, reader = load(checkpoint, prepared)
    moment = _until(prepared, config.update.until)
    before = state["moment"]
    if moment < before:
        raise ValueError(f"update.until: got {_text(moment)}, needs {_text(before)} or later, as of the last update")
    counts = np.load(cache / "counts.npy")
    now, old = (_lengths(prepared, limit) for limit in (moment, before))
    changed = now != counts
    # Late events change what stands before the cached rows; too many would push cached rows out.
    cached = changed & (old == counts) & (now <= network.max_seq_length)
    done = np.zeros(len(changed), bool)
    with cache_writer(cache, config.embed) as writer, atomic_file(folder / "embeddings.npy") as name:
        shutil.copyfile(folder / "embeddings.npy", name)
        out = np.load(name, mmap_mode="r+")
        if out.shape[0] != len(prepared.users):
            raise ValueError(f"{folder}/embeddings.npy: has {len(out)} rows, needs {len(prepared.users)}")
        with progress(int(changed.sum()), "update", unit="user") as bar:
            for path in sorted(cache.glob("*.pt")):
                if writer.full:
                    break
                rows, vectors = _continue(path, prepared, network, reader, (before, moment), changed, cached, writer)
                out[rows] = finite(vectors, prepared.users[rows])
                done[rows] = True
                bar.update(len(rows))
            reused = int(done.sum())
            rest = np.flatnonzero(changed & ~done)
            view = prepared.store.as_of(_datetime(moment)).select(prepared.users[rest])
            for rows, vectors in embed_users(network, reader, view, rest, moment, writer):
                out[rows] = finite(vectors, prepared.users[rows])
                bar.update(len(rows))
        out.flush()
        del out
        Made(prepared.fingerprint, state["checkpoint"], moment).write(folder)
        writer.finish(now, moment, checkpoint, folder, cache)
    return int(changed.sum()), reused, _text(moment)


def _continue(
    path: Path,
    prepared: Prepared,
    network: UniversalBehavioralTransformer,
    reader: Reader,
    window: tuple[int, int],
    changed: NDArray[np.bool_],
    cached: NDArray[np.bool_],
    writer: CacheWriter,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Carry one chunk on to the new moment; return the users with new events and their vectors."""
    rows, state = read_chunk(path)
    if not changed[rows].any():
        writer.keep(path)
        return np.zeros(0, np.int64), np.zeros((0, 1), np.float32)
    kept = np.flatnonzero(cached[rows] | ~changed[rows])
    rows = rows[kept]
    if not len(rows):
        return rows, np.zeros((0, 1), np.float32)
    view = prepared.store.all().window(_datetime(window[0]), _datetime(window[1])).select(prepared.users[rows])
    (batch,) = view.batches(BATCH_USERS, fields=reader.fields)
    with torch.inference_mode():
        state = state.select(torch.from_numpy(kept))
        vectors, state = network.advance(state, reader.sequences(batch), window[1])
    writer.add(rows, state)
    new = changed[rows]
    return rows[new], vectors.numpy()[new]


def _lengths(prepared: Prepared, moment: int) -> NDArray[np.int64]:
    """Events before a moment of every user asked for [U]."""
    lengths = np.zeros(len(prepared.users), np.int64)
    lengths[prepared.known] = prepared.history(_datetime(moment)).lengths()
    return lengths


def _until(prepared: Prepared, until: str | None) -> int:
    if until is None:
        last = max(shard["time_max"] for shard in prepared.store.schema["shards"])
        return last // 1_000_000 + 1
    return seconds(parse_moment(until, "update.until"))


def _datetime(moment: int) -> datetime:
    return datetime.fromtimestamp(moment, timezone.utc).replace(tzinfo=None)


def _text(moment: int) -> str:
    return _datetime(moment).isoformat(sep=" ")


def _need_unchanged(files: Mapping[str, Any], data_dir: Path) -> None:
    """Raise ValueError for the first prepared file that holds something else now; one that is gone is not missed."""
    there = [path for name in files if (path := data_dir / name).exists()]
    for name, one in fingerprints(there, data_dir, files).items():
        if one["hash"] != files[name]["hash"]:
            raise ValueError(
                f"{data_dir / name}: has changed since `ubt prepare` read it; needs new days in files of their own, or "
                "run `ubt prepare`, `ubt train` and `ubt embed` again"
            )


def _appended(path: Path, store: seqdata.Store) -> dict[str, str]:
    """Return the files that were added: hash -> name."""
    noted = read_json(path)
    # A process that died knew which files it was adding; the store knows whether it got that far.
    done = noted.get("generation", store.schema["generation"]) < store.schema["generation"]
    return noted.get("files", {}) | (noted["adding"] if done else {})


def _new_files(layout: str, folder: Path, config: LogConfig) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"update.new_data: {folder} is not a folder")
    if layout == "simple":
        raise ValueError(f"update.new_data: a log of layout {layout!r} cannot grow; run all steps on the new one")
    named = [path for name in COLUMNS if (path := folder / f"{name}.parquet").exists()]
    files = described.find_files(folder, config) if layout == "custom" else named
    if not files:
        raise FileNotFoundError(f"update.new_data: no file in {folder} is laid out as those of the log are")
    return files


def _sources(facts: dict[str, Any], files: list[Path], config: LogConfig, connection: duckdb.DuckDBPyConnection) -> Any:
    """The files as the store takes them: by event table, or as one table, read as the log was."""
    if facts["layout"] == "custom":
        table = described.new_table(files, config, connection)
        return connection.sql(described.events_sql(table, config, facts["reading"]))
    return {path.stem: str(path) for path in challenge.checked(files, connection)}
