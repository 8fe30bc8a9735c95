# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels of the scan and the convolution, for real A and packed or batched layouts alike.

A program owns a block of channels and walks time step by step, with all states in registers; segments and channel
blocks are the parallelism. The backward pass walks chunks in reverse, runs each forward again from its saved start into
a scratch of its own and then back. Sums over programs are taken afterwards by torch in a fixed order: no atomics.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba_scan.pointers import as_like
from mamba_scan.problem import CHUNK, ConvProblem, ScanProblem, SSDProblem
from mamba_scan.triton_ssd import Chunks

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# States of a program, channels times states, that registers hold well; and the programs that fill a large card.
_BLOCK = 512
_PARTS = 64


def unavailable() -> str | None:
    """Say why this backend cannot run here, or None when it can."""
    if INTERPRETED or torch.cuda.is_available():
        return None
    return "no CUDA device is visible (TRITON_INTERPRET=1, set before Python starts, runs the kernels slowly on a CPU)"


def supports(p: ScanProblem | ConvProblem | SSDProblem) -> str | None:
    """Say why these tensors cannot be taken, or None."""
    if p.device.type != ("cpu" if INTERPRETED else "cuda"):
        return f"they are on {p.device}, need {'cpu (interpreter)' if INTERPRETED else 'cuda'}"
    if p.dtype == torch.float64:
        return "they are float64, need float32, bfloat16 or float16"
    if isinstance(p, ScanProblem) and p.A.is_complex():
        return "A is complex, need a real A"
    return None


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


def conv_forward(p: ConvProblem) -> tuple[Tensor, Tensor]:
    """As ``cpu.conv_forward``."""
    out = torch.empty_like(p.x)
    rows = _Rows(p)
    rows.launch(_conv_kernel, out, out, BACKWARD=False)
    kept = p.width - 1
    final = torch.zeros(p.segments, p.channels, kept, dtype=torch.float32, device=p.x.device)
    if kept and p.segments:
        inside, token = rows.last_tokens(kept)
        x = rows.flat(p.x)
        values = x[token.clamp(0, max(p.rows - 1, 0))] if p.rows else x.new_zeros(*token.shape, p.channels)
        final = torch.where(inside[..., None], values.float(), 0.0).transpose(1, 2).contiguous()
        if p.initial_states is not None:
            steps = (rows.end - rows.begin)[:, None]
            shift = (torch.arange(kept, device=p.x.device) + steps).clamp(max=kept - 1)
            before = p.initial_states.float().gather(2, shift[:, None].expand(-1, p.channels, -1))
            final = torch.where(inside[:, None], final, before)
    return out, final


def conv_backward(p: ConvProblem, dout: Tensor | None, dfinal: Tensor | None) -> dict[str, Tensor]:
    """As ``cpu.conv_backward``."""
    dout = torch.zeros_like(p.x) if dout is None else dout
    rows, kept = _Rows(p), p.width - 1
    dpre = torch.zeros(p.rows, p.channels, dtype=torch.float32, device=p.x.device)
    parts = torch.zeros(rows.row_blocks, p.channels, p.width + 1, dtype=torch.float32, device=p.x.device)
    rows.launch(_conv_kernel, dout, dpre, parts, BACKWARD=True)
    dx = torch.empty_like(p.x)
    rows.launch(_conv_input_kernel, dpre, dx)
    sums = parts.sum(0)
    grads = {"x": dx, "weight": sums[:, : p.width]}
    if p.bias is not None:
        grads["bias"] = sums[:, p.width]
    dinitial = torch.zeros(p.segments, p.channels, kept, dtype=torch.float32, device=p.x.device)
    weight = p.weight.float()
    # A state row lies kept - j rows before its segment and is reached by the taps of the first rows.
    for j in range(kept if p.initial_states is not None and p.rows else 0):
        for tap in range(kept - j, p.width):
            token = rows.begin + j - kept + tap
            reached = (token < rows.end) & ((p.seq_idx is None) | (token < 0))
            term = dpre[token.clamp(max=p.rows - 1)] * weight[:, kept - tap]
            dinitial[:, :, j] += torch.where(reached[:, None], term, 0.0)
    if dfinal is not None and kept:
        inside, token = rows.last_tokens(kept)
        dfinal = dfinal.float()
        segment, place = inside.nonzero(as_tuple=True)
        flat = rows.flat(dx)
        here = token[segment, place]
        if here.numel():
            flat[here] = (flat[here].float() + dfinal[segment, :, place]).to(flat.dtype)
            if flat.data_ptr() != dx.data_ptr():
                dx.copy_(flat.view(dx.shape[0], -1, dx.shape[1]).mT)
        segment, place = (~inside).nonzero(as_tuple=True)
        steps = (rows.end - rows.begin)[segment]
        if segment.numel():
            dinitial[segment, :, place + steps] += dfinal[segment, :, place]
    if p.initial_states is not None:
        grads["initial_states"] = dinitial
    return {name: as_like(grad, getattr(p, name)) for name, grad in grads.items()}


