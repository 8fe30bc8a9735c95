"""Write the generated network's log: round by round to one file a day, then day by day in time order."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from synthlogs.buckets import Buckets
from synthlogs.folder import progress, whole_folder, write_mark
from synthlogs.friends.network import ACTIONS, REASONS, ROUNDS, Network
from synthlogs.friends.people import DAY, People
from synthlogs.ragged import texts
from synthlogs.settings import FriendsConfig

CHUNK_USERS = 200_000
FILES = ("events.parquet", "nodes.parquet", "truth/users.parquet", "truth/friendships.parquet")
ROW = np.dtype([("second", "<i8"), ("actor", "<i4"), ("target", "<i4"), ("action", "i1")])
TIME = pa.timestamp("ms", "UTC")


def generate(folder: str | Path, config: FriendsConfig, *, bar: bool = True) -> dict[str, float]:
    """Write ``events.parquet`` in time order, ``nodes.parquet`` and ``truth/``.

    The same config gives the same bytes. The folder appears in one step, when it is complete; memory holds the users,
    their friendships and one round or day of events.

    Args:
        bar: show a progress bar where stderr is a terminal

    Returns:
        Users, friendships and events of each kind.

    Raises:
        ValueError: if a size or date of the config cannot be.
        FileExistsError: if `folder` holds something that this function did not write.
    """
    config.check()
    start = int(datetime.strptime(config.start, "%Y-%m-%d").replace(tzinfo=timezone.utc).timestamp())
    with whole_folder(folder, FILES) as new, progress(ROUNDS + config.days, "generate", "step", bar) as shown:
        people = People.draw(config, np.random.default_rng([config.seed, 0]))
        (new / "truth").mkdir()
        _write_users(new, people, start)
        result: dict[str, float] = {"users": config.users, "friendships": 0, **dict.fromkeys(ACTIONS, 0)}
        with Buckets(new / "days", ROW) as days:
            with pq.ParquetWriter(new / "truth" / "friendships.parquet", _friendships(), store_schema=False) as writer:
                for events, friendship in Network(people, config).rounds():
                    kept = events["second"] < config.days * DAY
                    days.add(events["second"][kept] // DAY, {name: column[kept] for name, column in events.items()})
                    writer.write_table(_friendship_table(people, friendship, start))
                    result["friendships"] += len(friendship["second"])
                    shown.update()
            with pq.ParquetWriter(new / "events.parquet", _schema(), store_schema=False) as writer:
                for _, rows in days.read():
                    rows = rows[np.lexsort((rows["target"], rows["actor"], rows["action"], rows["second"]))]
                    writer.write_table(_event_table(people, rows, start))
                    for number, count in enumerate(np.bincount(rows["action"], minlength=len(ACTIONS))):
                        result[ACTIONS[number]] += int(count)
                    shown.update()
        write_mark(new, {"log": "friends", "config": asdict(config), "result": result})
    return result


def _event_table(people: People, rows: NDArray, start: int) -> pa.Table:
    columns = [
        pa.array(people.identity[rows["actor"]]),
        texts(rows["action"], pa.array(ACTIONS)).cast(pa.string()),
        pa.array(people.identity[rows["target"]]),
        _times(rows["second"], start),
    ]
    return pa.table(columns, _schema())


def _friendship_table(people: People, friendship: dict[str, NDArray], start: int) -> pa.Table:
    order = np.argsort(friendship["second"], kind="stable")
    actor, target, second, reason = (friendship[name][order] for name in ("actor", "target", "second", "reason"))
    columns = [
        pa.array(people.identity[actor]),
        pa.array(people.identity[target]),
        _times(second, start),
        texts(reason, pa.array(REASONS)).cast(pa.string()),
    ]
    return pa.table(columns, _friendships())


def _write_users(folder: Path, people: People, start: int) -> None:
    """Nodes and truth in the order of the users' ids, which says nothing of their communities."""
    order = np.argsort(people.identity)
    number, real = pa.int32(), pa.float32()
    shown = pa.schema(
        {"user": number, "region": pa.int8(), "age": pa.int8(), "interests": pa.list_(number), "joined": TIME}
    )
    hidden = pa.schema(
        {
            "user": number,
            "community": number,
            "region": pa.int8(),
            "position": pa.list_(real),
            "sociability": pa.float64(),
        }
    )
    with (
        pq.ParquetWriter(folder / "nodes.parquet", shown, store_schema=False) as nodes,
        pq.ParquetWriter(folder / "truth" / "users.parquet", hidden, store_schema=False) as truth,
    ):
        for first in range(0, len(order), CHUNK_USERS):
            who = order[first : first + CHUNK_USERS]
            user, joined = people.identity[who], _times(people.joined[who], start)
            told = [user, people.shown_region[who], people.age[who], _lists(people.interests[who]), joined]
            nodes.write_table(_table(told, shown))
            drawn = [
                user,
                people.community[who],
                people.region[who],
                _lists(people.position[who]),
                people.sociability[who],
            ]
            truth.write_table(_table(drawn, hidden))


def _table(columns: list, schema: pa.Schema) -> pa.Table:
    arrays = [column if isinstance(column, pa.Array) else pa.array(column) for column in columns]
    return pa.table([array.cast(field.type) for array, field in zip(arrays, schema, strict=True)], schema)


def _times(second: NDArray, start: int) -> pa.Array:
    return pa.array((second + start) * 1000).cast(TIME)


def _lists(values: NDArray) -> pa.Array:
    offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.ravel()))


def _schema() -> pa.Schema:
    return pa.schema({"actor": pa.int32(), "action": pa.string(), "target": pa.int32(), "time": TIME})


def _friendships() -> pa.Schema:
    return pa.schema({"user": pa.int32(), "friend": pa.int32(), "time": TIME, "reason": pa.string()})
