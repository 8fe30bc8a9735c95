"""Is seqdata's build faster and smaller than what people do today?

    python benchmarks/bench_seqdata.py build --events 10000000     two logs, of few and of many distinct items,
                                                                   against pandas, polars and DuckDB
    python benchmarks/bench_seqdata.py lgsr                         LGSR's 3.03 M rows against pandas (FOOTFALL_DATA)
    python benchmarks/bench_seqdata.py load                         opening, batches, loader throughput

Every rival is a process of its own, the rivals take turns, and what they make is compared before a time is reported.
Results go to benchmarks/results/seqdata_<what>.json and .md. Peak is the largest resident set of the whole process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from record import header, provenance, write

RESULTS = Path(__file__).parent / "results"
LGSR_FIELDS = [
    "PROD_CODE",
    "PROD_CODE_10",
    "PROD_CODE_20",
    "PROD_CODE_30",
    "PROD_CODE_40",
    "QUANTITY",
    "SPEND",
    "BASKET_ID",
    "STORE_CODE",
]
ROUND = 2_000_000
SEED = 7
DIGITS = 11
VERSIONS = ("numpy", "pyarrow", "duckdb", "pandas", "polars")


def generate(path: Path, events: int, many: bool = False) -> None:
    """A log in the shape of the RecSys Challenge 2025: about 10 events a user, a heavy tail, users in random order.

    many: items are texts, like the challenge's urls, with three distinct ones for ten events.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    every = 10
    users = events // every
    rng = np.random.default_rng(SEED)
    weight = rng.lognormal(0.0, 1.5, users).cumsum()
    names = rng.permutation(users * 3)[:users]
    kinds = pa.array(["page_visit", "add_to_cart", "search_query", "remove_from_cart", "product_buy"])
    writer = None
    for start in range(0, events, ROUND):
        count = min(ROUND, events - start)
        user = names[np.searchsorted(weight, rng.random(count) * weight[-1])]
        # One row in ten goes round the users, so that each of them has one.
        place = np.arange(start, start + count)
        user[place % every == 0] = names[place[place % every == 0] // every]
        when = (1_655_942_400 + rng.integers(0, 143 * 86_400, count)) * 1_000_000
        kind = rng.choice(5, count, p=[0.89, 0.03, 0.06, 0.01, 0.01])
        item = pa.array((rng.pareto(0.3, count) % 1_000_003).astype(np.int32))
        if many:
            digits = pa.array(rng.integers(0, events * 3 // 10, count)).cast(pa.string())
            item = pc.binary_join_element_wise("https://shop.example/item/", pc.utf8_lpad(digits, DIGITS, "0"), "")
        batch = pa.table(
            {
                "client_id": user.astype(np.int64),
                "timestamp": pa.array(when, pa.timestamp("us")),
                "event_type": pa.DictionaryArray.from_arrays(kind.astype(np.int8), kinds).cast(pa.string()),
                "item": item,
            }
        )
        writer = writer or pq.ParquetWriter(path, batch.schema, compression="zstd")
        writer.write_table(batch, row_group_size=1_000_000)
    writer.close()


def checksum(users: np.ndarray, lengths: np.ndarray, seconds: np.ndarray, items: np.ndarray) -> list[int]:
    """Sums that depend on which event stands where in its user's sequence, except among events of equal time."""
    first = np.repeat(np.cumsum(lengths) - lengths, lengths)
    place = np.arange(len(seconds)) - first
    who = np.repeat(users, lengths)
    return [
        len(users),
        len(seconds),
        int(((who % 1009) * (place + 1) * (seconds % 100_003)).sum()),
        int(((who % 1009) * (items.astype(np.int64) % 1009)).sum()),
    ]


def peak_kb() -> int:
    """Largest resident set of this process; unlike getrusage's it does not begin with the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def spent(began: tuple[float, float]) -> dict:
    return {"seconds": time.perf_counter() - began[0], "cpu": time.process_time() - began[1]}


def with_seqdata(log: str, out: str, memory: str) -> dict:
    import seqdata

    fields = {"event_type": seqdata.Categorical(), "item": seqdata.Categorical()}
    began = time.perf_counter(), time.process_time()
    store = seqdata.build(
        log, out, user="client_id", time="timestamp", fields=fields, memory_limit=memory, progress=False
    )
    took = spent(began)
    peak = peak_kb()
    items = np.append([0, 0], numbers(store.vocabulary("item").table.column("value")))[store.column("item")]
    return {
        **took,
        "peak": peak,
        "check": checksum(store.users, np.diff(store.offsets), store.time // 1_000_000, items),
    }


def numbers(items) -> np.ndarray:
    """int64 of items, or of the digits that their texts end with."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pa.types.is_integer(items.type):
        items = pc.utf8_slice_codeunits(items, -DIGITS).cast(pa.int64())
    return items.to_numpy()


def with_pandas(log: str, out: str, memory: str) -> dict:
    import pandas as pd

    began = time.perf_counter(), time.process_time()
    frame = pd.read_parquet(log).sort_values(["client_id", "timestamp"], kind="stable")
    lists = frame.groupby("client_id", sort=True).agg(list)
    took = spent(began)
    peak = peak_kb()
    lengths = frame.groupby("client_id").size()
    seconds = frame.timestamp.astype("int64").to_numpy() // (10**9 if "ns" in str(frame.timestamp.dtype) else 10**6)
    return {
        **took,
        "peak": peak,
        "check": checksum(lists.index.to_numpy(), lengths.to_numpy(), seconds, frame.item.to_numpy()),
    }


def with_polars(log: str, out: str, memory: str) -> dict:
    import polars as pl

    began = time.perf_counter(), time.process_time()
    plan = pl.scan_parquet(log).group_by("client_id").agg(pl.all().sort_by("timestamp", maintain_order=True))
    plan.sink_parquet(out)
    took = spent(began)
    return {**took, "peak": peak_kb(), "check": _check_lists(out)}


def with_polars_ids(log: str, out: str, memory: str) -> dict:
    """Items by the rank of their count, as a model needs them and seqdata makes them."""
    import polars as pl

    began = time.perf_counter(), time.process_time()
    ranked = pl.scan_parquet(log).group_by("item").len().sort(["len", "item"], descending=[True, False])
    ids = ranked.select("item").with_row_index("id").collect()
    plan = pl.scan_parquet(log).join(ids.lazy(), on="item", maintain_order="left").drop("item")
    plan.group_by("client_id").agg(pl.all().sort_by("timestamp", maintain_order=True)).sink_parquet(out)
    took = spent(began)
    return {**took, "peak": peak_kb(), "check": _check_lists(out, ids["item"])}


def with_duckdb_lists(log: str, out: str, memory: str) -> dict:
    return _duckdb(
        "SELECT client_id, list(timestamp ORDER BY timestamp) AS timestamp, list(event_type ORDER BY timestamp) AS"
        f" event_type, list(item ORDER BY timestamp) AS item FROM '{log}' GROUP BY client_id",
        out,
        "8GB",
    )


def with_duckdb_sort(log: str, out: str, memory: str) -> dict:
    return _duckdb(f"SELECT * FROM '{log}' ORDER BY client_id, timestamp", out, memory)


def _duckdb(query: str, out: str, memory: str) -> dict:
    import duckdb

    connection = duckdb.connect(config={"memory_limit": memory, "temp_directory": out + ".spill"})
    connection.execute("SET enable_progress_bar = false")
    began = time.perf_counter(), time.process_time()
    connection.execute(f"COPY ({query}) TO '{out}' (FORMAT parquet)")
    took = spent(began)
    return {**took, "peak": peak_kb(), "check": _check_lists(out)}


def _check_lists(path: str, names=None) -> list[int]:
    import polars as pl

    column = "item" if names is None else "id"
    frame = pl.read_parquet(path).sort("client_id", maintain_order=True)
    if frame[column].dtype == pl.List:
        lengths = frame[column].list.len().to_numpy().astype(np.int64)
        users, frame = frame["client_id"].to_numpy(), frame.select(pl.col("timestamp", column).explode())
    else:
        users, lengths = np.unique(frame["client_id"].to_numpy(), return_counts=True)
    items = frame[column] if names is None else names.gather(frame[column])
    return checksum(users, lengths, frame["timestamp"].dt.epoch("s").to_numpy(), numbers(items.to_arrow()))


def lgsr_with_seqdata(log: str, out: str, memory: str) -> dict:
    import seqdata

    began = time.perf_counter(), time.process_time()
    store = seqdata.build(
        log,
        out,
        user="CUST_CODE",
        time="SHOP_DATE",
        time_format="%Y%m%d",
        null_user="drop",
        fields={
            name: seqdata.Numeric() if name in ("QUANTITY", "SPEND") else seqdata.Categorical() for name in LGSR_FIELDS
        },
        memory_limit=memory,
        progress=False,
    )
    took = spent(began)
    peak = peak_kb()
    days = store.time // 86_400_000_000
    baskets = np.append([0, 0], store.vocabulary("BASKET_ID").values)[store.column("BASKET_ID")]
    return {**took, "peak": peak, "check": checksum(np.arange(store.num_users), np.diff(store.offsets), days, baskets)}


def lgsr_with_pandas(log: str, out: str, memory: str) -> dict:
    import pandas as pd

    began = time.perf_counter(), time.process_time()
    frame = pd.read_parquet(log, columns=["CUST_CODE", "SHOP_DATE", *LGSR_FIELDS]).dropna(subset=["CUST_CODE"])
    frame["SHOP_DATE"] = pd.to_datetime(frame["SHOP_DATE"].astype(str), format="%Y%m%d")
    frame = frame.sort_values(["CUST_CODE", "SHOP_DATE"], kind="stable")
    lists = frame.groupby("CUST_CODE", sort=True).agg(list)
    took = spent(began)
    peak = peak_kb()
    lengths = frame.groupby("CUST_CODE", sort=True).size().to_numpy()
    days = frame.SHOP_DATE.to_numpy().astype("datetime64[D]").astype(np.int64)
    return {**took, "peak": peak, "check": checksum(np.arange(len(lists)), lengths, days, frame.BASKET_ID.to_numpy())}


RIVALS = {
    "seqdata": with_seqdata,
    "pandas sort + groupby(list)": with_pandas,
    "polars group_by(sort_by)": with_polars,
    "polars group_by(sort_by), items to ids": with_polars_ids,
    "duckdb list(x ORDER BY t), 8 GB": with_duckdb_lists,
    "duckdb ORDER BY, same limit": with_duckdb_sort,
    "lgsr seqdata": lgsr_with_seqdata,
    "lgsr pandas sort + groupby(list)": lgsr_with_pandas,
}


def race(what: str, log: str, rivals: list[str], rounds: int, memory: str, limit: float, about: dict) -> dict:
    """Runs the rivals in turns; every result must describe the same sequences."""
    facts = provenance(SEED, *VERSIONS)
    runs: dict[str, list[dict]] = {name: [] for name in rivals}
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_TMP")) as folder:
        for turn in range(rounds):
            for name in rivals:
                command = [sys.executable, __file__, "one", name, log, f"{folder}/{turn}-{rivals.index(name)}", memory]
                try:
                    done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
                except subprocess.TimeoutExpired:
                    runs[name].append({"seconds": None, "cpu": None, "peak": None, "check": None})
                    continue
                if done.returncode:
                    raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
                runs[name].append(json.loads(done.stdout.splitlines()[-1]))
                print(name, runs[name][-1], flush=True)
                for left in Path(folder).iterdir():
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
    checks = {tuple(run["check"]) for name in rivals for run in runs[name] if run["check"]}
    if len(checks) != 1:
        raise RuntimeError(f"the rivals disagree: {checks}")
    table = {}
    for name in rivals:
        times = [run["seconds"] for run in runs[name] if run["seconds"] is not None]
        table[name] = {
            "median_s": statistics.median(times) if times else None,
            "cpu_s": (
                statistics.median(run["cpu"] for run in runs[name] if run["seconds"] is not None) if times else None
            ),
            "runs_s": times,
            "peak_mb": max((run["peak"] for run in runs[name] if run["peak"]), default=0) / 1024 or None,
        }
    result = {
        "what": what,
        **about,
        "memory_limit": memory,
        "limit_s": limit,
        "rivals": table,
        "provenance": facts,
    }
    save(what, result, table)
    return result


def save(what: str, result: dict, table: dict) -> None:
    ours, cpu = next((row["median_s"], row["cpu_s"]) for name, row in table.items() if "seqdata" in name)
    facts = ", ".join(f"{name} {value}" for name, value in result.items() if not isinstance(value, dict))
    lines = [
        f"# seqdata: {what}",
        "",
        header(result["provenance"]),
        "",
        f"Medians of the rounds, rivals in turns: {facts}.",
        "",
    ]
    lines += ["| | median s | ratio to seqdata | CPU s | ratio | peak MB |", "|---|---|---|---|---|---|"]
    for name, row in table.items():
        if row["median_s"] is None:
            lines.append(f"| {name} | > {result['limit_s']:.0f} | > {result['limit_s'] / ours:.1f} | | | |")
        else:
            lines.append(
                f"| {name} | {row['median_s']:.2f} | {row['median_s'] / ours:.2f} | {row['cpu_s']:.1f} |"
                f" {row['cpu_s'] / cpu:.2f} | {row['peak_mb']:.0f} |"
            )
    text = "\n".join(lines) + "\n"
    write(RESULTS / f"seqdata_{what}", result, text)
    print(text)


def load(log: Path) -> None:
    """Opening, a batch of 512 users and the loader with two workers, on the generated log's store."""
    import seqdata
    from seqdata.view import Gather

    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_TMP")) as folder:
        store = seqdata.build(str(log), folder + "/store", user="client_id", time="timestamp", progress=False)
        opened = []
        for _ in range(20):
            began = time.perf_counter()
            seqdata.open_store(store.path)
            opened.append(time.perf_counter() - began)
        view = store.all()
        began = time.perf_counter()
        view.bounds  # noqa: B018
        bounds = time.perf_counter() - began
        batches, gather = [], Gather(store)
        plan = view.plan(512, max_tokens=None, shuffle=True, seed=0, epoch=0, max_len=None, drop_empty=False)
        for number, rows in enumerate(plan):
            began = time.perf_counter()
            view.batch(rows, gather)
            batches.append(time.perf_counter() - began)
            if number == 2000:
                break
        speeds = {}
        for workers in (0, 2):
            dataset = seqdata.SequenceDataset(view, max_tokens=65_536, shuffle=True)
            loader = seqdata.SequenceLoader(dataset, num_workers=workers)
            events, began = 0, time.perf_counter()
            for batch in loader:
                events += int(batch.jagged.offsets[-1])
            speeds[workers] = events / (time.perf_counter() - began)
        rows = {
            "open_ms": statistics.median(opened) * 1e3,
            "bounds_of_all_users_ms": bounds * 1e3,
            "batch_of_512_users_ms": statistics.median(batches) * 1e3,
            "loader_events_per_s_0_workers": speeds[0],
            "loader_events_per_s_2_workers": speeds[2],
            "events": store.num_events,
            "users": store.num_users,
        }
    facts = provenance(SEED, *VERSIONS, "torch")
    text = f"# seqdata: loading\n\n{header(facts)}\n\n| | |\n|---|---|\n" + "".join(
        f"| {k} | {v:,.2f} |\n" for k, v in rows.items()
    )
    write(RESULTS / "seqdata_load", {**rows, "provenance": facts}, text)
    print(text)


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] == "one":
        print(json.dumps(RIVALS[sys.argv[2]](*sys.argv[3:])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["build", "lgsr", "load"])
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-limit", default="512MB")
    parser.add_argument("--limit", type=float, default=600, help="seconds after which a rival is stopped")
    parser.add_argument("--only", nargs="*", help="rivals to run, seqdata among them")
    parser.add_argument("--log", type=Path, help="a generated log that is kept; needs one of --items")
    parser.add_argument(
        "--items", nargs="+", choices=["few", "many"], default=["few", "many"], help="the logs to build"
    )
    options = parser.parse_args()
    if options.what == "lgsr":
        log = Path(os.environ["FOOTFALL_DATA"]) / "lgsr" / "transactions.parquet"
        race(
            "lgsr",
            str(log),
            ["lgsr seqdata", "lgsr pandas sort + groupby(list)"],
            options.rounds,
            options.memory_limit,
            options.limit,
            {"rows": 3_034_288, "columns": len(LGSR_FIELDS) + 2},
        )
        return
    if options.log and len(options.items) > 1 and options.what == "build":
        parser.error("--log: names one log; needs --items few or --items many beside it")
    for items in options.items[:1] if options.what == "load" else options.items:
        with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_TMP")) as folder:
            log = options.log or Path(folder) / "log.parquet"
            if not log.exists():
                generate(log, options.events, items == "many")
            if options.what == "load":
                load(log)
                return
            # pandas takes minutes and most of the memory for many texts
            slow = [] if items == "few" else ["pandas sort + groupby(list)"]
            race(
                f"build_{options.events // 1_000_000}m{'' if items == 'few' else '_many'}",
                str(log),
                options.only or [name for name in list(RIVALS)[:6] if name not in slow],
                options.rounds,
                options.memory_limit,
                options.limit,
                {"events": options.events, "items": items},
            )


if __name__ == "__main__":
    main()
