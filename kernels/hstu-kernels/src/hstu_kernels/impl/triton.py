# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels: one for the output, one for dq and the tables, one for dk and dv.

Only the sums of the tables depend on the order of programs; under ``torch.use_deterministic_algorithms(True)`` they are
sums of integers, which do not.
"""

import os
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hstu_kernels.dropout import keep_threshold, seed_key
from hstu_kernels.intervals import row_intervals
from hstu_kernels.pieces import norm_project_silu_backward  # noqa: F401
from hstu_kernels.problem import Problem
from hstu_kernels.time_buckets import bucket_edges

_NORM_GATE_ROWS = 32
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def unavailable() -> str | None:
    """Return why this backend cannot run here, or None."""
    if INTERPRETED or torch.cuda.is_available():
        return None
    return "no CUDA device is visible (TRITON_INTERPRET=1, set before Python starts, runs the kernels slowly on a CPU)"


def supports(x: Tensor) -> str | None:
    """Return why this backend cannot take tensors like x, or None."""
    if x.dtype == torch.float64:
        return "they are float64, need float32, bfloat16 or float16"
    if x.device.type != ("cpu" if INTERPRETED else "cuda"):
        return f"they are on {x.device}, need {'cpu (interpreter)' if INTERPRETED else 'cuda'}"
    return None


def forward(p: Problem) -> Tensor:
    """As ``reference.forward``."""
    out = p.q.new_empty(p.q.shape[0], p.v.shape[1], p.v.shape[2])
    if out.numel():
        call = _Call(p)
        call.launch("forward", call.longest_q, out)
    return out


def backward(p: Problem, grad: Tensor, needs: list[bool]) -> tuple[Tensor | None, ...]:
    """As ``reference.backward``."""
    call = _Call(p)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (p.q, p.k, p.v))
    if dk.numel() == 0 or dv.numel() == 0 or dq.numel() == 0:
        dq, dk, dv = (x.zero_() for x in (dq, dk, dv))
        empty = (None if w is None else torch.zeros_like(w) for w in (p.position_weight, p.time_weight))
        return dq, dk, dv, *empty
    grad = _dense(grad)
    exact = torch.are_deterministic_algorithms_enabled()
    scale = _fixed_point_scale(p, grad) if exact else None
    kind = torch.int64 if exact else torch.float32
    tables = [
        torch.zeros(w.shape, dtype=kind, device=w.device) if w is not None and needed else None
        for w, needed in zip((p.position_weight, p.time_weight), needs[3:], strict=True)
    ]
    call.launch("dq", call.longest_q, grad, grad.stride(0), grad.stride(1), dq, *tables, scale)
    call.launch("dkv", min(p.max_seqlen, p.k.shape[0]), grad, grad.stride(0), grad.stride(1), dk, dv)
    if scale is not None:
        tables = [None if table is None else table.double() / scale for table in tables]
    weights = (p.position_weight, p.time_weight)
    found = (None if t is None or w is None else t.to(w.dtype) for t, w in zip(tables, weights, strict=True))
    return dq, dk, dv, *found


def norm_gate(x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """As ``reference.norm_gate``."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, gate, weight, bias = _dense(x), _dense(gate), weight.contiguous(), bias.contiguous()
    rows, width = x.shape
    if rows:
        _norm_gate_kernel[(rows,)](
            x, x.stride(0), gate, gate.stride(0), weight, bias, eps, out, width, PADDED=triton.next_power_of_2(width)
        )
    return out


