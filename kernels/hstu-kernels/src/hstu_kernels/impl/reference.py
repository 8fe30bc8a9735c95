"""The definition: one loop over the sequences, plain torch, any dtype and device."""

from collections.abc import Iterator

import torch
from torch import Tensor

from hstu_kernels.dropout import keep_mask
from hstu_kernels.problem import Problem
from hstu_kernels.time_buckets import bucket_edges, difference


def unavailable() -> str | None:
    """Return why this backend cannot run here, or None."""
    return None


def supports(p: Problem | Tensor) -> str | None:
    """Return why this backend cannot take the problem, or the rows of a layer's piece, or None."""
    return None


def forward(p: Problem) -> Tensor:
    """Return out [Tq, H, Dv]: out_i = sum over j of mask_ij * SiLU(alpha * q_i·k_j + bias_ij) / divisor_i * v_j.

    Args:
        p: a checked problem.
    """
    out = p.q.new_zeros(p.q.shape[0], *p.v.shape[-2:], dtype=p.compute_dtype)
    for s in _sequences(p):
        out[s.rows] = torch.einsum("hij,jhv->ihv", s.scores * torch.sigmoid(s.scores) * s.scale, s.v)
    return out.to(p.q.dtype)


def backward(p: Problem, grad: Tensor, needs: list[bool]) -> tuple[Tensor | None, ...]:
    """Return the gradients of q, packed k and v, position_weight, time_weight and bias (None for an absent one).

    Args:
        p: a checked problem.
        grad: gradient of the output [Tq, H, Dv].
        needs: whether a gradient is wanted, one for each of those returned; others may be None.
    """
    dq, dk, dv = (torch.zeros_like(x, dtype=p.compute_dtype) for x in (p.q, p.k, p.v))
    weights = (p.position_weight, p.time_weight, p.bias)
    tables = [None if w is None else torch.zeros_like(w, dtype=p.compute_dtype) for w in weights]
    for s in _sequences(p):
        g = grad[s.rows].to(p.compute_dtype)
        sigmoid = torch.sigmoid(s.scores)
        dv[s.cols] += torch.einsum("hij,ihv->jhv", s.scores * sigmoid * s.scale, g)
        d_weights = torch.einsum("ihv,jhv->hij", g, s.v) * s.scale
        d_scores = d_weights * sigmoid * (1 + s.scores * (1 - sigmoid))
        dq[s.rows] += p.alpha * torch.einsum("hij,jhd->ihd", d_scores, s.k)
        dk[s.cols] += p.alpha * torch.einsum("hij,ihd->jhd", d_scores, s.q)
        for table, index in zip(tables, (s.position_index, s.time_index, s.bias_index), strict=True):
            if table is not None and index is not None:
                summed = d_scores.sum(0, keepdim=True) if table.shape[0] == 1 else d_scores
                table.index_add_(1, index.flatten(), summed.flatten(1))
    masters = (p.q, p.k, p.v, *weights)
    grads = (dq, dk, dv, *tables)
    return tuple(None if g is None or w is None else g.to(w.dtype) for g, w in zip(grads, masters, strict=True))


