"""Do 2 million generated rows train end to end in less than 3 GB and 30 minutes, and does prediction stream?

    python benchmarks/bench_ltv_scale.py --work FOLDER               minutes of both cores, 12 GB of disk
    python benchmarks/bench_ltv_scale.py --rows 60000 --out x        a look at it in minutes

Generates the log, trains the production settings on its first five days with `ltv train`, and predicts test partitions
of 100,000 rows with chunks of 1,000, 50,000 and all rows; every file written must hold the same bits. Each command runs
in a process of its own, whose wall time and peak memory it logs itself.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from record import header, provenance, write

CHUNKS = {"1,000": 1000, "50,000": 50_000, "whole partitions": 1 << 30}


def ltv(*words: object) -> None:
    """Run one `ltv` command; stop where it fails."""
    subprocess.run([sys.executable, "-m", "ltv.cli", *map(str, words)], check=True)


def digest(folder: Path) -> str:
    """Return a hash of every value of every prediction file below a run's folder, and of its submission."""
    found = hashlib.sha256((folder / "submissions" / "submission.csv").read_bytes())
    for path in sorted((folder / "predictions" / "test").glob("*.parquet")):
        sink = pa.BufferOutputStream()
        table = pq.read_table(path).combine_chunks()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        found.update(sink.getvalue())
    return found.hexdigest()


def measure(work: Path, rows: int) -> dict[str, Any]:
    """Generate, train, predict three times; return what the commands logged of themselves."""
    data, run = work / "data", work / "run"
    partition_rows = max(rows // 24, 100)
    if not data.exists():
        ltv("generate", "--data-dir", data, "--rows", rows, "--test-rows", 4 * partition_rows, "--test-hours", 4)
    settings = ["--config", "config/config.yaml", "--data.root", data, "--run-dir", run]
    ltv("train", *settings)

    def facts(command: str) -> dict[str, Any]:
        return json.loads((run / "metadata.json").read_text())["commands"][command]

    train, evaluate = facts("train"), facts("evaluate")
    report: dict[str, Any] = {key: train[key] for key in ("rows", "wall_seconds", "peak_memory_mb")}
    report |= {key: train["fit"][key] for key in ("training_rows", "held_out_rows", "seconds")}
    report["evaluate"] = {key: evaluate[key] for key in ("rows", "wall_seconds")}
    report["predict"] = []
    hashes = set()
    for name, chunk in CHUNKS.items():
        ltv("predict", *settings, "--chunk-size", chunk)
        own = facts("predict")
        hashes.add(digest(run))
        line = {"chunk": name, "rows": own["rows"], "partition_rows": partition_rows}
        report["predict"].append(line | {key: own[key] for key in ("seconds", "ms_per_row", "peak_memory_mb")})
    if len(hashes) != 1:
        raise SystemExit(f"predictions differ between chunk sizes {list(CHUNKS)}")
    return report


def text_of(facts: dict[str, str], report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    minutes, gigabytes = report["wall_seconds"] / 60, report["peak_memory_mb"] / 1024
    lines = [
        "# 2 million rows from end to end",
        "",
        header(facts),
        "",
        f"`ltv train` read {report['rows']:,} rows ({report['training_rows']:,} train the trees, "
        f"{report['held_out_rows']:,} calibrate): **{minutes:.1f} min, {gigabytes:.2f} GB at the peak**, of which "
        f"features {report['seconds']['cache']:.0f} s. Scoring {report['evaluate']['rows']:,} validation rows with the "
        f"whole report took {report['evaluate']['wall_seconds']:.0f} s more.",
        "",
        f"`ltv predict` on partitions of {report['predict'][0]['partition_rows']:,} rows; equal bit by bit:",
        "",
        "| chunk | rows | seconds | ms a row | peak memory, MB |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {p['chunk']} | {p['rows']:,} | {p['seconds']:.1f} | {p['ms_per_row']:.3f} | {p['peak_memory_mb']:.0f} |"
        for p in report["predict"]
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the command line, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # Five of the six generated days train: a little more than 2 million rows.
    parser.add_argument("--rows", type=int, default=2_410_000, help="rows of the six labelled days")
    parser.add_argument("--work", type=Path, help="folder for data and run; default: a temporary one")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "ltv_scale")
    given = parser.parse_args()
    facts = provenance(0, "lightgbm", "pyarrow")
    with tempfile.TemporaryDirectory() as temporary:
        report = measure(given.work or Path(temporary), given.rows)
    text = text_of(facts, report)
    write(given.out, {"facts": facts, **report}, text)
    print(text)


if __name__ == "__main__":
    main()
