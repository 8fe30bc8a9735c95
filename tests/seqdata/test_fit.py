"""Vocabularies, text users and vectors larger than the memory limit: same ids, bounded memory."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import seqdata
from seqdata import hashing, tables
from seqdata.entries import Coded, Entries, EntryWriter
from seqdata.fit import Old, Rules, fit_ids
from seqdata.texts import spread, text_order

KINDS = [pa.int64(), pa.string(), pa.binary()]
CATEGORICAL = [Rules(), Rules(least=2, room=300, buckets=5)]
CASES = [(rules, kind, old) for rules in CATEGORICAL for kind in KINDS[:2] for old in (False, True)]
CASES += [
    (Rules("value", 0, 0), pa.string(), False),
    *((Rules("seen", 1, 0), pa.binary(), old) for old in (False, True)),
]


def values(kind: pa.DataType, numbers: np.ndarray) -> list:
    if kind == pa.int64():
        return (numbers - 300).tolist()
    texts = [
        "" if n == 7 else ("ä" if n % 3 else "shared/start/") + f"{n * 7919 % 1000}" * (1 + n % 4) for n in numbers
    ]
    return texts if kind == pa.string() else [text.encode() for text in texts]


@pytest.mark.parametrize("parts", [1, 3, 40])
@pytest.mark.parametrize(("rules", "kind", "old"), CASES, ids=str)
def test_ids_by_the_book(tmp_path, rules, kind, old, parts):
    if (kind == pa.binary() and rules.buckets > 1) or (old and rules.first == 0):
        pytest.skip("no field is numbered so")
    rng = np.random.default_rng(parts)
    writer = EntryWriter(tmp_path / "e.arrow", kind)
    read, counts = [], pd.Series(dtype=np.int64)
    for _ in range(5):
        batch = list(dict.fromkeys(values(kind, rng.integers(0, 1000, 700))))
        count = rng.integers(0, 3, len(batch))
        writer.add(Coded(np.zeros(1, np.int32), pa.array(batch, kind), count))
        counts = counts.add(pd.Series(count, index=pd.Index(batch, dtype=object)), fill_value=0)
        read += batch
    writer.close()
    entries = Entries(kind, [tmp_path / "e.arrow"], writer.count, writer.bytes, tmp_path / "remap")
    known = values(kind, np.arange(500, 1300, 100)) if old else []
    table = pa.record_batch([pa.array(known, kind), pa.array([1] * len(known), pa.int64())], ["value", "count"])
    before = Old(len(known), lambda: [table.slice(0, 3), table.slice(3)], True) if old else None
    (tmp_path / "w").mkdir()
    made = list(fit_ids(entries, rules, tmp_path / "w", -(-entries.weight // parts), before))
    got = [pair for batch in made for pair in zip(*(column.to_pylist() for column in batch.columns), strict=True)]
    key = {"count": lambda v: (-counts[v], v), "seen": lambda v: (counts[v] == 0, v), "value": lambda v: v}[rules.order]
    fresh = sorted((v for v in counts.index if counts[v] >= rules.least and v not in known), key=key)
    want = (known + fresh)[: rules.room]
    assert got == [(v, counts.get(v, 0) + (v in known)) for v in want]
    ids = {value: i + rules.first for i, value in enumerate(want)}
    rest = [v for v in counts.index if v not in ids]
    if rest:
        ids |= zip(rest, hashing.bucket(pa.array(rest, kind), rules.buckets).tolist(), strict=True)
    assert np.fromfile(tmp_path / "remap", np.int32).tolist() == [ids[v] for v in read]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_order_and_spread(kind):
    rng = np.random.default_rng(0)
    array = pa.array(values(kind, rng.integers(0, 1000, 3000)), kind).slice(5)
    assert array.take(pa.array(text_order(array))).to_pylist() == sorted(array.to_pylist())
    hashes = dict(zip(array.to_pylist(), spread(array).tolist(), strict=True))
    assert [hashes[value] for value in array.to_pylist()] == spread(array).tolist()
    assert len(set(hashes.values())) == len(hashes)
    assert len(spread(array.slice(0, 0))) == len(text_order(array.slice(0, 0))) == 0


def test_hash_of_long_texts_is_the_same():
    rng = np.random.default_rng(0)
    texts = ["".join(map(chr, rng.integers(32, 400, size))) for size in [0, 1, 5, *range(50, 90), 3000, 100_000]]

    def fnv(text: str) -> int:
        word = 0xCBF29CE484222325
        for byte in text.encode():
            word = (word ^ byte) * 0x100000001B3 % 2**64
        return word

    assert (
        hashing.hash_values(pa.array(texts)).tolist()
        == hashing.mix(np.array([fnv(t) for t in texts], np.uint64)).tolist()
    )


def test_a_vocabulary_of_several_batches(tmp_path, oracle, monkeypatch):
    log = oracle.log(rows=4000).assign(item=lambda x: [f"i{i}" for i in np.arange(4000) * 7919 % 1500])
    keys = {"user": "user", "time": "time", "time_unit": "s", "progress": False}
    whole = seqdata.build(log, tmp_path / "whole", **keys)
    monkeypatch.setattr(tables, "BATCH_BYTES", 4096)
    monkeypatch.setattr("seqdata.fit.BLOCK_ROWS", 100)
    several = seqdata.build(log, tmp_path / "several", memory_limit="32MB", **keys)
    one, other = whole.vocabulary("item"), several.vocabulary("item")
    assert other.table.column("value").num_chunks > 2
    assert one.table.equals(other.table)
    ids = np.random.default_rng(0).integers(0, len(one), 5000)
    assert other.decode(ids) == one.decode(ids)
    for wanted in (["i3", "i3", None, "x", "i1499"], [f"i{i}" for i in range(1600)]):
        assert np.array_equal(other.encode(wanted), one.encode(wanted))
    more = seqdata.append(several, log.assign(item="new"), fit_before=10**15, progress=False)
    assert more.vocabulary("item").values.tolist() == [*one.values, "new"]


MANY = """
    import re, sys
    import numpy as np, pyarrow as pa
    import seqdata

    def batches(schema, make):
        for i in range(0, 240_000, 40_000):
            yield pa.record_batch(list(map(pa.array, make(np.arange(i, i + 40_000)))), schema=schema)

    def texts(at):
        return [f"u{x:06d}" for x in at * 7919 % 160_000], at, [f"{x * 2654435761 % 2**32:08x}-{x:012x}" for x in at]

    def vectors(at):
        values = np.random.default_rng(at[0]).random((len(at), 64), np.float32)
        return at % 1000, at, pa.FixedSizeListArray.from_arrays(values.reshape(-1), 64)

    user, column, make = {
        "texts": (pa.string(), pa.string(), texts), "vectors": (pa.int64(), pa.list_(pa.float32(), 64), vectors)
    }[sys.argv[2]]
    schema = pa.schema([("user", user), ("time", pa.timestamp("s")), ("c", column)])
    reader = pa.RecordBatchReader.from_batches(schema, batches(schema, make))
    store = seqdata.build(reader, sys.argv[1], user="user", time="time", memory_limit="32MB", progress=False)
    peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]
    print(store.num_users, int(store.column("c").max()), peak)
    """


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize(("what", "users"), [("texts", 160_000), ("vectors", 1000)])
def test_memory_of_many_values_stays_near_the_limit(tmp_path, what, users):
    command = [sys.executable, "-c", textwrap.dedent(MANY), str(tmp_path / "s"), what]
    found = subprocess.run(command, capture_output=True, text=True)
    assert not found.returncode, found.stderr
    count, last, peak = map(int, found.stdout.split())
    assert (count, last) == (users, 240_001 if what == "texts" else 240_000)
    # the interpreter and its libraries take about 100 MB of it; the vectors alone are 150 MB
    assert peak < 300_000
