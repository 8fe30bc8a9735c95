"""The fused C++ kernels for CPU tensors; csrc/scan_cpu.cpp holds the algorithm."""

from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mamba_scan import native
from mamba_scan.problem import ConvProblem, ScanProblem, SSDProblem

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


@cache
def unavailable() -> str | None:
    """Say why the native module cannot run here, or None when it can; builds it where it is missing."""
    try:
        _module()
    except (native.BuildError, ImportError, RuntimeError, OSError) as error:
        return str(error)
    return None


def isa() -> str:
    """The instruction set in use: "portable", "avx2" or "avx512"; the variable FOOTFALL_ISA forces one."""
    name: str = _module().isa()
    return name


def supports(p: ScanProblem | ConvProblem | SSDProblem) -> str | None:
    """Say why these tensors cannot be taken, or None."""
    return None if p.device.type == "cpu" else f"they are on {p.device}, the CPU kernels need CPU tensors"


def scan_forward(p: ScanProblem, saved: Tensor, last: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scan; the state at every chunk start is left in ``saved`` where that has rows.

    The last state goes into ``last`` if given, which may be the initial state itself.
    """
    out = torch.empty_like(p.u)
    args = _Arguments(p)
    in_place = last is not None and last.is_contiguous() and last.dtype == p.dtype
    state = last if last is not None and in_place else args.empty(p.segments, p.channels, p.states)
    _module().scan_forward(
        **args.common(),
        save=int(saved.shape[0] > 0),
        saved=saved.data_ptr(),
        out=_array(out, p.offsets),
        last=state.data_ptr(),
    )
    state = args.from_planes(state)
    return out, state if last is None or in_place else last.copy_(state)


def scan_backward(
    p: ScanProblem, saved: Tensor, dout: Tensor | None, dlast: Tensor | None, out: Tensor | None = None
) -> dict[str, Tensor]:
    """Gradients of every tensor argument: chunks in reverse, each run forward again from its saved start.

    The scan's output, which comes by on the way, goes into ``out`` if given.
    """
    dout = torch.zeros_like(p.u) if dout is None else dout
    args = _Arguments(p)
    grads = {name: torch.empty_like(getattr(p, name)) for name in ("u", "delta")}
    if p.z is not None:
        grads["z"] = torch.empty_like(p.z)
    whole = {name: torch.empty_like(getattr(args, name)) for name in ("A", "B", "C")}
    for name in ("D", "delta_bias"):
        if getattr(p, name) is not None:
            whole[name] = torch.empty(p.channels, dtype=p.dtype)
    if p.initial_state is not None:
        whole["initial_state"] = args.empty(*p.initial_state.shape)
    dlast = None if dlast is None else args.to_planes(dlast)
    _module().scan_backward(
        **args.common(),
        save=1,
        saved=saved.data_ptr(),
        out=_array(out, p.offsets),
        dout=_array(dout, p.offsets),
        dlast=_address(dlast),
        du=_array(grads["u"], p.offsets),
        ddelta=_array(grads["delta"], p.offsets),
        dz=_array(grads.get("z"), p.offsets),
        dA=_address(whole["A"]),
        dB=_address(whole["B"]),
        dC=_address(whole["C"]),
        dD=_address(whole.get("D")),
        dbias=_address(whole.get("delta_bias")),
        dinitial=_address(whole.get("initial_state")),
    )
    for name in ("A", "B", "C", "initial_state"):
        if name in whole:
            whole[name] = args.from_planes(whole[name])
    for name in ("B", "C"):
        whole[name] = whole[name].permute(0, 2, 3, 1) if getattr(p, name).dim() == 4 else whole[name]
    return grads | {name: _as(grad, getattr(p, name)) for name, grad in whole.items()}


def conv_forward(p: ConvProblem) -> tuple[Tensor, Tensor]:
    """Convolve; also returns the last width - 1 rows of every segment."""
    out = torch.empty_like(p.x)
    final = torch.empty(p.segments, p.channels, p.width - 1, dtype=p.dtype)
    args, _held = _conv_arguments(p)
    _module().conv_forward(**args, out=_array(out, p.offsets), final=final.data_ptr())
    return out, final


def conv_backward(p: ConvProblem, dout: Tensor | None, dfinal: Tensor | None) -> dict[str, Tensor]:
    """Gradients of every tensor argument."""
    dout = torch.zeros_like(p.x) if dout is None else dout
    dfinal = None if dfinal is None else dfinal.to(p.dtype).contiguous()
    grads = {"x": torch.empty_like(p.x), "weight": torch.empty(p.weight.shape, dtype=p.dtype)}
    if p.bias is not None:
        grads["bias"] = torch.empty(p.channels, dtype=p.dtype)
    if p.initial_states is not None:
        grads["initial_states"] = torch.empty(p.initial_states.shape, dtype=p.dtype)
    args, _held = _conv_arguments(p)
    _module().conv_backward(
        **args,
        dout=_array(dout, p.offsets),
        dx=_array(grads["x"], p.offsets),
        dfinal=_address(dfinal),
        dweight=_address(grads["weight"]),
        dbias=_address(grads.get("bias")),
        dinitial=_address(grads.get("initial_states")),
    )
    return {name: _as(grad, getattr(p, name)) for name, grad in grads.items()}


def ssd_forward(p: SSDProblem) -> tuple[Tensor, Tensor]:
    """Scan in chunks: matrix products within a chunk, one product with the state that enters it."""
    with torch.no_grad():
        out, final = _ssd_chunks(p)
    return torch.empty_like(p.x).copy_(out), final


def ssd_backward(p: SSDProblem, dout: Tensor | None, dfinal: Tensor | None) -> dict[str, Tensor]:
    """Gradients of every tensor argument; the chunks are computed again, nothing of them was kept."""
    tensors = p.leaves()
    with torch.enable_grad():
        out, final = _ssd_chunks(p.replaced(tensors))
        pairs = [(y, dy.to(y.dtype)) for y, dy in ((out, dout), (final, dfinal)) if dy is not None and y.requires_grad]
        grads: tuple[Tensor | None, ...] = (None,) * len(tensors)
        if pairs:
            ys, dys = zip(*pairs, strict=True)
            grads = torch.autograd.grad(ys, list(tensors.values()), dys, allow_unused=True)
    return {
        name: torch.zeros_like(x) if grad is None else _as(grad, x)
        for (name, x), grad in zip(tensors.items(), grads, strict=True)
    }


def _ssd_chunks(p: SSDProblem) -> tuple[Tensor, Tensor]:
    """Chunks [K, Q] start with every segment; rows past its end have step zero and change nothing."""
    heads, width = p.x.shape[-2:]
    x, dt, B, C = p.x.to(p.dtype), p.steps(), p.B.to(p.dtype), p.C.to(p.dtype)
    if p.offsets is None:
        x, dt, B, C = (t.flatten(0, 1) for t in (x, dt, B, C))
        bounds = torch.arange(p.segments + 1) * p.x.shape[1]
    else:
        bounds = p.offsets.to(torch.int64)
    Q = p.chunk_size
    counts = (bounds.diff() + Q - 1) // Q
    segment = torch.repeat_interleave(torch.arange(p.segments), counts)
    position = torch.arange(len(segment)) - (counts.cumsum(0) - counts)[segment]
    row = (bounds[segment] + position * Q)[:, None] + torch.arange(Q)
    inside = row < bounds[segment + 1, None]
    # The row after the last one holds zeros, for the places past a segment's end.
    row = torch.where(inside, row, x.shape[0])
    x, dt, B, C = (torch.cat([t, t.new_zeros(1, *t.shape[1:])])[row] for t in (x, dt, B, C))

    # Heads first, then steps: [K, h, Q, ...]; groups become heads where they meet them.
    x, dt = x.transpose(1, 2), dt.transpose(1, 2)
    repeats = heads // B.shape[2]
    B, C = B.transpose(1, 2), C.transpose(1, 2)
    decay = (dt * p.A.to(p.dtype)[:, None]).cumsum(-1)
    between = (decay[..., :, None] - decay[..., None, :]).masked_fill_(torch.ones(Q, Q).triu(1).bool(), -torch.inf)
    weights = (C @ B.mT).repeat_interleave(repeats, 1) * between.exp() * dt[..., None, :]
    B, C = B.repeat_interleave(repeats, 1), C.repeat_interleave(repeats, 1)
    y = weights @ x
    added = (x * (dt * (decay[..., -1:] - decay).exp())[..., None]).mT @ B
    kept = decay[..., -1].exp()[..., None, None]

    start = x.new_zeros(p.segments, heads, width, p.states)
    state = start if p.initial_states is None else p.initial_states.to(p.dtype)
    entering: list[Tensor] = []
    order: list[Tensor] = []
    for k in range(int(counts.max()) if len(segment) else 0):
        chunks = (position == k).nonzero().flatten()
        before = state[segment[chunks]]
        entering.append(before)
        order.append(chunks)
        state = state.index_copy(0, segment[chunks], kept[chunks] * before + added[chunks])
    if order:
        place = torch.cat(order).argsort()
        y = y + (C * decay.exp()[..., None]) @ torch.cat(entering)[place].mT
    y = y.transpose(1, 2)[inside]
    return p.finished(y.view(p.x.shape)), state.clone()


def _conv_arguments(p: ConvProblem) -> tuple[dict[str, Any], list[Tensor | None]]:
    """The problem as pointers, and the converted tensors to hold alive for as long as the call lasts."""
    weight, bias, initial = (
        None if x is None else x.to(p.dtype).contiguous() for x in (p.weight, p.bias, p.initial_states)
    )
    documents = None if p.seq_idx is None else p.seq_idx.to(torch.int32).contiguous()
    offsets = None if p.offsets is None else p.offsets.to(torch.int64).contiguous()
    args = {
        "double_precision": int(p.dtype == torch.float64),
        "silu": int(p.silu),
        "threads": _threads(p.rows * p.channels),
        "segments": p.segments,
        "length": 0 if p.offsets is not None else p.x.shape[2],
        "channels": p.channels,
        "width": p.width,
        "offsets": _address(offsets),
        "documents": _address(documents),
        "x": _array(p.x, p.offsets),
        "weight": _address(weight),
        "bias": _address(bias),
        "initial": _address(initial),
    }
    return args, [weight, bias, initial, documents, offsets]


class _Arguments:
    """The problem as pointers; holds the converted tensors alive for as long as the call lasts."""

    def __init__(self, p: ScanProblem) -> None:
        self.p = p
        self.A = self.to_planes(p.A)
        self.B, self.C = (self.to_planes(x.permute(0, 3, 1, 2) if x.dim() == 4 else x) for x in (p.B, p.C))
        self.D = None if p.D is None else p.D.to(p.dtype).contiguous()
        self.bias = None if p.delta_bias is None else p.delta_bias.to(p.dtype).contiguous()
        self.initial = None if p.initial_state is None else self.to_planes(p.initial_state)
        self.offsets = None if p.offsets is None else p.offsets.to(torch.int64).contiguous()

    def common(self) -> dict[str, Any]:
        p = self.p
        return {
            "double_precision": int(p.dtype == torch.float64),
            "complex": int(p.A.is_complex()),
            "softplus": int(p.delta_softplus),
            "variable_B": int(p.B.dim() > 2),
            "variable_C": int(p.C.dim() > 2),
            "threads": _threads(p.rows * p.channels * p.states),
            "segments": p.segments,
            "length": 0 if p.offsets is not None else p.u.shape[2],
            "channels": p.channels,
            "states": p.states,
            "groups": p.groups,
            "rows": p.rows,
            "offsets": _address(self.offsets),
            "u": _array(p.u, p.offsets),
            "delta": _array(p.delta, p.offsets),
            "z": _array(p.z, p.offsets),
            "A": self.A.data_ptr(),
            "B": self.B.data_ptr(),
            "C": self.C.data_ptr(),
            "D": _address(self.D),
            "bias": _address(self.bias),
            "initial": _address(self.initial),
        }

    def to_planes(self, x: Tensor) -> Tensor:
        """What belongs to states as the kernels take it: of complex numbers, real parts first, then imaginary ones."""
        if not self.p.A.is_complex():
            return x.to(self.p.dtype).contiguous()
        return torch.view_as_real(x.to(self.p.state_dtype)).movedim(-1, 0).contiguous()

    def from_planes(self, x: Tensor) -> Tensor:
        return torch.complex(x[0], x[1]) if self.p.A.is_complex() else x

    def empty(self, *shape: int) -> Tensor:
        planes = (2,) if self.p.A.is_complex() else ()
        return torch.empty(*planes, *shape, dtype=self.p.dtype)


def _threads(work: int) -> int:
    """Waking a thread costs about as much as this many state updates; no result depends on the number."""
    return max(1, min(torch.get_num_threads(), work // 20_000))


def _array(x: Tensor | None, offsets: Tensor | None) -> tuple[int, int, int, int, int] | None:
    """Address, dtype and the strides of batch, time and channel."""
    if x is None:
        return None
    batch, channel, time = (0, x.stride(1), x.stride(0)) if offsets is not None else x.stride()
    return x.data_ptr(), _DTYPES[x.dtype], batch, time, channel


def _as(grad: Tensor, x: Tensor) -> Tensor:
    """A gradient in the dtype and layout of what it is the gradient of."""
    return grad if grad.dtype == x.dtype and grad.stride() == x.stride() else torch.empty_like(x).copy_(grad)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


@cache
def _module() -> ModuleType:
    module = native.load(Path(__file__).parents[1], "_cpu")
    module.isa()
    return module
