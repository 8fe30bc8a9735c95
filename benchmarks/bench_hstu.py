"""Is jagged HSTU attention on a CPU faster than what one writes in plain PyTorch? Eight shapes, all rivals in one run.

Equality with the float64 reference is checked before anything is timed. Rivals take turns, so that a busy machine hurts
all of them; the tables hold medians and ratios of medians.

    python benchmarks/bench_hstu.py --threads 2 --out benchmarks/results/hstu_cpu
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

import torch
from record import header, provenance, write
from torch import Tensor
from torch.nn import functional as F

from hstu_kernels import HSTULayer, available_backends, hstu_attention
from hstu_kernels.impl import cpu

SHAPES = {
    # name: (lengths, batch, longest, heads, width, dtype)
    "ML-1M B128 N211 H1 d50": ("log-normal", 128, 211, 1, 50, torch.float32),
    "ML-1M large B128 N211 H2 d25": ("log-normal", 128, 211, 2, 25, torch.float32),
    "ML-20M B64 N211 H4 d64": ("log-normal", 64, 211, 4, 64, torch.float32),
    "UBT B64 N300 H4 d64": ("heavy tail", 64, 300, 4, 64, torch.float32),
    "B8 N1024 H4 d64": ("heavy tail", 8, 1024, 4, 64, torch.float32),
    "B4 N1024 H4 d64": ("full", 4, 1024, 4, 64, torch.float32),
    "B2 N2048 H4 d64": ("full", 2, 2048, 4, 64, torch.float32),
    "ML-20M B64 N211 H4 d64 bf16": ("log-normal", 64, 211, 4, 64, torch.bfloat16),
}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
MEMORY_ROWS = (4096, 8192, 16384)


class Case:
    """Tensors of one shape and the rivals on them; every rival takes and returns packed rows."""

    def __init__(self, name: str, seed: int) -> None:
        kind, batch, self.longest, self.heads, self.width, self.dtype = SHAPES[name]
        self.name = name
        g = torch.Generator().manual_seed(seed)
        if kind == "full":
            lengths = torch.full((batch,), self.longest)
        elif kind == "heavy tail":
            # Pareto(20, 1.2), as a batch of shop visitors looks.
            lengths = (20 * torch.rand(batch, generator=g) ** (-1 / 1.2)).long()
        else:
            lengths = (96 * torch.exp(0.98 * torch.randn(batch, generator=g))).long()
        self.lengths = lengths.clamp(1, self.longest).tolist()
        # One sequence fills the shape, so that padding to it is what the batch asks for.
        self.lengths[0] = self.longest
        self.offsets = torch.tensor([0, *self.lengths]).cumsum(0)
        total = sum(self.lengths)

        def rows() -> Tensor:
            return torch.randn(total, self.heads, self.width, generator=g).to(self.dtype)

        self.q, self.k, self.v = (rows().requires_grad_() for _ in range(3))
        self.grad = rows()
        self.position_weight = torch.randn(1, 2 * self.longest - 1, generator=g).requires_grad_()
        self.time_weight = torch.randn(1, 129, generator=g).requires_grad_()
        times = [torch.randint(0, 10**7, (n,), generator=g).sort().values for n in self.lengths]
        self.timestamps = torch.cat(times)
        self.alpha = self.width**-0.5
        # Where each packed row lies in the padded batch [B, N].
        steps = torch.arange(self.longest)
        self.inside = steps < torch.tensor(self.lengths)[:, None]
        self.slots = self.inside.flatten().nonzero().flatten()
        self.causal = torch.ones(self.longest, self.longest, dtype=torch.bool).tril()
        by_length = {n: self.causal[:n, :n].to(self.dtype).expand(self.heads, n, n) for n in set(self.lengths)}
        self.nested_causal = torch.nested.nested_tensor([by_length[n] for n in self.lengths])

    @property
    def fill(self) -> float:
        return sum(n * n for n in self.lengths) / (len(self.lengths) * self.longest**2)

    @property
    def causal_flops(self) -> float:
        """Of the forward pass: two products over the pairs j <= i."""
        return sum(4 * self.heads * self.width * n * (n + 1) / 2 for n in self.lengths)

    def padded(self, x: Tensor) -> Tensor:
        dense = x.new_zeros(len(self.lengths) * self.longest, self.heads, self.width).index_copy(0, self.slots, x)
        return dense.view(len(self.lengths), self.longest, self.heads, self.width)

    def packed(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.heads, self.width).index_select(0, self.slots)

    def ours(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return hstu_attention(q, k, v, self.offsets, self.longest, backend="cpu")

    def ours_with_bias(self, q: Tensor, k: Tensor, v: Tensor, position: Tensor, times: Tensor) -> Tensor:
        return hstu_attention(
            q,
            k,
            v,
            self.offsets,
            self.longest,
            position_weight=position,
            timestamps=self.timestamps,
            time_weight=times,
            backend="cpu",
        )

    def padded_eager(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.alpha * torch.einsum("bihd,bjhd->bhij", self.padded(q), self.padded(k))
        weights = F.silu(scores) / self.longest * self.causal
        return self.packed(torch.einsum("bhij,bjhd->bihd", weights, self.padded(v)))

    def loop(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = []
        for a, b, c in zip(q.split(self.lengths), k.split(self.lengths), v.split(self.lengths), strict=True):
            scores = self.alpha * torch.einsum("ihd,jhd->hij", a, b)
            weights = F.silu(scores) / self.longest * self.causal[: len(a), : len(a)]
            outs.append(torch.einsum("hij,jhd->ihd", weights, c))
        return torch.cat(outs)

    def nested(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """By torch.nested in its strided layout; the jagged layout has no product of two ragged operands."""
        q, k, v = (torch.nested.as_nested_tensor([y.transpose(0, 1) for y in x.split(self.lengths)]) for x in (q, k, v))
        weights = F.silu(self.alpha * torch.matmul(q, k.transpose(-1, -2))) * self.nested_causal
        outs = torch.matmul(weights / self.longest, v).unbind()
        return torch.cat([y.transpose(0, 1) for y in outs])

    def jagged(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """By torch.nested in its jagged layout, which refuses."""
        longest, offsets = max(self.lengths), self.offsets
        q, k, v = (
            torch.nested.nested_tensor_from_jagged(x, offsets, min_seqlen=1, max_seqlen=longest).transpose(1, 2)
            for x in (q, k, v)
        )
        weights = F.silu(self.alpha * torch.matmul(q, k.transpose(-1, -2)))
        return torch.matmul(weights / self.longest, v).values()

    def jagged_softmax(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal softmax SDPA on the jagged layout."""
        longest, offsets = max(self.lengths), self.offsets
        q, k, v = (
            torch.nested.nested_tensor_from_jagged(x, offsets, min_seqlen=1, max_seqlen=longest).transpose(1, 2)
            for x in (q, k, v)
        )
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).values()

    def softmax_sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (self.padded(x).transpose(1, 2) for x in (q, k, v))
        return self.packed(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2))


