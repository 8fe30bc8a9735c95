"""Is the fused sampled softmax faster and smaller than a plain gather and bmm? Several shapes, one and two threads.

Loss and gradients are checked against float64 before anything is timed. Rivals take turns, so that a busy machine hurts
all of them; the table holds medians of one run and their ratios, in wall time and in processor time.

    python benchmarks/bench_mtl_heads.py --out benchmarks/results/mtl_heads_sampled_softmax

The last table printed, what plain code takes over ours, is the README's.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from record import header, provenance, write
from torch import Tensor

from mtl_heads.losses import sampled_softmax_loss

TOLERANCE = 1e-4
# Rows kept for the check against the float64 reference.
CHECKED = 256
KINDS = ("own", "shared")
# Rows, width, negatives, items.
SHAPES = ("20000,64,128,30000", "2000,64,128,30000", "512,64,64,2000", "4096,128,64,200000")
COLUMNS = ("forward", "forward+backward", "forward, cpu", "forward+backward, cpu", "peak MB")


class Case:
    """Queries [N, D], an item table [I, D], a positive a row, negatives own [N, S] or shared [S], and their log Q."""

    def __init__(self, kind: str, n: int, d: int, s: int, items: int, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.queries = torch.randn(n, d, generator=g).requires_grad_()
        self.table = (torch.randn(items, d, generator=g) / d**0.5).requires_grad_()
        self.positives = torch.randint(items, (n,), generator=g)
        self.negatives = torch.randint(items, (n, s) if kind == "own" else (s,), generator=g)
        self.log_q = torch.rand(items, generator=g).log_softmax(0)

    def arguments(self) -> tuple[Tensor, ...]:
        log_q = self.log_q.to(self.queries)
        return (
            self.queries,
            self.table,
            self.positives,
            self.negatives,
            log_q[self.positives],
            log_q[self.negatives],
        )

    def first(self, rows: int) -> "Case":
        few = object.__new__(Case)
        few.queries = self.queries.detach()[:rows].double().requires_grad_()
        few.table = self.table.detach().double().requires_grad_()
        few.positives = self.positives[:rows]
        few.negatives = self.negatives[:rows] if self.negatives.dim() == 2 else self.negatives
        few.log_q = self.log_q
        return few


def ours(
    queries: Tensor, table: Tensor, positives: Tensor, negatives: Tensor, log_q_p: Tensor, log_q_n: Tensor
) -> Tensor:
    return sampled_softmax_loss(queries, table, positives, negatives, log_q_positives=log_q_p, log_q_negatives=log_q_n)


def _finished(positive: Tensor, negative: Tensor, hits: Tensor) -> Tensor:
    logits = torch.cat([positive[:, None], negative.masked_fill(hits, -torch.inf)], 1)
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


def gather_bmm(
    queries: Tensor, table: Tensor, positives: Tensor, negatives: Tensor, log_q_p: Tensor, log_q_n: Tensor
) -> Tensor:
    """What one writes first: look up all vectors [N, S, D], one bmm."""
    own = negatives if negatives.dim() == 2 else negatives.expand(len(queries), -1)
    negative = torch.bmm(F.embedding(own, table), queries[:, :, None])[..., 0] - log_q_n
    positive = (F.embedding(positives, table) * queries).sum(-1) - log_q_p
    return _finished(positive, negative, positives[:, None] == own)


def matmul(
    queries: Tensor, table: Tensor, positives: Tensor, negatives: Tensor, log_q_p: Tensor, log_q_n: Tensor
) -> Tensor:
    """For shared negatives only: look up [S, D], one matrix product."""
    negative = queries @ F.embedding(negatives, table).T - log_q_n
    positive = (F.embedding(positives, table) * queries).sum(-1) - log_q_p
    return _finished(positive, negative, positives[:, None] == negatives)


Rival = Callable[..., Tensor]
RIVALS: dict[str, dict[str, Rival]] = {
    "own": {"ours": ours, "gather + bmm": gather_bmm},
    "shared": {"ours": ours, "gather + bmm": gather_bmm, "matmul": matmul},
}


def passes(rival: Rival, case: Case) -> dict[str, Callable[[], object]]:
    def forward() -> None:
        with torch.no_grad():
            rival(*case.arguments())

    leaves = (case.queries, case.table)
    return {
        "forward": forward,
        "forward+backward": lambda: torch.autograd.grad(rival(*case.arguments()), leaves),
    }


def check(kind: str, case: Case) -> dict[str, float]:
    """Largest relative error of each rival's loss and gradients in float32; stops where it is too large."""
    wide = case.first(CHECKED)
    loss = gather_bmm(*wide.arguments())
    want = [loss, *torch.autograd.grad(loss, (wide.queries, wide.table))]
    errors = {}
    for name, rival in RIVALS[kind].items():
        narrow = case.first(CHECKED)
        narrow.queries = narrow.queries.detach().float().requires_grad_()
        narrow.table = narrow.table.detach().float().requires_grad_()
        loss = rival(*narrow.arguments())
        found = [loss, *torch.autograd.grad(loss, (narrow.queries, narrow.table))]
        pairs = [(a.detach(), b.detach()) for a, b in zip(found, want, strict=True)]
        errors[name] = max(float((a - b).norm() / b.norm()) for a, b in pairs)
        if errors[name] > TOLERANCE:
            raise SystemExit(f"{name} differs from the reference by {errors[name]:.1e}; nothing is timed")
    return errors


