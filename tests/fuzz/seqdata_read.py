"""Random logs and random chains of what a view can do, against plain Python lists; pickles, changes and damage.

The oracle is a list of users with their events in order, and every step does to it what the documentation says.
"""

import pickle
import random
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import seqdata
from seqdata import aggregates, labels

SECOND = 1_000_000
ITEMS, BRANDS = list(range(12)), [None, "a", "b", "c", "é", "zz"]


def tries(seed: int, seconds: float) -> dict[str, int]:
    """Fuzz for some seconds.

    Args:
        seed: of everything drawn.
        seconds: after which no new store is built.

    Returns:
        How many stores, views, batches, pickles and damaged files held.

    Raises:
        AssertionError: On the first that did not, naming the try's own seed.
    """
    counts: Counter[str] = Counter()
    end, number = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        own = seed * 1_000_003 + number
        folder = Path(tempfile.mkdtemp(prefix="seqdata_fuzz"))
        try:
            _one(random.Random(own), folder, counts)
        except Exception as error:
            raise AssertionError(f"try {own} (seed {seed}, number {number}): {error!r}") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        number += 1
    return dict(counts)


def _one(draw: random.Random, folder: Path, counts: Counter[str]) -> None:
    text, fit = draw.random() < 0.4, draw.choice([None, 40])
    rows = draw.choice([1, 5, 60, 300])
    log = _log(draw, rows, text, 0)
    options = {"user": "user", "time": "time", "time_unit": "s", "progress": False}
    fields = {"item": seqdata.Categorical(), "brand": seqdata.Categorical(), "price": seqdata.Numeric("float64")}
    fields["row"] = seqdata.Numeric("int64")
    before = None if fit is None else fit * SECOND
    shards = draw.choice([1, 1, 2, 5])
    store = seqdata.build(log, folder / "s", fields=fields, fit_before=before, shards=shards, **options)
    known = _known(log, fit)
    while draw.random() < 0.4:
        more = _log(draw, draw.randint(1, 80), text, len(log))
        store = seqdata.append(store, more, progress=False)
        log = pd.concat([log, more], ignore_index=True)
    if draw.random() < 0.3:
        store = seqdata.compact(store)
    counts["stores"] += 1
    held = []
    for _ in range(6):
        view, oracle = _chain(draw, store, _Oracle(log, known))
        _same(view, oracle)
        _batches(draw, view, counts)
        _sums(draw, view, oracle)
        counts["views"] += 1
        held.append((pickle.dumps(view), _contents(view)))
    again = seqdata.open_store(store.path)
    if draw.random() < 0.5:
        seqdata.append(again, _log(draw, 20, text, 0), progress=False)
    else:
        seqdata.build(_log(draw, 20, text, 0), store.path, fields=fields, overwrite=True, **options)
    for pickled, contents in held:
        assert _contents(pickle.loads(pickled)) == contents
        counts["pickles"] += 1
    _damaged(draw, seqdata.open_store(store.path).path, counts)


def _log(draw: random.Random, rows: int, text: bool, first: int) -> pd.DataFrame:
    users = [draw.randint(0, draw.choice([3, 30])) for _ in range(rows)]
    return pd.DataFrame(
        {
            "user": [f"u{user}" for user in users] if text else users,
            "time": [draw.randint(0, draw.choice([5, 100])) for _ in range(rows)],
            "item": [draw.choice(ITEMS) for _ in range(rows)],
            "brand": pd.Series([draw.choice(BRANDS) for _ in range(rows)], dtype=object),
            "price": [draw.choice([float("nan"), float(draw.randint(0, 9))]) for _ in range(rows)],
            "row": range(first, first + rows),
        }
    )


def _known(log: pd.DataFrame, fit: int | None) -> dict[str, list[Any]]:
    """Values of the vocabularies by falling count before the fit, ties by value."""
    seen = log if fit is None else log[log.time < fit]
    counted = {name: Counter(value for value in seen[name] if value is not None) for name in ("item", "brand")}
    return {name: sorted(count, key=lambda one: (-count[one], one)) for name, count in counted.items()}


class _Oracle:
    """Users [(id, events)] of a view; an event is a dict with time and values as the store has them."""

    def __init__(self, log: pd.DataFrame, known: dict[str, list[Any]]) -> None:
        self.known, self.end, self.named, self.whole = known, None, False, True
        events: dict[Any, list[dict[str, Any]]] = {}
        for event in log.to_dict("records"):
            for name, values in known.items():
                value = event[name]
                event[name] = 0 if value is None else values.index(value) + 2 if value in values else 1
            events.setdefault(event["user"], []).append(event)
        self.all = {user: sorted(events[user], key=lambda one: one["time"]) for user in sorted(events)}
        self.users = list(self.all.items())
        self.kept = lambda event: True

    def born(self, user: Any) -> int:
        return self.all[user][0]["time"]

    def each(self, change: Any) -> None:
        self.users = [(user, change(events)) for user, events in self.users]

    def only(self, keep: Any) -> None:
        self.each(lambda events: [one for one in events if keep(one)])


