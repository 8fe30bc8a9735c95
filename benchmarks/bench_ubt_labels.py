"""How long do the labels of a million clients take? Official shape: 1 M clients, 100 target categories, 100 skus.

Run it with ``python benchmarks/bench_ubt_labels.py``. The public code scans the target rows for every client; the same
rule is timed here on a thousand clients, after both were found equal on them. Processor seconds, medians.
"""

from __future__ import annotations

import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from record import header, provenance, write

from ubt.labels import window_labels
from ubt.prepare import TARGETS, Prepared, Targets

CLIENTS, ROWS, TARGET_ROWS, SCANNED = 1_000_000, 400_000, 100, 1000


def main() -> None:
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        users = rng.permutation(CLIENTS * 18)[:CLIENTS].astype(np.int64)
        rows = {
            "client_id": np.r_[rng.choice(users, ROWS // 2), rng.integers(0, CLIENTS * 18, ROWS // 2)],
            "timestamp": np.datetime64("2022-10-13", "us") + np.sort(rng.integers(0, 14 * 86400, ROWS)) * 1_000_000,
            "sku": rng.integers(0, 100_000, ROWS),
            "category": rng.zipf(1.3, ROWS).clip(max=6774),
            "price": rng.integers(0, 100, ROWS),
        }
        names = [str(row) for row in rng.integers(0, 256, (20_000, 16))]
        table = pa.table(rows).append_column("name", pa.array(names).take(pa.array(rows["sku"] % len(names))))
        (Path(folder) / "target").mkdir()
        pq.write_table(table, Path(folder) / "target" / "train_target.parquet")
        prepared = _prepared(Path(folder), users)
        seconds = []
        for _ in range(5):
            begin = time.process_time()
            labels = window_labels(prepared, "train")
            seconds.append(time.process_time() - begin)
        begin = time.process_time()
        for i in range(SCANNED):
            mine = rows["category"][rows["client_id"] == users[i]]
            scanned = np.isin(np.arange(1, TARGET_ROWS + 1), mine)
            if not np.array_equal(scanned, labels.category[[i]].toarray()[0] > 0):
                sys.exit(f"client {users[i]}: the two disagree")
        scan = (time.process_time() - begin) / SCANNED * CLIENTS
    facts = provenance(0, "numpy", "scipy", "pyarrow")
    median = float(np.median(seconds))
    text = f"""{CLIENTS:,} clients, {ROWS:,} target rows, processor seconds.

| labels | way | seconds |
|---|---|---|
| churn, conversion, 100 categories, 100 + 20 skus, 100 price buckets, first price and name | `ubt` | {median:.2f} |
| 100 categories alone | a scan of the rows for every client, from {SCANNED:,} clients | {scan:,.0f} |

{header(facts)}
"""
    print(text)
    report = {"facts": facts, "clients": CLIENTS, "rows": ROWS, "seconds": seconds, "scan_seconds": scan}
    write(Path(__file__).parent / "results" / "ubt_labels", report, text)


def _prepared(folder: Path, users: np.ndarray) -> Prepared:
    sizes = {"category": TARGET_ROWS, "sku": 100, "new_sku": 20, "price": 100}
    start = datetime(2022, 10, 13)
    return Prepared(
        folder=folder,
        store=None,  # type: ignore[arg-type]  # labels of a window do not look at the events
        users=users,
        known=np.arange(len(users)),
        active=np.arange(len(users)) % 2 == 0,
        asked=np.ones(len(users), bool),
        targets={what: Targets(np.arange(sizes[what]) + (what != "price"), np.ones(sizes[what])) for what in TARGETS},
        name_width=16,
        families={},
        train_start=start,
        valid_start=datetime(2022, 10, 27),
        end=datetime(2022, 11, 9),
        fingerprint="",
    )


if __name__ == "__main__":
    main()
