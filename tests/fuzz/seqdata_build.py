"""Random logs built into stores, appended to, killed, cut off by a full disk, damaged and forged, against plain Python.

Whatever happens, a store is complete and right, or it is not there and says why; nothing else is ever touched.
"""

from __future__ import annotations

import datetime as dt
import decimal
import json
import math
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

import seqdata
from seqdata import Categorical, Hashed, Numeric, Vector, hashing

EPOCH = dt.datetime(2024, 1, 1)
TEXTS = ["", "a", "ä", "0", "007", 'say "hi"', "tab\there", "two\nlines", "x" * 300, "日本", " a", "NULL", "a,b"]


def tries(seed: int, seconds: float) -> dict[str, int]:
    """Fuzz for some seconds.

    Args:
        seed: of everything drawn.
        seconds: after which no new try begins.

    Returns:
        How many tries of each kind held.

    Raises:
        AssertionError: On the first that did not, naming the try's own seed.
    """
    counts: Counter[str] = Counter()
    end = time.monotonic() + seconds
    number = 0
    while time.monotonic() < end:
        # a kill costs a process, so there are fewer of them
        for name, one in KINDS.items() if number % 8 == 0 else list(KINDS.items())[:-1]:
            own = seed * 1_000_003 + number
            try:
                attempt(one, own)
            except Exception as error:
                raise AssertionError(f"{name}: try {own} (seed {seed}, number {number}): {error}") from error
            counts[name] += 1
        number += 1
    return dict(counts)


def attempt(one: Any, own: int) -> None:
    """One try of a kind in a folder of its own."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        one(random.Random(own), folder)
    finally:
        shutil.rmtree(folder)


class Log:
    """A random log: columns, how each is made, events as (user, time, values) and how to build it."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.text_users, self.zoned = draw.random() < 0.4, draw.random() < 0.2
        self.unit = draw.choice(["s", "ms", "us", "ns"])
        names = draw.sample(list(COLUMNS), draw.randint(1, 5))
        self.kinds = {f"c{i} {kind}": kind for i, kind in enumerate(names)}
        self.pools = {name: COLUMNS[kind][1](draw) for name, kind in self.kinds.items()}
        self.users = draw.choice([1, 5, 40])
        self.fields = {name: COLUMNS[kind][2](draw) for name, kind in self.kinds.items()}
        self.null_users, self.dedup = draw.random() < 0.3, draw.random() < 0.3
        self.fit_before = draw.choice([None, None, 0, 500, 10**6])
        self.options: dict[str, Any] = {
            "user": "who is",
            "time": "when",
            "fields": self.fields,
            "null_user": "drop" if self.null_users else "error",
            "dedup": self.dedup,
            "fit_before": None if self.fit_before is None else EPOCH + dt.timedelta(seconds=self.fit_before),
            "progress": False,
        }

    def events(self, rows: int) -> list[tuple]:
        """Some events; few times and values, so that many tie and repeat."""
        draw = self.draw
        made = []
        for _ in range(rows):
            user = draw.randrange(self.users) ** 2
            who: Any = f"u{user}ü" if self.text_users else user
            if self.null_users and draw.random() < 0.1:
                who = None
            values = tuple(None if draw.random() < 0.15 else draw.choice(pool) for pool in self.pools.values())
            made.append((who, draw.randrange(1000), values))
        return made

    def table(self, events: list[tuple]) -> pa.Table:
        stamps = [EPOCH + dt.timedelta(seconds=event[1]) for event in events]
        columns: dict[str, pa.Array] = {
            "who is": pa.array([event[0] for event in events], pa.string() if self.text_users else pa.int64()),
            "when": pa.array(stamps, pa.timestamp(self.unit, "UTC" if self.zoned else None)),
        }
        for i, (name, kind) in enumerate(self.kinds.items()):
            columns[name] = COLUMNS[kind][0]([event[2][i] for event in events])
        return pa.table(columns)

    def sources(self, events: list[tuple], folder: Path, stem: str) -> Any:
        """The events in memory or in files, in one piece or several."""
        draw, table = self.draw, self.table(events)
        cuts = sorted(draw.sample(range(len(events) + 1), draw.randint(0, 2)))
        pieces = [table.slice(start, end - start) for start, end in zip([0, *cuts], [*cuts, len(events)], strict=True)]
        if draw.random() < 0.3:
            return pieces
        paths = []
        for i, piece in enumerate(pieces):
            # CSV knows no lists and cannot tell an empty text from a missing one
            flat = set(self.kinds.values()) <= {"integers", "numbers"} and not self.text_users
            if flat and piece.num_rows and not self.null_users and draw.random() < 0.5:
                paths.append(folder / f"{stem}{i}.csv")
                pacsv.write_csv(piece, paths[-1])
            else:
                paths.append(folder / f"{stem}{i}.parquet")
                pq.write_table(piece, paths[-1], row_group_size=draw.choice([7, 1000]))
        return [str(path) for path in paths]


