"""One order of events over several shards.

A store of one shard needs none of this. Over several, which may share users, the index holds the sorted users of all,
their offsets, and for every event of that order its time and its place in the shards laid end to end.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from seqdata import layout
from seqdata.layout import one_chunk
from seqdata.spool import stable_order


def write_index(shards: list[Path], folder: Path, budget: int) -> tuple[int, int]:
    """Writes users, offsets, order and time of some shards; earlier shards come first where times tie.

    Args:
        shards: their folders
        folder: where the index goes; what is there is replaced
        budget: bytes held at a time, besides the users

    Returns:
        The number of users and events
    """
    # an earlier attempt may have left some of it
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    text = (shards[0] / "users.arrow").exists()
    offsets = [layout.read_array(shard / "offsets.npy") for shard in shards]
    places, count = _merge_text(shards, folder) if text else _merge_integers(shards, folder)
    lengths = np.zeros(count, np.int64)
    for place, offset in zip(places, offsets, strict=True):
        lengths[place] += np.diff(offset)
    ends = np.cumsum(lengths)
    layout.write_array(folder / "offsets.npy", np.append(np.int64(0), ends))
    events = int(ends[-1])
    times = [layout.read_array(shard / "time.npy") for shard in shards]
    bases = np.cumsum([0, *(len(time) for time in times)])
    low, step = 0, max(budget // 80, 1)
    with (
        layout.ArrayWriter(folder / "order.npy", np.int64) as order_file,
        layout.ArrayWriter(folder / "time.npy", np.int64) as time_file,
    ):
        while low < count:
            high = max(int(np.searchsorted(ends, (ends[low - 1] if low else 0) + step, "right")), low + 1)
            users, time, position = [], [], []
            for i, (place, offset) in enumerate(zip(places, offsets, strict=True)):
                first, last = np.searchsorted(place, [low, high])
                begin, end = int(offset[first]), int(offset[last])
                users.append(np.repeat(place[first:last], np.diff(offset[first : last + 1])))
                time.append(times[i][begin:end])
                position.append(np.arange(bases[i] + begin, bases[i] + end))
            merged = np.concatenate(time)
            order = stable_order(merged)
            order = order[stable_order(np.concatenate(users)[order])]
            order_file.append(np.concatenate(position)[order])
            time_file.append(merged[order])
            low = high
    return count, events


def _merge_integers(shards: list[Path], folder: Path) -> tuple[list[np.ndarray], int]:
    users = [layout.read_array(shard / "users.npy") for shard in shards]
    merged = np.unique(np.concatenate(users))
    layout.write_array(folder / "users.npy", merged)
    return [np.searchsorted(merged, one) for one in users], len(merged)


def _merge_text(shards: list[Path], folder: Path) -> tuple[list[np.ndarray], int]:
    users = [one_chunk(layout.read_table(shard / "users.arrow").column("user")) for shard in shards]
    merged = pc.unique(pa.chunked_array(users))
    merged = merged.take(pc.sort_indices(merged))
    layout.write_table(folder / "users.arrow", pa.table({"user": merged}))
    return [pc.index_in(one, merged).to_numpy().astype(np.int64) for one in users], len(merged)