def measure(runs: dict[str, Callable[[], object]], rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median wall and processor milliseconds of each run; in a round all take turns."""
    wall: dict[str, list[float]] = {name: [] for name in runs}
    busy: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            start, used = time.perf_counter(), time.process_time()
            run()
            wall[name].append(time.perf_counter() - start)
            busy[name].append(time.process_time() - used)
    medians = [{name: round(1e3 * statistics.median(v), 1) for name, v in samples.items()} for samples in (wall, busy)]
    return medians[0], medians[1]


def peak_memory(kind: str, rival: str, shape: tuple[int, ...], seed: int, threads: int) -> float:
    """Megabytes by which one forward and backward raises the peak of a fresh process, gradients included."""
    code = f"import bench_mtl_heads as b; b.memory_worker({kind!r}, {rival!r}, *{shape}, {seed}, {threads})"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def memory_worker(kind: str, rival: str, n: int, d: int, s: int, items: int, seed: int, threads: int) -> None:
    def high_water() -> int:
        status = Path("/proc/self/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))

    torch.set_num_threads(threads)
    passes(RIVALS[kind][rival], Case(kind, 64, d, s, 500, seed))["forward+backward"]()
    case = Case(kind, n, d, s, items, seed)
    # 5 sets the high-water mark back to what is in use now.
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water()
    passes(RIVALS[kind][rival], case)["forward+backward"]()
    print((high_water() - before) / 1024)


def bench(kind: str, shape: tuple[int, ...], threads: int, rounds: int, seed: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    case = Case(kind, *shape, seed)
    row: dict[str, Any] = {"negatives": kind, "shape": shape, "threads": threads, "errors": check(kind, case)}
    runs = {name: passes(rival, case) for name, rival in RIVALS[kind].items()}
    for label in ("forward", "forward+backward"):
        row[label], row[f"{label}, cpu"] = measure({name: run[label] for name, run in runs.items()}, rounds)
    row["peak MB"] = {name: round(peak_memory(kind, name, shape, seed, threads), 1) for name in runs}
    return row


def table(report: dict[str, Any]) -> str:
    lines = [
        "# Sampled softmax on a CPU",
        "",
        header(report["provenance"]),
        "float32, logQ and accidental-hit mask on. Medians of "
        f"{report['rounds']} rounds in which the rivals take turns; loss and gradients are checked against float64 "
        "first. Peak: the rise of a fresh process's high-water mark over one forward and backward, gradients included. "
        "In brackets: over ours.",
        "",
        "| negatives | N, D, S, items | threads | rival | forward ms | fwd+bwd ms | forward cpu ms | fwd+bwd cpu ms | peak MB |",  # noqa: E501
        "|" + "---|" * (len(COLUMNS) + 4),
    ]
    for row in report["rows"]:
        shape = ", ".join(f"{n:,}" for n in row["shape"])
        for name in row["errors"]:
            cells = [f"{row[what][name]:.1f} ({_over(row, what, name)})" for what in COLUMNS]
            lines.append(f"| {row['negatives']} | {shape} | {row['threads']} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def readme(report: dict[str, Any]) -> str:
    """The README's table: rivals over ours."""
    lines = [
        "| negatives | rows, D, negatives, items | threads | plain code | wall | processor | memory |",
        "|" + "---|" * 7,
    ]
    for row in report["rows"]:
        shape = ", ".join(f"{n:,}" for n in row["shape"])
        for name in list(row["errors"])[1:]:
            cells = [_over(row, what, name) for what in ("forward+backward", "forward+backward, cpu", "peak MB")]
            lines.append(f"| {row['negatives']} | {shape} | {row['threads']} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _over(row: dict[str, Any], what: str, name: str) -> str:
    return f"{row[what][name] / max(row[what]['ours'], 0.1):.1f}x"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="threads for every rival, in turn")
    parser.add_argument("--rounds", type=int, default=7, help="rounds in which the rivals take turns")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="rows,width,negatives,items of each case")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    a = parser.parse_args()
    report: dict[str, Any] = {"rounds": a.rounds, "provenance": provenance(a.seed, "torch"), "rows": []}
    for kind in KINDS:
        for text in a.shapes:
            shape = tuple(int(number) for number in text.split(","))
            for threads in a.threads:
                report["rows"].append(bench(kind, shape, threads, a.rounds, a.seed))
                print(json.dumps(report["rows"][-1]), flush=True)
    print(table(report))
    print(readme(report))
    if a.out:
        write(a.out, report, table(report))


if __name__ == "__main__":
    main()
