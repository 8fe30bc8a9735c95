"""A few tries of each kind of the fuzzer, which `hatch run fuzz seqdata_build` runs for as long as one likes."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

import seqdata
from tests.fuzz import seqdata_build


@pytest.mark.parametrize("kind", seqdata_build.KINDS)
def test_tries(kind):
    for own in range(1 if kind == "kills" else 3):
        seqdata_build.attempt(seqdata_build.KINDS[kind], own)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s["fields"]["item"].update(file="../../../victim"), "plain name"),
        (lambda s: s["fields"]["item"].update(file="/etc/passwd"), "plain name"),
        (lambda s: s["fields"]["item"].update(dtype="O"), "dtype"),
        (lambda s: s["fields"]["item"].update(kind="pickle"), "kind|needs one of"),
        (lambda s: s["shards"][0].update(folder="../shards/00000"), "plain name"),
        (lambda s: s["shards"][0].update(events=10**9), "hold 1,000,000,000 events; schema.json says 50"),
        (lambda s: s.update(generation=-1), "whole number"),
        (lambda s: s.update(shards=[]), "no shard"),
        (lambda s: s.update(fields=[]), "'fields'"),
    ],
)
def test_a_forged_schema_is_refused(tmp_path, oracle, change, says):
    store = seqdata.build(oracle.log(rows=50), tmp_path / "s", user="user", time="time", time_unit="s", progress=False)
    schema = json.loads((store.path / "schema.json").read_text())
    change(schema)
    (store.path / "schema.json").write_text(json.dumps(schema))
    with pytest.raises(seqdata.StoreError, match=says):
        seqdata.open_store(store.path)


@pytest.mark.parametrize("what", ["shards/00000/time.npy", "shards/00000", "fitted"])
def test_links_out_of_a_store_are_refused(tmp_path, oracle, what):
    store = seqdata.build(oracle.log(rows=50), tmp_path / "s", user="user", time="time", time_unit="s", progress=False)
    path = store.path / what
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(seqdata.StoreError, match="link"):
        seqdata.open_store(store.path)
    assert np.all(store.time >= 0)
