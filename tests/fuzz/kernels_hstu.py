"""hstu-kernels: random ragged problems of the whole contract, the C++ kernel and now and then Triton against float64.

The oracle is the reference backend in float64 on the inputs as they were rounded; every gradient is compared. Cached
steps of a model, packed and in pages, are compared with its full pass.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from typing import Any

import torch
from torch import Tensor

if not torch.cuda.is_available():
    # Without a card the Triton kernels run in the interpreter, which must be asked for before triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hstu_kernels import HSTU, RaggedKVCache, available_backends, hstu_attention

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
# One problem in so many also goes through the interpreter, which is slow.
TRITON_EVERY = 25
STAMPS = (3, 10**4, 10**9, 10**17, 2**63 - 1)


def tries(seed: int, seconds: float) -> dict[str, int]:
    """Draw problems until the time is up.

    Args:
        seed: of the first case; every case has its own seed from there on, which a fault names.
        seconds: how long.

    Returns:
        How many problems each backend and dtype had, and how many caches.

    Raises:
        AssertionError: a backend differs from the reference; names the case.
    """
    counts: Counter[str] = Counter()
    end, case = time.monotonic() + seconds, 0
    backends = available_backends()
    while time.monotonic() < end:
        rng = random.Random(f"{seed}-{case}")
        torch.manual_seed(rng.getrandbits(62))
        where = f"seed {seed}, case {case}"
        if case % 10 == 9:
            _cached(rng, where)
            counts["caches"] += 1
        else:
            triton = (
                case % TRITON_EVERY == TRITON_EVERY - 2 and backends["triton"] == "ok" and not torch.cuda.is_available()
            )
            names = [name for name, wanted in (("cpu", backends["cpu"] == "ok"), ("triton", triton)) if wanted]
            for name, dtype in _compared(rng, names, where, longest=20 if triton else 200):
                counts[f"{name} {str(dtype).removeprefix('torch.')}"] += 1
        case += 1
    return dict(counts)


def _compared(rng: random.Random, backends: list[str], where: str, longest: int) -> list[tuple[str, torch.dtype]]:
    """Run one problem on the backends and compare each with the reference."""
    dtype = rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16] + [torch.float64] * (longest > 20))
    leaves, rest, grad = _problem(rng, dtype, longest)
    expected = _run(leaves, rest, grad, "reference", torch.float64)
    for backend in backends:
        found = _run(leaves, rest, grad, backend, dtype)
        for name, right in expected.items():
            error = _relative_error(found[name], right)
            assert error <= TOLERANCE[dtype], f"{where}: {backend} {dtype} {name} is off by {error:.2g} of its largest"
    return [(backend, dtype) for backend in backends]


def _problem(rng: random.Random, dtype: torch.dtype, longest: int) -> tuple[dict[str, Tensor], dict[str, Any], Tensor]:
    """Return what has gradients, the other arguments, and the gradient of the output."""
    lengths = [
        rng.choice([0, 1, 5, 63, 64, 65, rng.randint(0, longest)])
        for _ in range(rng.randint(0, 4 if longest > 20 else 2))
    ]
    lengths = [min(n, longest) for n in lengths]
    new = [rng.randint(0, n) for n in lengths] if rng.random() < 0.4 else lengths
    heads, d_qk, d_v = rng.choice([1, 2, 3]), rng.choice([1, 8, 16, 25, 50]), rng.choice([1, 5, 16, 33])
    total, total_q, bound = sum(lengths), sum(new), max([1, *lengths]) + rng.choice([0, 7])

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    leaves = {"q": normal(total_q, heads, d_qk), "k": normal(total, heads, d_qk), "v": normal(total, heads, d_v)}
    rest: dict[str, Any] = {"offsets": torch.tensor([0, *lengths]).cumsum(0), "max_seqlen": bound}
    if new is not lengths:
        rest["q_offsets"] = torch.tensor([0, *new]).cumsum(0)
    if rng.random() < 0.6:
        leaves["position_weight"] = normal(rng.choice([1, heads]), 2 * bound + 1)
    if rng.random() < 0.6:
        span = rng.choice(STAMPS)
        leaves["time_weight"] = normal(rng.choice([1, heads]), rng.choice([1, 13, 129, 200]))
        rest["timestamps"] = torch.randint(-span, span, (total,))
    if rng.random() < 0.4:
        pairs = sum(rows * keys for rows, keys in zip(new, lengths, strict=True))
        leaves["bias"] = normal(rng.choice([1, heads]), pairs)
    if rng.random() < 0.5:
        rest["num_targets"] = torch.tensor([rng.randint(0, n) for n in lengths], dtype=torch.int64)
    rest["num_contextual"] = rng.choice([0, 0, 1, 4])
    rest["causal"] = rng.random() < 0.8
    rest["target_group_size"] = rng.choice([1, 2, 3, 70]) if rest["causal"] else 1
    rest["max_attn_len"], rest["min_full_attn_len"] = rng.choice([0, 0, 1, 33]), rng.choice([0, 0, 9])
    rest["time_shift"], rest["alpha"] = rng.choice([0, 1]), rng.choice([None, 1.0, 0.0])
    rest["divisor"] = rng.choice([None, 3.0, 0.5 + 3 * torch.rand(total_q)])
    rest["dropout"], rest["seed"] = rng.choice([0.0, 0.0, 0.4]), rng.getrandbits(63)
    return leaves, rest, normal(total_q, heads, d_v)


def _run(
    leaves: dict[str, Tensor], rest: dict[str, Any], grad: Tensor, backend: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    given = {name: x.to(dtype, copy=True).requires_grad_() for name, x in leaves.items()}
    out = hstu_attention(**given, **rest, backend=backend)
    gradients = torch.autograd.grad(out, list(given.values()), grad.to(dtype))
    return {"out": out.detach()} | {f"d_{name}": x for name, x in zip(given, gradients, strict=True)}


def _relative_error(found: Tensor, right: Tensor) -> float:
    if right.numel() == 0:
        return 0.0
    error = float((found.double() - right).abs().max() / right.abs().max().clamp(min=1e-30))
    # NaN compares as false, and would pass unseen.
    return error if error == error else float("inf")


@torch.no_grad()
def _cached(rng: random.Random, where: str) -> None:
    """Append ragged steps, drop and reorder users, score without commit: each output equals that of the full pass."""
    model = HSTU(
        rng.choice([1, 2]),
        12,
        2,
        rng.choice([3, 8]),
        rng.choice([4, 8]),
        max_seqlen=300,
        time_buckets=30,
        max_attn_len=rng.choice([0, 20]),
        group_norm=rng.random() < 0.5,
        concat_ua=rng.random() < 0.5,
        dtype=torch.float64,
    ).eval()
    users = [torch.zeros(0, 12, dtype=torch.float64) for _ in range(rng.randint(1, 4))]
    cache = RaggedKVCache(len(users), page_size=rng.choice([None, 1, 7, 64]))
    for step in range(rng.randint(1, 6)):
        new = [rng.choice([0, 1, rng.randint(0, 40)]) for _ in users]
        rows, offsets = torch.randn(sum(new), 12, dtype=torch.float64), torch.tensor([0, *new]).cumsum(0)
        grown = [torch.cat([old, part]) for old, part in zip(users, rows.split(new), strict=True)]
        lengths = [len(user) for user in grown]
        stamps = [torch.arange(n) * 1000 for n in lengths]
        fresh = torch.cat([x[n - m :] for x, n, m in zip(stamps, lengths, new, strict=True)])
        commit = rng.random() < 0.7
        found = model(rows, offsets, timestamps=fresh, cache=cache, commit=commit)
        full = model(torch.cat(grown), torch.tensor([0, *lengths]).cumsum(0), timestamps=torch.cat(stamps))
        last = torch.cat([x[n - m :] for x, n, m in zip(full.split(lengths), lengths, new, strict=True)])
        assert torch.allclose(found, last, rtol=1e-9, atol=1e-9), f"{where}: step {step} differs from the full pass"
        users = grown if commit else users
        if rng.random() < 0.4:
            kept = rng.sample(range(len(users)), rng.randint(1, len(users)))
            cache.select(kept)
            users = [users[u] for u in kept]
