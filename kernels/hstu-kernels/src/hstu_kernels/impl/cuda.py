"""The CUDA C++ kernels: tensor cores for bfloat16 and float16, no atomics, so that every run gives the same bits."""

from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hstu_kernels import native
from hstu_kernels.dropout import keep_threshold, seed_key
from hstu_kernels.pieces import norm_gate, norm_gate_backward  # noqa: F401
from hstu_kernels.problem import Problem
from hstu_kernels.time_buckets import bucket_edges

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}
_WIDEST_HEAD = 256
# Parts of the position table's gradient may take this many numbers; more parts are more blocks at work.
_PART_NUMBERS = 1 << 25
_OWN_ROWS = 64


def unavailable() -> str | None:
    """Return why this backend cannot run here, or None; loads (and where needed builds) the native module."""
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    return _load()[1]


def supports(p: Problem | Tensor) -> str | None:
    """Return why this backend cannot take the problem, or the rows of a layer's piece, or None."""
    if isinstance(p, Problem):
        lacks = {"bias": p.bias is not None, "block_table": p.block_table is not None}
        lacks["target_group_size"] = p.target_group_size > 1
        if missing := [name for name, used in lacks.items() if used]:
            return f"they come with {', '.join(missing)}, which the CUDA kernels lack"
    if p.dtype not in _DTYPE_CODES:
        return f"they are {p.dtype}, needs float32, bfloat16 or float16"
    if p.device.type != "cuda":
        return f"they are on {p.device}, needs cuda"
    if isinstance(p, Problem) and (widest := max(p.q.shape[2], p.v.shape[2])) > _WIDEST_HEAD:
        return f"their heads are {widest} wide, needs at most {_WIDEST_HEAD}"
    return None


def forward(p: Problem) -> Tensor:
    """As ``reference.forward``."""
    out = torch.empty(p.q.shape[0], p.v.shape[1], p.v.shape[2], dtype=p.q.dtype, device=p.q.device)
    if p.q.shape[2] == 0 or out.numel() == 0:
        return out.zero_()
    call = _Call(p)
    call.run("forward", out=_view(out))
    return out


def backward(p: Problem, grad: Tensor, needs: list[bool]) -> tuple[Tensor | None, ...]:
    """As ``reference.backward``."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (p.q, p.k, p.v))
    weights = (p.position_weight, p.time_weight)
    tables = [
        torch.zeros(w.shape, dtype=torch.float32, device=w.device) if w is not None and needed else None
        for w, needed in zip(weights, needs[3:5], strict=True)
    ]
    if dq.numel() == 0 or dk.numel() == 0 or dv.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), *_as_tables(tables, weights), None
    grad = _dense(grad)
    call = _Call(p, grad)
    blocks, positions = call.batch * p.q.shape[1], 2 * p.max_seqlen - 1
    row_tiles = -(-call.longest_q // _OWN_ROWS)
    chunks = max(1, min(row_tiles, _PART_NUMBERS // max(blocks * positions, 1)))
    parts = [
        None if table is None else torch.empty(blocks * chunks * width, dtype=torch.float32, device=p.q.device)
        for table, width in zip(
            tables, (positions, 0 if p.time_weight is None else p.time_weight.shape[1]), strict=True
        )
    ]
    call.run(
        "backward",
        grad=_view(grad),
        dq=_view(dq),
        dk=_view(dk),
        dv=_view(dv),
        d_position=_pointer(tables[0]),
        d_time=_pointer(tables[1]),
        position_parts=_pointer(parts[0]),
        time_parts=_pointer(parts[1]),
        chunks=chunks,
    )
    return dq, dk, dv, *_as_tables(tables, weights), None


@cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return native.load(Path(__file__).parents[1], "_cuda"), None
    except (native.BuildError, ImportError, OSError) as error:
        return None, str(error)


class _Call:
    """Arguments that both directions share, and the tensors they point into."""

    def __init__(self, p: Problem, *more: Tensor) -> None:
        q, k, v = (_dense(x) for x in (p.q, p.k, p.v))
        offsets = p.offsets.long().contiguous()
        q_offsets = offsets if p.q_offsets is None else p.q_offsets.long().contiguous()
        targets, contextual = (None if x is None else x.long().contiguous() for x in (p.num_targets, p.num_contextual))
        position, time = (
            None if w is None else w.detach().float().contiguous() for w in (p.position_weight, p.time_weight)
        )
        timestamps = None if p.timestamps is None else p.timestamps.contiguous()
        edges = None if p.time_weight is None else bucket_edges(p.time_weight.shape[1] - 1, p.q.device)
        divisors = None if p.row_divisor is None else p.row_divisor.float().contiguous()
        self.alive = [
            q,
            k,
            v,
            offsets,
            q_offsets,
            targets,
            contextual,
            position,
            time,
            timestamps,
            edges,
            divisors,
            *more,
        ]
        self.batch, self.longest_q = p.offsets.shape[0] - 1, min(p.max_seqlen, p.q.shape[0])
        self.q, self.device = q, p.q.device
        self.arguments = {
            "dtype": _DTYPE_CODES[p.q.dtype],
            "batch": self.batch,
            "heads": p.q.shape[1],
            "width_qk": p.q.shape[2],
            "width_v": p.v.shape[2],
            "max_seqlen": p.max_seqlen,
            "longest_q": self.longest_q,
            "offsets": _pointer(offsets),
            "q_offsets": _pointer(q_offsets),
            "timestamps": _pointer(timestamps),
            "edges": _pointer(edges),
            "num_targets": _pointer(targets),
            "num_contextual": _pointer(contextual),
            "max_attn_len": p.max_attn_len,
            "min_full_attn_len": p.min_full_attn_len,
            "causal": p.causal,
            "divisors": _pointer(divisors),
            "position": _table(position),
            "time": _table(time),
            "alpha": p.alpha,
            "divisor": p.divisor,
            "time_shift": p.time_shift,
            "dropout": p.seed is not None,
            "keep_threshold": keep_threshold(p.dropout),
            "keep_scale": 1.0 / (1.0 - p.dropout),
            "seed_key": 0 if p.seed is None else seed_key(int(p.seed)),
            "aligned": all(_is_aligned(x) for x in (q, k, v, *more)),
            "q": _view(q),
            "k": _view(k),
            "v": _view(v),
        }

    def run(self, name: str, **own: Any) -> None:
        module, reason = _load()
        if module is None:
            raise RuntimeError(reason)
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
        with torch.cuda.device_of(self.q):
            getattr(module, name)(**self.arguments, **own, stream=stream)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _is_aligned(x: Tensor) -> bool:
    unit = 16 // x.element_size()
    return x.data_ptr() % 16 == 0 and all(size % unit == 0 for size in (x.shape[2], x.stride(0), x.stride(1)))


def _view(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1)


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _table(table: Tensor | None) -> tuple[int, int, int]:
    if table is None:
        return 0, 0, 0
    return table.data_ptr(), 0 if table.shape[0] == 1 else table.shape[1], table.shape[1]


def _as_tables(gradients: list[Tensor | None], tables: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    pairs = zip(gradients, tables, strict=True)
    return [None if g is None or w is None else g.to(w.dtype) for g, w in pairs]
