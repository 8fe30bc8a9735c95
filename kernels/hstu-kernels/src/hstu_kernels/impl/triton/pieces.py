# mypy: allow-untyped-defs, allow-incomplete-defs
"""The layer's pieces in Triton: LayerNorm times gate, and LayerNorm, projection and SiLU in one kernel."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

import triton
import triton.language as tl
from hstu_kernels.impl.triton.common import dense, dot, tuned

_NORM_GATE_ROWS = 32


def norm_gate(x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """As ``reference.norm_gate``."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, gate, weight, bias = dense(x), dense(gate), weight.contiguous(), bias.contiguous()
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
    x, gate, grad, weight, bias = dense(x), dense(gate), dense(grad), weight.contiguous(), bias.contiguous()
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

    Args:
        x: input of the norm [T, D].
        norm_weight: gain of the norm [D].
        norm_bias: shift of the norm [D].
        weight: of the projection [W, D].
        eps: added to the variance.
        keep: whether z is wanted, for backward.
    """
    rows, width = x.shape
    out = torch.empty(rows, weight.shape[0], dtype=weight.dtype, device=x.device)
    projected = torch.empty_like(out) if keep else weight.new_empty(0)
    if out.numel() == 0:
        return out, projected
    x, weight, norm_weight, norm_bias = dense(x), *(y.contiguous() for y in (weight, norm_weight, norm_bias))
    moments = torch.empty(2, rows, dtype=torch.float32, device=x.device)
    _moments_kernel[(rows,)](x, x.stride(0), eps, *moments, width, PADDED=triton.next_power_of_2(width))

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        return triton.cdiv(rows, meta["BLOCK_ROWS"]), triton.cdiv(out.shape[1], meta["BLOCK_WIDE"])

    chosen, config = (_tuned(), {}) if tuned() else (_norm_project_silu_kernel, _PROJECT_CONFIG)
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
        total += dot(normed.to(w.dtype), tl.trans(w))
    at = row[:, None] * wide + column[None, :]
    both = here[:, None] & there[None, :]
    if projected is not None:
        tl.store(projected + at, total.to(projected.dtype.element_ty), mask=both)
    tl.store(out + at, (total * tl.sigmoid(total)).to(out.dtype.element_ty), mask=both)


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


@cache
def _tuned() -> Any:
    return triton.autotune(_PROJECT_CONFIGS, key=["width", "wide"])(_norm_project_silu_kernel)
