"""How fast is jagged HSTU attention on this card, in CUDA C++ and in Triton, and what part of the card is that?

Outputs and gradients are compared with the float64 reference before anything is timed. Times are medians of CUDA
events, the calls' own work on the host included, over inputs that rotate, so that no call finds its own in the cache.
The measured rates of a copy and of a product of the same card stand beside them.

    python benchmarks/bench_hstu_gpu.py --out benchmarks/results/hstu_gpu
"""

import argparse
import statistics
import subprocess
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import torch
from record import header, provenance, write
from torch import Tensor
from torch.nn import functional as F

from hstu_kernels import available_backends, hstu_attention, ops

SHAPES = {
    # name: (batch, longest, heads, width, ragged)
    "B64 N1024 H4 d64 full": (64, 1024, 4, 64, False),
    "B64 N512 H4 d64 full": (64, 512, 4, 64, False),
    "B256 N256 H4 d64 full": (256, 256, 4, 64, False),
    "B512 N128 H4 d64 full": (512, 128, 4, 64, False),
    "B64 N1024 H4 d128 full": (64, 1024, 4, 128, False),
    "B512 N300 H4 d64 shop": (512, 300, 4, 64, True),
    "B128 N1024 H4 d64 shop": (128, 1024, 4, 64, True),
}
# Bounds of the full-length shape, in milliseconds, and what both biases may cost.
FORWARD_MS, BACKWARD_MS, BIAS = 0.15, 0.40, 1.3


