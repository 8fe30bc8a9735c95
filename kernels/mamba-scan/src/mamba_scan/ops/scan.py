"""The scan as registered ops: schemas, fake implementations, autograd."""

from typing import Any

import torch
from torch import Tensor

from mamba_scan.checks import check_offset_values
from mamba_scan.dispatch import choose
from mamba_scan.ops.refusals import once, refuse_transforms
from mamba_scan.problem import ScanProblem

_TENSORS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
_SCAN = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "Tensor? initial_state, Tensor? offsets, bool delta_softplus"
)
_FIELDS = len(ScanProblem.__dataclass_fields__)

torch.library.define("mamba_scan::scan", f"({_SCAN}, bool states, bool save, str backend) -> (Tensor, Tensor, Tensor)")
torch.library.define(
    "mamba_scan::scan_backward",
    f"(Tensor? dout, Tensor? dlast, Tensor saved, {_SCAN}, str backend) -> ({', '.join(['Tensor'] * len(_TENSORS))})",
)
torch.library.define(
    "mamba_scan::state_update", f"({_SCAN.replace('Tensor? initial_state', 'Tensor(a!) state')}, str backend) -> Tensor"
)


def scan(p: ScanProblem, backend: str | None, states: bool) -> tuple[Tensor, Tensor]:
    """Run the registered scan on a checked problem; ``backend`` None picks the fastest when the op runs.

    Without ``states`` nothing stands in the last states: so nobody has to ask how many segments there are.

    Args:
        p: a problem in canonical form.
        backend: name of a backend or None.
        states: whether the last states are wanted.

    Returns:
        out, shaped as u and in its dtype, and the last states [S, d, n].
    """
    refuse_transforms("scan", vars(p).values())
    fields = [getattr(p, name) for name in ScanProblem.__dataclass_fields__]
    save = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in fields)
    out, last, _ = torch.ops.mamba_scan.scan(*fields, states, save, backend or "auto")
    return out, last


def state_update(p: ScanProblem, backend: str | None) -> Tensor:
    """Run the registered scan that overwrites the initial state by the last one.

    Args:
        p: a problem in canonical form, with an initial state.
        backend: name of a backend; None picks the fastest when the op runs.

    Returns:
        out, shaped as u and in its dtype.
    """
    refuse_transforms("state_update", vars(p).values())
    fields = (x.detach() if isinstance(x, Tensor) else x for x in vars(p).values())
    out: Tensor = torch.ops.mamba_scan.state_update(*fields, backend or "auto")
    return out


def saved_states(p: ScanProblem, save: bool) -> Tensor:
    """Room for the states at chunk starts, zeros where there are fewer, or none when nothing is to be saved.

    Args:
        p: a problem in canonical form.
        save: whether there will be a backward pass.
    """
    return p.A.new_zeros(p.slots if save else 0, p.states, p.channels, dtype=p.state_dtype)


@torch.library.impl("mamba_scan::scan", ("cpu", "cuda"))
def _scan(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    p = ScanProblem(*args[:_FIELDS])
    states, save, backend = args[_FIELDS:]
    check_offset_values(p.offsets, p.rows)
    saved = saved_states(p, save)
    out, last = choose(backend, p).scan_forward(p, saved)
    return out, last if states else p.A.new_empty(0, dtype=p.state_dtype), saved


@torch.library.register_fake("mamba_scan::scan")
def _scan_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    p = ScanProblem(*args[:_FIELDS])
    states, save, _ = args[_FIELDS:]
    last = p.A.new_empty((p.segments, p.channels, p.states) if states else 0, dtype=p.state_dtype)
    return torch.empty_like(p.u), last, saved_states(p, save)


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


@torch.library.impl("mamba_scan::state_update", ("cpu", "cuda"))
def _state_update(*args: Any) -> Tensor:
    p = ScanProblem(*args[:-1])
    out: Tensor = choose(args[-1], p).scan_forward(p, saved_states(p, save=False), last=p.initial_state)[0]
    return out


@torch.library.register_fake("mamba_scan::state_update")
def _state_update_fake(*args: Any) -> Tensor:
    return torch.empty_like(args[0])


def _scan_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    problem = inputs[:_FIELDS]
    ctx.save_for_backward(output[2], *(x for x in problem if isinstance(x, Tensor)))
    ctx.layout = [None if isinstance(x, Tensor) else (x,) for x in problem]
    ctx.backend = inputs[-1]


def _scan_autograd(ctx: Any, dout: Tensor | None, dlast: Tensor | None, _: Any) -> tuple[Any, ...]:
    result: list[Any] = [None] * (_FIELDS + 3)
    if dout is None and dlast is None:
        return tuple(result)
    saved, *tensors = ctx.saved_tensors
    left = iter(tensors)
    problem = [next(left) if box is None else box[0] for box in ctx.layout]
    grads = torch.ops.mamba_scan.scan_backward(dout, dlast, saved, *problem, ctx.backend)
    for index, grad in enumerate(once(grads, (dout, dlast))):
        result[index] = grad if ctx.needs_input_grad[index] else None
    return tuple(result)


torch.library.register_autograd("mamba_scan::scan", _scan_autograd, setup_context=_scan_setup)
