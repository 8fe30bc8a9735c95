"""How fast is the selective scan on this card, in CUDA C++ and in Triton, and what part of a copy's rate is that?

Outputs and gradients are compared with the float64 reference before anything is timed. Times are medians of CUDA
events, the calls' own work on the host included, over inputs that rotate, so that no call finds its own in the cache.
``mamba_ssm`` runs beside them where it is installed.

    python benchmarks/bench_scan_gpu.py --out benchmarks/results/scan_gpu
"""

import argparse
import importlib
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import header, provenance, write
from torch import Tensor

from mamba_scan import available_backends, selective_scan

BATCH, CHANNELS, STATES = 8, 1536, 16
LENGTHS = (1024, 2048, 4096, 8192)
# Of the copy's rate, counting the fewest bytes; against mamba_ssm; packed against dense at as many tokens.
COPY_SHARE, RIVAL, PACKED = 0.6, 1.0, 1.1


class Case:
    """Inputs of one length in a few copies, dense [b, d, l] or packed [b * l, d]; softplus, bias, D and gate on."""

    def __init__(self, length: int, seed: int, packed: bool = False, batch: int = BATCH, channels: int = CHANNELS):
        g = torch.Generator().manual_seed(seed)
        signal = (batch * length, channels) if packed else (batch, channels, length)
        coefficient = (batch * length, STATES) if packed else (batch, STATES, length)

        def uniform(*shape: int) -> Tensor:
            return 2 * torch.rand(*shape, generator=g) - 1

        self.offsets = torch.arange(batch + 1).cuda() * length if packed else None
        fixed = {"A": -torch.rand(channels, STATES, generator=g), "D": uniform(channels), "bias": uniform(channels)}
        self.fixed = {name: x.cuda().requires_grad_() for name, x in fixed.items()}
        self.sets = []
        for _ in range(2):
            signals = [uniform(*signal).bfloat16().cuda().requires_grad_() for _ in range(3)]
            rows = [uniform(*coefficient).bfloat16().cuda().requires_grad_() for _ in range(2)]
            self.sets.append((signals, rows, uniform(*signal).bfloat16().cuda()))
        elements, rows_bytes = batch * length * channels, 2 * batch * length * STATES * 2
        # Forward: u, delta, z in, out out. Backward: those and the gradient in, three gradients out; B, C and theirs.
        self.bytes = {"forward": 4 * elements * 2 + rows_bytes, "backward": 7 * elements * 2 + 2 * rows_bytes}

    def call(self, scan: Callable[..., Any], i: int) -> tuple[Tensor, list[Tensor], Tensor]:
        (u, delta, z), (B, C), up = self.sets[i % len(self.sets)]
        f = self.fixed
        out = scan(u, delta, f["A"], B, C, f["D"], z, f["bias"], True)
        return out, [u, delta, z, B, C, *f.values()], up

    def ours(self, backend: str) -> Callable[..., Any]:
        return lambda *x: selective_scan(*x, offsets=self.offsets, backend=backend)


def check(backend: str, seed: int) -> None:
    """Stop where a small case, packed or not, differs from the float64 reference."""
    for packed in (False, True):
        case = Case(130, seed, packed, batch=2, channels=40)
        out, leaves, up = case.call(case.ours(backend), 0)
        found = [out, *torch.autograd.grad(out, leaves, up)]
        wide = [x.detach().cpu().double().requires_grad_() for x in leaves]
        u, delta, z, B, C, A, D, bias = wide
        offsets = None if case.offsets is None else case.offsets.cpu()
        want = selective_scan(u, delta, A, B, C, D, z, bias, True, offsets=offsets, backend="reference")
        assert isinstance(want, Tensor)
        wanted = [want, *torch.autograd.grad(want, wide, up.cpu().double())]
        pairs = [(a.detach().cpu().double(), b.detach()) for a, b in zip(found, wanted, strict=True)]
        errors = [float((a - b).norm() / b.norm()) for a, b in pairs]
        if not max(errors) < 1e-2:
            raise SystemExit(f"{backend} differs from the reference by {errors}; nothing is timed")


def milliseconds(run: Callable[[int], object], rounds: int) -> float:
    for i in range(5):
        run(i)
    torch.cuda.synchronize()
    marks = []
    for i in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run(i)
        end.record()
        marks.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in marks)


