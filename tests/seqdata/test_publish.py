"""What a build replaces, what it never touches, and how it goes on after it was stopped anywhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap

import pytest

import seqdata
from seqdata import job, publish

KEYS = {"user": "user", "time": "time", "time_unit": "s", "progress": False}


@pytest.fixture
def path(tmp_path, oracle):
    oracle.log(rows=400).to_parquet(tmp_path / "log.parquet")
    return tmp_path / "log.parquet"


def appears(make):
    """An engine in whose middle somebody makes something at the place of the store."""

    def engine(step, numbers):
        make()
        return [step(number) for number in numbers]

    return engine


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "store"])
def test_what_appears_meanwhile_stays(tmp_path, path, oracle, kind):
    out = tmp_path / "s"

    def make():
        if out.exists():
            return
        if kind == "file":
            out.write_text("mine")
        elif kind == "store":
            seqdata.build(oracle.log(7, rows=50), tmp_path / "other", **KEYS)
            os.rename(tmp_path / "other", out)
        else:
            out.mkdir()
            if kind == "folder":
                (out / "thesis.txt").write_text("mine")

    with pytest.raises(FileExistsError, match="appeared"):
        seqdata.build(path, out, engine=appears(make), **KEYS)
    if kind == "store":
        assert seqdata.open_store(out).num_events == 50
    elif kind == "empty folder":
        assert os.listdir(out) == []
    else:
        assert (out if kind == "file" else out / "thesis.txt").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["log.parquet", "s"]


def test_overwrite_leaves_what_is_no_store(tmp_path, path):
    out = tmp_path / "s"
    out.mkdir()
    (out / "schema.json").write_text('{"$schema": "json-schema"}')
    (out / "code.py").write_text("mine")
    with pytest.raises(FileExistsError, match="does not describe a seqdata store"):
        seqdata.build(path, out, overwrite=True, **KEYS)
    assert (out / "code.py").read_text() == "mine"
    shutil.rmtree(out)
    store = seqdata.build(path, out, **KEYS)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds 'notes\.txt'"):
        seqdata.build(path, out, overwrite=True, **KEYS)
    (out / "notes.txt").unlink()
    assert seqdata.build(path, out, overwrite=True, **KEYS).num_events == store.num_events


def test_a_store_that_becomes_something_else_meanwhile_stays(tmp_path, path):
    out = tmp_path / "s"
    seqdata.build(path, out, **KEYS)
    make = appears(lambda: (out / "notes.txt").write_text("mine"))
    with pytest.raises(FileExistsError, match=r"holds 'notes\.txt'"):
        seqdata.build(path, out, overwrite=True, engine=make, **KEYS)
    assert (out / "notes.txt").exists()


def test_a_foreign_folder_in_the_place_of_the_working_one_stays(tmp_path, path):
    (tmp_path / ".s.building").mkdir()
    (tmp_path / ".s.building" / "plans.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds 'plans\.txt'"):
        seqdata.build(path, tmp_path / "s", **KEYS)
    assert (tmp_path / ".s.building" / "plans.txt").read_text() == "mine"


def test_a_link_to_a_store_stays_a_link(tmp_path, path):
    seqdata.build(path, tmp_path / "real", **KEYS)
    (tmp_path / "s").symlink_to(tmp_path / "real")
    seqdata.build(path, tmp_path / "s", overwrite=True, shards=2, **KEYS)
    assert (tmp_path / "s").is_symlink()
    assert len(seqdata.open_store(tmp_path / "real").schema["shards"]) == 2


def test_without_an_atomic_exchange(tmp_path, path, monkeypatch):
    monkeypatch.setattr(publish, "_rename", lambda *_: False)
    for overwrite in (False, True):
        assert seqdata.build(path, tmp_path / "s", overwrite=overwrite, **KEYS).num_events == 400
    assert sorted(os.listdir(tmp_path)) == ["log.parquet", "s"]


STOPPED = """
    import os, signal, sys
    import seqdata
    from seqdata import job, layout
    import pathlib

    left = int(sys.argv[3])

    def stop(call):
        def counted(*arguments, **options):
            global left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)
        return counted

    os.replace, os.rename, os.unlink = stop(os.replace), stop(os.rename), stop(os.unlink)
    os.rmdir, os.mkdir = stop(os.rmdir), stop(os.mkdir)
    pathlib.Path.unlink, pathlib.Path.rename = stop(pathlib.Path.unlink), stop(pathlib.Path.rename)
    seqdata.build(
        sys.argv[1], sys.argv[2], user="user", time="time", time_unit="s", shards=2, resume=True, progress=False,
        items={"item": seqdata.ItemTable(sys.argv[1].replace("log", "items"), "item")},
    )
    """


def contents(store: seqdata.Store) -> dict[str, bytes]:
    files = [path for path in store.path.rglob("*") if path.suffix in (".npy", ".arrow")]
    return {str(path.relative_to(store.path)): path.read_bytes() for path in files}


def test_resume_always_ends(tmp_path, path, oracle):
    items = tmp_path / "items.parquet"
    oracle.log(rows=400).drop_duplicates("item")[["item", "price"]].to_parquet(items)
    table = {"item": seqdata.ItemTable(str(items), "item")}
    whole = contents(seqdata.build(path, tmp_path / "whole", items=table, shards=2, **KEYS))
    # some of the places where a file appears or goes; the last ones lie behind the index
    for step in (20, 34, 40, 44, 48, 52):
        out = tmp_path / f"s{step}"
        command = [sys.executable, "-c", textwrap.dedent(STOPPED), path, out, str(step)]
        done = subprocess.run(command, capture_output=True)
        assert done.returncode in (0, -9), done.stderr
        if done.returncode:
            seqdata.build(path, out, items=table, shards=2, resume=True, overwrite=True, **KEYS)
        assert contents(seqdata.open_store(out)) == whole
        assert not (tmp_path / f".s{step}.building").exists()


def test_stopped_between_index_and_schema(tmp_path, path, monkeypatch):
    build = sys.modules["seqdata.build"]
    with monkeypatch.context() as context:
        context.setattr(build, "seal", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            seqdata.build(path, tmp_path / "s", shards=2, resume=True, **KEYS)
    assert seqdata.build(path, tmp_path / "s", shards=2, resume=True, **KEYS).num_events == 400


def test_stopped_after_the_fit(tmp_path, path, monkeypatch):
    write = job.layout.write_json

    def stop(target, value):
        if target.name == "fit.json":
            raise KeyboardInterrupt
        write(target, value)

    with monkeypatch.context() as context:
        context.setattr(job.layout, "write_json", stop)
        with pytest.raises(KeyboardInterrupt):
            seqdata.build(path, tmp_path / "s", resume=True, **KEYS)
    monkeypatch.setattr(job.Ingest, "run", lambda *_: pytest.fail("read again"))
    assert seqdata.build(path, tmp_path / "s", resume=True, **KEYS).num_events == 400
