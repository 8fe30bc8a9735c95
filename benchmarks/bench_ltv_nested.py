"""Are nested columns read from Arrow offsets fifty times faster than pandas apply? 200,000 rows, 550,000 entries.

Nine statistics a row (count, sum, mean, std, min, max, top-1 and top-3 share, entropy) of a map<string, double> and of
a list<struct>. Each rival is compared with a literal Python loop before anything is timed; rivals take turns,
so that a busy machine hurts all of them. The table holds medians of processor seconds and their ratios.

    python benchmarks/bench_ltv_nested.py
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from record import header, provenance, write

from ltv_stack.nested import STATISTICS, nested_statistics

Table = dict[str, np.ndarray]
# Rows compared with the literal loop.
CHECKED = 5000


def columns(rows: int) -> dict[str, pa.Array]:
    """The same data as a map and as a list of structs: 45 % null, five entries where not, log-normal amounts."""
    rng = np.random.default_rng(0)
    null = rng.random(rows) < 0.45
    lengths = np.where(null, 0, rng.poisson(5, rows))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    keys = pa.array([f"{i:040x}" for i in range(5000)]).take(pa.array(rng.integers(0, 5000, offsets[-1])))
    values = pa.array(rng.lognormal(size=offsets[-1]))
    mask = pa.array(null)
    maps = pa.MapArray.from_arrays(pa.array(np.where(np.append(null, False), None, offsets), pa.int32()), keys, values)
    structs = pa.ListArray.from_arrays(
        pa.array(offsets), pa.StructArray.from_arrays([keys, values], names=["hash", "count"]), mask=mask
    )
    return {"map<string, double>": maps, "list<struct>": structs}


def loop(pairs: list[tuple[Any, float]] | None) -> list[float]:
    """The statistics of one row, written out."""
    if pairs is None:
        return [0.0] + [math.nan] * 8
    values = [value for _, value in pairs]
    if not values:
        return [0.0, 0.0] + [math.nan] * 7
    total = math.fsum(values)
    mean = total / len(values)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))
    top = sorted(values, reverse=True)
    entropy = -sum(v / total * math.log(v / total) for v in values)
    shares = [top[0] / total, sum(top[:3]) / total]
    return [float(len(values)), total, mean, deviation, top[-1], top[0], *shares, entropy]


def by_offsets(array: pa.Array) -> Table:
    """This package."""
    return nested_statistics(array, STATISTICS)


def by_numpy(pairs: list[tuple[Any, float]] | None) -> list[float]:
    """The statistics of one row as most write them, the published code among them: numpy on every cell."""
    if not pairs:
        return loop(pairs)
    values = np.array([value for _, value in pairs])
    total = np.sum(values)
    top = np.sort(values)[::-1]
    share = values / total
    entropy = -np.sum(share * np.log(share))
    moments = [np.mean(values), np.std(values), np.min(values), np.max(values)]
    return [float(len(values)), total, *moments, top[0] / total, np.sum(top[:3]) / total, entropy]


def by_apply(array: pa.Array, row: Callable[..., list[float]] = by_numpy) -> Table:
    """What people do: to pandas, then a function a row."""

    def one(cell: Any) -> list[float]:
        if cell is None:
            return row(None)
        return row([(p["hash"], p["count"]) if isinstance(p, dict) else p for p in cell])

    found = array.to_pandas().apply(one)
    return dict(zip(STATISTICS, np.array(found.tolist()).T, strict=True))


def by_loop(array: pa.Array) -> Table:
    """The same with the leanest Python loop a row."""
    return by_apply(array, loop)


def check(array: pa.Array, found: Table, what: str) -> None:
    """Raise unless the first rows equal the literal loop."""
    for row, pairs in enumerate(array.slice(0, CHECKED).to_pylist()):
        if pairs is not None and pairs and isinstance(pairs[0], dict):
            pairs = [(p["hash"], p["count"]) for p in pairs]
        for name, expected in zip(STATISTICS, loop(pairs), strict=True):
            if not np.isclose(found[name][row], expected, rtol=1e-9, atol=1e-7, equal_nan=True):
                raise SystemExit(f"{what}: row {row}, {name}: {found[name][row]} is not {expected}")


def main() -> None:
    """Check, time in turns, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "ltv_nested")
    arguments = parser.parse_args()
    results = []
    for kind, array in columns(arguments.rows).items():
        rivals: dict[str, Callable[[pa.Array], Table]] = {
            "ltv_stack": by_offsets,
            "pandas apply, numpy on every cell": by_apply,
            "pandas apply, leanest Python loop": by_loop,
        }
        for name, rival in rivals.items():
            check(array, rival(array), f"{kind}, {name}")
        seconds: dict[str, list[float]] = {name: [] for name in rivals}
        for _ in range(arguments.rounds):
            for name, rival in rivals.items():
                repeats = 10 if name == "ltv_stack" else 1
                begin = time.process_time()
                for _ in range(repeats):
                    rival(array)
                seconds[name].append((time.process_time() - begin) / repeats)
        ours = statistics.median(seconds["ltv_stack"])
        for name, times in seconds.items():
            results.append({"column": kind, "rival": name, "seconds": statistics.median(times), "all": times})
            results[-1]["ratio"] = results[-1]["seconds"] / ours
    _write(arguments, results)


def _write(arguments: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    facts = provenance(0, "pyarrow", "numpy", "pandas")
    lines = ["| column | way | seconds | times slower than ltv_stack |", "|---|---|---|---|"]
    lines += [f"| {r['column']} | {r['rival']} | {r['seconds']:.4f} | {r['ratio']:.1f} |" for r in results]
    head = f"{arguments.rows:,} rows, nine statistics a row, processor seconds, medians of {arguments.rounds} turns."
    text = "\n".join([head, "", *lines, "", header(facts)]) + "\n"
    write(arguments.out, {"facts": facts, "rows": arguments.rows, "results": results}, text)
    print(text)


if __name__ == "__main__":
    main()
