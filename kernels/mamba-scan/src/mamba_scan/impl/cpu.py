"""The fused C++ kernels for CPU tensors; csrc/scan_cpu.cpp holds the algorithm."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mamba_scan import native
from mamba_scan.pointers import ConvArguments, ScanArguments, address, array, as_like
from mamba_scan.problem import ConvProblem, ScanProblem
from mamba_scan.problem_ssd import SSDProblem


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

    Args:
        p: a problem in canonical form.
        saved: room for states, as ``ops.scan.saved_states`` makes it.
        last: [S, d, n].

    Returns:
        out, shaped as u and in its dtype, and the last states [S, d, n].
    """
    out = torch.empty_like(p.u)
    args = ScanArguments(p)
    in_place = last is not None and last.is_contiguous() and last.dtype == p.dtype
    state = last if last is not None and in_place else args.empty(p.segments, p.channels, p.states)
    _module().scan_forward(
        **args.named(),
        threads=_threads(p.rows * p.channels * p.states),
        save=int(saved.shape[0] > 0),
        saved=saved.data_ptr(),
        out=array(out, p.offsets),
        last=state.data_ptr(),
    )
    state = args.from_planes(state)
    return out, state if last is None or in_place else last.copy_(state)


def scan_backward(
    p: ScanProblem, saved: Tensor, dout: Tensor | None, dlast: Tensor | None, out: Tensor | None = None
) -> dict[str, Tensor]:
    """Gradients of every tensor argument: chunks in reverse, each run forward again from its saved start.

    The scan's output, which comes by on the way, goes into ``out`` if given.

    Args:
        p: this and the others as in ``reference.scan_backward``.
        saved: what the forward pass left.
        dout: gradient of the output.
        dlast: gradient of the last states.
        out: shaped as u.

    Returns:
        Gradients by argument name.
    """
    dout = torch.zeros_like(p.u) if dout is None else dout
    args = ScanArguments(p)
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
        **args.named(),
        threads=_threads(p.rows * p.channels * p.states),
        save=1,
        saved=saved.data_ptr(),
        out=array(out, p.offsets),
        dout=array(dout, p.offsets),
        dlast=address(dlast),
        du=array(grads["u"], p.offsets),
        ddelta=array(grads["delta"], p.offsets),
        dz=array(grads.get("z"), p.offsets),
        dA=address(whole["A"]),
        dB=address(whole["B"]),
        dC=address(whole["C"]),
        dD=address(whole.get("D")),
        dbias=address(whole.get("delta_bias")),
        dinitial=address(whole.get("initial_state")),
    )
    for name in ("A", "B", "C", "initial_state"):
        if name in whole:
            whole[name] = args.from_planes(whole[name])
    for name in ("B", "C"):
        whole[name] = whole[name].permute(0, 2, 3, 1) if getattr(p, name).dim() == 4 else whole[name]
    return grads | {name: as_like(grad, getattr(p, name)) for name, grad in whole.items()}


def conv_forward(p: ConvProblem) -> tuple[Tensor, Tensor]:
    """Convolve; also returns the last width - 1 rows of every segment."""
    out = torch.empty_like(p.x)
    final = torch.empty(p.segments, p.channels, p.width - 1, dtype=p.dtype)
    args = ConvArguments(p)
    _module().conv_forward(
        **args.named(), threads=_threads(p.rows * p.channels), out=array(out, p.offsets), final=final.data_ptr()
    )
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
    args = ConvArguments(p)
    _module().conv_backward(
        **args.named(),
        threads=_threads(p.rows * p.channels),
        dout=array(dout, p.offsets),
        dx=array(grads["x"], p.offsets),
        dfinal=address(dfinal),
        dweight=address(grads["weight"]),
        dbias=address(grads.get("bias")),
        dinitial=address(grads.get("initial_states")),
    )
    return {name: as_like(grad, getattr(p, name)) for name, grad in grads.items()}


def ssd_forward(p: SSDProblem) -> tuple[Tensor, Tensor]:
    """Scan every head as so many channels of one decay: measured twice as fast as chunks of matrix products."""
    scan = p.as_scan()
    out, last = scan_forward(scan, scan.u.new_empty(0, p.states, scan.channels))
    return torch.empty_like(p.x).copy_(p.from_scan(out)), last.view(p.segments, *p.x.shape[-2:], p.states)


def ssd_backward(p: SSDProblem, dout: Tensor | None, dfinal: Tensor | None) -> dict[str, Tensor]:
    """Gradients of every tensor argument: those of the scan, and autograd of what leads to its arguments."""
    tensors = p.leaves()
    with torch.enable_grad():
        scan = p.replaced(tensors).as_scan()
    inputs: dict[str, Any] = {k: x for k, x in vars(scan).items() if isinstance(x, Tensor) and x.requires_grad}
    detached = replace(scan, **{k: x.detach() for k, x in inputs.items()})
    saved = scan.u.new_empty(detached.slots, p.states, detached.channels)
    scan_forward(detached, saved)
    dout = torch.zeros_like(p.x) if dout is None else dout
    dlast = None if dfinal is None else dfinal.flatten(1, 2)
    grads = scan_backward(detached, saved, p.to_scan(dout.to(p.dtype)), dlast)
    wanted = [grads[name] for name in inputs]
    found = torch.autograd.grad(list(inputs.values()), list(tensors.values()), wanted, allow_unused=True)
    return {
        name: torch.zeros_like(x) if grad is None else as_like(grad, x)
        for (name, x), grad in zip(tensors.items(), found, strict=True)
    }


def _threads(work: int) -> int:
    """Waking a thread costs about as much as this many state updates; no result depends on the number."""
    return max(1, min(torch.get_num_threads(), work // 20_000))


@cache
def _module() -> ModuleType:
    module = native.load(Path(__file__).parents[1], "_cpu")
    module.isa()
    return module