def norm_gate_backward(
    grad: Tensor, x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``reference.norm_gate_backward``."""
    d_x, d_gate = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    x, gate, grad, weight, bias = _dense(x), _dense(gate), _dense(grad), weight.contiguous(), bias.contiguous()
    rows, width = x.shape
    # Each program sums its own rows, so that the order of sums is always the same.
    programs = triton.cdiv(rows, _NORM_GATE_ROWS)
    partial = torch.zeros(2, programs, width, dtype=torch.float32, device=x.device)
    if rows:
        _norm_gate_backward_kernel[(programs,)](
            grad,
            grad.stride(0),
            x,
            x.stride(0),
            gate,
            gate.stride(0),
            weight,
            bias,
            eps,
            d_x,
            d_gate,
            partial[0],
            partial[1],
            rows,
            width,
            PADDED=triton.next_power_of_2(width),
            ROWS=_NORM_GATE_ROWS,
        )
    d_weight, d_bias = partial[0].sum(0), partial[1].sum(0)
    return d_x, d_gate, d_weight.to(weight.dtype), d_bias.to(bias.dtype)


def norm_project_silu(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, eps: float, keep: bool
) -> tuple[Tensor, Tensor]:
    """Return SiLU(z) and z = LayerNorm(x) @ weight.T [T, W], in the dtype of weight; z is empty unless kept.

    Backward is products of torch's own.
    """
    rows, width = x.shape
    out = torch.empty(rows, weight.shape[0], dtype=weight.dtype, device=x.device)
    projected = torch.empty_like(out) if keep else weight.new_empty(0)
    if out.numel() == 0:
        return out, projected
    x, weight, norm_weight, norm_bias = _dense(x), *(y.contiguous() for y in (weight, norm_weight, norm_bias))
    moments = torch.empty(2, rows, dtype=torch.float32, device=x.device)
    _moments_kernel[(rows,)](x, x.stride(0), eps, *moments, width, PADDED=triton.next_power_of_2(width))

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        return triton.cdiv(rows, meta["BLOCK_ROWS"]), triton.cdiv(out.shape[1], meta["BLOCK_WIDE"])

    tuned = _tune() and not torch.are_deterministic_algorithms_enabled()
    chosen, config = (_tuned("project"), {}) if tuned else (_norm_project_silu_kernel, _PROJECT_CONFIG)
    chosen[grid](
        x,
        x.stride(0),
        *moments,
        norm_weight,
        norm_bias,
        weight,
        out,
        projected if keep else None,
        rows,
        width,
        out.shape[1],
        **config,
    )
    return out, projected


class _Call:
    """Arguments that all kernels share."""

    def __init__(self, p: Problem) -> None:
        self.p = p
        self.q, self.k, self.v = (_dense(x) for x in (p.q, p.k, p.v))
        # Pointers without strides go to the kernels: of anything but rows and heads only dense tensors will do.
        self.offsets = p.offsets.long().contiguous()
        self.q_offsets = self.offsets if p.q_offsets is None else p.q_offsets.long().contiguous()
        self.timestamps = None if p.timestamps is None else p.timestamps.contiguous()
        self.row_divisor = None if p.row_divisor is None else p.row_divisor.contiguous()
        self.lo, self.hi = row_intervals(p)
        self.edges = None if p.time_weight is None else bucket_edges(p.time_weight.shape[1] - 1, p.q.device)
        self.longest_q = min(p.max_seqlen, p.q.shape[0])

    def launch(self, name: str, longest: int, *own: Any) -> None:
        p = self.p
        position, time = (None if w is None else w.detach().contiguous() for w in (p.position_weight, p.time_weight))
        fixed = {
            "WIDTH_QK": p.q.shape[2],
            "WIDTH_V": p.v.shape[2],
            "PADDED_QK": max(16, triton.next_power_of_2(p.q.shape[2])),
            "PADDED_V": max(16, triton.next_power_of_2(p.v.shape[2])),
            "POSITION": position is not None,
            "TIME": time is not None,
            "DROPOUT": p.seed is not None,
            "ROW_DIVISOR": p.row_divisor is not None,
            "TIME_SHIFT": p.time_shift,
        }
        batch, heads = p.offsets.shape[0] - 1, p.q.shape[1]
        if batch * heads == 0 or longest == 0:
            return
        tuned = _tune() and not torch.are_deterministic_algorithms_enabled()
        block = "BLOCK_KEYS" if name == "dkv" else "BLOCK_ROWS"

        def grid(meta: dict[str, Any]) -> tuple[int, int]:
            return batch * heads, triton.cdiv(longest, meta[block])

        chosen, config = (_tuned(name), {}) if tuned else (_KERNELS[name], _fixed_config(fixed))
        chosen[grid](
            self.q,
            self.q.stride(0),
            self.q.stride(1),
            self.k,
            self.k.stride(0),
            self.k.stride(1),
            self.v,
            self.v.stride(0),
            self.v.stride(1),
            self.offsets,
            self.q_offsets,
            self.lo,
            self.hi,
            position,
            0 if position is None or position.shape[0] == 1 else position.shape[1],
            0 if position is None else position.shape[1] // 2,
            time,
            0 if time is None or time.shape[0] == 1 else time.shape[1],
            0 if time is None else time.shape[1] - 1,
            self.timestamps,
            self.edges,
            self.row_divisor,
            p.alpha,
            p.divisor,
            0 if p.seed is None else seed_key(int(p.seed)),
            keep_threshold(p.dropout),
            1.0 / (1.0 - p.dropout),
            heads,
            *own,
            **fixed,
            **config,
        )


def _tune() -> bool:
    # Fixed block sizes: reproducible sums from one process to the next, and no warm-up.
    return not INTERPRETED and os.environ.get("HSTU_KERNELS_TRITON_CONFIG", "auto") != "fixed"


def _fixed_config(fixed: dict[str, Any]) -> dict[str, int]:
    wide = max(fixed["PADDED_QK"], fixed["PADDED_V"]) > 128
    return {"BLOCK_ROWS": 32 if wide else 64, "BLOCK_KEYS": 32, "num_warps": 4, "num_stages": 1 if wide else 2}


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _fixed_point_scale(p: Problem, grad: Tensor) -> Tensor:
    # Integers have one sum in any order. The scale leaves room for the largest sum that these inputs can make.
    divisor = abs(p.divisor) if p.row_divisor is None else p.row_divisor.abs().amin().double()
    largest = grad.detach().abs().amax().double() * p.v.detach().abs().amax().double() * p.v.shape[2] / divisor
    bound = 1.2 * largest / (1.0 - p.dropout) * (p.q.shape[0] * p.q.shape[1] * max(p.max_seqlen, 1))
    # Within float32, in which the kernel scales; NaN where the inputs are not finite, so that the sums are NaN too.
    return torch.where(bound == 0, torch.ones_like(bound), (2.0**62 / bound).clamp(max=1e37))


# numpy has no bfloat16, so the interpreter multiplies in float32, which holds every bfloat16 exactly.
_WIDEN = tl.constexpr(INTERPRETED)


@triton.jit
def _dot(a, b):
    if _WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


@triton.jit
def _kept(seed_key, threshold, scale, head, rows, cols):
    # The arithmetic of dropout.py, in int64 as there: the low 32 bits of the products are exact.
    key = _mix((seed_key + head.to(tl.int64) * 0x9E3779B9) & 0xFFFFFFFF)
    key = _mix((key + rows.to(tl.int64)) & 0xFFFFFFFF)
    draw = _mix(key[:, None] ^ ((cols[None, :].to(tl.int64) * 0x9E3779B9) & 0xFFFFFFFF))
    return tl.where(draw >= threshold, scale, 0.0)


@triton.jit
def _buckets(ts, first, at, cols, n, edges, last_bucket, TIME_SHIFT: tl.constexpr):
    now = tl.load(ts + first + tl.minimum(at + TIME_SHIFT, n - 1), mask=at < n, other=0)
    then = tl.load(ts + first + cols, mask=cols < n, other=0)
    dt = tl.maximum(tl.abs(now[:, None] - then[None, :]), 1)
    guess = (tl.log(dt.to(tl.float32)) / 0.301).to(tl.int32)
    guess = tl.minimum(guess, last_bucket)
    # The logarithm may be one off beside an edge; the integer edges decide.
    above = tl.load(edges + guess, mask=guess < last_bucket, other=0x7FFFFFFFFFFFFFFF)
    guess = tl.where(above <= dt, guess + 1, guess)
    below = tl.load(edges + guess - 1, mask=guess > 0, other=0)
    return tl.where(below > dt, guess - 1, guess)


@triton.jit
def _score_tile(
    q_tile, k_tile, at, cols, lo, hi, inside, n, first, head,
    position, position_stride, center, time, time_stride, last_bucket, ts, edges,
    alpha, POSITION: tl.constexpr, TIME: tl.constexpr, TIME_SHIFT: tl.constexpr,
):  # fmt: skip
    """Scores, their mask, position indices and buckets."""
    scores = alpha * _dot(q_tile, tl.trans(k_tile))
    seen = (cols[None, :] >= lo[:, None]) & (cols[None, :] < hi[:, None])
    seen = (seen | (cols[None, :] == at[:, None])) & inside[:, None] & (cols < n)[None, :]
    where = center + cols[None, :] - at[:, None]
    bucket = where
    if POSITION:
        scores += tl.load(position + head * position_stride + where, mask=seen, other=0.0).to(tl.float32)
    if TIME:
        bucket = _buckets(ts, first, at, cols, n, edges, last_bucket, TIME_SHIFT)
        scores += tl.load(time + head * time_stride + bucket, mask=seen, other=0.0).to(tl.float32)
    return scores, seen, where, bucket


@triton.jit
def _load_rows(base, row, stride_row, head, stride_head, inside, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    d = tl.arange(0, PADDED)
    at = row.to(tl.int64)[:, None] * stride_row + head.to(tl.int64) * stride_head + d[None, :]
    return tl.load(base + at, mask=inside[:, None] & (d < WIDTH)[None, :], other=0.0)


@triton.jit
def _store_rows(base, row, head, heads, inside, x, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    d = tl.arange(0, PADDED)
    at = (row.to(tl.int64)[:, None] * heads + head) * WIDTH + d[None, :]
    tl.store(base + at, x.to(base.dtype.element_ty), mask=inside[:, None] & (d < WIDTH)[None, :])


@triton.jit
def _extent(offsets, b):
    """First row and number of rows of sequence b."""
    first = tl.load(offsets + b)
    return first, (tl.load(offsets + b + 1) - first).to(tl.int32)


@triton.jit
def _intervals(lo_of, hi_of, first_q, row, n, m):
    """Which query rows exist, their positions in the sequence, and the keys [lo, hi) that they see."""
    inside = row < m
    lo = tl.load(lo_of + first_q + row, mask=inside, other=0)
    hi = tl.load(hi_of + first_q + row, mask=inside, other=0)
    return inside, n - m + row, lo, hi


@triton.jit
def _divisor(divisors, divisor, first_q, row, inside, ROW_DIVISOR: tl.constexpr):
    by = 0.0 * row.to(tl.float32) + divisor
    if ROW_DIVISOR:
        by = tl.load(divisors + first_q + row, mask=inside, other=1.0).to(tl.float32)
    return by


@triton.jit
def _weights_and_d_scores(scores, seen, g_tile, v_tile, by):
    """The weights and the gradient of the scores, before dropout."""
    s = tl.sigmoid(scores)
    d_weights = _dot(g_tile, tl.trans(v_tile)) / by[:, None]
    d_scores = tl.where(seen, d_weights * s * (1.0 + scores * (1.0 - s)), 0.0)
    return tl.where(seen, scores * s, 0.0) / by[:, None], d_scores


@triton.jit
def _key_range(lo, hi, at, inside, n):
    """First and one past the last key that any row of the block sees."""
    least = tl.minimum(tl.where(lo < hi, lo, at), at)
    begin = tl.min(tl.where(inside, least, n))
    end = tl.max(tl.where(inside, tl.maximum(hi, at + 1), 0))
    return begin, end


@triton.jit
def _forward_kernel(
    q, q_row, q_head, k, k_row, k_head, v, v_row, v_head, offsets, q_offsets, lo_of, hi_of,
    position, position_stride, center, time, time_stride, last_bucket, ts, edges, divisors,
    alpha, divisor, seed_key, threshold, keep_scale, heads, out,
    WIDTH_QK: tl.constexpr, WIDTH_V: tl.constexpr, PADDED_QK: tl.constexpr, PADDED_V: tl.constexpr,
    POSITION: tl.constexpr, TIME: tl.constexpr, DROPOUT: tl.constexpr, ROW_DIVISOR: tl.constexpr,
    TIME_SHIFT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    b, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    first, n = _extent(offsets, b)
    first_q, m = _extent(q_offsets, b)
    start = tl.program_id(1) * BLOCK_ROWS
    if start >= m:
        return
    row = start + tl.arange(0, BLOCK_ROWS)
    inside, at, lo, hi = _intervals(lo_of, hi_of, first_q, row, n, m)
    q_tile = _load_rows(q, first_q + row, q_row, head, q_head, inside, WIDTH_QK, PADDED_QK)
    total = tl.zeros([BLOCK_ROWS, PADDED_V], dtype=tl.float32)
    begin, end = _key_range(lo, hi, at, inside, n)
    for tile in range(begin // BLOCK_KEYS * BLOCK_KEYS, end, BLOCK_KEYS):
        cols = tile + tl.arange(0, BLOCK_KEYS)
        k_tile = _load_rows(k, first + cols, k_row, head, k_head, cols < n, WIDTH_QK, PADDED_QK)
        v_tile = _load_rows(v, first + cols, v_row, head, v_head, cols < n, WIDTH_V, PADDED_V)
        scores, seen, _, _ = _score_tile(
            q_tile, k_tile, at, cols, lo, hi, inside, n, first, head,
            position, position_stride, center, time, time_stride, last_bucket, ts, edges, alpha,
            POSITION, TIME, TIME_SHIFT,
        )  # fmt: skip
        weights = tl.where(seen, scores * tl.sigmoid(scores), 0.0)
        if DROPOUT:
            weights *= _kept(seed_key, threshold, keep_scale, head, first + at, cols)
        total += _dot(weights.to(v_tile.dtype), v_tile)
    total /= _divisor(divisors, divisor, first_q, row, inside, ROW_DIVISOR)[:, None]
    _store_rows(out, first_q + row, head, heads, inside, total, WIDTH_V, PADDED_V)


@triton.jit
def _dq_kernel(
    q, q_row, q_head, k, k_row, k_head, v, v_row, v_head, offsets, q_offsets, lo_of, hi_of,
    position, position_stride, center, time, time_stride, last_bucket, ts, edges, divisors,
    alpha, divisor, seed_key, threshold, keep_scale, heads,
    grad, grad_row, grad_head, dq, d_position, d_time, fixed_point,
    WIDTH_QK: tl.constexpr, WIDTH_V: tl.constexpr, PADDED_QK: tl.constexpr, PADDED_V: tl.constexpr,
    POSITION: tl.constexpr, TIME: tl.constexpr, DROPOUT: tl.constexpr, ROW_DIVISOR: tl.constexpr,
    TIME_SHIFT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    b, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    first, n = _extent(offsets, b)
    first_q, m = _extent(q_offsets, b)
    start = tl.program_id(1) * BLOCK_ROWS
    if start >= m:
        return
    row = start + tl.arange(0, BLOCK_ROWS)
    inside, at, lo, hi = _intervals(lo_of, hi_of, first_q, row, n, m)
    q_tile = _load_rows(q, first_q + row, q_row, head, q_head, inside, WIDTH_QK, PADDED_QK)
    g_tile = _load_rows(grad, first_q + row, grad_row, head, grad_head, inside, WIDTH_V, PADDED_V)
    by = _divisor(divisors, divisor, first_q, row, inside, ROW_DIVISOR)
    total = tl.zeros([BLOCK_ROWS, PADDED_QK], dtype=tl.float32)
    begin, end = _key_range(lo, hi, at, inside, n)
    for tile in range(begin // BLOCK_KEYS * BLOCK_KEYS, end, BLOCK_KEYS):
        cols = tile + tl.arange(0, BLOCK_KEYS)
        k_tile = _load_rows(k, first + cols, k_row, head, k_head, cols < n, WIDTH_QK, PADDED_QK)
        v_tile = _load_rows(v, first + cols, v_row, head, v_head, cols < n, WIDTH_V, PADDED_V)
        scores, seen, where, bucket = _score_tile(
            q_tile, k_tile, at, cols, lo, hi, inside, n, first, head,
            position, position_stride, center, time, time_stride, last_bucket, ts, edges, alpha,
            POSITION, TIME, TIME_SHIFT,
        )  # fmt: skip
        _, d_scores = _weights_and_d_scores(scores, seen, g_tile, v_tile, by)
        if DROPOUT:
            d_scores *= _kept(seed_key, threshold, keep_scale, head, first + at, cols)
        total += _dot(d_scores.to(k_tile.dtype), k_tile)
        amount = d_scores
        if fixed_point is not None:
            scaled = tl.floor(d_scores * tl.load(fixed_point).to(tl.float32) + 0.5)
            # The scale is NaN then, and makes the sums NaN again.
            amount = tl.where(scaled == scaled, scaled, 0.0).to(tl.int64)
        if d_position is not None:
            tl.atomic_add(d_position + head * position_stride + where, amount, mask=seen, sem="relaxed")
        if d_time is not None:
            tl.atomic_add(d_time + head * time_stride + bucket, amount, mask=seen, sem="relaxed")
    _store_rows(dq, first_q + row, head, heads, inside, total * alpha, WIDTH_QK, PADDED_QK)


@triton.jit
def _dkv_kernel(
    q, q_row, q_head, k, k_row, k_head, v, v_row, v_head, offsets, q_offsets, lo_of, hi_of,
    position, position_stride, center, time, time_stride, last_bucket, ts, edges, divisors,
    alpha, divisor, seed_key, threshold, keep_scale, heads, grad, grad_row, grad_head, dk, dv,
    WIDTH_QK: tl.constexpr, WIDTH_V: tl.constexpr, PADDED_QK: tl.constexpr, PADDED_V: tl.constexpr,
    POSITION: tl.constexpr, TIME: tl.constexpr, DROPOUT: tl.constexpr, ROW_DIVISOR: tl.constexpr,
    TIME_SHIFT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    b, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    first, n = _extent(offsets, b)
    first_q, m = _extent(q_offsets, b)
    tile = tl.program_id(1) * BLOCK_KEYS
    if tile >= n:
        return
    cols = tile + tl.arange(0, BLOCK_KEYS)
    k_tile = _load_rows(k, first + cols, k_row, head, k_head, cols < n, WIDTH_QK, PADDED_QK)
    v_tile = _load_rows(v, first + cols, v_row, head, v_head, cols < n, WIDTH_V, PADDED_V)
    dk_total = tl.zeros([BLOCK_KEYS, PADDED_QK], dtype=tl.float32)
    dv_total = tl.zeros([BLOCK_KEYS, PADDED_V], dtype=tl.float32)
    for start in range(0, m, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        inside, at, lo, hi = _intervals(lo_of, hi_of, first_q, row, n, m)
        sees = (lo < tile + BLOCK_KEYS) & (hi > tile) & (lo < hi)
        sees = (sees | ((at >= tile) & (at < tile + BLOCK_KEYS))) & inside
        if tl.max(sees.to(tl.int32)) > 0:
            q_tile = _load_rows(q, first_q + row, q_row, head, q_head, inside, WIDTH_QK, PADDED_QK)
            g_tile = _load_rows(grad, first_q + row, grad_row, head, grad_head, inside, WIDTH_V, PADDED_V)
            by = _divisor(divisors, divisor, first_q, row, inside, ROW_DIVISOR)
            scores, seen, _, _ = _score_tile(
                q_tile, k_tile, at, cols, lo, hi, inside, n, first, head,
                position, position_stride, center, time, time_stride, last_bucket, ts, edges, alpha,
                POSITION, TIME, TIME_SHIFT,
            )  # fmt: skip
            weights, d_scores = _weights_and_d_scores(scores, seen, g_tile, v_tile, by)
            if DROPOUT:
                kept = _kept(seed_key, threshold, keep_scale, head, first + at, cols)
                weights *= kept
                d_scores *= kept
            dv_total += _dot(tl.trans(weights.to(g_tile.dtype)), g_tile)
            dk_total += _dot(tl.trans(d_scores.to(q_tile.dtype)), q_tile)
    _store_rows(dk, first + cols, head, heads, cols < n, dk_total * alpha, WIDTH_QK, PADDED_QK)
    _store_rows(dv, first + cols, head, heads, cols < n, dv_total, WIDTH_V, PADDED_V)


@triton.jit
def _normalize(x, inside, width, eps):
    mean = tl.sum(x, 0) / width
    centered = tl.where(inside, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, 0) / width + eps)
    return centered * rstd, rstd


@triton.jit
def _norm_gate_kernel(x, x_row, gate, gate_row, weight, bias, eps, out, width, PADDED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, PADDED)
    inside = d < width
    n, _ = _normalize(tl.load(x + row * x_row + d, mask=inside, other=0.0).to(tl.float32), inside, width, eps)
    w = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_row + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + d, ((n * w + b) * g).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _norm_gate_backward_kernel(
    grad, grad_row, x, x_row, gate, gate_row, weight, bias, eps, d_x, d_gate, d_weight, d_bias, rows, width,
    PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, PADDED)
    inside = d < width
    w = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)
    weight_sum = tl.zeros([PADDED], dtype=tl.float32)
    bias_sum = tl.zeros([PADDED], dtype=tl.float32)
    for r in range(ROWS):
        row = program * ROWS + r
        # The interpreter takes a mask of the block's shape only.
        here = inside & (row + 0 * d < rows)
        n, rstd = _normalize(tl.load(x + row * x_row + d, mask=here, other=0.0).to(tl.float32), here, width, eps)
        g = tl.load(gate + row * gate_row + d, mask=here, other=0.0).to(tl.float32)
        up = tl.load(grad + row * grad_row + d, mask=here, other=0.0).to(tl.float32)
        dy = up * g
        dn = dy * w
        dx = rstd * (dn - tl.sum(dn, 0) / width - n * (tl.sum(dn * n, 0) / width))
        tl.store(d_x + row * width + d, dx.to(d_x.dtype.element_ty), mask=here)
        tl.store(d_gate + row * width + d, (up * (n * w + b)).to(d_gate.dtype.element_ty), mask=here)
        weight_sum += dy * n
        bias_sum += dy
    tl.store(d_weight + program * width + d, weight_sum, mask=inside)
    tl.store(d_bias + program * width + d, bias_sum, mask=inside)


@triton.jit
def _moments_kernel(x, x_row, eps, mean, rstd, width, PADDED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, PADDED)
    inside = d < width
    values = tl.load(x + row * x_row + d, mask=inside, other=0.0).to(tl.float32)
    _, r = _normalize(values, inside, width, eps)
    tl.store(mean + row, tl.sum(values, 0) / width)
    tl.store(rstd + row, r)


@triton.jit
def _norm_project_silu_kernel(
    x, x_row, mean, rstd, norm_weight, norm_bias, weight, out, projected, rows, width, wide,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDE: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_WIDE + tl.arange(0, BLOCK_WIDE)
    here, there = row < rows, column < wide
    m = tl.load(mean + row, mask=here, other=0.0)
    r = tl.load(rstd + row, mask=here, other=0.0)
    total = tl.zeros([BLOCK_ROWS, BLOCK_WIDE], dtype=tl.float32)
    for start in range(0, width, BLOCK_WIDTH):
        d = start + tl.arange(0, BLOCK_WIDTH)
        inside = d < width
        tile = tl.load(x + row[:, None] * x_row + d[None, :], mask=here[:, None] & inside[None, :], other=0.0)
        gain = tl.load(norm_weight + d, mask=inside, other=0.0).to(tl.float32)
        shift = tl.load(norm_bias + d, mask=inside, other=0.0).to(tl.float32)
        # Beyond the width gain and shift are 0, and so is the norm.
        normed = (tile.to(tl.float32) - m[:, None]) * r[:, None] * gain[None, :] + shift[None, :]
        w = tl.load(
            weight + column.to(tl.int64)[:, None] * width + d[None, :],
            mask=there[:, None] & inside[None, :],
            other=0.0,
        )
        total += _dot(normed.to(w.dtype), tl.trans(w))
    at = row[:, None] * wide + column[None, :]
    both = here[:, None] & there[None, :]
    if projected is not None:
        tl.store(projected + at, total.to(projected.dtype.element_ty), mask=both)
    tl.store(out + at, (total * tl.sigmoid(total)).to(out.dtype.element_ty), mask=both)


_CONFIGS = [
    triton.Config({"BLOCK_ROWS": rows, "BLOCK_KEYS": keys}, num_warps=warps, num_stages=stages)
    for rows, keys, warps, stages in (
        (16, 32, 2, 2),
        (32, 32, 4, 2),
        (64, 32, 4, 2),
        (64, 64, 4, 2),
        (128, 32, 4, 2),
        (128, 64, 8, 2),
    )
]
_PROJECT_CONFIG = {"BLOCK_ROWS": 64, "BLOCK_WIDE": 64, "BLOCK_WIDTH": 32, "num_warps": 4, "num_stages": 2}
_PROJECT_CONFIGS = [
    triton.Config({"BLOCK_ROWS": rows, "BLOCK_WIDE": wide, "BLOCK_WIDTH": width}, num_warps=warps, num_stages=stages)
    for rows, wide, width, warps, stages in (
        (64, 64, 32, 4, 2),
        (64, 64, 64, 4, 3),
        (128, 64, 32, 4, 3),
        (128, 128, 32, 8, 3),
        (128, 128, 64, 8, 3),
    )
]
_KEY = ["WIDTH_QK", "WIDTH_V", "POSITION", "TIME", "DROPOUT", "ROW_DIVISOR"]
_KERNELS = {"forward": _forward_kernel, "dq": _dq_kernel, "dkv": _dkv_kernel}


@cache
def _tuned(name: str) -> Any:
    if name == "project":
        return triton.autotune(_PROJECT_CONFIGS, key=["width", "wide"])(_norm_project_silu_kernel)
    # Every trial adds to the tables: they start from zero again.
    zeroed = ["d_position", "d_time"] if name == "dq" else []
    return triton.autotune(_CONFIGS, key=_KEY, reset_to_zero=zeroed)(_KERNELS[name])
