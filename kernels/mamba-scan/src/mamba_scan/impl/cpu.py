"""The fused C++ kernels for CPU tensors; csrc/scan_cpu.cpp holds the algorithm."""

from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mamba_scan import native
from mamba_scan.problem import ScanProblem

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


def supports(p: ScanProblem) -> str | None:
    """Say why these tensors cannot be taken, or None."""
    return None if p.u.device.type == "cpu" else f"u is on {p.u.device}, the CPU kernels need CPU tensors"


def scan_forward(p: ScanProblem, saved: Tensor) -> tuple[Tensor, Tensor]:
    """Scan; the state at every chunk start is left in ``saved`` where that has rows."""
    out = torch.empty_like(p.u)
    args = _Arguments(p)
    last = args.empty(p.segments, p.channels, p.states)
    _module().scan_forward(
        **args.common(),
        save=int(saved.shape[0] > 0),
        saved=saved.data_ptr(),
        out=args.array(out),
        last=last.data_ptr(),
    )
    return out, args.from_planes(last)


def scan_backward(p: ScanProblem, saved: Tensor, dout: Tensor | None, dlast: Tensor | None) -> dict[str, Tensor]:
    """Gradients of every tensor argument: chunks in reverse, each run forward again from its saved start."""
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
        dout=args.array(dout),
        dlast=_address(dlast),
        du=args.array(grads["u"]),
        ddelta=args.array(grads["delta"]),
        dz=args.array(grads.get("z")),
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
    for name, grad in whole.items():
        x = getattr(p, name)
        grads[name] = grad if grad.dtype == x.dtype and grad.stride() == x.stride() else torch.empty_like(x).copy_(grad)
    return grads


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
            "u": self.array(p.u),
            "delta": self.array(p.delta),
            "z": self.array(p.z),
            "A": self.A.data_ptr(),
            "B": self.B.data_ptr(),
            "C": self.C.data_ptr(),
            "D": _address(self.D),
            "bias": _address(self.bias),
            "initial": _address(self.initial),
        }

    def array(self, x: Tensor | None) -> tuple[int, int, int, int, int] | None:
        """Address, dtype and the strides of batch, time and channel."""
        if x is None:
            return None
        batch, channel, time = (0, x.stride(1), x.stride(0)) if self.p.offsets is not None else x.stride()
        return x.data_ptr(), _DTYPES[x.dtype], batch, time, channel

    def to_planes(self, x: Tensor) -> Tensor:
        """What belongs to states as the kernels take it: complex numbers as a plane of real parts and one of imaginary."""
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


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


@cache
def _module() -> ModuleType:
    module = native.load(Path(__file__).parents[1], "_cpu")
    module.isa()
    return module
