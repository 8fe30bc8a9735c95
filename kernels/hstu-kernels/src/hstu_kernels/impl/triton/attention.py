# mypy: allow-untyped-defs, allow-incomplete-defs
"""Attention in Triton: one kernel for the output, one for dq and the tables, one for dk and dv.

Only the sums of the tables depend on the order of programs; under ``torch.use_deterministic_algorithms(True)`` they are
sums of integers, which do not.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

import triton
from hstu_kernels.dropout import keep_threshold, seed_key
from hstu_kernels.impl.triton.common import dense, tuned
from hstu_kernels.impl.triton.kernels import dkv_kernel, dq_kernel, forward_kernel
from hstu_kernels.intervals import row_intervals
from hstu_kernels.problem import Problem
from hstu_kernels.time_buckets import bucket_edges

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
_KEY = ["WIDTH_QK", "WIDTH_V", "POSITION", "TIME", "DROPOUT", "ROW_DIVISOR"]
_KERNELS = {"forward": forward_kernel, "dq": dq_kernel, "dkv": dkv_kernel}


def forward(p: Problem) -> Tensor:
    """As ``reference.forward``."""
    out = p.q.new_empty(p.q.shape[0], *p.v.shape[-2:])
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
        empty = (None if w is None else torch.zeros_like(w) for w in (p.position_weight, p.time_weight, p.bias))
        return dq, dk, dv, *empty
    grad = dense(grad)
    exact = torch.are_deterministic_algorithms_enabled()
    scale = _fixed_point_scale(p, grad) if exact else None
    kind = torch.int64 if exact else torch.float32
    tables = [
        torch.zeros(w.shape, dtype=kind, device=w.device) if w is not None and needed else None
        for w, needed in zip((p.position_weight, p.time_weight), needs[3:5], strict=True)
    ]
    pairs = 0 if p.bias is None else p.bias.shape[1]
    # Of pairs that nobody sees nothing is written.
    d_bias = p.q.new_zeros(p.q.shape[1], pairs, dtype=torch.float32) if p.bias is not None and needs[5] else None
    call.launch("dq", call.longest_q, grad, grad.stride(0), grad.stride(1), dq, *tables, scale, d_bias, pairs)
    call.launch("dkv", min(p.max_seqlen, p.k.shape[0]), grad, grad.stride(0), grad.stride(1), dk, dv)
    if scale is not None:
        tables = [None if table is None else table.double() / scale for table in tables]
    if d_bias is not None and p.bias is not None and p.bias.shape[0] == 1:
        d_bias = d_bias.sum(0, keepdim=True)
    weights = (p.position_weight, p.time_weight, p.bias)
    found = (None if t is None or w is None else t.to(w.dtype) for t, w in zip((*tables, d_bias), weights, strict=True))
    return dq, dk, dv, *found


class _Call:
    """Arguments that all kernels share."""

    def __init__(self, p: Problem) -> None:
        self.p = p
        self.q, self.k, self.v = (dense(x) for x in (p.q, p.keys, p.values))
        # Pointers without strides go to the kernels: of anything but rows and heads only dense tensors will do.
        self.offsets = p.offsets.long().contiguous()
        self.q_offsets = self.offsets if p.q_offsets is None else p.q_offsets.long().contiguous()
        self.timestamps = None if p.timestamps is None else p.timestamps.contiguous()
        self.row_divisor = None if p.row_divisor is None else p.row_divisor.contiguous()
        self.lo, self.hi, self.own = row_intervals(p)
        self.edges = None if p.time_weight is None else bucket_edges(p.time_weight.shape[1] - 1, p.q.device)
        self.bias = None if p.bias is None else p.bias.detach().contiguous()
        self.bias_begin = None if p.bias is None else p.bias_begin
        self.longest_q = min(p.max_seqlen, p.q.shape[0])

    def launch(self, name: str, longest: int, *own: Any) -> None:
        p = self.p
        position, time = (None if w is None else w.detach().contiguous() for w in (p.position_weight, p.time_weight))
        fixed = {
            "WIDTH_QK": p.q.shape[2],
            "WIDTH_V": p.v.shape[-1],
            "PADDED_QK": max(16, triton.next_power_of_2(p.q.shape[2])),
            "PADDED_V": max(16, triton.next_power_of_2(p.v.shape[-1])),
            "POSITION": position is not None,
            "TIME": time is not None,
            "DROPOUT": p.seed is not None,
            "ROW_DIVISOR": p.row_divisor is not None,
            "TIME_SHIFT": p.time_shift,
        }
        batch, heads = p.offsets.shape[0] - 1, p.q.shape[1]
        if batch * heads == 0 or longest == 0:
            return
        block = "BLOCK_KEYS" if name == "dkv" else "BLOCK_ROWS"

        def grid(meta: dict[str, Any]) -> tuple[int, int]:
            return batch * heads, triton.cdiv(longest, meta[block])

        chosen, config = (_tuned(name), {}) if tuned() else (_KERNELS[name], _fixed_config(fixed))
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
            self.own,
            position,
            0 if position is None or position.shape[0] == 1 else position.shape[1],
            0 if position is None else position.shape[1] // 2,
            time,
            0 if time is None or time.shape[0] == 1 else time.shape[1],
            0 if time is None else time.shape[1] - 1,
            self.timestamps,
            self.edges,
            self.row_divisor,
            self.bias,
            0 if p.bias is None or p.bias.shape[0] == 1 else p.bias.shape[1],
            self.bias_begin,
            p.slots,
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


def _fixed_config(fixed: dict[str, Any]) -> dict[str, int]:
    wide = max(fixed["PADDED_QK"], fixed["PADDED_V"]) > 128
    return {"BLOCK_ROWS": 32 if wide else 64, "BLOCK_KEYS": 32, "num_warps": 4, "num_stages": 1 if wide else 2}


def _fixed_point_scale(p: Problem, grad: Tensor) -> Tensor:
    # Integers have one sum in any order. The scale leaves room for the largest sum that these inputs can make.
    divisor = abs(p.divisor) if p.row_divisor is None else p.row_divisor.abs().amin().double()
    largest = grad.detach().abs().amax().double() * p.v.detach().abs().amax().double() * p.v.shape[2] / divisor
    bound = 1.2 * largest / (1.0 - p.dropout) * (p.q.shape[0] * p.q.shape[1] * max(p.max_seqlen, 1))
    # Within float32, in which the kernel scales; NaN where the inputs are not finite, so that the sums are NaN too.
    return torch.where(bound == 0, torch.ones_like(bound), (2.0**62 / bound).clamp(max=1e37))


@cache
def _tuned(name: str) -> Any:
    # Every trial adds to the tables: they start from zero again.
    zeroed = ["d_position", "d_time"] if name == "dq" else []
    return triton.autotune(_CONFIGS, key=_KEY, reset_to_zero=zeroed)(_KERNELS[name])
