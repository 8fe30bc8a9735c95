"""The scan with scalar decays as registered ops: schemas, fake implementations, autograd."""

from typing import Any

import torch
from torch import Tensor

from mamba_scan.dispatch import choose
from mamba_scan.ops.saved import keep_inputs, kept_inputs
from mamba_scan.problem import SSDProblem, check_offset_values

_SSD = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? initial_states, "
    "Tensor? offsets, bool dt_softplus, float dt_min, float dt_max, int chunk_size, str backend"
)
_TENSORS = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")
torch.library.define("mamba_scan::ssd", f"({_SSD}) -> (Tensor, Tensor)")
torch.library.define(
    "mamba_scan::ssd_backward",
    f"(Tensor? dout, Tensor? dfinal, {_SSD}) -> ({', '.join(['Tensor'] * len(_TENSORS))})",
)


def ssd(p: SSDProblem, backend: str | None) -> tuple[Tensor, Tensor]:
    """Run the registered scan with scalar decays on a checked problem."""
    out, final = torch.ops.mamba_scan.ssd(*vars(p).values(), backend or "auto")
    return out, final


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
    return tuple(grads[name] if name in grads else p.x.new_empty(0) for name in _TENSORS)


@torch.library.register_fake("mamba_scan::ssd_backward")
def _ssd_backward_fake(dout: Tensor | None, dfinal: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    p = SSDProblem(*args[:-1])
    tensors = (getattr(p, name) for name in _TENSORS)
    return tuple(p.x.new_empty(0) if x is None else torch.empty_like(x) for x in tensors)


def _ssd_autograd(ctx: Any, dout: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
    inputs = kept_inputs(ctx)
    if dout is None and dfinal is None:
        return (None,) * len(inputs)
    grads = torch.ops.mamba_scan.ssd_backward(dout, dfinal, *inputs)
    needed = ctx.needs_input_grad
    return (*(grad if needed[i] else None for i, grad in enumerate(grads)), *[None] * (len(inputs) - len(grads)))


torch.library.register_autograd("mamba_scan::ssd", _ssd_autograd, setup_context=keep_inputs)
