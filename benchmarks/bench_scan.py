"""Is the fused selective scan on a CPU faster than what one writes in plain PyTorch, and what memory does it take?

Equality with the float64 reference is checked before anything is timed. Rivals take turns, so that a busy machine hurts
all of them; the tables hold medians, the ratios are ratios of medians of one run.

    python benchmarks/bench_scan.py --threads 2 --out benchmarks/results/scan_cpu
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
from record import header, provenance, write
from torch import Tensor
from torch.nn import functional as F

from mamba_scan import available_backends, selective_scan
from mamba_scan.impl import cpu

SHAPES = {
    # name: (batch, channels, states, length); the first is a shop's session encoder, the second a long history.
    "B32 D1024 N16 L51": (32, 1024, 16, 51),
    "B4 D256 N16 L1024": (4, 256, 16, 1024),
}
TOLERANCE = 2e-5
# Channels kept for the check against the float64 reference.
CHECKED = 32


class Case:
    """Tensors of one shape, softplus, bias, D and gate on; the rivals map them to the gated output [b, d, l]."""

    def __init__(self, batch: int, channels: int, states: int, length: int, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g)

        self.inputs = {
            "u": normal(batch, channels, length),
            "delta": normal(batch, channels, length) - 2,
            "A": -torch.arange(1.0, states + 1).repeat(channels, 1),
            "B": normal(batch, states, length),
            "C": normal(batch, states, length),
            "D": torch.ones(channels),
            "z": normal(batch, channels, length),
            "delta_bias": normal(channels) * 0.1,
        }
        self.inputs = {name: x.requires_grad_() for name, x in self.inputs.items()}
        self.grad = normal(batch, channels, length)

    def leaves(self) -> list[Tensor]:
        return list(self.inputs.values())


def ours(*inputs: Tensor) -> Tensor:
    out = selective_scan(*inputs, delta_softplus=True, backend="cpu")
    assert isinstance(out, Tensor)
    return out


def _prepared(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, delta_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Decays and inputs of the recurrence of all steps, time first so that a step is contiguous: [l, b, d, n]."""
    dt = F.softplus(delta + delta_bias[:, None]).permute(2, 0, 1)
    decay = torch.exp(dt[..., None] * A)
    return decay, (dt * u.permute(2, 0, 1))[..., None] * B.permute(2, 0, 1)[:, :, None]


def _finished(h: Tensor, u: Tensor, C: Tensor, D: Tensor, z: Tensor) -> Tensor:
    y = (h @ C.permute(2, 0, 1)[..., None]).squeeze(-1).permute(1, 2, 0)
    return (y + D[:, None] * u) * F.silu(z)


def unbind_loop(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor
) -> Tensor:
    """The plain loop, written with care: decays for all steps at once, unbind instead of indexing, one stack."""
    decay, x = _prepared(u, delta, A, B, bias)
    h, states = torch.zeros_like(x[0]), []
    for decay_t, x_t in zip(decay.unbind(), x.unbind(), strict=True):
        h = torch.addcmul(x_t, decay_t, h)
        states.append(h)
    return _finished(torch.stack(states), u, C, D, z)


