# mypy: allow-untyped-defs, allow-incomplete-defs
"""The kernels of attention. A program takes one sequence, one head and one block of its rows or of its keys."""

import triton
import triton.language as tl
from hstu_kernels.impl.triton.common import dot


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
    # Never wrapped around, and one short of the edges that int64 cannot hold.
    dt = tl.maximum(now[:, None], then[None, :]) - tl.minimum(now[:, None], then[None, :])
    dt = tl.where(dt < 0, 0x7FFFFFFFFFFFFFFE, tl.minimum(dt, 0x7FFFFFFFFFFFFFFE))
    dt = tl.maximum(dt, 1)
    guess = (tl.log(dt.to(tl.float32)) / 0.301).to(tl.int32)
    guess = tl.minimum(guess, last_bucket)
    # The logarithm may be one off beside an edge; the integer edges decide.
    above = tl.load(edges + guess, mask=guess < last_bucket, other=0x7FFFFFFFFFFFFFFF)
    guess = tl.where((above <= dt) & (guess < last_bucket), guess + 1, guess)
    below = tl.load(edges + guess - 1, mask=guess > 0, other=0)
    return tl.where(below > dt, guess - 1, guess)


@triton.jit
def _score_tile(
    q_tile, k_tile, at, cols, lo, hi, own, inside, n, first, head,
    position, position_stride, center, time, time_stride, last_bucket, ts, edges,
    bias, bias_stride, line, alpha, POSITION: tl.constexpr, TIME: tl.constexpr, TIME_SHIFT: tl.constexpr,
):  # fmt: skip
    """Scores, their mask, position indices and buckets."""
    scores = alpha * dot(q_tile, tl.trans(k_tile))
    seen = (cols[None, :] >= lo[:, None]) & (cols[None, :] < hi[:, None])
    seen = (
        (seen | ((cols[None, :] >= own[:, None]) & (cols[None, :] <= at[:, None])))
        & inside[:, None]
        & (cols < n)[None, :]
    )
    where = center + cols[None, :] - at[:, None]
    bucket = where
    if POSITION:
        scores += tl.load(position + head * position_stride + where, mask=seen, other=0.0).to(tl.float32)
    if TIME:
        bucket = _buckets(ts, first, at, cols, n, edges, last_bucket, TIME_SHIFT)
        scores += tl.load(time + head * time_stride + bucket, mask=seen, other=0.0).to(tl.float32)
    if bias is not None:
        pair = line[:, None] + cols[None, :]
        scores += tl.load(bias + head * bias_stride + pair, mask=seen, other=0.0).to(tl.float32)
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
def _intervals(lo_of, hi_of, own_of, first_q, row, n, m):
    """Which query rows exist, their positions in the sequence, and the keys [lo, hi) and [own, at] that they see."""
    inside = row < m
    lo = tl.load(lo_of + first_q + row, mask=inside, other=0)
    hi = tl.load(hi_of + first_q + row, mask=inside, other=0)
    own = tl.load(own_of + first_q + row, mask=inside, other=0)
    return inside, n - m + row, lo, hi, own


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
    d_weights = dot(g_tile, tl.trans(v_tile)) / by[:, None]
    d_scores = tl.where(seen, d_weights * s * (1.0 + scores * (1.0 - s)), 0.0)
    return tl.where(seen, scores * s, 0.0) / by[:, None], d_scores


@triton.jit
def _lines(bias, bias_begin, b, row, n):
    """First entry of the bias of each row."""
    line = row
    if bias is not None:
        line = tl.load(bias_begin + b) + row.to(tl.int64) * n
    return line


@triton.jit
def _key_range(lo, hi, own, at, inside, n):
    """First and one past the last key that any row of the block sees."""
    least = tl.minimum(tl.where(lo < hi, lo, own), own)
    begin = tl.min(tl.where(inside, least, n))
    end = tl.max(tl.where(inside, tl.maximum(hi, at + 1), 0))
    return begin, end


