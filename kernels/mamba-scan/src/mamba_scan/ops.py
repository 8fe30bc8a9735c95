"""The registered ops: schemas, fake implementations, autograd. Backends are imported by name, when an op first runs."""

import importlib
import warnings
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mamba_scan.problem import ConvProblem, ScanProblem, SSDProblem, check_offset_values

BACKENDS = ("reference", "cpu", "triton", "cuda")

_TENSORS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
_SCAN = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "Tensor? initial_state, Tensor? offsets, bool delta_softplus"
)
_FIELDS = len(ScanProblem.__dataclass_fields__)
_CONV = "Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, Tensor? initial_states, Tensor? offsets, bool silu"
_CONV_TENSORS = ("x", "weight", "bias", "initial_states")

torch.library.define("mamba_scan::scan", f"({_SCAN}, bool save, str backend) -> (Tensor, Tensor, Tensor)")
torch.library.define(
    "mamba_scan::scan_backward",
    f"(Tensor? dout, Tensor? dlast, Tensor saved, {_SCAN}, str backend) -> ({', '.join(['Tensor'] * len(_TENSORS))})",
)
torch.library.define("mamba_scan::conv", f"({_CONV}, str backend) -> (Tensor, Tensor)")
torch.library.define(
    "mamba_scan::conv_backward",
    f"(Tensor? dout, Tensor? dfinal, {_CONV}, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "mamba_scan::state_update", f"({_SCAN.replace('Tensor? initial_state', 'Tensor(a!) state')}, str backend) -> Tensor"
)


_SSD = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? initial_states, "
    "Tensor? offsets, bool dt_softplus, float dt_min, float dt_max, int chunk_size, str backend"
)
_SSD_TENSORS = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")
torch.library.define("mamba_scan::ssd", f"({_SSD}) -> (Tensor, Tensor)")
torch.library.define(
    "mamba_scan::ssd_backward",
    f"(Tensor? dout, Tensor? dfinal, {_SSD}) -> ({', '.join(['Tensor'] * len(_SSD_TENSORS))})",
)


def scan(p: ScanProblem, backend: str | None) -> tuple[Tensor, Tensor]:
    """Run the registered scan on a checked problem; ``backend`` None picks the fastest when the op runs."""
    fields = [getattr(p, name) for name in ScanProblem.__dataclass_fields__]
    save = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in fields)
    out, last, _ = torch.ops.mamba_scan.scan(*fields, save, backend or "auto")
    return out, last


def conv(p: ConvProblem, backend: str | None) -> tuple[Tensor, Tensor]:
    """Run the registered convolution on a checked problem."""
    out, final = torch.ops.mamba_scan.conv(*vars(p).values(), backend or "auto")
    return out, final


def state_update(p: ScanProblem, backend: str | None) -> Tensor:
    """Run the registered scan that overwrites the initial state by the last one."""
    fields = (x.detach() if isinstance(x, Tensor) else x for x in vars(p).values())
    out: Tensor = torch.ops.mamba_scan.state_update(*fields, backend or "auto")
    return out


def ssd(p: SSDProblem, backend: str | None) -> tuple[Tensor, Tensor]:
    """Run the registered scan with scalar decays on a checked problem."""
    out, final = torch.ops.mamba_scan.ssd(*vars(p).values(), backend or "auto")
    return out, final


def backend_status(name: str) -> str:
    """Return "ok" or the reason why the backend cannot run on this machine."""
    try:
        return _implementation(name).unavailable() or "ok"
    except ImportError as error:
        return str(error)


def choose(backend: str, p: Any) -> ModuleType:
    """The module of the backend asked for, or of the fastest one for these tensors when asked for "auto"."""
    if backend != "auto":
        if (status := backend_status(backend)) != "ok":
            raise RuntimeError(f'backend="{backend}" cannot run here: {status}')
        chosen = _implementation(backend)
        if reason := chosen.supports(p):
            raise ValueError(f'backend="{backend}" cannot take these tensors: {reason}')
        return chosen
    missing = []
    # On a card, CUDA comes second until both have been measured there.
    for name in ("cpu",) if p.device.type == "cpu" else ("triton", "cuda"):
        if (status := backend_status(name)) != "ok":
            missing.append(f"{name}: {status}")
        elif _implementation(name).supports(p) is None:
            return _implementation(name)
    if missing:
        _warn_once(f"mamba_scan runs on the slow reference path, for want of a faster backend: {'; '.join(missing)}")
    return _implementation("reference")


