"""Random scans, convolutions and updates of the cpu backend against plain float64 loops; unwritten memory holds NaN.

Dense and packed, empty segments, free strides, every option, states and gradients; pools of states with padding.
"""

import math
import random
import time
from collections import Counter
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mamba_scan import (
    causal_conv1d,
    causal_conv1d_update,
    causal_conv1d_varlen_states,
    selective_scan,
    selective_state_update,
    ssd_scan,
)

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 4e-2, torch.float16: 2e-2}
LENGTHS = (0, 1, 2, 3, 7, 31, 63, 64, 65, 130)


def tries(seed: int, seconds: float) -> dict[str, int]:
    """Fuzz for some seconds.

    Args:
        seed: of everything drawn.
        seconds: after which no new try begins.

    Returns:
        How many tries of each kind held.

    Raises:
        AssertionError: On the first that did not, naming the try's own seed.
    """
    counts: Counter[str] = Counter()
    end, number = time.monotonic() + seconds, 0
    kinds = {
        "scans": _scan,
        "convolutions": _conv,
        "scans of heads": _ssd,
        "updates": _update,
        "conv updates": _conv_update,
    }
    before = torch.are_deterministic_algorithms_enabled()
    # Memory that nobody writes to is then filled with NaN.
    torch.use_deterministic_algorithms(True)
    try:
        while time.monotonic() < end:
            own = seed * 1_000_003 + number
            for name, one in kinds.items():
                try:
                    one(_Draw(own))
                except Exception as error:
                    raise AssertionError(f"{name}: try {own} (seed {seed}, number {number}): {error}") from error
                counts[name] += 1
            number += 1
    finally:
        torch.use_deterministic_algorithms(before)
    return dict(counts)


class _Draw:
    """One try's random numbers and its layout: dense [b, l] or packed [T]."""

    def __init__(self, seed: int) -> None:
        self.rng, self.g = random.Random(seed), torch.Generator().manual_seed(seed)
        self.dtype = self.rng.choice(list(TOLERANCE))
        self.packed = self.rng.random() < 0.5
        length = self.rng.choice(LENGTHS[1:])
        self.lengths = [self.rng.choice(LENGTHS) if self.packed else length for _ in range(self.rng.randint(1, 4))]
        bounds = [0, *torch.tensor(self.lengths).cumsum(0).tolist()]
        self.offsets = torch.tensor(bounds, dtype=self.rng.choice((torch.int32, torch.int64)))

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, generator=self.g, dtype=torch.float64).to(dtype or self.dtype)

    def rows(self, *shape: int) -> Tensor:
        """Numbers of all rows, [T, ...], a slice of something wider at times."""
        if self.rng.random() < 0.3:
            return self.normal(sum(self.lengths), *shape[:-1], shape[-1] + 2)[..., 1:-1]
        return self.normal(sum(self.lengths), *shape)

    def maybe(self, x: Tensor) -> Tensor | None:
        return x if self.rng.random() < 0.6 else None

    def dense(self, x: Tensor, last: bool = True) -> Tensor:
        """Rows as [b, ..., l], or [b, l, ...], where the layout is dense."""
        if self.packed:
            return x
        x = x.unflatten(0, (len(self.lengths), self.lengths[0]))
        return x.movedim(1, -1) if last else x


