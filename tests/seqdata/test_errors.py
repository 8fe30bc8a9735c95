"""Bad input: each a clear error, and no half-written store that opens."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import seqdata

KEYS = {"user": "user", "time": "time", "progress": False}


def frame(**columns) -> pd.DataFrame:
    return pd.DataFrame(
        {"user": [1, 2, 3], "time": ["2022-01-01", "2022-01-02", "2022-01-03"], "item": [1, 2, 3], **columns}
    )


def nothing_left(folder) -> bool:
    return not [name for name in os.listdir(folder) if name.startswith((".s", "s"))]


@pytest.mark.parametrize(
    ("log", "options", "message"),
    [
        (frame(), {"user": "client"}, r"user column 'client' is not in .*\['user', 'time', 'item'\]"),
        (frame(), {"time": "ts"}, r"time column 'ts' is not in .*\['user', 'time', 'item'\]"),
        (frame(), {"fields": {"sku": seqdata.Categorical()}}, r"column 'sku' is in no table; there are \['item'\]"),
        (
            frame(),
            {"items": {"sku": seqdata.ItemTable(frame(), "item")}},
            r"'sku' is not a categorical field.*\['item'\]",
        ),
        (frame(), {"items": {"item": seqdata.ItemTable(frame(), "sku")}}, r"key column 'sku' is not in .*"),
        (frame(), {"types": {"sku": "int64"}}, "column 'sku' is in no table"),
        (frame(), {"types": {"item": "int32"}}, "needs one of"),
        (
            frame(time=["2022-01-01", "yesterday", "??"]),
            {},
            r"'time'.*2 value\(s\) do not parse, the first 'yesterday' at row 1",
        ),
        (frame(time=["2022-01-01", None, "2022-01-01"]), {}, r"'time'.*1 null value.*row 1"),
        (
            frame(time=["2022-01-01 00:00:00", "2022-01-01T00:00:00Z", "2022-01-01 00:00:00"]),
            {},
            "mixes values with a zone",
        ),
        (frame(time=[1, 2, 3]), {}, r"'time'.*integers.*time_unit='s'"),
        (frame(time=[1, 2, 2**62]), {"time_unit": "s"}, "beyond what int64 microseconds hold"),
        (frame(time=[1, 2, 3]), {"time_unit": "min"}, "time_unit='min'"),
        (frame(time=[1.5, 2, 3]), {"time_unit": "s"}, "holds fractions"),
        (frame(time=["x", "y", "z"]), {"time_format": "%Y"}, r"'x' at row 0; needs text in the format '%Y'"),
        (frame(time=[True, True, False]), {}, "type bool"),
        (frame(user=[1, -5, 3]), {}, r"negative id -5 .*row 1"),
        (frame(user=np.array([1, 2, 2**64 - 1], np.uint64)), {}, "user.*int64"),
        (frame(user=[1.0, 2.5, 3.0]), {}, "user.*not int64"),
        (frame(user=pd.to_datetime(["2022"] * 3)), {}, "user column 'user' has type timestamp"),
        (frame(user=["a", None, "c"]), {}, r"1 null value\(s\), the first at row 1"),
        (frame(item=["a", "b", "c"]), {"fields": {"item": seqdata.Numeric()}}, "column 'item'.*not double"),
        (frame(item=[1.5, 2, 3]), {"fields": {"item": seqdata.Categorical()}}, "column 'item'.*not int64"),
        (frame(item=[1, None, 3]), {"fields": {"item": seqdata.Numeric("int32")}}, "column 'item'.*1 missing value"),
        (frame(item=[1, 300, 3]), {"fields": {"item": seqdata.Numeric("uint8")}}, "column 'item'.*uint8"),
        (
            frame(item=["[1 2]", "[1 2 3]", "[1 2]"]),
            {"fields": {"item": seqdata.Vector()}},
            r"'\[1 2 3\]' is not a vector of 2",
        ),
        (
            frame(item=["[1 2]", "[1 x]", "[1 2]"]),
            {"fields": {"item": seqdata.Vector(2)}},
            r"'\[1 x\]' is not a vector",
        ),
        (frame(item=["[1 256]"] * 3), {"fields": {"item": seqdata.Vector(2)}}, r"integers 0\.\.255"),
        (frame()[:0], {}, "log is empty: 0 rows"),
        (frame(user=[None] * 3), {"null_user": "drop"}, "log is empty: 3 rows read, all dropped"),
        (frame(), {"null_user": "ignore"}, "null_user='ignore'"),
        (frame(), {"engine": "spark"}, "engine='spark'"),
        (frame(), {"memory_limit": "lots"}, "memory_limit='lots'"),
        (frame(), {"memory_limit": "1MB"}, "at least 32 MB"),
        (frame(), {"shards": 0}, "shards=0"),
        (frame(), {"fit_before": "soon"}, "fit_before='soon'"),
        (frame(), {"fields": {"item": "category"}}, "field 'item': got"),
        (frame(), {"fields": {"item": {"kind": "vector", "size": 3}}}, "field 'item'.*size"),
        (frame(timestamp=[1, 2, 3]), {}, "'timestamp' is taken"),
        ({}, {}, "at least one event table"),
        ({"a": frame(event_type=1)}, {}, "event_field='event_type' is also a column"),
        ([], {}, "empty list"),
        (3, {}, "cannot read a int"),
        ("nowhere.parquet", {}, "no such file: 'nowhere.parquet'"),
        ("nowhere-*.parquet", {}, "no file matches"),
        (seqdata.Sql("SELECT nonsense"), {}, "the query failed"),
    ],
)
def test_bad_input_is_a_clear_error(tmp_path, log, options, message):
    with pytest.raises((ValueError, KeyError, TypeError, FileNotFoundError), match=message):
        seqdata.build(log, tmp_path / "s", **KEYS | options)
    assert nothing_left(tmp_path)


def test_repeated_item_keys(tmp_path):
    items = pd.DataFrame({"item": [1, 1], "c": [1, 2]})
    with pytest.raises(ValueError, match=r"1 key\(s\) appear more than once, such as 1"):
        seqdata.build(frame(), tmp_path / "s", items={"item": seqdata.ItemTable(items, "item")}, **KEYS)


def test_mixed_zones_across_files(tmp_path):
    for name, when in [("a", "2022-01-01 00:00:00"), ("b", "2022-01-01 00:00:00 UTC")]:
        pd.DataFrame({"user": [1], "time": [when]}).to_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet names a zone and .*a\.parquet does not"):
        seqdata.build(tmp_path / "*.parquet", tmp_path / "s", **KEYS)


def test_corrupt_parquet(tmp_path, oracle):
    path = tmp_path / "log.parquet"
    oracle.log(rows=5000).to_parquet(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"log\.parquet: not a readable Parquet file"):
        seqdata.build(path, tmp_path / "s", time_unit="s", **KEYS)
    path.write_bytes(whole[:100] + b"\xff" * 2000 + whole[2100:])
    with pytest.raises(ValueError, match=r"log\.parquet: corrupt"):
        seqdata.build(path, tmp_path / "s", time_unit="s", **KEYS)
    assert nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, r"log\.csv: not a readable CSV file"),
        ("user,time,item\n", {}, "log is empty: 0 rows"),
        ("a,b\n1,2\n", {}, r"user column 'user' is not in .*log\.csv; it has \['a', 'b'\]"),
        ("user,time\n" + "1,2022-01-01\n" * 30_000 + "x,2022-01-01\n", {}, r'log\.csv: .*Line: 30002.*"x".*types='),
        ("user,time\n" + "1,2022-01-01\n" * 30_000 + "1\n", {}, r"log\.csv: .*Line: 30002"),
        ("user,time\n" + "1,2022-01-01\n" * 30_000 + "1,later\n", {}, "the first 'later' at row 30000"),
    ],
)
def test_bad_csv(tmp_path, text, options, message):
    (tmp_path / "log.csv").write_text(text)
    with pytest.raises((ValueError, KeyError), match=message):
        seqdata.build(tmp_path / "log.csv", tmp_path / "s", **KEYS | options)
    assert nothing_left(tmp_path)


def test_existing_store_is_kept_unless_overwritten(tmp_path):
    seqdata.build(frame(), tmp_path / "s", **KEYS)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        seqdata.build(frame(item=[7, 8, 9]), tmp_path / "s", **KEYS)
    with pytest.raises(ValueError, match="do not parse"):
        seqdata.build(frame(time=["x"] * 3), tmp_path / "s", overwrite=True, **KEYS)
    assert seqdata.open_store(tmp_path / "s").vocabulary("item").values.tolist() == [1, 2, 3]
    seqdata.build(frame(item=[7, 8, 9]), tmp_path / "s", overwrite=True, **KEYS)
    assert seqdata.open_store(tmp_path / "s").vocabulary("item").values.tolist() == [7, 8, 9]
    assert os.listdir(tmp_path) == ["s"]


def test_a_folder_that_is_no_store_is_never_replaced(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="no store"):
        seqdata.build(frame(), tmp_path / "s", overwrite=True, **KEYS)


@pytest.mark.parametrize("at", [1, 3, 5, 7])
def test_full_disk(tmp_path, monkeypatch, at):
    seqdata.build(frame(), tmp_path / "s", **KEYS)
    calls = [0]

    def full(file, values):
        calls[0] += 1
        if calls[0] >= at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        file.write(values.reshape(-1).view(np.uint8).data)

    for module in ("layout", "spool", "fit"):
        monkeypatch.setattr(f"seqdata.{module}.write_all", full)
    with pytest.raises(OSError, match="no space left while building") as caught:
        seqdata.build(frame(), tmp_path / "s", overwrite=True, **KEYS)
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["s"]
    assert seqdata.open_store(tmp_path / "s").num_events == 3


def test_file_size_limit_of_the_process(tmp_path):
    # a real refusal by the system in the middle of a build
    code = textwrap.dedent("""
        import resource, signal, sys, numpy as np, pandas as pd, seqdata
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        log = pd.DataFrame({"user": np.arange(300_000) % 997, "time": np.arange(300_000), "p": 0.5})
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        seqdata.build(log, sys.argv[1], user="user", time="time", time_unit="s", progress=False)
        """)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "s")], capture_output=True, text=True)
    assert done.returncode == 1
    assert "no space left while building" in done.stderr
    assert nothing_left(tmp_path)


SLOW_BUILD = textwrap.dedent("""
    import sys, time, pyarrow as pa, seqdata

    def batches():
        for i in range(1000):
            print(i, flush=True)
            time.sleep(0.01)
            yield pa.record_batch({"user": [i % 7], "time": [i], "item": [i]})

    schema = pa.schema([("user", pa.int64()), ("time", pa.int64()), ("item", pa.int64())])
    reader = pa.RecordBatchReader.from_batches(schema, batches())
    seqdata.build(reader, sys.argv[1], user="user", time="time", time_unit="s", progress=False, overwrite=True)
    """)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_build(tmp_path, how):
    seqdata.build(frame(), tmp_path / "s", **KEYS)
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_BUILD, str(tmp_path / "s")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    while process.stdout.readline().strip() != "20":
        pass
    with pytest.raises(FileExistsError, match="another process is building"):
        seqdata.build(frame(), tmp_path / "s", overwrite=True, **KEYS)
    process.send_signal(how)
    process.stdout.close()
    process.wait(30)
    assert seqdata.open_store(tmp_path / "s").num_events == 3
    leftovers = [name for name in os.listdir(tmp_path) if name != "s"]
    assert leftovers == ([] if how == signal.SIGINT else [".s.building"])
    for name in leftovers:
        with pytest.raises(seqdata.StoreError, match="no schema"):
            seqdata.open_store(tmp_path / name)
    # the next build clears what the killed one left
    seqdata.build(frame(item=[4, 5, 6]), tmp_path / "s", overwrite=True, **KEYS)
    assert os.listdir(tmp_path) == ["s"]


def test_damaged_stores_do_not_open(tmp_path):
    store = seqdata.build(frame(), tmp_path / "s", **KEYS)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        seqdata.open_store(tmp_path / "nothing")
    schema = json.loads((store.path / "schema.json").read_text())

    def write(**changes):
        (store.path / "schema.json").write_text(json.dumps(schema | changes))

    write(version=99)
    with pytest.raises(seqdata.StoreError, match=r"format version 99; this seqdata reads up to \d+: upgrade"):
        seqdata.open_store(store.path)
    write(num_events=4)
    with pytest.raises(seqdata.StoreError, match=r"schema\.json says"):
        seqdata.open_store(store.path)
    write(format="parquet")
    with pytest.raises(seqdata.StoreError, match="does not describe a seqdata store"):
        seqdata.open_store(store.path)
    (store.path / "schema.json").write_text("{")
    with pytest.raises(seqdata.StoreError, match="damaged"):
        seqdata.open_store(store.path)
    write()
    seqdata.open_store(store.path)
    column = store.path / "shards" / "00000" / f"{schema['fields']['item']['file']}.npy"
    whole = column.read_bytes()
    column.write_bytes(whole[:-3])
    with pytest.raises(seqdata.StoreError, match="missing or damaged"):
        seqdata.open_store(store.path)
    column.unlink()
    with pytest.raises(seqdata.StoreError, match="missing or damaged"):
        seqdata.open_store(store.path)


def test_resume_continues_where_it_stopped(tmp_path, oracle, monkeypatch):
    log = oracle.log(rows=3000)
    for i in range(3):
        log.iloc[i * 1000 : (i + 1) * 1000].to_parquet(tmp_path / f"log-{i}.parquet")
    options = {"user": "user", "time": "time", "time_unit": "s", "progress": False, "shards": 3}
    plain = seqdata.build(tmp_path / "log-*.parquet", tmp_path / "plain", **options)
    from seqdata.ingest import Ingest
    from seqdata.job import Job

    ingested = []
    run, sort = Ingest.run, Job.sort

    def failing_run(self, tick):
        ingested.append(self.part.where)
        if len(ingested) == 2:
            raise KeyboardInterrupt
        return run(self, tick)

    monkeypatch.setattr(Ingest, "run", failing_run)
    with pytest.raises(KeyboardInterrupt):
        seqdata.build(tmp_path / "log-*.parquet", tmp_path / "s", resume=True, **options)
    sorted_shards = []

    def failing_sort(self, shard, *rest):
        sorted_shards.append(shard)
        if len(sorted_shards) == 2:
            raise KeyboardInterrupt
        return sort(self, shard, *rest)

    monkeypatch.setattr(Job, "sort", failing_sort)
    with pytest.raises(KeyboardInterrupt):
        seqdata.build(tmp_path / "log-*.parquet", tmp_path / "s", resume=True, **options)
    assert len(ingested) == 4
    store = seqdata.build(tmp_path / "log-*.parquet", tmp_path / "s", resume=True, **options)
    assert len(ingested) == 4
    for path in plain.path.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (store.path / path.relative_to(plain.path)).read_bytes(), path
    with pytest.raises(ValueError, match="resume=True"):
        seqdata.build(pa.table({"user": [1], "time": [1]}), tmp_path / "t", resume=True, **options)


def test_resume_ignores_another_input(tmp_path, monkeypatch):
    from seqdata.job import Job

    options = {"progress": False, "user": "user", "time": "time", "resume": True}
    frame().to_parquet(tmp_path / "log.parquet")
    with monkeypatch.context() as patch:
        patch.setattr(Job, "fit", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            seqdata.build(tmp_path / "log.parquet", tmp_path / "s", **options)
    time.sleep(0.01)
    frame(item=[9, 9, 9]).to_parquet(tmp_path / "log.parquet")
    assert seqdata.build(tmp_path / "log.parquet", tmp_path / "s", **options).vocabulary("item").values.tolist() == [9]