def ssd_forward(p: SSDProblem) -> tuple[Tensor, Tensor]:
    """As ``cpu.ssd_forward``."""
    chunks = Chunks(p, p.steps())
    states, final = chunks.states(chunks.x, chunks.B, p.initial_states)
    return torch.empty_like(p.x).copy_(p.finished(chunks.outputs(states))), final


def ssd_backward(p: SSDProblem, dout: Tensor | None, dfinal: Tensor | None) -> dict[str, Tensor]:
    """As ``cpu.ssd_backward``; autograd for what comes before the scan and after it."""
    tensors = p.leaves()
    with torch.enable_grad():
        steps = p.replaced(tensors).steps()
    chunks = Chunks(p, steps.detach())
    states, _ = chunks.states(chunks.x, chunks.B, p.initial_states)
    # Of what comes after the scan only the gate needs the scan's output.
    y = chunks.outputs(states) if p.z is not None else torch.zeros_like(p.x, dtype=p.dtype)
    with torch.enable_grad():
        out = p.replaced(tensors).finished(y.requires_grad_())
    dout = torch.zeros_like(out) if dout is None else dout
    dy, *direct = torch.autograd.grad(out, [y, *tensors.values()], dout, allow_unused=True)
    dy = chunks.rows(dy)
    ends, dinitial = chunks.states(dy, chunks.C, dfinal, reverse=True)
    grads = chunks.gradients(dy, states, ends) | {"initial_states": dinitial}
    before = torch.autograd.grad(steps, list(tensors.values()), grads.pop("steps"), allow_unused=True)
    parts = zip(tensors.items(), direct, before, strict=True)
    found = {name: [g for g in (grads.get(name), *autograd) if g is not None] for (name, _), *autograd in parts}
    return {name: as_like(sum(found[name], x.new_zeros(())), x) for name, x in tensors.items()}


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


class _Rows:
    """A convolution as rows that know where their segment begins and ends."""

    def __init__(self, p: ConvProblem) -> None:
        self.p = p
        device = p.x.device
        if p.offsets is None:
            self.length = p.x.shape[2]
            bounds = torch.arange(p.segments + 1, device=device) * self.length
        else:
            self.length = max(p.rows, 1)
            bounds = p.offsets.to(torch.int64)
        self.begin, self.end = bounds[:-1], bounds[1:]
        self.segment = torch.repeat_interleave(
            torch.arange(p.segments, device=device), self.end - self.begin, output_size=p.rows
        ).to(torch.int32)
        self.block_r, self.block_d = 32, min(32, triton.next_power_of_2(p.channels))
        self.row_blocks = triton.cdiv(p.rows, self.block_r)

    def flat(self, x: Tensor) -> Tensor:
        """Rows [T, d]; of a batch a copy, unless channels lie together."""
        return x if self.p.offsets is not None else x.mT.reshape(-1, self.p.channels)

    def last_tokens(self, kept: int) -> tuple[Tensor, Tensor]:
        """The last ``kept`` rows of every segment [S, kept], and whether they lie in it."""
        token = self.end[:, None] - kept + torch.arange(kept, device=self.end.device)
        return token >= self.begin[:, None], token

    def strides(self, x: Tensor) -> tuple[int, int, int]:
        if x.dim() == 2:
            return (self.length * x.stride(0), x.stride(0), x.stride(1))
        return (x.stride(0), x.stride(2), x.stride(1))

    def launch(self, kernel, first: Tensor, second: Tensor, parts: Tensor | None = None, **options) -> None:
        p = self.p
        if p.rows == 0 or p.channels == 0:
            return
        documents = None if p.seq_idx is None else p.seq_idx.to(torch.int32).contiguous()
        weight, bias, initial = (
            None if x is None else x.float().contiguous() for x in (p.weight, p.bias, p.initial_states)
        )
        kernel[(self.row_blocks, triton.cdiv(p.channels, self.block_d))](
            p.x,
            first,
            second,
            parts,
            weight,
            bias,
            initial,
            documents,
            self.segment,
            self.begin,
            self.end,
            p.rows,
            self.length,
            p.channels,
            *self.strides(p.x),
            *self.strides(first),
            *self.strides(second),
            WIDTH=p.width,
            SILU=p.silu,
            BLOCK_R=self.block_r,
            BLOCK_D=self.block_d,
            **options,
        )


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
def _sigmoid(x):
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
            y = y * gate * _sigmoid(gate)
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
                    open_ = _sigmoid(gate)
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
                    grad_dt = tl.where(raw > 20.0, grad_dt, grad_dt * _sigmoid(raw))
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


