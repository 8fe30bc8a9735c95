# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels of the scan, for real A and packed or batched layouts alike.

A program owns a block of channels and walks time step by step, with all states in registers; segments and channel
blocks are the parallelism. The backward pass walks chunks in reverse, runs each forward again from its saved start into
a scratch of its own and then back. Sums over programs are taken afterwards by torch in a fixed order: no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba_scan.pointers import as_like
from mamba_scan.problem import CHUNK, ScanProblem

# States of a program, channels times states, that registers hold well; and the programs that fill a large card.
_BLOCK = 512
_PARTS = 64


def scan_forward(p: ScanProblem, saved: Tensor, last: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As ``cpu.scan_forward``."""
    out = torch.empty_like(p.u)
    state = p.A.new_empty(p.segments, p.channels, p.states, dtype=torch.float32)
    if p.segments and p.channels:
        args = _Arguments(p)
        _scan_forward_kernel[(p.segments, args.blocks)](
            out, state, saved, *args.tensors, *args.strides(out), *args.sizes, SAVE=saved.shape[0] > 0, **args.meta
        )
    return out, state if last is None else last.copy_(state)


def scan_backward(
    p: ScanProblem, saved: Tensor, dout: Tensor | None, dlast: Tensor | None, out: Tensor | None = None
) -> dict[str, Tensor]:
    """As ``cpu.scan_backward``."""
    dout = torch.zeros_like(p.u) if dout is None else dout
    args = _Arguments(p)
    d, n, rows = p.channels, p.states, p.rows
    parts, device = max(1, min(p.segments, _PARTS)), p.u.device

    def floats(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float32, device=device)

    du, ddelta = torch.empty_like(p.u), torch.empty_like(p.delta)
    dz = None if p.z is None else torch.empty_like(p.z)
    row_sums = floats(args.per_group, rows, p.groups, n), floats(args.per_group, rows, p.groups, n)
    state_sums = floats(3, parts, d, n)
    channel_sums = floats(2, parts, d)
    dinitial = floats(p.segments, d, n)
    longest = p.u.shape[-1] if p.offsets is None else int((p.offsets[1:] - p.offsets[:-1]).max()) if p.segments else 0
    block_d, block_n = args.meta["BLOCK_D"], args.meta["BLOCK_N"]
    scratch = torch.empty(
        parts * args.blocks, max(1, min(longest, CHUNK)), block_d, block_n, dtype=torch.float32, device=device
    )
    if p.segments and d:
        _scan_backward_kernel[(parts, args.blocks)](
            dout,
            None if dlast is None else dlast.float().contiguous(),
            saved,
            du,
            ddelta,
            dz,
            out,
            *row_sums,
            state_sums,
            channel_sums,
            dinitial,
            scratch,
            scratch.shape[1],
            *args.tensors,
            *args.strides(dout),
            *args.strides(du),
            *args.strides(ddelta),
            *args.strides(dz),
            *args.strides(out),
            *args.sizes,
            p.segments,
            parts,
            **args.meta,
        )
    whole = state_sums.sum(1)
    dB, dC = (x.sum(0) for x in row_sums)
    grads = {"A": whole[0], "B": whole[1], "C": whole[2]}
    for name, rowwise in (("B", dB), ("C", dC)):
        x = getattr(p, name)
        if x.dim() > 2:
            grads[name] = rowwise.unflatten(0, (x.shape[0], -1)).permute(0, 2, 3, 1) if x.dim() == 4 else rowwise
    if p.D is not None:
        grads["D"] = channel_sums[0].sum(0)
    if p.delta_bias is not None:
        grads["delta_bias"] = channel_sums[1].sum(0)
    if p.initial_state is not None:
        grads["initial_state"] = dinitial
    result = {name: as_like(grad, getattr(p, name)) for name, grad in grads.items()} | {"u": du, "delta": ddelta}
    return result if dz is None else result | {"z": dz}


class _Arguments:
    """Tensors, strides and sizes in the order all scan kernels take them."""

    def __init__(self, p: ScanProblem) -> None:
        self.p = p
        rowwise = (x.permute(0, 3, 1, 2) if x.dim() == 4 else x for x in (p.B, p.C))
        B, C = (x.float().contiguous() for x in rowwise)
        floats = (None if x is None else x.float().contiguous() for x in (p.A, p.D, p.delta_bias, p.initial_state))
        A, D, bias, initial = floats
        self.tensors = (p.u, p.delta, p.z, A, B, C, D, bias, initial, p.offsets)
        width = max(1, p.channels // p.groups)
        block_n = triton.next_power_of_2(p.states)
        block_d = max(1, min(32, _BLOCK // block_n, triton.next_power_of_2(width)))
        self.per_group = triton.cdiv(width, block_d)
        self.blocks = self.per_group * p.groups
        length = 0 if p.offsets is not None else p.u.shape[2]
        self.sizes = (*self.strides(p.u), *self.strides(p.delta), *self.strides(p.z), length, p.rows, width, p.states)
        self.meta = {
            "GROUPS": p.groups,
            "PER_GROUP": self.per_group,
            "PACKED": p.offsets is not None,
            "SOFTPLUS": p.delta_softplus,
            "ROWS_B": p.B.dim() > 2,
            "ROWS_C": p.C.dim() > 2,
            "CHUNK": CHUNK,
            "BLOCK_D": block_d,
            "BLOCK_N": block_n,
            "num_warps": max(1, min(4, block_d * block_n // 128)),
        }

    def strides(self, x: Tensor | None) -> tuple[int, int, int]:
        """Of batch, time and channel."""
        if x is None:
            return (0, 0, 0)
        if self.p.offsets is not None:
            return (0, x.stride(0), x.stride(1))
        return (x.stride(0), x.stride(2), x.stride(1))


@triton.jit
def _softplus(x):
    # log1p(w) of w = exp(-|x|) as the series of 2 atanh(w / (2 + w)): log(1 + w) would lose a small w.
    w = tl.exp(-tl.abs(x))
    s = w / (2.0 + w)
    q = s * s
    p = 2.0 / 11.0 + q * (2.0 / 13.0 + q * (2.0 / 15.0))
    p = s * (2.0 + q * (2.0 / 3.0 + q * (2.0 / 5.0 + q * (2.0 / 7.0 + q * (2.0 / 9.0 + q * p)))))
    return tl.where(x > 20.0, x, tl.maximum(x, 0.0) + p)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _signal(x, batch, time, d, inside, step_b, step_t, step_d):
    return tl.load(x + batch * step_b + time * step_t + d * step_d, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _segment(offsets, s, length, PACKED: tl.constexpr):
    """Batch row, first time in it, first row of all, number of steps."""
    if PACKED:
        begin = tl.load(offsets + s).to(tl.int64)
        return begin * 0, begin, begin, tl.load(offsets + s + 1).to(tl.int64) - begin
    else:
        batch = s.to(tl.int64)
        return batch, batch * 0, batch * length, batch * 0 + length


@triton.jit
def _coefficient(x, row, group, d, n, mask_d, mask_n, states, GROUPS: tl.constexpr, ROWS: tl.constexpr):
    if ROWS:
        values = tl.load(x + (row * GROUPS + group) * states + n, mask=mask_n, other=0.0)
        return tl.broadcast_to(values[None, :], (d.shape[0], n.shape[0]))
    else:
        return tl.load(x + d[:, None] * states + n[None, :], mask=mask_d[:, None] & mask_n[None, :], other=0.0)


@triton.jit
def _scan_forward_kernel(
    out, last, saved, u, delta, z, A, B, C, D, bias, initial, offsets, out_b, out_t, out_d, u_b, u_t, u_d, dt_b, dt_t,
    dt_d, z_b, z_t, z_d, length, rows, width, states, SAVE: tl.constexpr, GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr, PACKED: tl.constexpr, SOFTPLUS: tl.constexpr, ROWS_B: tl.constexpr, ROWS_C: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0)
    group = tl.program_id(1) // PER_GROUP
    lane = (tl.program_id(1) % PER_GROUP) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    mask_d, mask_n, d = lane < width, n < states, group * width + lane
    mask = mask_d[:, None] & mask_n[None, :]
    channels = width * GROUPS
    batch, time, row, steps = _segment(offsets, s, length, PACKED)
    slot = row // CHUNK if PACKED else batch * (tl.maximum(length - 1, 0) // CHUNK)
    at = d[:, None] * states + n[None, :]
    a = tl.load(A + at, mask=mask, other=0.0)
    skip = tl.load(D + d, mask=mask_d, other=0.0) if D is not None else tl.zeros((BLOCK_D,), tl.float32)
    shift = tl.load(bias + d, mask=mask_d, other=0.0) if bias is not None else tl.zeros((BLOCK_D,), tl.float32)
    state_at = s.to(tl.int64) * channels * states + at
    if initial is not None:
        h = tl.load(initial + state_at, mask=mask, other=0.0)
    else:
        h = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    for t in range(0, steps):
        if SAVE:  # noqa: SIM102
            if (t % CHUNK == 0) & (t > 0):
                here = (slot + t // CHUNK - 1) * states * channels + n[None, :] * channels + d[:, None]
                tl.store(saved + here, h, mask=mask)
        x = _signal(u, batch, time + t, d, mask_d, u_b, u_t, u_d)
        dt = _signal(delta, batch, time + t, d, mask_d, dt_b, dt_t, dt_d) + shift
        if SOFTPLUS:
            dt = _softplus(dt)
        b = _coefficient(B, row + t, group, d, n, mask_d, mask_n, states, GROUPS, ROWS_B)
        c = _coefficient(C, row + t, group, d, n, mask_d, mask_n, states, GROUPS, ROWS_C)
        h = tl.exp(dt[:, None] * a) * h + (dt * x)[:, None] * b
        y = tl.sum(h * c, axis=1) + skip * x
        if z is not None:
            gate = _signal(z, batch, time + t, d, mask_d, z_b, z_t, z_d)
            y = y * gate * sigmoid(gate)
        tl.store(out + batch * out_b + (time + t) * out_t + d * out_d, y.to(out.dtype.element_ty), mask=mask_d)
    tl.store(last + state_at, h, mask=mask)


@triton.jit
def _scan_backward_kernel(
    dout, dlast, saved, du, ddelta, dz, out, dB, dC, state_sums, channel_sums, dinitial, scratch, scratch_steps, u,
    delta, z, A, B, C, D, bias, initial, offsets, dout_b, dout_t, dout_d, du_b, du_t, du_d, ddt_b, ddt_t, ddt_d, dz_b,
    dz_t, dz_d, out_b, out_t, out_d, u_b, u_t, u_d, dt_b, dt_t, dt_d, z_b, z_t, z_d, length, rows, width, states,
    segments, parts, GROUPS: tl.constexpr, PER_GROUP: tl.constexpr, PACKED: tl.constexpr, SOFTPLUS: tl.constexpr,
    ROWS_B: tl.constexpr, ROWS_C: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    group, block = tl.program_id(1) // PER_GROUP, tl.program_id(1) % PER_GROUP
    lane = block * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    mask_d, mask_n, d = lane < width, n < states, group * width + lane
    mask = mask_d[:, None] & mask_n[None, :]
    channels = width * GROUPS
    at = d[:, None] * states + n[None, :]
    a = tl.load(A + at, mask=mask, other=0.0)
    skip = tl.load(D + d, mask=mask_d, other=0.0) if D is not None else tl.zeros((BLOCK_D,), tl.float32)
    shift = tl.load(bias + d, mask=mask_d, other=0.0) if bias is not None else tl.zeros((BLOCK_D,), tl.float32)
    sum_A = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    sum_B = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    sum_C = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    sum_D = tl.zeros((BLOCK_D,), tl.float32)
    sum_bias = tl.zeros((BLOCK_D,), tl.float32)
    program = part.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    own = scratch + program * scratch_steps * BLOCK_D * BLOCK_N
    own_at = tl.arange(0, BLOCK_D)[:, None] * BLOCK_N + n[None, :]
    for turn in range(0, (segments - part + parts - 1) // parts):
        s = part.to(tl.int64) + turn * parts
        batch, time, row, steps = _segment(offsets, s, length, PACKED)
        slot = row // CHUNK if PACKED else batch * (tl.maximum(length - 1, 0) // CHUNK)
        state_at = s.to(tl.int64) * channels * states + at
        if dlast is not None:
            g = tl.load(dlast + state_at, mask=mask, other=0.0)
        else:
            g = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
        chunks = (steps + CHUNK - 1) // CHUNK
        for back in range(0, chunks):
            first = (chunks - 1 - back) * CHUNK
            stop = tl.minimum(first + CHUNK, steps)
            if first > 0:
                here = (slot + first // CHUNK - 1) * states * channels + n[None, :] * channels + d[:, None]
                h = tl.load(saved + here, mask=mask, other=0.0)
            elif initial is not None:
                h = tl.load(initial + state_at, mask=mask, other=0.0)
            else:
                h = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
            # Forward again, leaving the state before every step in the scratch.
            for t in range(first, stop):
                tl.store(own + (t - first) * BLOCK_D * BLOCK_N + own_at, h)
                x = _signal(u, batch, time + t, d, mask_d, u_b, u_t, u_d)
                dt = _signal(delta, batch, time + t, d, mask_d, dt_b, dt_t, dt_d) + shift
                if SOFTPLUS:
                    dt = _softplus(dt)
                b = _coefficient(B, row + t, group, d, n, mask_d, mask_n, states, GROUPS, ROWS_B)
                h = tl.exp(dt[:, None] * a) * h + (dt * x)[:, None] * b
            # Threads read what other threads of the program wrote.
            tl.debug_barrier()
            for down in range(0, stop - first):
                t = stop - 1 - down
                before = tl.load(own + (t - first) * BLOCK_D * BLOCK_N + own_at)
                x = _signal(u, batch, time + t, d, mask_d, u_b, u_t, u_d)
                raw = _signal(delta, batch, time + t, d, mask_d, dt_b, dt_t, dt_d) + shift
                dt = raw
                if SOFTPLUS:
                    dt = _softplus(raw)
                b = _coefficient(B, row + t, group, d, n, mask_d, mask_n, states, GROUPS, ROWS_B)
                c = _coefficient(C, row + t, group, d, n, mask_d, mask_n, states, GROUPS, ROWS_C)
                decay = tl.exp(dt[:, None] * a)
                decayed = decay * before
                h = decayed + (dt * x)[:, None] * b
                dy = _signal(dout, batch, time + t, d, mask_d, dout_b, dout_t, dout_d)
                if z is not None:
                    gate = _signal(z, batch, time + t, d, mask_d, z_b, z_t, z_d)
                    open_ = sigmoid(gate)
                    y = tl.sum(h * c, axis=1) + skip * x
                    grad_z = dy * y * open_ * (1.0 + gate * (1.0 - open_))
                    here = dz + batch * dz_b + (time + t) * dz_t + d * dz_d
                    tl.store(here, grad_z.to(dz.dtype.element_ty), mask=mask_d)
                    dy = dy * gate * open_
                    if out is not None:
                        here = out + batch * out_b + (time + t) * out_t + d * out_d
                        tl.store(here, (y * gate * open_).to(out.dtype.element_ty), mask=mask_d)
                elif out is not None:
                    here = out + batch * out_b + (time + t) * out_t + d * out_d
                    y = tl.sum(h * c, axis=1) + skip * x
                    tl.store(here, y.to(out.dtype.element_ty), mask=mask_d)
                grad_c = dy[:, None] * h
                g += dy[:, None] * c
                grad_b = (dt * x)[:, None] * g
                gb = tl.sum(g * b, axis=1)
                q = g * decayed
                sum_A += dt[:, None] * q
                grad_dt = tl.sum(q * a, axis=1) + x * gb
                if SOFTPLUS:
                    grad_dt = tl.where(raw > 20.0, grad_dt, grad_dt * sigmoid(raw))
                g = g * decay
                place = ((block * rows + row + t) * GROUPS + group) * states + n
                if ROWS_B:
                    tl.store(dB + place, tl.sum(grad_b, axis=0), mask=mask_n)
                else:
                    sum_B += grad_b
                if ROWS_C:
                    tl.store(dC + place, tl.sum(grad_c, axis=0), mask=mask_n)
                else:
                    sum_C += grad_c
                sum_D += dy * x
                sum_bias += grad_dt
                here = du + batch * du_b + (time + t) * du_t + d * du_d
                tl.store(here, (skip * dy + dt * gb).to(du.dtype.element_ty), mask=mask_d)
                here = ddelta + batch * ddt_b + (time + t) * ddt_t + d * ddt_d
                tl.store(here, grad_dt.to(ddelta.dtype.element_ty), mask=mask_d)
            tl.debug_barrier()
        tl.store(dinitial + state_at, g, mask=mask)
    kind = parts * channels * states
    place = part * channels * states + at
    tl.store(state_sums + place, sum_A, mask=mask)
    tl.store(state_sums + kind + place, sum_B, mask=mask)
    tl.store(state_sums + 2 * kind + place, sum_C, mask=mask)
    tl.store(channel_sums + part * channels + d, sum_D, mask=mask_d)
    tl.store(channel_sums + (parts + part) * channels + d, sum_bias, mask=mask_d)