def _scan(draw: _Draw) -> None:
    rng, groups = draw.rng, draw.rng.choice((1, 1, 2))
    d, n = groups * rng.choice((1, 3, 8, 17)), rng.choice((1, 2, 7, 16, 33))
    S, real = len(draw.lengths), torch.float64 if draw.dtype == torch.float64 else torch.float32
    rows = {"u": draw.rows(d), "delta": draw.rows(d) * 0.5, "B": draw.rows(groups, n), "C": draw.rows(groups, n)}
    if (z := draw.maybe(draw.rows(d))) is not None:
        rows["z"] = z
    other = {"A": -torch.rand(d, n, generator=draw.g).to(real)}
    options = {"D": (d,), "delta_bias": (d,), "initial_state": (S, d, n)}
    other |= {k: x for k, s in options.items() if (x := draw.maybe(draw.normal(*s, dtype=real))) is not None}
    given, wide = _leaves(rows | other)
    arguments = {k: draw.dense(x) if k in rows else x for k, x in given.items()}
    out, last = selective_scan(
        **arguments,
        delta_softplus=True,
        return_last_state=True,
        backend="cpu",
        offsets=draw.offsets if draw.packed else None,
    )
    outs, lasts = [], []
    for s, row in enumerate(_segments(draw)):
        h = wide["initial_state"][s] if "initial_state" in wide else torch.zeros(d, n, dtype=torch.float64)
        for t in range(row.start, row.stop):
            dt = torch.nn.functional.softplus(wide["delta"][t] + wide.get("delta_bias", 0))[:, None]
            B, C = (wide[k][t].repeat_interleave(d // groups, 0) for k in "BC")
            h = torch.exp(dt * wide["A"]) * h + dt * B * wide["u"][t, :, None]
            y = (h * C).sum(-1) + wide.get("D", 0) * wide["u"][t]
            outs.append(y * torch.nn.functional.silu(wide["z"][t]) if "z" in wide else y)
        lasts.append(h)
    _compare(draw, given, wide, [draw.dense(_stack(outs, d)), torch.stack(lasts)], [out, last])


def _ssd(draw: _Draw) -> None:
    rng, groups = draw.rng, draw.rng.choice((1, 2))
    h, p, n, S = groups * rng.choice((1, 3)), rng.choice((1, 4, 9)), rng.choice((1, 5, 16)), len(draw.lengths)
    rows = {"x": draw.rows(h, p), "dt": draw.rows(h) * 0.5, "B": draw.rows(groups, n), "C": draw.rows(groups, n)}
    if (z := draw.maybe(draw.rows(h, p))) is not None:
        rows["z"] = z
    real = torch.float64 if draw.dtype == torch.float64 else torch.float32
    other = {"A": -torch.rand(h, generator=draw.g).to(real)}
    options = {"D": rng.choice(((h,), (h, p))), "dt_bias": (h,), "initial_states": (S, h, p, n)}
    other |= {k: x for k, s in options.items() if (x := draw.maybe(draw.normal(*s, dtype=real))) is not None}
    given, wide = _leaves(rows | other)
    index = draw.maybe(torch.randint(0, 3, (sum(draw.lengths),), generator=draw.g).sort()[0])
    arguments = {k: draw.dense(x, last=False) if k in rows else x for k, x in given.items()}
    out, final = ssd_scan(
        **arguments, dt_softplus=True, return_final_states=True, backend="cpu",
        offsets=draw.offsets if draw.packed else None, seq_idx=None if index is None else draw.dense(index, last=False),
    )  # fmt: skip
    outs, lasts = [], []
    for s, row in enumerate(_segments(draw)):
        state = wide["initial_states"][s] if "initial_states" in wide else torch.zeros(h, p, n, dtype=torch.float64)
        for t in range(row.start, row.stop):
            if index is not None and t > row.start and index[t] != index[t - 1]:
                state = torch.zeros(h, p, n, dtype=torch.float64)
            dt = torch.nn.functional.softplus(wide["dt"][t] + wide.get("dt_bias", 0))[:, None, None]
            B, C = (wide[k][t].repeat_interleave(h // groups, 0)[:, None] for k in "BC")
            state = torch.exp(dt * wide["A"][:, None, None]) * state + dt * wide["x"][t, :, :, None] * B
            y = (state * C).sum(-1)
            if "D" in wide:
                y = y + wide["D"].view(h, -1) * wide["x"][t]
            outs.append(y * torch.nn.functional.silu(wide["z"][t]) if "z" in wide else y)
        lasts.append(state)
    want = [draw.dense(_stack(outs, h, p), last=False), torch.stack(lasts)]
    _compare(draw, given, wide, want, [out, final])


def _conv(draw: _Draw) -> None:
    d, width, S = draw.rng.choice((1, 3, 16, 21)), draw.rng.choice((1, 2, 4, 7)), len(draw.lengths)
    rows, other = {"x": draw.rows(d)}, {"weight": draw.normal(d, width)}
    options = {"bias": (d,), "initial_states": (S, d, width - 1)}
    other |= {k: x for k, s in options.items() if (x := draw.maybe(draw.normal(*s))) is not None}
    given, wide = _leaves(rows | other)
    activation = draw.rng.choice((None, "silu"))
    out, final = causal_conv1d(
        **given | {"x": draw.dense(given["x"])}, activation=activation, return_final_states=True, backend="cpu",
        offsets=draw.offsets if draw.packed else None,
    )  # fmt: skip
    outs, finals = [], []
    for s, row in enumerate(_segments(draw)):
        before = wide["initial_states"][s] if "initial_states" in wide else torch.zeros(d, width - 1).double()
        seen = torch.cat([before, wide["x"][row].T], dim=1)
        for t in range(row.stop - row.start):
            y = (seen[:, t : t + width] * wide["weight"]).sum(-1) + wide.get("bias", 0)
            outs.append(torch.nn.functional.silu(y) if activation else y)
        finals.append(seen[:, seen.shape[1] - width + 1 :])
    if draw.packed and width > 1 and "initial_states" not in given:
        assert torch.equal(causal_conv1d_varlen_states(given["x"], draw.offsets, width - 1), final), "varlen states"
    _compare(draw, given, wide, [draw.dense(_stack(outs, d)), torch.stack(finals)], [out, final])


def _update(draw: _Draw) -> None:
    """Steps in a pool with padding, in mixed dtypes, against the recurrence."""
    rng, b, slots = draw.rng, draw.rng.randint(1, 5), 6
    h, p, n, groups = rng.choice((2, 4)), rng.choice((1, 5)), rng.choice((1, 3, 16)), rng.choice((1, 2))
    lead = (h, p) if rng.random() < 0.5 else (h * p,)
    index = torch.tensor([slot if rng.random() < 0.7 else -rng.randint(1, 3) for slot in rng.sample(range(slots), b)])
    kept = index >= 0
    dtypes = [draw.dtype, rng.choice((draw.dtype, torch.float32))]
    x, dt, z = (draw.normal(b, *lead, dtype=rng.choice(dtypes)) for _ in range(3))
    B, C = (draw.normal(b, groups, n, dtype=rng.choice(dtypes)) for _ in range(2))
    A, D, bias = -torch.rand(*lead, n, generator=draw.g), draw.normal(*lead), draw.normal(*lead)
    pool = draw.normal(slots, *lead, n, dtype=torch.float64 if draw.dtype == torch.float64 else torch.float32)
    before = pool.clone()
    for t in (x, dt, z, B, C):
        t[~kept] = math.nan
    out = selective_state_update(pool, x, dt, A, B, C, D, z, bias, True, index, backend="cpu")
    assert out.dtype == x.dtype and out[~kept].eq(0).all(), "padding has an output"
    untouched = [slot for slot in range(slots) if slot not in index.tolist()]
    assert torch.equal(pool[untouched], before[untouched]), "a slot nobody named has changed"
    step = torch.nn.functional.softplus(dt[kept].double() + bias.double())[..., None]
    Bs, Cs = (c[kept].double().repeat_interleave(h * p // groups, 1).view(-1, *lead, n) for c in (B, C))
    state = torch.exp(step * A.double()) * before[index[kept]].double() + step * Bs * x[kept].double()[..., None]
    y = ((state * Cs).sum(-1) + D.double() * x[kept].double()) * torch.nn.functional.silu(z[kept].double())
    _close("state", pool[index[kept]], state, TOLERANCE[pool.dtype] if torch.float64 in (x.dtype, pool.dtype) else 1e-5)
    _close("out", out[kept], y, max(TOLERANCE[x.dtype], 1e-9))


def _conv_update(draw: _Draw) -> None:
    """A sequence in pieces of a few rows, ring or not, against the convolution of all of it."""
    rng, d, width, b = draw.rng, draw.rng.choice((1, 3, 8)), draw.rng.choice((2, 3, 4)), draw.rng.randint(1, 3)
    size, ring, total = width - 1 + rng.choice((0, 1, 4)), rng.random() < 0.5, rng.randint(1, 12)
    x, weight, bias = draw.normal(b, d, total), draw.normal(d, width), draw.maybe(draw.normal(d))
    want = causal_conv1d(x, weight, bias, activation="silu", backend="reference")
    pool, index = draw.normal(b + 2, d, size), torch.tensor(rng.sample(range(b + 2), b))
    pool[index] = 0
    others = pool[[slot for slot in range(b + 2) if slot not in index.tolist()]].clone()
    outs, seen = [], 0
    while seen < total:
        step = min(rng.randint(1, 4), total - seen)
        counts = torch.full((b + 1,), seen) if ring else None
        # The last row is padding.
        rows = torch.cat([x[:, :, seen : seen + step], torch.full((1, d, step), math.nan).to(x.dtype)])
        slots = torch.cat([index, torch.tensor([-1])])
        out = causal_conv1d_update(rows, pool, weight, bias, "silu", counts, slots, backend="cpu")
        assert out[-1].eq(0).all(), "padding has an output"
        outs.append(out[:-1])
        seen += step
    _close("out", torch.cat(outs, 2), want.double(), TOLERANCE[x.dtype])
    now = pool[[slot for slot in range(b + 2) if slot not in index.tolist()]]
    assert torch.equal(now, others), "a slot nobody named has changed"


def _leaves(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors and their float64 copies, both ready to be differentiated."""
    given = {k: x.detach().requires_grad_() for k, x in tensors.items()}
    return given, {k: x.detach().double().requires_grad_() for k, x in tensors.items()}


def _segments(draw: _Draw) -> list[slice]:
    bounds = draw.offsets.tolist()
    return [slice(a, b) for a, b in pairwise(bounds)]


def _stack(outs: list[Tensor], *shape: int) -> Tensor:
    return torch.stack(outs) if outs else torch.zeros(0, *shape, dtype=torch.float64)


def _compare(draw: _Draw, given: dict[str, Tensor], wide: dict[str, Tensor], want: list[Any], got: list[Any]) -> None:
    """Outputs, states, and the gradients of one direction of both."""
    limit = TOLERANCE[draw.dtype]
    for name, a, b in zip(("out", "states"), got, want, strict=True):
        _close(name, a, b, limit)
    directions = [draw.normal(*x.shape, dtype=torch.float64).to(x.dtype) for x in got]
    pairs = [(y, g) for y, g in zip(got, directions, strict=True) if y.requires_grad]
    exact = [(y, g.double()) for y, g in zip(want, directions, strict=True) if y.requires_grad]
    found = _gradients(pairs, given)
    wanted = _gradients(exact, wide)
    for name, x in wide.items():
        zero = torch.zeros_like(x)
        got_grad, want_grad = (zero if grads[name] is None else grads[name] for grads in (found, wanted))
        _close(f"gradient of {name}", got_grad, want_grad, limit)


def _gradients(pairs: list[tuple[Tensor, Tensor]], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Gradients by name; None for what nothing depends on."""
    if not pairs:
        return dict.fromkeys(tensors)
    ys, directions = zip(*pairs, strict=True)
    return dict(zip(tensors, torch.autograd.grad(ys, [*tensors.values()], directions, allow_unused=True), strict=True))


def _close(name: str, got: Tensor, want: Tensor, limit: float) -> None:
    """Within ``limit`` of the size of what is wanted, root mean square over root mean square; NaN never is."""
    assert got.shape == want.shape, f"{name}: shape {list(got.shape)}, needs {list(want.shape)}"
    error, size = (got.double() - want).norm().item(), want.norm().item()
    assert error <= limit * (size + want.numel() ** 0.5 * 1e-2), f"{name}: error {error:.2e} of size {size:.2e}"