@triton.jit
def _conv_kernel(
    x, first, second, parts, weight, bias, initial, documents, segment, begin, end, rows, length, channels, x_b, x_t,
    x_d, first_b, first_t, first_d, second_b, second_t, second_d, BACKWARD: tl.constexpr, WIDTH: tl.constexpr,
    SILU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Forward: second = the output. Backward: first = its gradient, second = the gradient before the activation."""
    KEPT: tl.constexpr = WIDTH - 1
    r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_r, mask_d = r < rows, d < channels
    mask = mask_r[:, None] & mask_d[None, :]
    s = tl.load(segment + r, mask=mask_r, other=0).to(tl.int64)
    start = tl.load(begin + s, mask=mask_r, other=0)
    y = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    if bias is not None:
        y += tl.load(bias + d, mask=mask_d, other=0.0)[None, :]
    if documents is not None:
        document = tl.load(documents + r, mask=mask_r, other=0)
    for tap in tl.static_range(WIDTH):
        w = tl.load(weight + d * WIDTH + KEPT - tap, mask=mask_d, other=0.0)
        y += w[None, :] * _tap(x, r, d, tap, s, start, mask_r, mask_d, length, x_b, x_t, x_d, initial, documents,
            channels, KEPT)  # fmt: skip
    open_ = _sigmoid(y)
    if BACKWARD:
        here = (r // length)[:, None] * first_b + (r % length)[:, None] * first_t + d[None, :] * first_d
        g = tl.load(first + here, mask=mask, other=0.0).to(tl.float32)
        if SILU:
            g = g * open_ * (1.0 + y * (1.0 - open_))
        if documents is not None:
            g = tl.where((document >= 0)[:, None], g, 0.0)
        at = parts + (tl.program_id(0) * channels + d) * (WIDTH + 1)
        for tap in tl.static_range(WIDTH):
            seen = _tap(x, r, d, tap, s, start, mask_r, mask_d, length, x_b, x_t, x_d, initial, documents, channels,
                KEPT)  # fmt: skip
            tl.store(at + KEPT - tap, tl.sum(g * seen, axis=0), mask=mask_d)
        tl.store(at + WIDTH, tl.sum(g, axis=0), mask=mask_d)
        y = g
    else:
        if SILU:
            y = y * open_
        if documents is not None:
            y = tl.where((document >= 0)[:, None], y, 0.0)
    here = (r // length)[:, None] * second_b + (r % length)[:, None] * second_t + d[None, :] * second_d
    tl.store(second + here, y.to(second.dtype.element_ty), mask=mask)


@triton.jit
def _tap(
    x, r, d, tap: tl.constexpr, s, start, mask_r, mask_d, length, x_b, x_t, x_d, initial, documents, channels,
    KEPT: tl.constexpr,
):  # fmt: skip
    """What the tap reaches: rows ``tap`` before r, the initial state before the segment, zero elsewhere."""
    source = r - tap
    inside = mask_r & (source >= start)
    here = (source // length)[:, None] * x_b + (source % length)[:, None] * x_t + d[None, :] * x_d
    value = tl.load(x + here, mask=inside[:, None] & mask_d[None, :], other=0.0).to(tl.float32)
    if initial is not None and documents is None:
        before = mask_r & (source < start)
        at = (s[:, None] * channels + d[None, :]) * KEPT + (KEPT + source - start)[:, None]
        value += tl.load(initial + at, mask=before[:, None] & mask_d[None, :], other=0.0)
    if documents is not None and tap > 0:
        same = tl.load(documents + source, mask=inside, other=-1) == tl.load(documents + r, mask=mask_r, other=-2)
        value = tl.where(same[:, None], value, 0.0)
    return value


@triton.jit
def _conv_input_kernel(
    x, dpre, dx, parts, weight, bias, initial, documents, segment, begin, end, rows, length, channels, x_b, x_t, x_d,
    dpre_b, dpre_t, dpre_d, dx_b, dx_t, dx_d, WIDTH: tl.constexpr, SILU: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_r, mask_d = r < rows, d < channels
    s = tl.load(segment + r, mask=mask_r, other=0).to(tl.int64)
    stop = tl.load(end + s, mask=mask_r, other=0)
    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for tap in tl.static_range(WIDTH):
        later = r + tap
        inside = mask_r & (later < stop)
        if documents is not None and tap > 0:
            inside = inside & (
                tl.load(documents + later, mask=inside, other=-1) == tl.load(documents + r, mask=mask_r, other=-2)
            )
        g = tl.load(
            dpre + later[:, None] * dpre_t + d[None, :] * dpre_d, mask=inside[:, None] & mask_d[None, :], other=0.0
        )
        total += g * tl.load(weight + d * WIDTH + WIDTH - 1 - tap, mask=mask_d, other=0.0)[None, :]
    here = (r // length)[:, None] * dx_b + (r % length)[:, None] * dx_t + d[None, :] * dx_d
    tl.store(dx + here, total.to(dx.dtype.element_ty), mask=mask_r[:, None] & mask_d[None, :])
