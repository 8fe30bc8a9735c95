# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels of the convolution, for packed or batched layouts alike; sums over programs in a fixed order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba_scan.impl.triton.scan import sigmoid
from mamba_scan.pointers import as_like
from mamba_scan.problem import ConvProblem


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
    open_ = sigmoid(y)
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
