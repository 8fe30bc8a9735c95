"""The C++ kernel: AVX2, AVX-512 or portable code chosen at run time, on torch's own number of threads."""

from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hstu_kernels import native
from hstu_kernels.dropout import keep_threshold
from hstu_kernels.pieces import norm_gate, norm_gate_backward  # noqa: F401
from hstu_kernels.problem import Problem
from hstu_kernels.time_buckets import bucket_edges

_DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def unavailable() -> str | None:
    """Return why this backend cannot run here, or None; loads (and where needed builds) the native module."""
    return _load()[1]


def supports(p: Problem | Tensor) -> str | None:
    """Return why this backend cannot take the problem, or the rows of a layer's piece, or None."""
    return None if p.device.type == "cpu" else f"they are on {p.device}, needs cpu"


def forward(p: Problem) -> Tensor:
    """As ``reference.forward``."""
    q, k, v = (_dense_rows(x) for x in (p.q, p.keys, p.values))
    out = p.q.new_empty(p.q.shape[0], *p.v.shape[-2:])
    arguments, alive = _arguments(p)
    _module().forward(q=_view(q), k=_view(k), v=_view(v), out=_view(out), **arguments)
    del alive
    return out


def backward(p: Problem, grad: Tensor, needs: list[bool]) -> tuple[Tensor | None, ...]:
    """As ``reference.backward``."""
    q, k, v, grad = (_dense_rows(x) for x in (p.q, p.k, p.v, grad))
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (p.q, p.k, p.v))
    arguments, alive = _arguments(p)
    d_position = _table_gradient(p, p.position_weight, needs[3])
    d_time = _table_gradient(p, p.time_weight, needs[4])
    d_bias = None
    if p.bias is not None and needs[5]:
        # Of pairs that nobody sees nothing is written; heads that share a bias are summed in their order afterwards.
        d_bias = torch.zeros(p.q.shape[1], p.bias.shape[1], dtype=p.compute_dtype)
    _module().backward(
        q=_view(q),
        k=_view(k),
        v=_view(v),
        grad=_view(grad),
        dq=_view(dq),
        dk=_view(dk),
        dv=_view(dv),
        d_position=_pointer(d_position),
        d_time=_pointer(d_time),
        d_bias=_pointer(d_bias),
        **arguments,
    )
    del alive
    if d_bias is not None and p.bias is not None and p.bias.shape[0] == 1:
        d_bias = d_bias.sum(0, keepdim=True)
    tables = ((d_position, p.position_weight), (d_time, p.time_weight), (d_bias, p.bias))
    return dq, dk, dv, *(_as_table(gradient, table) for gradient, table in tables)


def instruction_set() -> str:
    """Return the instruction set in use: "portable", "avx2", "avx512" or "avx512_bf16".

    The environment variable FOOTFALL_ISA forces one.
    """
    return str(_module().isa())


@cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return native.load(Path(__file__).parents[1], "_cpu"), None
    except (native.BuildError, ImportError, OSError) as error:
        return None, str(error)


def _module() -> ModuleType:
    module, reason = _load()
    if module is None:
        raise RuntimeError(reason)
    return module


def _arguments(p: Problem) -> tuple[dict[str, Any], list[Tensor | None]]:
    def integers(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(torch.int64).contiguous()

    offsets, q_offsets, targets, contextual, timestamps = map(
        integers, (p.offsets, p.q_offsets, p.num_targets, p.num_contextual, p.timestamps)
    )
    position, time, bias = (
        None if w is None else w.detach().to(p.compute_dtype).contiguous()
        for w in (p.position_weight, p.time_weight, p.bias)
    )
    bias_begin = None if bias is None else p.bias_begin
    edges = None if p.time_weight is None else bucket_edges(p.time_weight.shape[1] - 1, torch.device("cpu"))
    divisors = None if p.row_divisor is None else p.row_divisor.to(torch.float64).contiguous()
    alive = [offsets, q_offsets, targets, contextual, timestamps, position, time, edges, divisors, bias, bias_begin]
    arguments = {
        "dtype": _DTYPE_CODES[p.q.dtype],
        "batch": p.offsets.shape[0] - 1,
        "heads": p.q.shape[1],
        "width_qk": p.q.shape[2],
        "width_v": p.v.shape[-1],
        "offsets": _pointer(offsets),
        "q_offsets": _pointer(q_offsets),
        "num_targets": _pointer(targets),
        "num_contextual": _pointer(contextual),
        "timestamps": _pointer(timestamps),
        "divisors": _pointer(divisors),
        "position": _table_view(position),
        "time": _table_view(time),
        "edges": _pointer(edges),
        "bias": _table_view(bias),
        "bias_begin": _pointer(bias_begin),
        "slots": _pointer(p.slots),
        "alpha": p.alpha,
        "divisor": p.divisor,
        "causal": p.causal,
        "max_attn_len": p.max_attn_len,
        "min_full_attn_len": p.min_full_attn_len,
        "target_group_size": p.target_group_size,
        "time_shift": p.time_shift,
        "dropout": p.dropout,
        "keep_threshold": keep_threshold(p.dropout),
        "seed": 0 if p.seed is None else int(p.seed),
        "threads": torch.get_num_threads(),
    }
    return arguments, alive


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _view(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1)


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _table_view(table: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if table is None else (table.data_ptr(), table.shape[0], table.shape[1])


def _table_gradient(p: Problem, table: Tensor | None, needed: bool) -> Tensor | None:
    # The kernel writes every entry.
    return torch.empty(table.shape, dtype=p.compute_dtype) if table is not None and needed else None


def _as_table(gradient: Tensor | None, table: Tensor | None) -> Tensor | None:
    return None if gradient is None or table is None else gradient.to(table.dtype)