@triton.jit
def forward_kernel(
    q, q_row, q_head, k, k_row, k_head, v, v_row, v_head, offsets, q_offsets, lo_of, hi_of, own_of,
    position, position_stride, center, time, time_stride, last_bucket, ts, edges, divisors,
    bias, bias_stride, bias_begin, slots, alpha, divisor, seed_key, threshold, keep_scale, heads, out,
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
    inside, at, lo, hi, own = _intervals(lo_of, hi_of, own_of, first_q, row, n, m)
    q_tile = _load_rows(q, first_q + row, q_row, head, q_head, inside, WIDTH_QK, PADDED_QK)
    total = tl.zeros([BLOCK_ROWS, PADDED_V], dtype=tl.float32)
    begin, end = _key_range(lo, hi, own, at, inside, n)
    for tile in range(begin // BLOCK_KEYS * BLOCK_KEYS, end, BLOCK_KEYS):
        cols = tile + tl.arange(0, BLOCK_KEYS)
        key = first + cols
        if slots is not None:
            key = tl.load(slots + key, mask=cols < n, other=0)
        k_tile = _load_rows(k, key, k_row, head, k_head, cols < n, WIDTH_QK, PADDED_QK)
        v_tile = _load_rows(v, key, v_row, head, v_head, cols < n, WIDTH_V, PADDED_V)
        scores, seen, _, _ = _score_tile(
            q_tile, k_tile, at, cols, lo, hi, own, inside, n, first, head,
            position, position_stride, center, time, time_stride, last_bucket, ts, edges,
            bias, bias_stride, _lines(bias, bias_begin, b, row, n), alpha, POSITION, TIME, TIME_SHIFT,
        )  # fmt: skip
        weights = tl.where(seen, scores * tl.sigmoid(scores), 0.0)
        if DROPOUT:
            weights *= _kept(seed_key, threshold, keep_scale, head, first + at, cols)
        total += dot(weights.to(v_tile.dtype), v_tile)
    total /= _divisor(divisors, divisor, first_q, row, inside, ROW_DIVISOR)[:, None]
    _store_rows(out, first_q + row, head, heads, inside, total, WIDTH_V, PADDED_V)


@triton.jit
def dq_kernel(
    q, q_row, q_head, k, k_row, k_head, v, v_row, v_head, offsets, q_offsets, lo_of, hi_of, own_of,
    position, position_stride, center, time, time_stride, last_bucket, ts, edges, divisors,
    bias, bias_stride, bias_begin, slots, alpha, divisor, seed_key, threshold, keep_scale, heads,
    grad, grad_row, grad_head, dq, d_position, d_time, fixed_point, d_bias, pairs,
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
    inside, at, lo, hi, own = _intervals(lo_of, hi_of, own_of, first_q, row, n, m)
    q_tile = _load_rows(q, first_q + row, q_row, head, q_head, inside, WIDTH_QK, PADDED_QK)
    g_tile = _load_rows(grad, first_q + row, grad_row, head, grad_head, inside, WIDTH_V, PADDED_V)
    by = _divisor(divisors, divisor, first_q, row, inside, ROW_DIVISOR)
    total = tl.zeros([BLOCK_ROWS, PADDED_QK], dtype=tl.float32)
    begin, end = _key_range(lo, hi, own, at, inside, n)
    for tile in range(begin // BLOCK_KEYS * BLOCK_KEYS, end, BLOCK_KEYS):
        cols = tile + tl.arange(0, BLOCK_KEYS)
        k_tile = _load_rows(k, first + cols, k_row, head, k_head, cols < n, WIDTH_QK, PADDED_QK)
        v_tile = _load_rows(v, first + cols, v_row, head, v_head, cols < n, WIDTH_V, PADDED_V)
        scores, seen, where, bucket = _score_tile(
            q_tile, k_tile, at, cols, lo, hi, own, inside, n, first, head,
            position, position_stride, center, time, time_stride, last_bucket, ts, edges,
            bias, bias_stride, _lines(bias, bias_begin, b, row, n), alpha, POSITION, TIME, TIME_SHIFT,
        )  # fmt: skip
        _, d_scores = _weights_and_d_scores(scores, seen, g_tile, v_tile, by)
        if DROPOUT:
            d_scores *= _kept(seed_key, threshold, keep_scale, head, first + at, cols)
        total += dot(d_scores.to(k_tile.dtype), k_tile)
        if d_bias is not None:
            line = _lines(bias, bias_begin, b, row, n)
            tl.store(d_bias + head.to(tl.int64) * pairs + line[:, None] + cols[None, :], d_scores, mask=seen)
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
def dkv_kernel(
    q, q_row, q_head, k, k_row, k_head, v, v_row, v_head, offsets, q_offsets, lo_of, hi_of, own_of,
    position, position_stride, center, time, time_stride, last_bucket, ts, edges, divisors,
    bias, bias_stride, bias_begin, slots, alpha, divisor, seed_key, threshold, keep_scale, heads,
    grad, grad_row, grad_head, dk, dv,
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
        inside, at, lo, hi, own = _intervals(lo_of, hi_of, own_of, first_q, row, n, m)
        sees = (lo < tile + BLOCK_KEYS) & (hi > tile) & (lo < hi)
        sees = (sees | ((at >= tile) & (own < tile + BLOCK_KEYS))) & inside
        if tl.max(sees.to(tl.int32)) > 0:
            q_tile = _load_rows(q, first_q + row, q_row, head, q_head, inside, WIDTH_QK, PADDED_QK)
            g_tile = _load_rows(grad, first_q + row, grad_row, head, grad_head, inside, WIDTH_V, PADDED_V)
            by = _divisor(divisors, divisor, first_q, row, inside, ROW_DIVISOR)
            scores, seen, _, _ = _score_tile(
                q_tile, k_tile, at, cols, lo, hi, own, inside, n, first, head,
                position, position_stride, center, time, time_stride, last_bucket, ts, edges,
                bias, bias_stride, _lines(bias, bias_begin, b, row, n), alpha, POSITION, TIME, TIME_SHIFT,
            )  # fmt: skip
            weights, d_scores = _weights_and_d_scores(scores, seen, g_tile, v_tile, by)
            if DROPOUT:
                kept = _kept(seed_key, threshold, keep_scale, head, first + at, cols)
                weights *= kept
                d_scores *= kept
            dv_total += dot(tl.trans(weights.to(g_tile.dtype)), g_tile)
            dk_total += dot(tl.trans(d_scores.to(q_tile.dtype)), q_tile)
    _store_rows(dk, first + cols, head, heads, cols < n, dk_total * alpha, WIDTH_QK, PADDED_QK)
    _store_rows(dv, first + cols, head, heads, cols < n, dv_total, WIDTH_V, PADDED_V)