class _ParallelScan(torch.autograd.Function):
    """h_t = a_t h_{t-1} + x_t along the first dimension in O(log l) vector steps, with the scan's own gradient."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, x: Tensor) -> Tensor:
        h = _ParallelScan.scan(a, x)
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, h = ctx.saved_tensors
        later = torch.cat([a[1:], torch.zeros_like(a[:1])]).flip(0)
        g = _ParallelScan.scan(later, grad.flip(0)).flip(0)
        return torch.cat([torch.zeros_like(a[:1]), g[1:] * h[:-1]]), g

    @staticmethod
    def scan(a: Tensor, x: Tensor) -> Tensor:
        length = a.shape[0]
        if length == 1:
            return x
        # Pairs of steps become one step; their scan gives every second state, from which the others follow.
        even = length - length % 2
        a_odd, x_odd = a[1:even:2], x[1:even:2]
        odd = _ParallelScan.scan(a_odd * a[0:even:2], torch.addcmul(x_odd, a_odd, x[0:even:2]))
        h = torch.empty_like(x)
        h[1:even:2] = odd
        h[0] = x[0]
        h[2::2] = torch.addcmul(x[2::2], a[2::2], odd[: (length - 1) // 2])
        return h


def parallel_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor
) -> Tensor:
    """A work-efficient parallel scan over time, as the pure PyTorch packages have it."""
    h = _ParallelScan.apply(*_prepared(u, delta, A, B, bias))
    return _finished(h, u, C, D, z)


def associative_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor
) -> Tensor:
    """torch's own higher-order operator, a prototype."""
    from torch._higher_order_ops.associative_scan import associative_scan as scan

    def combine(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return left[0] * right[0], right[0] * left[1] + right[1]

    h = scan(combine, _prepared(u, delta, A, B, bias), dim=0, combine_mode="generic")[1]
    return _finished(h, u, C, D, z)


RIVALS: dict[str, Callable[..., Tensor]] = {
    "ours": ours,
    "unbind loop": unbind_loop,
    "parallel scan": parallel_scan,
    "associative_scan": associative_scan,
}


def passes(rival: Callable[..., Tensor], case: Case) -> dict[str, Callable[[], object]]:
    leaves = case.leaves()

    def forward() -> None:
        with torch.no_grad():
            rival(*leaves)

    return {"forward": forward, "forward+backward": lambda: torch.autograd.grad(rival(*leaves), leaves, case.grad)}


def check(case: Case) -> dict[str, float]:
    """Largest relative error of each rival on some channels, gradients included; stops where it is too large."""
    few = {k: x if k in ("B", "C") else x[:, :CHECKED] if x.dim() == 3 else x[:CHECKED] for k, x in case.inputs.items()}
    grad = case.grad[:, :CHECKED]
    wide = [x.detach().double().requires_grad_() for x in few.values()]
    out = selective_scan(*wide, delta_softplus=True, backend="reference")
    assert isinstance(out, Tensor)
    want = [out, *torch.autograd.grad(out, wide, grad.double())]
    errors = {}
    for name, rival in RIVALS.items():
        leaves = [x.detach().requires_grad_() for x in few.values()]
        try:
            out = rival(*leaves)
            found = [out, *torch.autograd.grad(out, leaves, grad)]
        except Exception as error:
            print(f"{name} does not run: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        errors[name] = max(
            float((a.detach() - b.detach()).norm() / b.detach().norm()) for a, b in zip(found, want, strict=True)
        )
        if errors[name] > TOLERANCE:
            raise SystemExit(f"{name} differs from the reference by {errors[name]:.1e}; nothing is timed")
    return errors


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
clock = CLOCKS["wall"]


def seconds(run: Callable[[], object], repeat: int) -> float:
    start = clock()
    for _ in range(repeat):
        run()
    return (clock() - start) / repeat


def measure(runs: dict[str, Callable[[], object]], rounds: int, least: float = 0.05) -> dict[str, float]:
    """Median milliseconds of each run; in a round all take turns, short ones for ``least`` seconds at a time.

    A turn begins with a call that is not timed: the rival before has given its memory back to the system, and pages
    that come from there cost more than the short runs themselves.
    """
    for run in runs.values():
        run()
    repeats = {name: max(1, min(20, int(least / max(seconds(run, 1), 1e-6)))) for name, run in runs.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run()
            samples[name].append(seconds(run, repeats[name]))
    return {name: round(1e3 * statistics.median(values), 3) for name, values in samples.items()}


def scaling(case: Case, threads: int, rounds: int) -> dict[str, float]:
    """Ours on one thread and on all, in turns: the time of one over that of all, of medians and of the best rounds."""
    result = {}
    for label, run in passes(ours, case).items():
        samples: dict[int, list[float]] = {1: [], threads: []}
        for _ in range(3 * rounds):
            for count in samples:
                torch.set_num_threads(count)
                run()
                samples[count].append(seconds(run, 3))
        result[label] = round(statistics.median(samples[1]) / statistics.median(samples[threads]), 2)
        result[f"{label}, best rounds"] = round(min(samples[1]) / min(samples[threads]), 2)
    torch.set_num_threads(threads)
    return result


def compiled(shape: str, seed: int, threads: int, rounds: int, limit: int) -> dict[str, Any]:
    """The loop under torch.compile beside ours, in a process of its own that may take ``limit`` seconds."""
    code = f"import bench_scan; bench_scan.compile_worker({shape!r}, {seed}, {threads}, {rounds})"
    try:
        done = subprocess.run(_python(code), env=_environment(), capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"did not compile and run within {limit} s"}
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def compile_worker(shape: str, seed: int, threads: int, rounds: int) -> None:
    torch.set_num_threads(threads)
    case = Case(*SHAPES[shape], seed)
    start = time.perf_counter()
    loop = passes(torch.compile(unbind_loop, fullgraph=True, dynamic=False), case)
    for run in loop.values():
        run()
    first = time.perf_counter() - start
    mine = passes(ours, case)
    times = {label: measure({"ours": mine[label], "compile": loop[label]}, rounds) for label in loop}
    print(json.dumps(times | {"seconds to compile": round(first, 1)}))


def peak_memory(shape: str, rival: str, seed: int) -> float:
    """Megabytes by which one forward and backward raises the peak of a fresh process, gradients included."""
    code = f"import bench_scan; bench_scan.memory_worker({shape!r}, {rival!r}, {seed})"
    done = subprocess.run(_python(code), env=_environment(), capture_output=True, text=True)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else float("nan")


def memory_worker(shape: str, rival: str, seed: int) -> None:
    def high_water() -> int:
        status = Path("/proc/self/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))

    small, case = Case(1, 16, 16, 8, seed), Case(*SHAPES[shape], seed)
    passes(RIVALS[rival], small)["forward+backward"]()
    # 5 sets the high-water mark back to what is in use now.
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water()
    passes(RIVALS[rival], case)["forward+backward"]()
    print((high_water() - before) / 1024)


def kept_over_inputs(case: Case) -> float:
    """Bytes kept between forward and backward, inputs included, over the bytes of the inputs."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.data_ptr()] = x.nbytes
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        ours(*case.leaves())
    return round(sum(kept.values()) / sum(x.nbytes for x in case.leaves()), 3)


def bench(name: str, a: argparse.Namespace) -> dict[str, Any]:
    case = Case(*SHAPES[name], a.seed)
    row: dict[str, Any] = {"shape": name, "errors": check(case)}
    runs = {rival: passes(RIVALS[rival], case) for rival in row["errors"]}
    for label in ("forward", "forward+backward"):
        row[label] = measure({rival: run[label] for rival, run in runs.items()}, a.rounds)
    row["compile"] = compiled(name, a.seed, a.threads, a.rounds, a.compile_limit) if a.compile_limit else {}
    row["scaling"] = scaling(case, a.threads, a.rounds) if a.threads > 1 else {}
    row["kept / inputs"] = kept_over_inputs(case)
    row["inputs MB"] = round(sum(x.nbytes for x in case.leaves()) / 2**20, 1)
    row["peak MB"] = {rival: round(peak_memory(name, rival, a.seed), 1) for rival in runs}
    return row


def bars(row: dict[str, Any]) -> list[tuple[str, float, str]]:
    """What is asked of the forward and backward pass, what was found, and whether it is enough."""
    times, scale = row["forward+backward"], row["scaling"]
    found = {
        "times faster than the unbind loop": (times["unbind loop"] / times["ours"], 15),
        "times faster than the parallel scan": (times["parallel scan"] / times["ours"], 25),
    }
    if scale:
        found["times faster on all threads than on one"] = (scale["forward+backward"], 1.7)
    result = [
        (f"at least {bar} {name}", round(x, 2), "pass" if x >= bar else "fail") for name, (x, bar) in found.items()
    ]
    kept = row["kept / inputs"]
    return [*result, ("at most 2 times the inputs kept", kept, "pass" if kept <= 2 else "fail")]


def table(report: dict[str, Any]) -> str:
    lines = [
        "# The selective scan on a CPU",
        "",
        header(report["run"]),
        "Medians of rounds in which all rivals take turns, each turn after a call that is not timed; equality with the "
        "float64 reference is checked first. "
        "float32; softplus, bias, D and gate on. No GPU was used.",
        "",
        "Milliseconds; the rivals' time divided by ours in brackets.",
        "",
        "| shape | pass | " + " | ".join(RIVALS) + " | compiled loop |",
        "|" + "---|" * (len(RIVALS) + 3),
    ]
    for row in report["shapes"]:
        for label in ("forward", "forward+backward"):
            times = row[label]
            cells = [row["shape"], label, f"{times['ours']:.2f}"]
            for rival in list(RIVALS)[1:]:
                got = times.get(rival)
                cells.append(f"{got:.1f} ({got / times['ours']:.1f}x)" if got else "does not run")
            other = row["compile"].get(label)
            if other:
                cells.append(f"{other['compile']:.1f} ({other['compile'] / other['ours']:.1f}x)")
            else:
                cells.append(row["compile"].get("failed", "not tried"))
            lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "The compiled loop runs in a process of its own, beside ours again. Memory: the rise of a fresh process's peak "
        "over one forward and backward, gradients included; what ours keeps between the passes, inputs included, over "
        "the inputs. Scaling: time of ours on one thread over that on all, in turns (in brackets: of the best rounds).",
        "",
        "| shape | inputs MB | " + " | ".join(f"peak MB {name}" for name in RIVALS) + " | kept / inputs | scaling fwd "
        "| scaling fwd+bwd | compile s |",
        "|" + "---|" * (len(RIVALS) + 6),
    ]
    for row in report["shapes"]:
        peaks = [f"{row['peak MB'].get(name, float('nan')):.0f}" for name in RIVALS]
        scale = [
            f"{row['scaling'][k]} ({row['scaling'][k + ', best rounds']})" if row["scaling"] else "-"
            for k in ("forward", "forward+backward")
        ]
        cells = [row["shape"], f"{row['inputs MB']}", *peaks, f"{row['kept / inputs']}", *scale]
        lines.append("| " + " | ".join([*cells, str(row["compile"].get("seconds to compile", "-"))]) + " |")
    lines += ["", "| shape | asked of forward and backward | found | |", "|---|---|---|---|"]
    lines += [f"| {row['shape']} | {' | '.join(map(str, bar))} |" for row in report["shapes"] for bar in row["bars"]]
    return "\n".join(lines) + "\n"


def _python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="threads for every rival")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: time of this process alone, for one thread on a busy machine",
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds in which the rivals take turns")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs")
    parser.add_argument("--only", default="", help="only the shapes whose name contains this text")
    parser.add_argument(
        "--compile-limit", type=int, default=300, help="seconds torch.compile may take; 0 leaves it out"
    )
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    a = parser.parse_args()
    if (status := available_backends()["cpu"]) != "ok":
        raise SystemExit(f"the C++ kernel cannot run here: {status}")
    global clock
    clock = CLOCKS[a.clock]
    torch.set_num_threads(a.threads)
    report: dict[str, Any] = {
        "run": provenance(a.seed, "torch")
        | {
            "threads": str(a.threads),
            "clock": a.clock,
            "instruction set": cpu.isa(),
            "rounds": str(a.rounds),
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "not set"),
        },
        "shapes": [],
    }
    for name in SHAPES:
        if a.only in name:
            row = bench(name, a)
            report["shapes"].append(row | {"bars": bars(row)})
            print(json.dumps(report["shapes"][-1]), flush=True)
    print(table(report))
    if a.out:
        write(a.out, report, table(report))


if __name__ == "__main__":
    main()
