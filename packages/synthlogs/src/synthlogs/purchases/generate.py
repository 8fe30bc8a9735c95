"""Write the generated shop's log: two pilots fix size and rate, then block by block of users, then day by day."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm import tqdm

from synthlogs.buckets import Buckets
from synthlogs.draws import root, sigmoid
from synthlogs.folder import progress, whole_folder, write_mark
from synthlogs.purchases.catalogue import DAY, Catalogue
from synthlogs.purchases.users import COMPANION, PURCHASE, Users
from synthlogs.ragged import texts
from synthlogs.settings import PurchasesConfig
from synthlogs.text import uuids_of

BLOCK_USERS = 40_000
KINDS = ("view", "cart", "purchase")
# Not from strftime, whose names follow the locale.
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
FILES = ("????-???.parquet", "truth/????-???.parquet", "truth/products.parquet", "truth/users.parquet")
ROW = np.dtype(
    [("second", "<i8"), ("session", "<i8"), ("user", "<i4"), ("product", "<i4"), ("kind", "i1"), ("propensity", "<f4")]
)
FIRST_USER = 512_000_000


@dataclass(frozen=True)
class World:
    """What the pilots found: how many users give the rows, and the intercept that gives the rate of purchases."""

    users: int
    intercept: float


def generate(folder: str | Path, config: PurchasesConfig, *, bar: bool = True) -> dict[str, float]:
    """Write ``2019-Nov.parquet`` and so on, one file a month in time order, and ``truth/``.

    ``truth/`` has a file for every month whose row i is the propensity of the month's row i, the latents of the users
    and those of the products. The same config gives the same bytes. The folder appears in one step, when it is
    complete; memory holds one block of users or one day.

    Args:
        bar: show a progress bar where stderr is a terminal

    Returns:
        Users, sessions and rows of each kind.

    Raises:
        ValueError: if a size, rate or date of the config cannot be.
        FileExistsError: if `folder` holds something that this function did not write.
    """
    config.check()
    with whole_folder(folder, FILES) as new, progress(2 * config.rows, "generate", "row", bar) as shown:
        catalogue = Catalogue.draw(config, np.random.default_rng([config.seed, 0]))
        world = _world(catalogue, config)
        (new / "truth").mkdir()
        _write_products(new, catalogue, config)
        with Buckets(new / "days", ROW) as days:
            sessions = 0
            with pq.ParquetWriter(new / "truth" / "users.parquet", _user_schema()) as writer:
                for number, first in enumerate(range(0, world.users, BLOCK_USERS)):
                    count = min(BLOCK_USERS, world.users - first)
                    rng = np.random.default_rng([config.seed, 1, number])
                    users = Users(catalogue, count, world.intercept, config.days, rng)
                    events = _block(users, first, sessions)
                    sessions += users.count
                    kept = events["second"] < config.days * DAY
                    days.add(events["second"][kept] // DAY, {name: column[kept] for name, column in events.items()})
                    writer.write_table(_user_table(users, first))
                    shown.update(int(kept.sum()))
            counts = _write_days(new, days, catalogue, config, shown)
        result = {"users": world.users, "sessions": sessions, **counts}
        write_mark(new, {"log": "purchases", "config": asdict(config), "world": asdict(world), "result": result})
    return result


def _world(catalogue: Catalogue, config: PurchasesConfig) -> World:
    """Solve for the intercept on pilots, again and again: what is bought changes what is looked at next."""
    intercept = -float(np.log(config.ratio))
    rows, pilots = 0, 3
    number = int(np.clip(config.rows // 100, 4_000, 20_000))
    for pilot in range(pilots):
        rng = np.random.default_rng([config.seed, 2, pilot])
        sessions = list(Users(catalogue, number, intercept, config.days, rng).sessions())
        odds = np.concatenate([one.odds for one in sessions])
        views = sum(one.views for one in sessions)
        rows += sum(len(one.events["user"]) for one in sessions)
        # Companions add to what a session buys.
        bought = sum((one.events["kind"] == PURCHASE).sum() for one in sessions)
        expected = sum(float(sigmoid(intercept + one.odds).sum()) for one in sessions)
        each = 1 + COMPANION * 0.2 if bought < 200 else bought / expected
        wanted = views / config.ratio / each / len(odds)
        intercept = _intercept(odds, wanted)
    return World(max(1, round(config.rows * pilots * number / rows)), intercept)


def _intercept(odds: NDArray[np.float64], wanted: float) -> float:
    """The intercept with which a share `wanted` of the sessions buys."""
    return root(lambda x: float(sigmoid(x + odds).mean()) - wanted, -40.0, 20.0)


def _block(users: Users, first: int, sessions: int) -> dict[str, NDArray]:
    parts = [one.events for one in users.sessions()]
    events = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
    return events | {"user": events["user"] + first, "session": events["session"] + sessions}


def _write_days(
    folder: Path, days: Buckets, catalogue: Catalogue, config: PurchasesConfig, shown: tqdm
) -> dict[str, float]:
    start = datetime.strptime(config.start, "%Y-%m-%d").replace(tzinfo=timezone.utc)
    counts: dict[str, float] = dict.fromkeys(KINDS, 0)
    month, stack = "", ExitStack()
    with stack:
        writers: list[pq.ParquetWriter] = []
        for day, rows in days.read():
            # A session is of one user, and its rows were added in order.
            rows = rows[np.lexsort((rows["session"], rows["second"]))]
            date = start + timedelta(days=day)
            name = f"{date.year}-{MONTHS[date.month - 1]}.parquet"
            if name != month:
                stack.close()
                paths = (folder / name, folder / "truth" / name)
                writers = [
                    stack.enter_context(pq.ParquetWriter(path, schema, store_schema=False))
                    for path, schema in zip(paths, (_schema(), _truth_schema()), strict=True)
                ]
                month = name
            writers[0].write_table(_day_table(rows, catalogue, start, config.seed))
            writers[1].write_table(pa.table([rows["propensity"]], schema=_truth_schema()))
            for number, kind in enumerate(KINDS):
                counts[kind] += int((rows["kind"] == number).sum())
            shown.update(len(rows))
    return counts


def _day_table(rows: NDArray, catalogue: Catalogue, start: datetime, seed: int) -> pa.Table:
    product = rows["product"].astype(np.int64)
    category, brand = catalogue.category[product], catalogue.brand[product]
    session, which = np.unique(rows["session"], return_inverse=True)
    columns = [
        pa.array((rows["second"] + int(start.timestamp())) * 1000).cast(pa.timestamp("ms", "UTC")),
        texts(rows["kind"], pa.array(KINDS)),
        pa.array(catalogue.product_id[product]),
        pa.array(catalogue.category_id[category]),
        catalogue.category_code.take(pa.array(category)),
        texts(np.maximum(brand, 0), catalogue.brand_names, brand < 0),
        pa.array(catalogue.paid(product, rows["second"])),
        pa.array(_user_id(rows["user"])),
        texts(which, uuids_of(session, seed)),
    ]
    return pa.table([column.cast(field.type) for column, field in zip(columns, _schema(), strict=True)], _schema())


def _write_products(folder: Path, catalogue: Catalogue, config: PurchasesConfig) -> None:
    category = catalogue.category
    mass = np.bincount(category, catalogue.popularity)[category]
    first = int(datetime.strptime(config.start, "%Y-%m-%d").replace(tzinfo=timezone.utc).timestamp())
    columns = {
        "product_id": catalogue.product_id,
        "category_id": catalogue.category_id[category],
        "complement_category_id": catalogue.category_id[catalogue.complement[category]],
        "share_of_category": catalogue.popularity / mass,
        "style": _vectors(catalogue.style),
        "relative_price": catalogue.relative_price,
        "quality": catalogue.quality,
        "launch": pa.array((first + catalogue.launch * DAY) * 1000).cast(pa.timestamp("ms", "UTC")),
    }
    pq.write_table(pa.table(columns), folder / "truth" / "products.parquet")


def _user_table(users: Users, first: int) -> pa.Table:
    interests = users.catalogue.category_id[users.interests]
    columns = [
        pa.array(_user_id(first + np.arange(len(users.wealth)))),
        _vectors(users.taste),
        pa.array(users.wealth),
        pa.array(users.readiness),
        _vectors(interests),
    ]
    return pa.table(columns, schema=_user_schema())


def _user_id(number: NDArray) -> NDArray[np.int32]:
    return (FIRST_USER + 7 * number.astype(np.int64)).astype(np.int32)


def _vectors(values: NDArray) -> pa.Array:
    offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.ravel()))


def _schema() -> pa.Schema:
    return pa.schema(
        {
            "event_time": pa.timestamp("ms", "UTC"),
            "event_type": pa.string(),
            "product_id": pa.int32(),
            "category_id": pa.int64(),
            "category_code": pa.string(),
            "brand": pa.string(),
            "price": pa.float64(),
            "user_id": pa.int32(),
            "user_session": pa.string(),
        }
    )


def _truth_schema() -> pa.Schema:
    return pa.schema({"propensity": pa.float32()})


def _user_schema() -> pa.Schema:
    number = pa.float64()
    types = {"taste": pa.list_(pa.float32()), "wealth": number, "readiness": number, "interests": pa.list_(pa.int64())}
    return pa.schema({"user_id": pa.int32(), **types})
