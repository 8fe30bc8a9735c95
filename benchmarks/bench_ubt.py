"""Does the user model gain from packed HSTU against the same model with padded attention in plain PyTorch?

Both networks have the same weights and give the same user vectors and gradients, which is checked first. Then they take
turns: a training step (forward, five losses, backward, AdamW) and the embedding of users, on batches whose lengths are
log-normal and cut at 300, as in the challenge's log. Peak memory is measured in a process for each.

    python benchmarks/bench_ubt.py --out benchmarks/results/ubt_model
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from record import header, provenance, write
from torch import Tensor, nn
from torch.nn import functional as F

from hstu_kernels import HSTU
from mtl_heads import TaskSpec
from ubt.config import ModelConfig
from ubt.encoder import Family, Sequences
from ubt.model import UniversalBehavioralTransformer

FAMILIES = {
    "event_type": Family("id", 7),
    "category": Family("id", 2_000),
    "price": Family("id", 102),
    "item": Family("id", 10_000),
    "url": Family("id", 10_000),
    "name": Family("vector", 16),
    "query": Family("vector", 16),
}
TASKS = (
    TaskSpec("churn", "binary", loss="focal"),
    TaskSpec("category_propensity", "multilabel", 100, loss="focal"),
    TaskSpec("product_propensity", "retrieval", 10_000, head_options={"num_negatives": 400}, missing=0),
    TaskSpec("price", "regression"),
    TaskSpec("name", "vector", 16),
)
NOW = 1_700_000_000


class PaddedHSTU(nn.Module):
    """The layers of an HSTU stack on padded rows: what one writes in plain PyTorch, with the same parameters."""

    def __init__(self, stack: HSTU):
        super().__init__()
        self.layers = stack.layers

    def forward(self, x: Tensor, offsets: Tensor, max_seqlen: int, timestamps: Tensor) -> Tensor:
        lengths = offsets.diff()
        longest = int(lengths.max())
        column = torch.arange(longest)
        real = column < lengths[:, None]
        padded, time = x.new_zeros(*real.shape, x.shape[1]), timestamps.new_zeros(real.shape)
        padded[real], time[real] = x, timestamps
        gap = (time[:, :, None] - time[:, None, :]).abs().clamp(min=1)
        bucket = (gap.double().log() / 0.301).long()
        sees = (column[:, None] >= column) & real[:, None, :]
        for layer in self.layers:
            heads, width = layer.num_heads, layer.d_v
            u, v, q, k = F.silu(layer.uvqk(layer.input_norm(padded))).split(heads * width, -1)
            q, k, v = (y.unflatten(-1, (heads, width)).transpose(1, 2) for y in (q, k, v))
            scores = q @ k.transpose(-1, -2) * width**-0.5
            size = layer.position_weight.shape[1] // 2
            scores = scores + layer.position_weight[:, size + column - column[:, None]]
            scores = scores + layer.time_weight[0, bucket.clamp(max=layer.time_weight.shape[1] - 1)][:, None]
            attention = (F.silu(scores) * sees[:, None] / layer.max_seqlen) @ v
            attention = layer.attention_norm(attention.transpose(1, 2).flatten(2))
            padded = padded + layer.output(attention * u)
        return padded[real]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--users", type=int, default=64, help="users of a batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    parser.add_argument("--memory", nargs=2, metavar=("RIVAL", "WORK"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    batches = [batch(arguments.users, arguments.seed + i) for i in range(2)]
    if arguments.memory:
        rival, work = arguments.memory
        run = WORK[work](network(rival))
        for one in batches[:1]:
            run(one)
        # Not getrusage, which begins with what the process that started this one had.
        status = Path("/proc/self/status").read_text()
        print(int(status.split("VmHWM:")[1].split()[0]) / 1024)
        return
    difference = check(batches[0])
    report = {"settings": provenance(arguments.seed, "torch"), "difference": difference, "rows": []}
    lengths = torch.cat([one.offsets.diff() for one in batches]).float()
    report["lengths"] = [round(float(value)) for value in (lengths.mean(), lengths.median(), lengths.max())]
    for name, make in WORK.items():
        runs = {rival: make(network(rival)) for rival in ("packed", "padded")}
        seconds: dict[str, list[float]] = {rival: [] for rival in runs}
        for turn in range(arguments.rounds + 1):
            for rival, run in runs.items():
                begin = time.perf_counter()
                for one in batches:
                    run(one)
                if turn:
                    seconds[rival].append(time.perf_counter() - begin)
        amount = sum(len(one.timestamps) if name == "training" else arguments.users for one in batches)
        rates = {rival: amount / statistics.median(values) for rival, values in seconds.items()}
        memory = {rival: peak(rival, name) for rival in runs}
        report["rows"].append({"work": name, "rates": rates, "memory": memory})
    text = table(report)
    print(text)
    if arguments.out:
        write(arguments.out, report, text)


def network(rival: str) -> UniversalBehavioralTransformer:
    torch.manual_seed(0)
    config = ModelConfig(dropout=0.0, id_dropout=0.0)
    values = {"category_propensity": ("category", range(2, 102)), "product_propensity": ("item", range(2, 102))}
    model = UniversalBehavioralTransformer(FAMILIES, TASKS, values, config)
    if rival == "padded":
        model.hstu = PaddedHSTU(model.hstu)  # type: ignore[assignment]
    return model


def batch(users: int, seed: int) -> Sequences:
    g = torch.Generator().manual_seed(seed)
    # Median 15, mean 33 at a cut of 128, as published of the clients that are asked for.
    lengths = (15 * torch.exp(1.4 * torch.randn(users, generator=g))).long().clamp(1, 300)
    offsets = torch.tensor([0, *lengths.tolist()]).cumsum(0)
    total = int(offsets[-1])
    features = {}
    for name, family in FAMILIES.items():
        if family.kind == "id":
            features[name] = torch.randint(0, family.size, (total,), generator=g)
        else:
            features[name] = torch.rand(total, family.size, generator=g)
    age = torch.randint(1, 90 * 86400, (total,), generator=g)
    owner = torch.repeat_interleave(torch.arange(users), lengths)
    time_of = (NOW - age)[torch.argsort(owner * 2**33 - age)]
    return Sequences(features, time_of, offsets)


def targets(users: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(users)
    return {
        "churn": torch.randint(0, 2, (users, 1), generator=g).float(),
        "category_propensity": (torch.rand(users, 1, 100, generator=g) < 0.01).float(),
        "product_propensity": torch.randint(2, 10_000, (users, 1), generator=g),
        "price": torch.rand(users, 1, generator=g),
        "name": torch.rand(users, 1, 16, generator=g),
    }


def training(model: UniversalBehavioralTransformer) -> Callable[[Sequences], None]:
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def run(one: Sequences) -> None:
        users = model(one, torch.tensor([NOW]))
        model.tasks.heads.losses(users, targets(len(users))).values.sum().backward()
        optimiser.step()
        optimiser.zero_grad()

    return run


def embedding(model: UniversalBehavioralTransformer) -> Callable[[Sequences], None]:
    model.eval()

    def run(one: Sequences) -> None:
        with torch.inference_mode():
            model(one, torch.tensor([NOW]))

    return run


WORK = {"training": training, "embedding": embedding}


def check(one: Sequences) -> float:
    """Return the largest difference of the rivals' user vectors; stop if they or the gradients are not the same."""
    vectors, gradients = [], []
    for rival in ("packed", "padded"):
        model = network(rival)
        users = model(one, torch.tensor([NOW]))
        (users * torch.linspace(-1, 1, users.numel()).view_as(users)).sum().backward()
        vectors.append(users.detach())
        gradients.append([p.grad for p in model.hstu.parameters()])
    torch.testing.assert_close(*vectors, rtol=1e-4, atol=1e-4)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))
    return float((vectors[0] - vectors[1]).abs().max())


def peak(rival: str, work: str) -> float:
    command = [sys.executable, __file__, *sys.argv[1:], "--memory", rival, work]
    return float(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def table(report: dict) -> str:
    mean, median, longest = report["lengths"]
    lines = [
        "# Packed against padded: the user model",
        "",
        header(report["settings"]),
        "",
        "Default sizes (hidden 256, 3 layers, 4 heads, 300 events), five tasks, float32. Events a user: "
        f"mean {mean}, median {median}, longest {longest}. Same weights; user vectors differ by "
        f"{report['difference']:.1e} at most, gradients agree. The rivals took turns, two batches a turn; medians. "
        "Padded means that rows are padded inside the HSTU layers only; all else is the same code.",
        "",
        "| | packed | padded | ratio | peak memory of a process, packed | padded |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        packed, padded = (row["rates"][rival] for rival in ("packed", "padded"))
        unit = "events/s" if row["work"] == "training" else "users/s"
        small, large = (row["memory"][rival] for rival in ("packed", "padded"))
        lines.append(
            f"| {row['work']}, {unit} | {packed:,.0f} | {padded:,.0f} | {packed / padded:.1f}x | {small:,.0f} MB "
            f"| {large:,.0f} MB |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