def check(case: Case) -> dict[str, float]:
    """Compare with the float64 reference; raise where a tolerance is broken."""
    inputs = [x.detach().double().requires_grad_() for x in (case.q, case.k, case.v)]
    expected = hstu_attention(*inputs, case.offsets, case.longest, backend="reference")
    gradients = torch.autograd.grad(expected, inputs, case.grad.double())
    errors = {}
    for rival in ("ours", "padded_eager", "loop", "nested"):
        if rival != "ours" and case.dtype != torch.float32:
            continue
        leaves = (case.q, case.k, case.v)
        out = getattr(case, rival)(*leaves)
        found = (out, *torch.autograd.grad(out, leaves, case.grad))
        pairs = list(zip(found, (expected, *gradients), strict=True))
        worst = [relative_error(a.detach(), b.detach()) for a, b in pairs]
        if worst[0] > TOLERANCE[case.dtype] or max(worst[1:]) > GRADIENT_TOLERANCE[case.dtype]:
            raise SystemExit(f"{case.name}: {rival} differs from the reference by {worst}; nothing is timed")
        errors[rival] = max(worst)
    return errors


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


def seconds(run: Callable[[], object], repeat: int) -> float:
    start = time.perf_counter()
    for _ in range(repeat):
        run()
    return (time.perf_counter() - start) / repeat


