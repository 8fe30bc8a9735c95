"""Readers, and what they pickled, see what they opened while others append, compact and build over it."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pandas as pd
import pytest

import seqdata

KEYS = {"user": "user", "time": "time", "time_unit": "s", "progress": False}
CUT = 300 * 1_000_000


def contents(view: seqdata.View) -> tuple:
    """Users, times, ids and values of a view."""
    found, names = view.gather(["item", "brand"]), view.store.vocabulary("brand")
    return (
        view.users.tolist(),
        found.offsets.tolist(),
        found["timestamp"].tolist(),
        view.store.vocabulary("item").decode(found["item"]),
        names.decode(found["brand"]),
        names.values.tolist(),
    )


def append(store, oracle, seed):
    """More events, as a nightly job adds them: known users and new ones, before and after the cutoff."""
    return seqdata.append(seqdata.open_store(store.path), oracle.log(seed, users=160), progress=False)


def replace(store, oracle, seed):
    log = oracle.log(seed).assign(brand="zinc")
    return seqdata.build(log, store.path, overwrite=True, **KEYS)


def compact(store, oracle, seed):
    return seqdata.compact(append(store, oracle, seed))


CHANGES = {
    "append": [append],
    "two appends": [append, append, append],
    "compact": [append, compact, append],
    "overwrite": [replace],
    "everything": [append, compact, replace, append, replace, compact],
}


@pytest.mark.parametrize("changes", CHANGES)
def test_readers_and_their_pickles_see_what_they_opened(tmp_path, oracle, changes):
    store = seqdata.build(oracle.log(), tmp_path / "s", shards=3 if changes == "everything" else 1, **KEYS)
    view = store.as_of(CUT).where("brand", ["b1", "b2", "b5"])
    expected = contents(seqdata.open_store(store.path).as_of(CUT).where("brand", ["b1", "b2", "b5"]))
    pickled = pickle.dumps(view)
    for seed, change in enumerate(CHANGES[changes], 1):
        change(store, oracle, seed)
        assert contents(pickle.loads(pickled)) == expected
    assert contents(view) == expected
    if changes == "everything":
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            assert pool.submit(contents, view).result() == expected
    assert seqdata.open_store(store.path).verify() == []
    assert store.verify() == []


def test_what_nobody_holds_goes_with_the_next_change(tmp_path, oracle):
    store = seqdata.build(oracle.log(rows=300), tmp_path / "s", **KEYS)
    pickled = pickle.dumps(store)
    replace(store, oracle, 1)
    compact(store, oracle, 2)
    assert pickle.loads(pickled).num_events == 300
    del store
    gc.collect()
    with seqdata.open_store(tmp_path / "s") as last:
        replace(last, oracle, 3)
    append(last, oracle, 4)
    assert sorted(os.listdir(tmp_path)) == ["s"]
    with pytest.raises(seqdata.StoreError, match="open the store again"):
        pickle.loads(pickled)
    newest = seqdata.compact(seqdata.open_store(tmp_path / "s"))
    append(newest, oracle, 5)
    newest.close()
    append(newest, oracle, 6)
    assert sorted(os.listdir(tmp_path / "s" / "shards")) == ["00002", "00003", "00004"]
    assert newest.num_events == len(newest.time)


def test_foreign_folders_in_a_store_stay(tmp_path, oracle):
    store = seqdata.build(oracle.log(rows=100), tmp_path / "s", **KEYS)
    for place in ("fitted", "shards"):
        (store.path / place / "mine").mkdir()
    append(append(store, oracle, 1), oracle, 2)
    assert (store.path / "fitted" / "mine").exists() and (store.path / "shards" / "mine").exists()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_one_descriptor_a_store_whatever_its_shards(tmp_path, oracle):
    log = oracle.log().assign(query="[1 2]")
    store = seqdata.build(log, tmp_path / "s", shards=9, fields=dict.fromkeys(["item", "brand"], "categorical"), **KEYS)
    del store
    gc.collect()
    before = descriptors()
    stores = [seqdata.open_store(tmp_path / "s") for _ in range(20)]
    for one in stores:
        contents(one.all())
    assert descriptors() == before + 20
    del stores, one
    gc.collect()
    assert descriptors() == before


READ = """
import resource, sys, seqdata
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
store = seqdata.open_store(sys.argv[1])
seen = sum(int(b.jagged.offsets[-1]) for b in store.all().batches(64, shuffle=True))
assert seen == store.num_events and store.vocabulary("item").values.size and store.verify() == []
print(seqdata.compact(store).num_events)
"""


def test_64_shards_under_64_descriptors(tmp_path, oracle):
    seqdata.build(oracle.log(rows=2000, users=600), tmp_path / "s", shards=64, **KEYS)
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / "s")], capture_output=True, text=True, env=os.environ
    )
    assert done.stdout == "2000\n", done.stderr


def test_zeroed_offsets_do_not_open(tmp_path):
    store = seqdata.build(pd.DataFrame({"user": [1, 2], "time": [1, 2]}), tmp_path / "s", **KEYS)
    file = store.path / "shards" / "00000" / "offsets.npy"
    np.save(file, np.zeros(3, np.int64))
    with pytest.raises(seqdata.StoreError, match=r"offsets\.npy goes from 0 to 0; schema.json says 0 to 2"):
        seqdata.open_store(tmp_path / "s")
