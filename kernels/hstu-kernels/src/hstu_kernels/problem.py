"""One attention problem as every backend sees it, and the checks that it must pass."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Problem:
    """Arguments of ``hstu_attention`` with the defaults filled in; field for field the schema of the registered op."""

    q: Tensor
    k: Tensor
    v: Tensor
    offsets: Tensor
    q_offsets: Tensor | None
    num_targets: Tensor | None
    num_contextual: Tensor | None
    position_weight: Tensor | None
    timestamps: Tensor | None
    time_weight: Tensor | None
    row_divisor: Tensor | None
    seed: Tensor | None
    max_seqlen: int
    alpha: float
    divisor: float
    causal: bool
    max_attn_len: int
    min_full_attn_len: int
    time_shift: int
    dropout: float

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 for float64 inputs, float32 for all others."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32


def check_static(p: Problem) -> None:
    """Check what needs no look at tensor contents: ranks, shapes, dtypes, devices, scalars.

    Raises:
        ValueError: names the argument, what it got and what it needs.
    """
    for name, x in (("q", p.q), ("k", p.k), ("v", p.v)):
        _need(x.dim() == 3, name, f"shape {list(x.shape)}", "three dimensions [rows, heads, width]")
    _need(p.q.dtype in DTYPES, "q", f"dtype {p.q.dtype}", "float32, float64, bfloat16 or float16")
    for name, x in (("k", p.k), ("v", p.v)):
        _need(x.dtype == p.q.dtype, name, f"dtype {x.dtype}", f"the dtype of q, {p.q.dtype}")
        _need(x.shape[1] == p.q.shape[1], name, f"{x.shape[1]} heads", f"as many heads as q, {p.q.shape[1]}")
    _need(p.k.shape[2] == p.q.shape[2], "k", f"width {p.k.shape[2]}", f"the width of q, {p.q.shape[2]}")
    _need(p.v.shape[0] == p.k.shape[0], "v", f"{p.v.shape[0]} rows", f"as many rows as k, {p.k.shape[0]}")
    _check_integers(p, "offsets", p.offsets)
    _need(p.offsets.shape[0] >= 1, "offsets", "no element", "batch + 1 elements")
    batch = p.offsets.shape[0] - 1
    if p.q_offsets is None:
        _need(p.q.shape[0] == p.k.shape[0], "q", f"{p.q.shape[0]} rows", f"as many as k, {p.k.shape[0]}, or q_offsets")
    else:
        _check_integers(p, "q_offsets", p.q_offsets, batch + 1)
    if p.num_targets is not None:
        _check_integers(p, "num_targets", p.num_targets, batch)
    if p.num_contextual is not None:
        _check_integers(p, "num_contextual", p.num_contextual, batch)
    tensors: tuple[tuple[str, Tensor | None], ...] = (
        ("k", p.k),
        ("v", p.v),
        ("position_weight", p.position_weight),
        ("timestamps", p.timestamps),
        ("time_weight", p.time_weight),
        ("divisor", p.row_divisor),
    )
    for name, tensor in tensors:
        if tensor is not None:
            _need(tensor.device == p.q.device, name, f"device {tensor.device}", f"the device of q, {p.q.device}")
    _need(p.max_seqlen >= 0, "max_seqlen", str(p.max_seqlen), "a length of at least 0")
    _need(p.max_attn_len >= 0, "max_attn_len", str(p.max_attn_len), "0 (no window) or more")
    _need(p.min_full_attn_len >= 0, "min_full_attn_len", str(p.min_full_attn_len), "0 or more")
    _need(p.time_shift in (0, 1), "time_shift", str(p.time_shift), "0 or 1")
    _need(0.0 <= p.dropout < 1.0, "dropout", str(p.dropout), "a probability in [0, 1)")
    _need(p.divisor != 0.0, "divisor", "0", "a number other than 0")
    if p.row_divisor is not None:
        rows = p.q.shape[0]
        _need(
            p.row_divisor.shape == (rows,), "divisor", f"shape {list(p.row_divisor.shape)}", f"[{rows}], the rows of q"
        )
        _need(
            not p.row_divisor.requires_grad, "divisor", "a tensor that requires grad", "a constant tensor (detach it)"
        )
    if p.position_weight is not None:
        _check_table(p, "position_weight", p.position_weight)
        width = p.position_weight.shape[1]
        _need(
            width % 2 == 1 and width >= 2 * p.max_seqlen - 1,
            "position_weight",
            f"width {width}",
            f"an odd width 2*N-1 with N >= max_seqlen ({p.max_seqlen}), so at least {max(2 * p.max_seqlen - 1, 1)}",
        )
    if p.time_weight is not None:
        _check_table(p, "time_weight", p.time_weight)
        _need(p.time_weight.shape[1] >= 1, "time_weight", "width 0", "width K+1 with K >= 0")
        if p.timestamps is None:
            raise ValueError("timestamps: got None, need int64 seconds [T] because time_weight is given")
    if p.timestamps is not None:
        _need(p.timestamps.dtype == torch.int64, "timestamps", f"dtype {p.timestamps.dtype}", "int64 seconds")
        rows = p.k.shape[0]
        _need(
            p.timestamps.shape == (rows,), "timestamps", f"shape {list(p.timestamps.shape)}", f"[{rows}], the rows of k"
        )


def check_contents(p: Problem) -> None:
    """Check the integers: offsets, lengths, targets, contextual rows. Runs inside the op, where tracing never sees it.

    Raises:
        ValueError: names the argument, what it got and what it needs.
    """
    offsets = p.offsets.tolist()
    lengths = _check_offsets("offsets", offsets, p.k.shape[0], "k and v")
    if lengths and max(lengths) > p.max_seqlen:
        b = lengths.index(max(lengths))
        raise ValueError(f"offsets: sequence {b} has length {lengths[b]}, need at most max_seqlen, {p.max_seqlen}")
    if p.q_offsets is not None:
        new = _check_offsets("q_offsets", p.q_offsets.tolist(), p.q.shape[0], "q")
        for b, (rows, length) in enumerate(zip(new, lengths, strict=True)):
            if rows > length:
                raise ValueError(f"q_offsets: sequence {b} has {rows} rows of q, need at most its {length} rows of k")
    if p.num_targets is not None:
        for b, (count, length) in enumerate(zip(p.num_targets.tolist(), lengths, strict=True)):
            if not 0 <= count <= length:
                raise ValueError(f"num_targets: got {count} for sequence {b}, need between 0 and its length {length}")
    if p.num_contextual is not None and p.num_contextual.numel() and int(p.num_contextual.min()) < 0:
        raise ValueError(f"num_contextual: got {int(p.num_contextual.min())}, need 0 or more")


def _check_offsets(name: str, offsets: list[int], total: int, of: str) -> list[int]:
    if offsets[0] != 0:
        raise ValueError(f"{name}: got {offsets[0]} as first element, need 0")
    lengths = [after - before for before, after in pairwise(offsets)]
    for b, length in enumerate(lengths):
        if length < 0:
            fall = f"a fall from {offsets[b]} to {offsets[b + 1]} at index {b + 1}"
            raise ValueError(f"{name}: got {fall}, need a sequence that never falls")
    if offsets[-1] != total:
        raise ValueError(f"{name}: got {offsets[-1]} as last element, need the number of rows of {of}, {total}")
    return lengths


def _check_integers(p: Problem, name: str, x: Tensor, length: int | None = None) -> None:
    _need(x.dtype in (torch.int32, torch.int64), name, f"dtype {x.dtype}", "int32 or int64")
    _need(x.dim() == 1, name, f"shape {list(x.shape)}", "one dimension")
    _need(x.device == p.q.device, name, f"device {x.device}", f"the device of q, {p.q.device}")
    if length is not None:
        _need(x.shape[0] == length, name, f"{x.shape[0]} elements", f"{length}, given the length of offsets")


def _check_table(p: Problem, name: str, table: Tensor) -> None:
    heads = p.q.shape[1]
    _need(
        table.dim() == 2 and table.shape[0] in (1, heads),
        name,
        f"shape {list(table.shape)}",
        f"[1, width] or [{heads}, width]",
    )
    _need(
        table.dtype in (p.q.dtype, p.compute_dtype),
        name,
        f"dtype {table.dtype}",
        f"{p.q.dtype} (as q) or {p.compute_dtype}",
    )


def _need(ok: bool, name: str, got: str, need: str) -> None:
    if not ok:
        raise ValueError(f"{name}: got {got}, need {need}")