def measure(runs: dict[str, Callable[[], object]], rounds: int, least: float = 0.05) -> dict[str, float]:
    """Median milliseconds of each run; in a round all take turns, short ones for ``least`` seconds at a time."""
    for run in runs.values():
        run()
    repeats = {name: max(1, min(50, int(least / max(seconds(run, 1), 1e-6)))) for name, run in runs.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            samples[name].append(seconds(run, repeats[name]))
    return {name: 1e3 * statistics.median(values) for name, values in samples.items()}


def cost(plain: Callable[[], object], dearer: Callable[[], object], rounds: int = 21, least: float = 0.03) -> float:
    """Median of dearer over plain, timed side by side in many short turns: what disturbs one turn disturbs both."""
    repeat = max(1, int(least / min(seconds(plain, 1) for _ in range(3))))
    return statistics.median(1 / (seconds(plain, repeat) / seconds(dearer, repeat)) for _ in range(rounds))


def bench(case: Case, rounds: int, with_compile: bool) -> dict[str, object]:
    leaves = (case.q, case.k, case.v)
    biased = (*leaves, case.position_weight, case.time_weight)

    def forward(rival: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], object]:
        def run() -> None:
            with torch.no_grad():
                rival(*inputs)

        return run

    def both(rival: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(rival(*inputs), inputs, case.grad)

    rivals: dict[str, Callable[..., Tensor]] = {"ours": case.ours, "padded eager": case.padded_eager}
    if with_compile:
        torch._dynamo.reset()
        rivals["padded compile"] = torch.compile(case.padded_eager, fullgraph=True, dynamic=False)
    rivals["loop"] = case.loop
    refused = {}
    for name, rival in (("nested", case.nested), ("jagged", case.jagged), ("jagged SDPA", case.jagged_softmax)):
        try:
            torch.autograd.grad(rival(*leaves), leaves, case.grad)
            rivals[name] = rival
        except RuntimeError as error:
            refused[name] = str(error).splitlines()[0]
    rivals["softmax SDPA"] = case.softmax_sdpa
    large = torch.randn(2048, 2048)
    passes = {"forward": forward, "forward+backward": both}
    row: dict[str, object] = {"shape": case.name, "rows": sum(case.lengths), "fill": round(case.fill, 3)}
    row["full"], row["longest"] = min(case.lengths) == case.longest, case.longest
    row["refused"] = refused
    for label, wrap in passes.items():
        runs = {name: wrap(rival, leaves) for name, rival in rivals.items()}
        runs["ours with bias"] = wrap(case.ours_with_bias, biased)
        if label == "forward":
            runs["sgemm"] = lambda: large @ large
        times = measure(runs, rounds)
        if label == "forward":
            row["sgemm GF/s"] = round(2 * 2048**3 / times.pop("sgemm") / 1e6, 1)
            row["ours GF/s"] = round(case.causal_flops / times["ours"] / 1e6, 1)
        row[label] = {name: round(value, 3) for name, value in times.items()}
        row[f"bias cost, {label}"] = round(cost(runs["ours"], runs["ours with bias"]), 3)
    return row


def layer_pieces(seed: int, rounds: int) -> dict[str, float]:
    """Milliseconds, forward and backward, of LayerNorm, projection and SiLU, of their bare products, of the layer."""
    case = Case("ML-20M B64 N211 H4 d64", seed)
    rows, width = sum(case.lengths), case.heads * case.width
    torch.manual_seed(seed)
    x, up, wide = torch.randn(rows, width).requires_grad_(), torch.randn(rows, width), torch.randn(rows, 4 * width)
    layers = {
        name: HSTULayer(width, case.heads, case.width, case.width, max_seqlen=case.longest, recompute=recompute)
        for name, recompute in (("layer", False), ("layer, recompute", True))
    }
    layer = layers["layer"]
    weight = layer.uvqk.weight

    def products() -> None:
        with torch.no_grad():
            F.linear(x, weight), wide @ weight, wide.t() @ x

    def piece(project: Callable[..., Tensor]) -> Callable[[], object]:
        inputs = (x, *layer.input_norm.parameters(), weight)
        return lambda: torch.autograd.grad(project(*inputs), inputs, wide)

    def step(layer: HSTULayer) -> Callable[[], object]:
        inputs = (x, *layer.parameters())
        return lambda: torch.autograd.grad(
            layer(x, case.offsets, timestamps=case.timestamps), inputs, up, materialize_grads=True
        )

    runs = {
        "products alone": products,
        "by torch's autograd": piece(lambda x, g, b, w: F.silu(F.linear(F.layer_norm(x, x.shape[1:], g, b), w))),
        "norm computed anew": piece(lambda *inputs: NormProjectSilu.apply(*inputs, True)),
        "norm and projection computed anew": piece(lambda *inputs: NormProjectSilu.apply(*inputs, False)),
        **{name: step(layer) for name, layer in layers.items()},
    }
    return measure(runs, rounds)


class NormProjectSilu(torch.autograd.Function):
    """The fused rival: one function that keeps x, and the projection where asked to, and computes the rest anew."""

    @staticmethod
    def forward(ctx, x, gain, bias, weight, keep):
        normed = torch.native_layer_norm(x, x.shape[1:], gain, bias, 1e-5)[0]
        projected = normed @ weight.t()
        ctx.save_for_backward(x, gain, bias, weight, projected if keep else None)
        return F.silu(projected, inplace=not keep)

    @staticmethod
    def backward(ctx, grad):
        x, gain, bias, weight, projected = ctx.saved_tensors
        normed, mean, rstd = torch.native_layer_norm(x, x.shape[1:], gain, bias, 1e-5)
        d_projected = torch.ops.aten.silu_backward(grad, normed @ weight.t() if projected is None else projected)
        d_x, d_gain, d_bias = torch.ops.aten.native_layer_norm_backward(
            d_projected @ weight, x, x.shape[1:], mean, rstd, gain, bias, [True, True, True]
        )
        return d_x, d_gain, d_bias, d_projected.t() @ normed, None


def bars(report: dict) -> list[tuple[str, bool, str]]:
    """What the kernel set out to reach: the bar, whether every row reaches it, the worst row."""

    def ratio(row: dict, rival: str) -> float:
        return row["forward+backward"][rival] / row["forward+backward"]["ours"]

    rows = report["shapes"]
    plain = [row for row in rows if "bf16" not in row["shape"]]
    thin = [row for row in plain if row["fill"] <= 0.2]
    ragged = [row for row in rows if not row["full"]]
    cases = [
        ("f+b against padded eager, float32, n² fill <= 0.2: 5x", thin, lambda r: ratio(r, "padded eager"), 5.0),
        (
            "f+b against padded eager, other ragged rows: 2.5x",
            [row for row in ragged if row not in thin],
            lambda r: ratio(r, "padded eager"),
            2.5,
        ),
        (
            "f+b against padded eager, full rows: 1.3x",
            [row for row in rows if row["full"]],
            lambda r: ratio(r, "padded eager"),
            1.3,
        ),
        (
            "f+b against padded compile, ragged rows: 2x",
            [row for row in ragged if "padded compile" in row["forward"]],
            lambda r: ratio(r, "padded compile"),
            2.0,
        ),
        ("f+b against the loop, every row: 1x", rows, lambda r: ratio(r, "loop"), 1.0),
        (
            "f+b without bias over f+b with both: 1/1.3 = 0.77",
            rows,
            lambda r: 1 / r["bias cost, forward+backward"],
            1 / 1.3,
        ),
        (
            "forward rate over the sgemm rate at n >= 512, full rows: 0.5",
            [row for row in plain if row["full"] and row["longest"] >= 512],
            lambda r: r["ours GF/s"] / r["sgemm GF/s"],
            0.5,
        ),
    ]
    found = []
    for text, among, value, least in cases:
        if among:
            worst = min(among, key=value)
            found.append((text, value(worst) >= least, f"{value(worst):.2f} ({worst['shape']})"))
    per_row = [1024 * mb / int(rows) for rows, mb in report["memory"].items()]
    if per_row:
        worst = f"{min(per_row):.2f} to {max(per_row):.2f} KB a row"
        found.append(("peak memory linear in rows: within 1.3x a row", max(per_row) <= 1.3 * min(per_row), worst))
    return found


def peak_memory(rows: int) -> float:
    """Megabytes by which one forward and backward of one sequence raises the peak of a fresh process."""
    code = f"import bench_hstu; bench_hstu.memory_worker({rows})"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def memory_worker(rows: int) -> None:
    def attend(n: int) -> None:
        q, k, v = (torch.randn(n, 1, 32).requires_grad_() for _ in range(3))
        position, times = torch.randn(1, 2 * n - 1).requires_grad_(), torch.randn(1, 129).requires_grad_()
        offsets, stamps = torch.tensor([0, n]), torch.arange(n)
        out = hstu_attention(
            q, k, v, offsets, n, position_weight=position, timestamps=stamps, time_weight=times, backend="cpu"
        )
        out.sum().backward()

    def high_water() -> int:
        status = Path("/proc/self/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))

    attend(64)
    # 5 sets the high-water mark back to what is in use now.
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water()
    attend(rows)
    print((high_water() - before) / 1024)


def table(report: dict) -> str:
    def ratio(row: dict, label: str, rival: str) -> str:
        times = row[label]
        return f"{times[rival] / times['ours']:.1f}x" if rival in times else "-"

    lines = [
        "# HSTU attention on a CPU",
        "",
        header(report["run"]),
        "Medians of rounds in which all rivals take turns; equality with the float64 reference is checked first. No "
        "GPU was used.",
        "",
        "## What was to be shown",
        "",
        "| bar | reached | worst row |",
        "|---|---|---|",
        *(f"| {text} | {'yes' if ok else 'NO'} | {worst} |" for text, ok, worst in bars(report)),
        "",
        "## Attention",
        "",
        "Time of ours in milliseconds; the rivals' time divided by ours (above 1: ours is faster).",
        "",
        "| shape | n² fill | ours fwd | eager | compile | loop | nested | SDPA* | ours f+b | eager | compile | loop "
        "| nested | SDPA* "
        "| bias fwd | bias f+b | GF/s fwd | sgemm |",
        "|" + "---|" * 18,
    ]
    for row in report["shapes"]:
        cells = [row["shape"], f"{row['fill']:.2f}"]
        for label in ("forward", "forward+backward"):
            cells.append(f"{row[label]['ours']:.2f}")
            names = ("padded eager", "padded compile", "loop", "nested", "softmax SDPA")
            cells += [ratio(row, label, name) for name in names]
        cells += [f"{row[f'bias cost, {label}']:.2f}x" for label in ("forward", "forward+backward")]
        cells += [f"{row['ours GF/s']:.0f}", f"{row['sgemm GF/s']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "eager, compile: padded to [B, N], eager and under `torch.compile`. loop: one einsum a sequence, unpadded.",
        "nested: torch.nested in its strided layout. *softmax SDPA computes other maths (SDPA has no SiLU weights), "
        "padded and causal.",
        "bias: time of ours with position and time bias over ours without, side by side in 21 short turns. GF/s counts "
        "the causal pairs only; sgemm is "
        "torch's 2048 x 2048 product in the same rounds.",
        "",
        "## What refused",
        "",
        *(f"- {name}: `{error}`" for name, error in report["shapes"][0]["refused"].items()),
        "",
        "jagged: torch.nested in its jagged layout, SiLU of q·k times v. jagged SDPA: causal softmax on that layout.",
        "",
        "## LayerNorm, projection to u, v, q, k, SiLU",
        "",
        "Forward and backward, milliseconds, rows of ML-20M, width 256 to 1024; over the three bare products, which "
        "bound what fusing can reach. The layer is `HSTULayer` with both biases.",
        "",
        "| | ms | over the products |",
        "|---|---|---|",
        *(
            f"| {name} | {ms:.1f} | {ms / report['pieces']['products alone']:.2f} |"
            for name, ms in report["pieces"].items()
        ),
        "",
        "## Memory",
        "",
        "Peak memory of forward and backward of one sequence (1 head, 32 wide, both biases) above the process's own:",
        "",
        "| rows | MB | KB a row |",
        "|---|---|---|",
        *(f"| {rows} | {mb:.1f} | {1024 * mb / int(rows):.2f} |" for rows, mb in report["memory"].items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="threads for every rival")
    parser.add_argument("--rounds", type=int, default=5, help="rounds in which the rivals take turns")
    parser.add_argument("--seed", type=int, default=0, help="of lengths and inputs")
    parser.add_argument("--only", default="", help="only the shapes whose name contains this text")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    a = parser.parse_args()
    if (status := available_backends()["cpu"]) != "ok":
        raise SystemExit(f"the C++ kernel cannot run here: {status}")
    torch.set_num_threads(a.threads)
    facts = provenance(a.seed, "torch") | {"threads": str(a.threads), "instructions": cpu.instruction_set()}
    report: dict = {
        "run": facts | {"rounds": str(a.rounds)},
        "shapes": [],
        "memory": {},
        "pieces": {},
    }
    for name in SHAPES:
        if a.only not in name:
            continue
        case = Case(name, a.seed)
        errors = check(case)
        row = bench(case, a.rounds, not a.no_compile) | {"errors": errors}
        report["shapes"].append(row)
        print(json.dumps(row), flush=True)
    report["memory"] = {str(rows): round(peak_memory(rows), 1) for rows in MEMORY_ROWS}
    report["pieces"] = {name: round(ms, 2) for name, ms in layer_pieces(a.seed, a.rounds).items()}
    print(table(report))
    if a.out:
        write(a.out, report, table(report))


if __name__ == "__main__":
    main()