class Case:
    """One shape: packed inputs on the card, in so many copies that they do not fit its cache together."""

    def __init__(self, name: str, seed: int) -> None:
        batch, self.longest, self.heads, self.width, ragged = SHAPES[name]
        g = torch.Generator().manual_seed(seed)
        full = torch.full((batch,), self.longest)
        # Pareto(20, 1.2), as a batch of shop visitors looks.
        shop = (20 * torch.rand(batch, generator=g) ** (-1 / 1.2)).long().clamp(1, self.longest)
        self.lengths = (shop if ragged else full).tolist()
        self.offsets = torch.tensor([0, *self.lengths]).cumsum(0).cuda()
        total = sum(self.lengths)
        one = 8 * total * self.heads * self.width
        self.sets = []
        for _ in range(max(2, min(8, (256 << 20) // one + 1))):
            q, k, v, up = (
                (2 * torch.rand(total, self.heads, self.width, generator=g) - 1).bfloat16().cuda() for _ in range(4)
            )
            self.sets.append(((q.requires_grad_(), k.requires_grad_(), v.requires_grad_()), up))
        self.position = torch.randn(1, 2 * self.longest - 1, generator=g).cuda().requires_grad_()
        self.time = torch.randn(1, 129, generator=g).cuda().requires_grad_()
        self.timestamps = torch.randint(0, 10**7, (total,), generator=g).cuda()
        steps = torch.arange(self.longest)
        self.slots = (steps < torch.tensor(self.lengths)[:, None]).flatten().nonzero().flatten().cuda()
        self.causal = torch.ones(self.longest, self.longest, dtype=torch.bool, device="cuda").tril()

    @property
    def flops(self) -> float:
        """Of the forward pass: two products over the pairs j <= i. Backward is five."""
        return sum(4 * self.heads * self.width * n * (n + 1) / 2 for n in self.lengths)

    def ours(self, backend: str, bias: bool) -> Callable[..., Tensor]:
        options = (
            {"position_weight": self.position, "time_weight": self.time, "timestamps": self.timestamps} if bias else {}
        )
        return lambda q, k, v: hstu_attention(q, k, v, self.offsets, self.longest, backend=backend, **options)

    def padded(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def pad(x: Tensor) -> Tensor:
            dense = x.new_zeros(len(self.lengths) * self.longest, self.heads, self.width).index_copy(0, self.slots, x)
            return dense.view(len(self.lengths), self.longest, self.heads, self.width)

        scores = self.width**-0.5 * torch.einsum("bihd,bjhd->bhij", pad(q), pad(k))
        weights = F.silu(scores) / self.longest * self.causal
        out = torch.einsum("bhij,bjhd->bihd", weights, pad(v))
        return out.reshape(-1, self.heads, self.width).index_select(0, self.slots)


def check(case: Case, backend: str) -> None:
    """Stop where the first sequences of the case differ from the float64 reference."""
    (q, k, v), up = case.sets[0]
    rows = int(case.offsets[min(2, len(case.lengths))])
    offsets = case.offsets[:3]
    found = []
    for name, kind, device in (("reference", torch.float64, "cpu"), (backend, torch.bfloat16, "cuda")):
        leaves = [x.detach()[:rows].to(device, kind).requires_grad_() for x in (q, k, v)]
        tables = [
            x.detach().to(device, torch.float64 if name == "reference" else None) for x in (case.position, case.time)
        ]
        out = hstu_attention(
            *leaves,
            offsets.to(device),
            case.longest,
            position_weight=tables[0],
            time_weight=tables[1],
            timestamps=case.timestamps[:rows].to(device),
            backend=name,
        )
        gradients = torch.autograd.grad(out, leaves, up[:rows].to(device, kind))
        found.append([x.detach().cpu().double() for x in (out, *gradients)])
    errors = [float((a - b).abs().max() / a.abs().max()) for a, b in zip(*found, strict=True)]
    if not max(errors) < 2e-2:
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


def measure(case: Case, rival: Callable[..., Tensor], tables: tuple[Tensor, ...], rounds: int) -> dict[str, float]:
    def forward(i: int) -> None:
        with torch.no_grad():
            rival(*case.sets[i % len(case.sets)][0])

    outs = [(rival(*leaves), leaves, up) for leaves, up in case.sets]

    def backward(i: int) -> None:
        out, leaves, up = outs[i % len(outs)]
        torch.autograd.grad(out, (*leaves, *tables), up, retain_graph=True)

    return {"forward": milliseconds(forward, rounds), "backward": milliseconds(backward, rounds)}


def layer_piece(seed: int, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of LayerNorm, projection to u, v, q, k and SiLU, by Triton's kernel and by torch's own."""
    g = torch.Generator().manual_seed(seed)
    rows, width = 1 << 16, 256
    weights = (torch.ones(width), torch.zeros(width), torch.randn(4 * width, width, generator=g) * width**-0.5)
    weights = tuple(w.bfloat16().cuda().requires_grad_() for w in weights)
    sets = [
        (torch.randn(rows, width).bfloat16().cuda().requires_grad_(), torch.randn(rows, 4 * width).bfloat16().cuda())
        for _ in range(3)
    ]

    def by_torch(x: Tensor, gain: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
        return F.silu(F.linear(F.layer_norm(x, x.shape[1:], gain, bias, 1e-6), weight))

    rivals = {"triton": lambda *leaves: ops.norm_project_silu(*leaves, 1e-6, "triton"), "torch": by_torch}
    times = {}
    for name, rival in rivals.items():

        def forward(i: int, rival: Callable[..., Tensor] = rival) -> None:
            with torch.no_grad():
                rival(sets[i % len(sets)][0], *weights)

        def both(i: int, rival: Callable[..., Tensor] = rival) -> None:
            x, up = sets[i % len(sets)]
            torch.autograd.grad(rival(x, *weights), (x, *weights), up)

        times[name] = {"forward": milliseconds(forward, rounds), "both": milliseconds(both, rounds)}
    return times


def card(rounds: int) -> dict[str, float]:
    """Rates of this card as measured: a copy in GB/s (read and written), a bfloat16 product in TF/s."""
    source, target = (torch.empty(1 << 28, dtype=torch.uint8, device="cuda") for _ in range(2))
    copy = milliseconds(lambda i: target.copy_(source), rounds)
    pairs = [torch.randn(2, 8192, 8192, device="cuda").bfloat16() for _ in range(2)]
    turn = cycle(pairs)
    product = milliseconds(lambda i: torch.matmul(*next(turn)), rounds)
    return {"copy GB/s": 2 * (1 << 28) / copy / 1e6, "matmul TF/s": 2 * 8192**3 / product / 1e9}


def table(report: dict) -> str:
    rates = report["card"]
    lines = [
        "# HSTU attention on a GPU",
        "",
        header(report["run"]),
        f"Measured on this card: copy {rates['copy GB/s']:.0f} GB/s, bfloat16 product {rates['matmul TF/s']:.0f} TF/s.",
        "",
        "Milliseconds, bfloat16, medians. TF/s count the causal pairs: two products forward, five backward.",
        "",
        "| shape | what | forward | TF/s | of the product | backward | TF/s | of the product |",
        "|" + "---|" * 8,
    ]
    for row in report["shapes"]:
        for name, times in row["times"].items():
            cells = [row["shape"], name]
            for label, products in (("forward", 1.0), ("backward", 2.5)):
                rate = row["flops"] * products / times[label] / 1e9
                cells += [f"{times[label]:.3f}", f"{rate:.0f}", f"{rate / rates['matmul TF/s']:.2f}"]
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "LayerNorm, projection and SiLU, 65,536 rows, width 256 to 1024:", ""]
    lines += ["| by | forward | forward and backward |", "|---|---|---|"]
    lines += [f"| {name} | {times['forward']:.3f} | {times['both']:.3f} |" for name, times in report["piece"].items()]
    lines += ["", "| bar | reached | found |", "|---|---|---|"]
    lines += [f"| {text} | {'yes' if ok else 'NO'} | {found} |" for text, ok, found in bars(report)]
    return "\n".join(lines) + "\n"


def bars(report: dict) -> list[tuple[str, bool, str]]:
    found = []
    rows = {row["shape"]: row for row in report["shapes"]}
    if (row := rows.get("B64 N1024 H4 d64 full")) is None:
        return found
    plain = {name: times for name, times in row["times"].items() if name in ("cuda", "triton")}
    best = min(plain, key=lambda name: plain[name]["forward"])
    for label, limit in (("forward", FORWARD_MS), ("backward", BACKWARD_MS)):
        ms = min(times[label] for times in plain.values())
        found.append((f"{label} at {row['shape']}: {limit} ms", ms <= limit, f"{ms:.3f}"))
        cost = row["times"][f"{best}, both biases"][label] / plain[best][label]
        found.append((f"{label}, both biases ({best}): {BIAS}x", cost <= BIAS, f"{cost:.2f}x"))
    fast = row["flops"] / min(times["forward"] for times in plain.values())
    for name in ("B256 N256 H4 d64 full", "B512 N128 H4 d64 full"):
        if short := rows.get(name):
            rate = short["flops"] / min(short["times"][x]["forward"] for x in plain) / fast
            found.append((f"rate of {name} over that of n = 1024: 0.3", rate >= 0.3, f"{rate:.2f}"))
    for row in report["shapes"]:
        if "shop" in row["shape"] and "padded compile" in row["times"]:
            ours = min(sum(row["times"][x].values()) for x in plain)
            ratio = sum(row["times"]["padded compile"].values()) / ours
            found.append((f"against padded compile, {row['shape']}: 10x", ratio >= 10, f"{ratio:.1f}x"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50, help="timed calls of each rival")
    parser.add_argument("--seed", type=int, default=0, help="of lengths and inputs")
    parser.add_argument("--only", default="", help="only the shapes whose name contains this text")
    parser.add_argument("--check-memory", action="store_true", help="compare once on a small shape and time nothing")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    a = parser.parse_args()
    backends = [name for name in ("cuda", "triton") if available_backends()[name] == "ok"]
    if not torch.cuda.is_available() or not backends:
        raise SystemExit(f"nothing to time: {available_backends()}")
    if a.check_memory:
        SHAPES["small"] = (3, 150, 2, 50, True)
        for backend in backends:
            check(Case("small", a.seed), backend)
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
    report: dict = {"run": facts, "card": card(a.rounds), "shapes": []}
    for name in SHAPES:
        if a.only not in name:
            continue
        case = Case(name, a.seed)
        row: dict = {"shape": name, "flops": case.flops, "times": {}}
        for backend in backends:
            check(case, backend)
            row["times"][backend] = measure(case, case.ours(backend, False), (), a.rounds)
            tables = (case.position, case.time)
            row["times"][f"{backend}, both biases"] = measure(case, case.ours(backend, True), tables, a.rounds)
        torch._dynamo.reset()
        compiled = torch.compile(case.padded, fullgraph=True, dynamic=False)
        try:
            row["times"]["padded compile"] = measure(case, compiled, (), max(5, a.rounds // 5))
        except torch.cuda.OutOfMemoryError:
            row["refused"] = {"padded compile": "out of memory"}
        report["shapes"].append(row)
        print(
            name, {key: {k: round(v, 3) for k, v in times.items()} for key, times in row["times"].items()}, flush=True
        )
    report["piece"] = layer_piece(a.seed, a.rounds) if "triton" in backends else {}
    print(table(report))
    if a.out:
        write(a.out, report, table(report))


if __name__ == "__main__":
    main()
