"""The CUDA kernels; csrc/scan_cuda.cu and csrc/conv_cuda.cu hold the algorithms."""

from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from mamba_scan import native
from mamba_scan.pointers import ConvArguments, ScanArguments, address, array, as_like
from mamba_scan.problem import ConvProblem, ScanProblem
from mamba_scan.problem_ssd import SSDProblem

# Parts of the segments whose sums are taken apart: with the blocks of channels they fill a large card.
_PARTS = 64


@cache
def unavailable() -> str | None:
    """Say why the CUDA module cannot run here, or None when it can; builds it where a card and nvcc are there."""
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    try:
        _module()
    except (native.BuildError, ImportError, OSError) as error:
        return str(error)
    return None


def supports(p: ScanProblem | ConvProblem | SSDProblem) -> str | None:
    """Say why these tensors cannot be taken, or None."""
    if isinstance(p, SSDProblem):
        return "the scan of Mamba-2 has Triton kernels only"
    if p.device.type != "cuda":
        return f"they are on {p.device}, the CUDA kernels need cuda"
    if p.dtype == torch.float64:
        return "they are float64, needs float32, bfloat16 or float16"
    if isinstance(p, ScanProblem) and p.A.is_complex():
        return "A is complex, needs a real A"
    if isinstance(p, ScanProblem) and p.states > 256:
        return f"there are {p.states} states, needs at most 256"
    return None


def scan_forward(p: ScanProblem, saved: Tensor, last: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As ``cpu.scan_forward``."""
    out = torch.empty_like(p.u)
    args = ScanArguments(p)
    state = args.empty(p.segments, p.channels, p.states)
    if p.segments and p.channels:
        _module().scan_forward(
            **args.named(),
            threads=0,
            stream=_stream(p.device),
            save=int(saved.shape[0] > 0),
            saved=saved.data_ptr(),
            out=array(out, p.offsets),
            last=state.data_ptr(),
        )
    return out, state if last is None else last.copy_(state)


def scan_backward(
    p: ScanProblem, saved: Tensor, dout: Tensor | None, dlast: Tensor | None, out: Tensor | None = None
) -> dict[str, Tensor]:
    """As ``cpu.scan_backward``; sums over parts and blocks are taken by torch, in order."""
    dout = torch.zeros_like(p.u) if dout is None else dout
    dlast = None if dlast is None else dlast.to(torch.float32).contiguous()
    args = ScanArguments(p)
    grads = {name: torch.empty_like(getattr(p, name)) for name in ("u", "delta")}
    if p.z is not None:
        grads["z"] = torch.empty_like(p.z)
    parts = max(1, min(p.segments, _PARTS))
    blocks = _module().scan_blocks(p.states, p.channels // p.groups)
    rows = {name: p.u.new_zeros(0) for name in ("B", "C")}
    for name in rows:
        if getattr(p, name).dim() > 2:
            rows[name] = p.u.new_empty(blocks, p.rows, p.groups, p.states, dtype=torch.float32)
    state_sums = p.u.new_zeros(3, parts, p.channels, p.states, dtype=torch.float32)
    channel_sums = p.u.new_zeros(2, parts, p.channels, dtype=torch.float32)
    dinitial = None if p.initial_state is None else args.empty(*p.initial_state.shape)
    if p.segments and p.channels:
        _module().scan_backward(
            **args.named(),
            threads=0,
            stream=_stream(p.device),
            save=1,
            saved=saved.data_ptr(),
            out=array(out, p.offsets),
            dout=array(dout, p.offsets),
            dlast=address(dlast),
            du=array(grads["u"], p.offsets),
            ddelta=array(grads["delta"], p.offsets),
            dz=array(grads.get("z"), p.offsets),
            dinitial=address(dinitial),
            parts=parts,
            row_B=rows["B"].data_ptr(),
            row_C=rows["C"].data_ptr(),
            state_sums=state_sums.data_ptr(),
            channel_sums=channel_sums.data_ptr(),
        )
    sums, of_channels = state_sums.sum(1), channel_sums.sum(1)
    whole = {"A": sums[0], "B": sums[1], "C": sums[2], "D": of_channels[0], "delta_bias": of_channels[1]}
    for name, x in rows.items():
        given = getattr(p, name)
        if given.dim() > 2:
            total = x.sum(0)
            whole[name] = total.unflatten(0, (given.shape[0], -1)).permute(0, 2, 3, 1) if given.dim() == 4 else total
    if dinitial is not None:
        whole["initial_state"] = dinitial
    present = {name: grad for name, grad in whole.items() if getattr(p, name) is not None}
    return grads | {name: as_like(grad, getattr(p, name)) for name, grad in present.items()}


def conv_forward(p: ConvProblem) -> tuple[Tensor, Tensor]:
    """As ``cpu.conv_forward``."""
    out = torch.empty_like(p.x)
    final = p.x.new_empty(p.segments, p.channels, p.width - 1, dtype=torch.float32)
    args = ConvArguments(p)
    _module().conv_forward(
        **args.named(),
        threads=0,
        stream=_stream(p.device),
        rows=p.rows,
        out=array(out, p.offsets),
        final=final.data_ptr(),
    )
    return out, final


def conv_backward(p: ConvProblem, dout: Tensor | None, dfinal: Tensor | None) -> dict[str, Tensor]:
    """As ``cpu.conv_backward``."""
    dout = torch.zeros_like(p.x) if dout is None else dout
    dfinal = None if dfinal is None else dfinal.to(torch.float32).contiguous()
    args = ConvArguments(p)
    dx = torch.empty_like(p.x)
    dpre = p.x.new_empty(p.rows, p.channels, dtype=torch.float32)
    parts = p.x.new_empty(-(-p.rows // _module().conv_rows()), p.width + 1, p.channels, dtype=torch.float32)
    dinitial = None
    if p.initial_states is not None:
        dinitial = p.x.new_empty(p.initial_states.shape, dtype=torch.float32)
    _module().conv_backward(
        **args.named(),
        threads=0,
        stream=_stream(p.device),
        rows=p.rows,
        dout=array(dout, p.offsets),
        dx=array(dx, p.offsets),
        dfinal=address(dfinal),
        dinitial=address(dinitial),
        dpre=dpre.data_ptr(),
        parts=parts.data_ptr(),
    )
    sums = parts.sum(0)
    whole = {"weight": sums[: p.width].T, "bias": sums[p.width], "initial_states": dinitial}
    present = {name: grad for name, grad in whole.items() if grad is not None and getattr(p, name) is not None}
    return {"x": dx} | {name: as_like(grad, getattr(p, name)) for name, grad in present.items()}


def _stream(device: torch.device) -> int:
    """The address of the stream that torch works on; the emulator has none."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@cache
def _module() -> ModuleType:
    return native.load(Path(__file__).parents[1], "_cuda")