COLUMNS: dict[str, tuple[Any, Any, Any]] = {
    # kind: (values to Arrow, the values there are, the field)
    "integers": (
        lambda values: pa.array(values, pa.int64()),
        lambda draw: [draw.randrange(-5, 40) ** 3 for _ in range(draw.choice([3, 30]))],
        lambda draw: _categorical(draw),
    ),
    "texts": (
        lambda values: pa.array(values, pa.string()),
        lambda draw: draw.sample(TEXTS, 8) + [f"id-{draw.randrange(10**6)}" for _ in range(draw.choice([1, 60]))],
        lambda draw: _categorical(draw),
    ),
    "coded": (
        lambda values: pa.array(values, pa.string()).dictionary_encode(),
        lambda draw: draw.sample(TEXTS, 5),
        lambda draw: _categorical(draw),
    ),
    "uuids": (
        lambda values: pa.ExtensionArray.from_storage(
            pa.uuid(), pa.array([value and uuid.UUID(value).bytes for value in values], pa.binary(16))
        ),
        lambda draw: [str(uuid.UUID(int=draw.getrandbits(128))) for _ in range(20)],
        lambda draw: _categorical(draw),
    ),
    "decimals": (
        lambda values: pa.array([None if v is None else decimal.Decimal(v) for v in values], pa.decimal128(20, 0)),
        lambda draw: [draw.randrange(10**17) for _ in range(9)],
        lambda draw: _categorical(draw),
    ),
    "hashed": (
        lambda values: pa.array(values, pa.string()),
        lambda draw: draw.sample(TEXTS, 9),
        lambda draw: Hashed(draw.choice([1, 3, 1000]), draw.randrange(3)),
    ),
    "numbers": (
        lambda values: pa.array(values, pa.float64()),
        lambda draw: [0.0, 0.1, -2.5, draw.random()],
        lambda draw: Numeric(draw.choice(["float32", "float64"])),
    ),
    "vectors": (
        lambda values: pa.array(values, pa.list_(pa.float32())),
        lambda draw: [[draw.randrange(4) / 2, 1.5] for _ in range(6)],
        lambda draw: Vector(2, "float32"),
    ),
}


def _categorical(draw: random.Random) -> Categorical:
    return Categorical(draw.choice([1, 1, 3]), draw.choice([None, None, 4]), None, draw.choice([1, 1, 5]))