def measure(case: Case, scan: Callable[..., Any], rounds: int) -> dict[str, float]:
    def forward(i: int) -> None:
        with torch.no_grad():
            case.call(scan, i)

    outs = [case.call(scan, i) for i in range(len(case.sets))]

    def backward(i: int) -> None:
        out, leaves, up = outs[i % len(outs)]
        torch.autograd.grad(out, leaves, up, retain_graph=True)

    return {"forward": milliseconds(forward, rounds), "backward": milliseconds(backward, rounds)}


def copy_rate(rounds: int) -> float:
    """GB/s of a copy on this card, read and written."""
    source, target = (torch.empty(1 << 29, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * (1 << 29) / milliseconds(lambda i: target.copy_(source), rounds) / 1e6


def rival() -> Callable[..., Any] | None:
    try:
        scan: Callable[..., Any] = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    except ImportError:
        return None
    return scan


def bars(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What is asked of the faster of our backends, what was found, and whether it is enough."""
    found = []
    for row in report["lengths"]:
        sums = {name: sum(times.values()) for name, times in row["times"].items()}
        mine = {name: x for name, x in sums.items() if name in ("cuda", "triton")}
        best = min(mine, key=lambda name: mine[name])
        if "mamba_ssm" in sums:
            ratio = sums["mamba_ssm"] / mine[best]
            found.append((f"L{row['length']} against mamba_ssm: {RIVAL}x", f"{ratio:.2f}x ({best})", ratio >= RIVAL))
        else:
            share = sum(row["bytes"].values()) / mine[best] / 1e6 / report["copy GB/s"]
            found.append((f"L{row['length']} of the copy's rate: {COPY_SHARE}", f"{share:.2f}", share >= COPY_SHARE))
        cost = sums[f"{best}, packed"] / mine[best]
        found.append((f"L{row['length']} packed over dense: {PACKED}x", f"{cost:.2f}x", cost <= PACKED))
    return [(text, value, "pass" if ok else "fail") for text, value, ok in found]


def table(report: dict[str, Any]) -> str:
    lines = [
        "# The selective scan on a GPU",
        "",
        header(report["run"]),
        f"B{BATCH} D{CHANNELS} N{STATES}, bfloat16. A copy on this card: {report['copy GB/s']:.0f} GB/s.",
        "",
        "Milliseconds, medians; in brackets the rate of the fewest bytes over that of the copy.",
        "",
        "| length | what | forward | backward |",
        "|---|---|---|---|",
    ]
    for row in report["lengths"]:
        for name, times in row["times"].items():
            shares = {k: row["bytes"][k] / ms / 1e6 / report["copy GB/s"] for k, ms in times.items()}
            cells = [f"{times[k]:.3f} ({shares[k]:.2f})" for k in ("forward", "backward")]
            lines.append(f"| {row['length']} | {name} | {' | '.join(cells)} |")
    lines += ["", "| asked of forward and backward | found | |", "|---|---|---|"]
    lines += [f"| {' | '.join(bar)} |" for bar in bars(report)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="timed calls of each rival")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs")
    parser.add_argument("--check-memory", action="store_true", help="compare once on a small shape and time nothing")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    a = parser.parse_args()
    backends = [name for name in ("cuda", "triton") if available_backends()[name] == "ok"]
    if not torch.cuda.is_available() or not backends:
        raise SystemExit(f"nothing to time: {available_backends()}")
    for backend in backends:
        check(backend, a.seed)
    if a.check_memory:
        return
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    )
    facts = provenance(a.seed, "torch") | {
        "card": torch.cuda.get_device_name(),
        "driver": driver.stdout.split("\n")[0],
        "CUDA": str(torch.version.cuda),
        "rounds": str(a.rounds),
    }
    report: dict[str, Any] = {"run": facts, "copy GB/s": copy_rate(a.rounds), "lengths": []}
    for length in LENGTHS:
        dense, packed = Case(length, a.seed), Case(length, a.seed, packed=True)
        times = {}
        for backend in backends:
            times[backend] = measure(dense, dense.ours(backend), a.rounds)
            times[f"{backend}, packed"] = measure(packed, packed.ours(backend), a.rounds)
        if (other := rival()) is not None:
            times["mamba_ssm"] = measure(dense, other, a.rounds)
        report["lengths"].append({"length": length, "bytes": dense.bytes, "times": times})
        print(length, {k: {n: round(ms, 3) for n, ms in x.items()} for k, x in times.items()}, flush=True)
    print(table(report))
    if a.out:
        write(a.out, report, table(report))


if __name__ == "__main__":
    main()
