"""The same build on Dask workers: a real scheduler and worker processes on loopback."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

import seqdata

distributed = pytest.importorskip("distributed", reason="needs distributed (pip install 'seqdata[dask]')")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory):
    """Address of a scheduler process with two worker processes."""
    folder = tmp_path_factory.mktemp("dask")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{one.getsockname()[1]}"
    # workers unpickle what this process pickles, so they need its import path
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(Path(name).resolve()) for name in sys.path if name)}
    common = {"cwd": folder, "env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    commands = [["scheduler", "--host", address, "--no-dashboard"]]
    commands += [["worker", address, "--nthreads", "1", "--no-dashboard", "--nanny"]] * 2
    processes = []
    for command in commands:
        processes.append(
            subprocess.Popen([sys.executable, "-m", "distributed.cli.dask_" + command[0], *command[1:]], **common)
        )
    try:
        with distributed.Client(address, timeout=60) as client:
            client.wait_for_workers(2, timeout=60)
        yield address
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(30)


def write_parts(folder, oracle):
    log = oracle.log(rows=4000)
    for i in range(4):
        log[i * 1000 : (i + 1) * 1000].to_parquet(folder / f"log-{i}.parquet")
    return log, str(folder / "log-*.parquet")


def assert_same_bytes(one, other):
    for path in one.path.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (other.path / path.relative_to(one.path)).read_bytes(), path


@pytest.mark.parametrize("text", [False, True])
def test_workers_write_the_bytes_of_a_local_build(tmp_path, oracle, scheduler, text):
    _, glob = write_parts(tmp_path, oracle)
    options = {
        "user": "user",
        "time": "time",
        "time_unit": "s",
        "shards": 5,
        "progress": False,
        "fit_before": 300_000_000,
    }
    if text:
        options["types"] = {"user": "string"}
    local = seqdata.build(glob, tmp_path / "local", **options)
    spread = seqdata.build(glob, tmp_path / "spread", engine="dask", scheduler=scheduler, **options)
    assert_same_bytes(local, spread)


def test_tables_in_memory_stay_here(tmp_path, oracle, scheduler):
    log, glob = write_parts(tmp_path, oracle)
    options = {"user": "user", "time": "time", "time_unit": "s", "shards": 2, "progress": False}
    sources = {"disk": glob, "memory": log}
    local = seqdata.build(sources, tmp_path / "local", **options)
    spread = seqdata.build(sources, tmp_path / "spread", engine="dask", scheduler=scheduler, **options)
    assert_same_bytes(local, spread)


def test_an_error_on_a_worker_is_the_same_error(tmp_path, oracle, scheduler):
    log, _ = write_parts(tmp_path, oracle)
    log.assign(user=-1).to_parquet(tmp_path / "log-9.parquet")
    with pytest.raises(ValueError, match="negative id -1"):
        seqdata.build(
            str(tmp_path / "log-*.parquet"),
            tmp_path / "s",
            user="user",
            time="time",
            time_unit="s",
            engine="dask",
            scheduler=scheduler,
            progress=False,
        )
    time.sleep(0.5)
    assert not (tmp_path / "s").exists()


def test_any_mapper_will_do(tmp_path, oracle):
    _, glob = write_parts(tmp_path, oracle)
    options = {"user": "user", "time": "time", "time_unit": "s", "shards": 3, "progress": False}
    local = seqdata.build(glob, tmp_path / "local", **options)
    # as Spark or Ray would: every step is pickled and runs in another process
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        spread = seqdata.build(glob, tmp_path / "spread", engine=pool.map, **options)
    assert_same_bytes(local, spread)


def test_scheduler_needs_the_dask_engine(tmp_path, oracle):
    with pytest.raises(ValueError, match="only engine='dask'"):
        seqdata.build(oracle.log(), tmp_path / "s", user="user", time="time", time_unit="s", scheduler="tcp://x:1")