class Expected:
    """What a store of some events holds, by the book: kept event by event in plain Python."""

    def __init__(self, log: Log) -> None:
        self.log, self.kept = log, list[tuple]()
        self.values: dict[str, list] = {}
        self.dropped = 0

    def add(self, events: list[tuple], fit_before: int | None, grow: bool) -> None:
        """Adds a build's or an append's events; `grow`: whether vocabularies may get values."""
        events = [event for event in events if event[0] is not None]
        for i, (name, kind) in enumerate(self.log.kinds.items()):
            spec = self.log.fields[name]
            if not isinstance(spec, Categorical):
                continue
            counted = Counter(
                event[2][i]
                for event in events
                if event[2][i] is not None and (fit_before is None or event[1] < fit_before)
            )
            known = self.values.setdefault(name, [])
            fresh = [value for value, n in counted.items() if n >= spec.min_count and value not in known]
            fresh.sort(key=lambda value: (-counted[value], value if kind != "texts" else value.encode()))
            room = len(fresh) if spec.max_size is None else max(spec.max_size - len(known), 0)
            known += fresh[:room] if grow else []
        if self.log.dedup:
            seen = set()
            unique = []
            for event in events:
                mark = repr(event)
                if mark not in seen:
                    unique.append(event)
                    seen.add(mark)
            events = unique
        ids = [self._ids(name, [event[2][i] for event in events]) for i, name in enumerate(self.log.kinds)]
        self.kept += [(*event, own) for event, own in zip(events, zip(*ids, strict=True), strict=True)]

    def check(self, store: seqdata.Store) -> None:
        """Compares a store with this, event by event."""
        order = sorted(self.kept, key=lambda event: (event[0].encode() if self.log.text_users else event[0], event[1]))
        users = list(dict.fromkeys(event[0] for event in order))
        assert store.users.tolist() == users, "users"
        counts = Counter(event[0] for event in order)
        assert (store.offsets[1:] - store.offsets[:-1]).tolist() == [counts[user] for user in users], "offsets"
        epoch = int(EPOCH.replace(tzinfo=dt.timezone.utc).timestamp())
        assert store.time.tolist() == [(epoch + event[1]) * 1_000_000 for event in order], "times"
        for i, name in enumerate(self.log.kinds):
            wanted, ids = [event[2][i] for event in order], [event[3][i] for event in order]
            assert self._same(store, name, wanted, ids, store.column(name)), f"column {name!r}"
        assert store.verify() == [], "verify"

    def _same(self, store: seqdata.Store, name: str, wanted: list, ids: list[int], column: Any) -> bool:
        spec = self.log.fields[name]
        if isinstance(spec, Numeric):
            floats = pa.array(wanted, pa.float64()).cast(spec.dtype.replace("float32", "float")).to_pylist()
            return all(a == b or (a is None and math.isnan(b)) for a, b in zip(floats, column.tolist(), strict=True))
        if isinstance(spec, Vector):
            return store.vectors(name)[column].tolist() == [value or [0, 0] for value in wanted]
        if isinstance(spec, Hashed):
            return column.tolist() == ids
        vocabulary, values = store.vocabulary(name), self.values[name]
        assert vocabulary.values.tolist() == values, f"vocabulary of {name!r}"
        places = [id - spec.first_value for id in ids]
        assert vocabulary.decode(column) == [values[place] if place >= 0 else None for place in places], name
        return column.tolist() == ids

    def _ids(self, name: str, wanted: list) -> list[int]:
        """Ids of a batch's values, which later batches do not change."""
        spec = self.log.fields[name]
        if isinstance(spec, Hashed):
            rest, first = set(wanted) - {None}, {}
            for value in rest:
                first[value] = 2 + int(hashing.hash_values(pa.array([value]), spec.seed)[0] % spec.buckets)
        elif isinstance(spec, Categorical):
            first = {value: spec.first_value + i for i, value in enumerate(self.values[name])}
            rest = [value for value in set(wanted) - {None} if value not in first]
            if rest:
                arrow = pa.array(rest, pa.int64() if isinstance(rest[0], int) else pa.string())
                first |= dict(zip(rest, hashing.bucket(arrow, spec.oov_buckets).tolist(), strict=True))
        else:
            return [0] * len(wanted)
        return [0 if value is None else first[value] for value in wanted]


def logs(draw: random.Random, folder: Path) -> None:
    """Builds, and appends to, a random log."""
    log = Log(draw)
    expected = Expected(log)
    events = log.events(draw.choice([1, 30, 400]))
    if all(event[0] is None for event in events):
        return
    expected.add(events, log.fit_before, True)
    store = seqdata.build(
        log.sources(events, folder, "a"),
        folder / "s",
        shards=draw.choice([1, 1, 3]),
        memory_limit=draw.choice([None, "32MB"]),
        **log.options,
    )
    expected.check(store)
    for i in range(draw.choice([0, 1, 2])):
        events = log.events(draw.choice([1, 50]))
        if all(event[0] is None for event in events):
            continue
        cutoff = draw.choice([None, 2 * 10**6])
        before = log.fit_before if cutoff is None else cutoff
        expected.add(events, before, cutoff is not None)
        stamp = None if cutoff is None else EPOCH + dt.timedelta(seconds=cutoff)
        if cutoff is not None:
            log.fit_before = cutoff if log.fit_before is not None else None
        source = log.sources(events, folder, f"b{i}-")
        store = seqdata.append(store, source, fit_before=stamp, progress=False, taken="again")
        expected.check(store)
    if draw.random() < 0.5:
        expected.check(seqdata.compact(store))