@torch.library.impl("mamba_scan::scan", ("cpu", "cuda"))
def _scan(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    p = ScanProblem(*args[:_FIELDS])
    save, backend = args[_FIELDS:]
    check_offset_values(p.offsets, p.rows)
    saved = saved_states(p, save)
    out, last = choose(backend, p).scan_forward(p, saved)
    return out, last, saved


@torch.library.register_fake("mamba_scan::scan")
def _scan_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    p = ScanProblem(*args[:_FIELDS])
    last = p.A.new_empty(p.segments, p.channels, p.states, dtype=p.state_dtype)
    return torch.empty_like(p.u), last, saved_states(p, args[_FIELDS])


@torch.library.impl("mamba_scan::scan_backward", ("cpu", "cuda"))
def _scan_backward(dout: Tensor | None, dlast: Tensor | None, saved: Tensor, *args: Any) -> tuple[Tensor, ...]:
    p = ScanProblem(*args[:_FIELDS])
    grads = choose(args[_FIELDS], p).scan_backward(p, saved, dout, dlast)
    return tuple(grads[name] if name in grads else p.u.new_empty(0) for name in _TENSORS)


@torch.library.register_fake("mamba_scan::scan_backward")
def _scan_backward_fake(dout: Tensor | None, dlast: Tensor | None, saved: Tensor, *args: Any) -> tuple[Tensor, ...]:
    p = ScanProblem(*args[:_FIELDS])
    tensors = (getattr(p, name) for name in _TENSORS)
    return tuple(p.u.new_empty(0) if x is None else torch.empty_like(x) for x in tensors)


@torch.library.impl("mamba_scan::conv", ("cpu", "cuda"))
def _conv(*args: Any) -> tuple[Tensor, Tensor]:
    p = ConvProblem(*args[:-1])
    check_offset_values(p.offsets, p.x.shape[0])
    out, final = choose(args[-1], p).conv_forward(p)
    return out, final


@torch.library.register_fake("mamba_scan::conv")
def _conv_fake(*args: Any) -> tuple[Tensor, Tensor]:
    p = ConvProblem(*args[:-1])
    return torch.empty_like(p.x), p.x.new_empty(p.segments, p.channels, p.width - 1, dtype=p.dtype)


@torch.library.impl("mamba_scan::conv_backward", ("cpu", "cuda"))
def _conv_backward(dout: Tensor | None, dfinal: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    p = ConvProblem(*args[:-1])
    grads = choose(args[-1], p).conv_backward(p, dout, dfinal)
    return tuple(grads[name] if name in grads else p.x.new_empty(0) for name in _CONV_TENSORS)


@torch.library.register_fake("mamba_scan::conv_backward")
def _conv_backward_fake(dout: Tensor | None, dfinal: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    p = ConvProblem(*args[:-1])
    tensors = (getattr(p, name) for name in _CONV_TENSORS)
    return tuple(p.x.new_empty(0) if x is None else torch.empty_like(x) for x in tensors)


@torch.library.impl("mamba_scan::state_update", ("cpu", "cuda"))
def _state_update(*args: Any) -> Tensor:
    p = ScanProblem(*args[:-1])
    out: Tensor = choose(args[-1], p).scan_forward(p, saved_states(p, save=False), last=p.initial_state)[0]
    return out


@torch.library.register_fake("mamba_scan::state_update")
def _state_update_fake(*args: Any) -> Tensor:
    return torch.empty_like(args[0])


@torch.library.impl("mamba_scan::ssd", ("cpu", "cuda"))
def _ssd(*args: Any) -> tuple[Tensor, Tensor]:
    p = SSDProblem(*args[:-1])
    check_offset_values(p.offsets, p.x.shape[0])
    out, final = choose(args[-1], p).ssd_forward(p)
    return out, final


@torch.library.register_fake("mamba_scan::ssd")
def _ssd_fake(*args: Any) -> tuple[Tensor, Tensor]:
    p = SSDProblem(*args[:-1])
    return torch.empty_like(p.x), p.x.new_empty(p.segments, *p.x.shape[-2:], p.states, dtype=p.dtype)


@torch.library.impl("mamba_scan::ssd_backward", ("cpu", "cuda"))
def _ssd_backward(dout: Tensor | None, dfinal: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    p = SSDProblem(*args[:-1])
    grads = choose(args[-1], p).ssd_backward(p, dout, dfinal)
    return tuple(grads[name] if name in grads else p.x.new_empty(0) for name in _SSD_TENSORS)


@torch.library.register_fake("mamba_scan::ssd_backward")
def _ssd_backward_fake(dout: Tensor | None, dfinal: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    p = SSDProblem(*args[:-1])
    tensors = (getattr(p, name) for name in _SSD_TENSORS)
    return tuple(p.x.new_empty(0) if x is None else torch.empty_like(x) for x in tensors)


def saved_states(p: ScanProblem, save: bool) -> Tensor:
    """Room for the states at chunk starts, or none when nothing is to be saved."""
    return p.A.new_empty(p.slots if save else 0, p.states, p.channels, dtype=p.state_dtype)


def _scan_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    problem = inputs[:_FIELDS]
    ctx.save_for_backward(output[2], *(x for x in problem if isinstance(x, Tensor)))
    ctx.layout = [None if isinstance(x, Tensor) else (x,) for x in problem]
    ctx.backend = inputs[-1]


def _scan_autograd(ctx: Any, dout: Tensor | None, dlast: Tensor | None, _: Any) -> tuple[Any, ...]:
    result: list[Any] = [None] * (_FIELDS + 2)
    if dout is None and dlast is None:
        return tuple(result)
    saved, *tensors = ctx.saved_tensors
    left = iter(tensors)
    problem = [next(left) if box is None else box[0] for box in ctx.layout]
    grads = torch.ops.mamba_scan.scan_backward(dout, dlast, saved, *problem, ctx.backend)
    for index, grad in enumerate(grads):
        result[index] = grad if ctx.needs_input_grad[index] else None
    return tuple(result)


torch.library.register_autograd("mamba_scan::scan", _scan_autograd, setup_context=_scan_setup)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
    ctx.layout = [None if isinstance(x, Tensor) else (x,) for x in inputs]


def _conv_autograd(ctx: Any, dout: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
    left = iter(ctx.saved_tensors)
    inputs = [next(left) if box is None else box[0] for box in ctx.layout]
    if dout is None and dfinal is None:
        return (None,) * len(inputs)
    dx, dweight, dbias, dstates = torch.ops.mamba_scan.conv_backward(dout, dfinal, *inputs)
    grads = (dx, dweight, dbias, None, dstates, None, None, None)
    return tuple(grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=True))


torch.library.register_autograd("mamba_scan::conv", _conv_autograd, setup_context=_keep_inputs)


def _ssd_autograd(ctx: Any, dout: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
    left = iter(ctx.saved_tensors)
    inputs = [next(left) if box is None else box[0] for box in ctx.layout]
    if dout is None and dfinal is None:
        return (None,) * len(inputs)
    grads = torch.ops.mamba_scan.ssd_backward(dout, dfinal, *inputs)
    needed = ctx.needs_input_grad
    return (*(grad if needed[i] else None for i, grad in enumerate(grads)), *[None] * (len(inputs) - len(grads)))


torch.library.register_autograd("mamba_scan::ssd", _ssd_autograd, setup_context=_keep_inputs)


@cache
def _implementation(name: str) -> ModuleType:
    return importlib.import_module(f"mamba_scan.impl.{name}")


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