def _chain(draw: random.Random, store: seqdata.Store, oracle: _Oracle) -> tuple[seqdata.View, _Oracle]:
    view = store.all()
    for _ in range(draw.randint(0, 5)):
        step = draw.choice(["as_of", "window", "select", "at", "at_least", "where", "last", "ratio", "core"])
        if step == "as_of":
            end = draw.randint(0, 110)
            view = view.as_of(end * SECOND)
            oracle.only(lambda one, end=end: one["time"] < end)
            if not oracle.named:
                oracle.users = [one for one in oracle.users if oracle.born(one[0]) < end]
        elif step == "window":
            low, high = sorted((draw.randint(0, 110), draw.randint(0, 110)))
            view = view.window(low * SECOND, high * SECOND)
            oracle.only(lambda one, low=low, high=high: low <= one["time"] < high)
        elif step == "select":
            # out of everybody's view any user may be named
            here = dict(oracle.users)
            pool = list(oracle.all) if oracle.whole else list(here)
            chosen = draw.sample(pool, draw.randint(0, len(pool)))
            view = view.select(chosen)
            oracle.users = [(user, here.get(user, [])) for user in chosen]
            oracle.named, oracle.whole = True, False
        elif step in ("at", "at_least"):
            least = draw.randint(0, 4)
            mask = [len(events) >= least if step == "at_least" else draw.random() < 0.7 for _, events in oracle.users]
            view = view.at_least(least) if step == "at_least" else view.at(np.array(mask, bool))
            oracle.users = [one for one, keep in zip(oracle.users, mask, strict=True) if keep]
            oracle.whole = False
        elif step == "where":
            field = draw.choice(["item", "brand"])
            if oracle.known[field]:
                values = draw.sample(oracle.known[field], draw.randint(1, len(oracle.known[field])))
                ids = {oracle.known[field].index(value) + 2 for value in values}
                view = view.where(field, values)
                oracle.only(lambda one, field=field, ids=ids: one[field] in ids)
        elif step == "last":
            number, which = draw.randint(0, 3), draw.randint(0, 1)
            view = view.leave_last(number)[which]
            oracle.each(
                lambda events, n=number, w=which: (
                    events[len(events) - n :]
                    if w and n <= len(events)
                    else events
                    if w
                    else events[: max(len(events) - n, 0)]
                )
            )
        elif step == "ratio":
            which = draw.randint(0, 2)
            view = view.ratio(0.5, 0.25, 0.25)[which]
            oracle.each(
                lambda events, w=which: events[len(events) * 2 * w // 4 if w < 2 else len(events) * 3 // 4 :][
                    : [len(events) // 2, len(events) * 3 // 4 - len(events) // 2, len(events)][w]
                ]
            )
        else:
            k = draw.randint(1, 4)
            view = view.k_core("item", k)
            oracle.only(lambda one: one["item"] > 1)
            while True:
                often = Counter(one["item"] for _, events in oracle.users for one in events)
                users = [(user, events) for user, events in oracle.users if len(events) >= k]
                if len(users) == len(oracle.users) and all(often[i] >= k for i in often):
                    break
                users = [(user, [one for one in events if often[one["item"]] >= k]) for user, events in users]
                oracle.users, oracle.whole = [one for one in users if one[1]], False
    return view, oracle


def _contents(view: seqdata.View) -> list[Any]:
    found = view.gather(["row", "item", "brand", "price"])
    columns = [np.nan_to_num(found[name], nan=-1.0).tolist() for name in ("row", "item", "brand", "price", "timestamp")]
    values = [view.store.vocabulary(name).values.tolist() for name in ("item", "brand")]
    return [view.users.tolist(), found.offsets.tolist(), *columns, *values]


def _same(view: seqdata.View, oracle: _Oracle) -> None:
    users, offsets, row, item, brand, price, stamp, items, brands = _contents(view)
    events = [one for _, mine in oracle.users for one in mine]
    assert users == [user for user, _ in oracle.users], "users"
    assert np.diff(offsets).tolist() == [len(mine) for _, mine in oracle.users], "lengths"
    assert row == [one["row"] for one in events], "rows"
    assert stamp == [one["time"] for one in events], "times"
    assert item == [one["item"] for one in events] and brand == [one["brand"] for one in events], "ids"
    assert price == [-1.0 if one["price"] != one["price"] else one["price"] for one in events], "prices"
    assert items == oracle.known["item"] and brands == oracle.known["brand"], "vocabularies"
    assert np.array_equal(view.store.users[view.user_index], view.users), "user_index"


def _batches(draw: random.Random, view: seqdata.View, counts: Counter[str]) -> None:
    longest = int(view.lengths().max(initial=1))
    options = {
        "batch_size": draw.choice([None, 1, 3, 50]),
        "max_tokens": draw.choice([None, max(longest, 1), 2 * max(longest, 1) + 3]),
        "shuffle": draw.random() < 0.6,
        "seed": draw.randint(0, 9),
        "epoch": draw.randint(0, 3),
        "drop_empty": draw.random() < 0.5,
        "length_pool": draw.choice([None, None, 4]),
        "max_len": draw.choice([None, None, 2]),
    }
    if options["batch_size"] is options["max_tokens"] is None:
        options["batch_size"] = 2
    whole = list(view.batches(**options, fields=["row"]))
    seen = [user for one in whole for user in one.users.tolist()]
    asked = [
        user for user, n in zip(view.users.tolist(), view.lengths(), strict=True) if n or not options["drop_empty"]
    ]
    assert sorted(seen) == sorted(asked), "every user once"
    lengths = dict(zip(view.users.tolist(), view.lengths().tolist(), strict=True))
    for one in whole:
        assert len(one) <= (options["batch_size"] or len(one))
        assert one.jagged.offsets[-1] <= (options["max_tokens"] or one.jagged.offsets[-1])
        cut = options["max_len"] or 10**9
        assert one.jagged.lengths.tolist() == [min(lengths[user], cut) for user in one.users.tolist()]
        mine = view.select(one.users)
        expected = [
            row
            for low, high in zip(mine.gather([]).offsets, mine.gather([]).offsets[1:], strict=False)
            for row in mine.gather(["row"])["row"][max(low, high - cut) : high]
        ]
        assert one.jagged["row"].tolist() == expected
    start = draw.randint(0, len(whole))
    rest = [one.users.tolist() for one in view.batches(**options, fields=["row"], start=start)]
    assert rest == [one.users.tolist() for one in whole[start:]], "start"
    counts["batches"] += len(whole)


def _sums(draw: random.Random, view: seqdata.View, oracle: _Oracle) -> None:
    end, gap = draw.randint(0, 110), draw.randint(1, 9)
    past = aggregates.Past(view, end * SECOND, ["item", "brand", "price"])
    sessions, place = view.sessions(gap * SECOND).tolist(), 0
    found = [past.counts(), past.distinct("brand"), past.sums("price"), past.since_last(), past.sessions(gap * SECOND)]
    of = past.counts_of("item", [0, 1, 2, 3, 3])
    after = labels.counts(view, end * SECOND, [10 * SECOND])[:, 0]
    for i, (_, events) in enumerate(oracle.users):
        mine = [one for one in events if one["time"] < end]
        starts = [k for k, one in enumerate(mine) if k == 0 or one["time"] - mine[k - 1]["time"] > gap]
        last = end - mine[-1]["time"] if mine else np.nan
        total = sum(one["price"] for one in mine if one["price"] == one["price"])
        expected = [len(mine), len({one["brand"] for one in mine} - {0}), total, last, len(starts)]
        assert np.array_equal([one[i] for one in found], expected, equal_nan=True), "aggregates"
        assert of[i].tolist() == [sum(one["item"] == k and k > 1 for one in mine) for k in (0, 1, 2, 3, 3)]
        assert after[i] == sum(end <= one["time"] < end + 10 for one in events), "labels.counts"
        number = -1
        for k, one in enumerate(events):
            number += k == 0 or one["time"] - events[k - 1]["time"] > gap
            assert sessions[place] == number, "sessions"
            place += 1


def _damaged(draw: random.Random, path: Path, counts: Counter[str]) -> None:
    """A flipped, cut or lost file keeps the store from opening, or is named; the audit ends either way."""
    store = seqdata.open_store(path)
    current = [*path.glob(f"fitted/{store.schema['generation']:05d}/**/*"), path / "schema.json"]
    shards = [one for shard in store.schema["shards"] for one in (path / "shards" / shard["folder"]).iterdir()]
    del store
    file = draw.choice([one for one in current + shards if one.is_file()])
    raw = file.read_bytes()
    at = draw.randrange(len(raw))
    how = draw.choice(["flip", "cut", "lose"])
    if how == "lose":
        file.unlink()
    else:
        file.write_bytes(
            raw[:at] + (bytes([raw[at] ^ (1 << draw.randrange(8))]) + raw[at + 1 :] if how == "flip" else b"")
        )
    try:
        store = seqdata.open_store(path)
    except (seqdata.StoreError, FileNotFoundError) as error:
        assert path.name in str(error), "names nothing"
    else:
        found = store.verify()
        assert any(str(file) in one for one in found), f"{how} of {file} at {at} is not named: {found}"
        assert seqdata.audit(store).worst in ("error", "warning")
    counts["damaged files"] += 1