def full_disk(draw: random.Random, folder: Path) -> None:
    """A build and an append on a disk that takes no file beyond a few bytes: done, or refused with nothing changed."""
    log = Log(draw)
    first, second = ([(0 if not log.text_users else "u", *e[1:]) for e in log.events(200)] for _ in range(2))
    expected = Expected(log)
    expected.add(first, log.fit_before, True)
    store = seqdata.build(log.table(first), folder / "s", **log.options)
    limit, old = draw.randrange(100, 6000), resource.getrlimit(resource.RLIMIT_FSIZE)
    table, longer = log.table(second), Expected(log)
    longer.kept, longer.values = list(expected.kept), expected.values
    for change in (
        lambda: seqdata.append(store, table, progress=False),
        lambda: seqdata.build(table, folder / "s", overwrite=True, **log.options),
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
        try:
            change()
        except OSError as error:
            assert "no space left" in str(error), error
        else:
            return
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        expected.check(seqdata.open_store(folder / "s"))
        assert [path.name for path in folder.iterdir()] == ["s"], list(folder.iterdir())


def damage(draw: random.Random, folder: Path) -> None:
    """A byte of a store is another: `verify` names the file, and opening it is right or a StoreError."""
    log = Log(draw)
    events = [(0 if not log.text_users else "u", *event[1:]) for event in log.events(50)]
    seqdata.build(log.table(events), folder / "s", shards=draw.choice([1, 2]), **log.options)
    files = sorted(path for path in (folder / "s").rglob("*") if path.is_file() and path.stat().st_size)
    path = draw.choice(files)
    raw = bytearray(path.read_bytes())
    if draw.random() < 0.3:
        raw = raw[: draw.randrange(len(raw))]
    else:
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    path.write_bytes(raw)
    try:
        store = seqdata.open_store(folder / "s")
    except seqdata.StoreError:
        return
    found = store.verify()
    assert any(path.name in line for line in found), (path, found)


def forged(draw: random.Random, folder: Path) -> None:
    """A schema.json that names files outside the store: refused, and what lies there is not touched."""
    log = Log(draw)
    events = [(0 if not log.text_users else "u", *event[1:]) for event in log.events(30)]
    store = seqdata.build(log.table(events), folder / "s", **log.options)
    store = seqdata.append(store, log.table(events), progress=False)
    del store
    outside = folder / "outside"
    outside.mkdir()
    for path in (folder / "s" / "shards" / "00000").iterdir():
        shutil.copy(path, outside / path.name)
    before = {path.name: path.read_bytes() for path in outside.iterdir()}
    for schema_path in (folder / "s").rglob("schema.json"):
        schema = json.loads(schema_path.read_text())
        bad = draw.choice(["../../../outside", str(outside), "..", "00000/../../../outside", "a/b", "", None, 7])
        if draw.random() < 0.5:
            draw.choice(schema["shards"])["folder"] = bad
        else:
            name = draw.choice(list(schema["fields"]))
            plain = schema["fields"][name]["file"]
            schema["fields"][name]["file"] = bad if not isinstance(bad, str) else f"{bad}/{plain}"
        schema_path.write_text(json.dumps(schema))
    try:
        store = seqdata.open_store(folder / "s")
    except (seqdata.StoreError, FileNotFoundError):
        pass
    else:
        try:
            seqdata.compact(store)
        except (seqdata.StoreError, ValueError):
            pass
        else:
            raise AssertionError("a forged store was opened and compacted")
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == before, "outside was changed"


def descriptors(draw: random.Random, folder: Path) -> None:
    """Many shards and few descriptors."""
    log = Log(draw)
    events = [(e[0] if e[0] is not None else ("u" if log.text_users else 1), *e[1:]) for e in log.events(200)]
    expected = Expected(log)
    expected.add(events, log.fit_before, True)
    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 40, old[1]))
    try:
        store = seqdata.build(log.table(events), folder / "s", shards=draw.choice([60, 100]), **log.options)
        expected.check(store)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, old)


CHILD = """
import sys
sys.path.insert(0, sys.argv[3])
import random
from pathlib import Path
import seqdata
from tests.fuzz.seqdata_build import Log
log = Log(random.Random(int(sys.argv[2])))
folder = Path(sys.argv[1])
print("ready", flush=True)
seqdata.build(sorted(map(str, folder.glob("*.parquet"))), folder / "s", shards=2, resume=True, **log.options)
"""


def kills(draw: random.Random, folder: Path) -> None:
    """A build that is killed again and again and resumed each time ends with the store of one that was not."""
    own = draw.randrange(10**9)
    log, expected = Log(random.Random(own)), None
    expected = Expected(log)
    events = [(e[0] if e[0] is not None else ("u" if log.text_users else 1), *e[1:]) for e in log.events(600)]
    for i in range(3):
        pq.write_table(log.table(events[i * 200 : i * 200 + 200]), folder / f"{i}.parquet")
    expected.add(events, log.fit_before, True)
    root = str(Path(__file__).parents[2])
    for _ in range(4):
        if (folder / "s").exists():
            break
        command = [sys.executable, "-c", CHILD, str(folder), str(own), root]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None and child.stderr is not None
            child.stdout.readline()
            time.sleep(draw.random() * 0.25)
            child.send_signal(signal.SIGKILL)
            said = child.stderr.read()
        assert child.returncode in (0, -signal.SIGKILL), said
    if not (folder / "s").exists():
        paths = sorted(map(str, folder.glob("*.parquet")))
        seqdata.build(paths, folder / "s", shards=2, resume=True, **log.options)
    expected.check(seqdata.open_store(folder / "s"))


KINDS = {
    "logs": logs,
    "full disks": full_disk,
    "damaged": damage,
    "forged": forged,
    "few descriptors": descriptors,
    "kills": kills,
}