def norm_gate(x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return LayerNorm(x) * gate [T, W], in the dtype of x.

    Args:
        x: what is normed [T, W].
        gate: what the normed rows are multiplied with [T, W].
        weight: gain of the norm [W].
        bias: shift of the norm [W].
        eps: added to the variance.
    """
    normed, _, _ = _normed(x, weight, bias, eps)
    return (normed * gate.to(normed.dtype)).to(x.dtype)


def norm_gate_backward(
    grad: Tensor, x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, gate, weight and bias.

    Args:
        grad: gradient of the output [T, W].
        x: this and the others as in ``norm_gate``.
        gate: [T, W].
        weight: [W].
        bias: [W].
        eps: added to the variance.
    """
    normed, n, rstd = _normed(x, weight, bias, eps)
    grad = grad.to(n.dtype)
    d_normed = grad * gate.to(n.dtype)
    d_n = d_normed * weight.to(n.dtype)
    d_x = rstd * (d_n - d_n.mean(1, keepdim=True) - n * (d_n * n).mean(1, keepdim=True))
    d_weight, d_bias = (d_normed * n).sum(0), d_normed.sum(0)
    return d_x.to(x.dtype), (grad * normed).to(gate.dtype), d_weight.to(weight.dtype), d_bias.to(bias.dtype)


def _normed(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    centered = x.to(wide) - x.to(wide).mean(1, keepdim=True)
    rstd = (centered.square().mean(1, keepdim=True) + eps).rsqrt()
    return centered * rstd * weight.to(wide) + bias.to(wide), centered * rstd, rstd


class _Sequence:
    """One sequence: its rows, scores [H, i, j] before SiLU and ``scale`` = mask * dropout / divisor."""

    def __init__(self, p: Problem, b: int, rows: slice, cols: slice) -> None:
        n, m = cols.stop - cols.start, rows.stop - rows.start
        self.rows, self.cols = rows, cols
        seen = cols if p.slots is None else p.slots[cols]
        self.q, self.k, self.v = (x.to(p.compute_dtype) for x in (p.q[rows], p.keys[seen], p.values[seen]))
        j = torch.arange(n, device=p.q.device)
        i = j[n - m :]
        self.scores = p.alpha * torch.einsum("ihd,jhd->hij", self.q, self.k)
        self.position_index = self.time_index = self.bias_index = None
        if p.position_weight is not None:
            center = p.position_weight.shape[1] // 2
            self.position_index = center + j[None, :] - i[:, None]
            self.scores = self.scores + p.position_weight.to(p.compute_dtype)[:, self.position_index]
        if p.time_weight is not None and p.timestamps is not None:
            ts = p.timestamps[cols]
            ts_row = ts[(i + p.time_shift).clamp(max=max(n - 1, 0))]
            edges = bucket_edges(p.time_weight.shape[1] - 1, p.q.device)
            self.time_index = torch.bucketize(difference(ts_row[:, None], ts[None, :]), edges, right=True)
            self.scores = self.scores + p.time_weight.to(p.compute_dtype)[:, self.time_index]
        if p.bias is not None:
            self.bias_index = p.bias_begin[b] + torch.arange(m * n, device=p.q.device).view(m, n)
            self.scores = self.scores + p.bias.to(p.compute_dtype)[:, self.bias_index]
        divisor = p.divisor if p.row_divisor is None else p.row_divisor[rows].to(p.compute_dtype)[:, None]
        self.scale = (_mask(p, b, i, j, n).to(p.compute_dtype) / divisor)[None]
        if p.seed is not None:
            heads = torch.arange(p.q.shape[1], device=p.q.device)
            keep = keep_mask(p.seed, p.dropout, heads[:, None, None], (cols.start + i)[:, None], j)
            self.scale = self.scale * keep.to(p.compute_dtype) / (1.0 - p.dropout)


def _sequences(p: Problem) -> Iterator[_Sequence]:
    offsets = p.offsets.tolist()
    q_offsets = offsets if p.q_offsets is None else p.q_offsets.tolist()
    for b in range(len(offsets) - 1):
        yield _Sequence(p, b, slice(q_offsets[b], q_offsets[b + 1]), slice(offsets[b], offsets[b + 1]))


def _mask(p: Problem, b: int, i: Tensor, j: Tensor, n: int) -> Tensor:
    contextual = 0 if p.num_contextual is None else int(p.num_contextual[b])
    targets = 0 if p.num_targets is None else int(p.num_targets[b])
    # All contextual rows share id 0, all targets share the id one past the history.
    first = max(contextual - 1, 0)
    last_id = n - first - targets
    row, col = ((x - first).clamp(min=0).clamp(max=last_id) for x in (i[:, None], j[None, :]))
    distance = row - col if p.causal else (row - col).abs()
    # Nothing but a target itself looks at a target, from the left no more than from the right.
    mask = (distance > 0) & (col < last_id)
    if p.max_attn_len:
        near = distance <= p.max_attn_len
        if p.min_full_attn_len:
            near = near | (row >= last_id - p.min_full_attn_len)
        mask = mask & near
    mask = mask | (i[:, None] == j[None, :])
    if p.target_group_size > 1:
        row_group, col_group = ((x - (n - targets)).div(p.target_group_size, rounding_mode="floor") for x in (i, j))
        mate = (row_group[:, None] == col_group[None, :]) & (j[None, :] >= n - targets)
        mask = mask | (mate & (j[None, :] < i[:, None]))
    if contextual:
        mask = mask | ((row == 0) & (col < last_id))
    return mask
