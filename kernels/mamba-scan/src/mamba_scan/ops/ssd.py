"""The scan with scalar decays as registered ops: schemas, fake implementations, autograd."""

from typing import Any

import torch
from torch import Tensor

from mamba_scan.checks import check_offset_values
from mamba_scan.dispatch import choose
from mamba_scan.documents import Documents
from mamba_scan.ops.refusals import once, refuse_transforms
from mamba_scan.ops.saved import keep_inputs, kept_inputs
from mamba_scan.problem_ssd import SSDProblem

_SSD = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? initial_states, "
    "Tensor? offsets, Tensor? seq_idx, bool dt_softplus, float dt_min, float dt_max, int chunk_size"
)
_TENSORS = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")
torch.library.define("mamba_scan::ssd", f"({_SSD}, bool states, str backend) -> (Tensor, Tensor)")
torch.library.define(
    "mamba_scan::ssd_backward",
    f"(Tensor? dout, Tensor? dfinal, {_SSD}, str backend) -> ({', '.join(['Tensor'] * len(_TENSORS))})",
)


def ssd(p: SSDProblem, backend: str | None, states: bool) -> tuple[Tensor, Tensor]:
    """Run the registered scan with scalar decays on a checked problem; without ``states`` no final ones come back.

    Args:
        p: a checked problem.
        backend: name of a backend; None picks the fastest when the op runs.
        states: whether the final states are wanted.

    Returns:
        out, shaped as x and in its dtype, and the final states [S, h, p, n].
    """
    refuse_transforms("ssd", vars(p).values())
    out, final = torch.ops.mamba_scan.ssd(*vars(p).values(), states, backend or "auto")
    return out, final


@torch.library.impl("mamba_scan::ssd", ("cpu", "cuda"))
def _ssd(*args: Any) -> tuple[Tensor, Tensor]:
    p, (states, backend) = SSDProblem(*args[:-2]), args[-2:]
    check_offset_values(p.offsets, p.x.shape[0])
    if p.seq_idx is None:
        out, final = choose(backend, p).ssd_forward(p)
    else:
        cut = Documents(p)
        rows, finals = choose(backend, p).ssd_forward(cut.problem)
        out, final = torch.empty_like(p.x).copy_(rows.view(p.x.shape)), finals[cut.last]
    return out, final if states else p.x.new_empty(0, dtype=p.dtype)


@torch.library.register_fake("mamba_scan::ssd")
def _ssd_fake(*args: Any) -> tuple[Tensor, Tensor]:
    p, states = SSDProblem(*args[:-2]), args[-2]
    shape = (p.segments, *p.x.shape[-2:], p.states) if states else 0
    return torch.empty_like(p.x), p.x.new_empty(shape, dtype=p.dtype)


@torch.library.impl("mamba_scan::ssd_backward", ("cpu", "cuda"))
def _ssd_backward(dout: Tensor | None, dfinal: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    p = SSDProblem(*args[:-1])
    if p.seq_idx is None:
        grads = choose(args[-1], p).ssd_backward(p, dout, dfinal)
    else:
        cut = Documents(p)
        grads = cut.gradients(choose(args[-1], p).ssd_backward(cut.problem, *cut.directions(dout, dfinal)))
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
    *problem, _, backend = inputs
    grads = once(torch.ops.mamba_scan.ssd_backward(dout, dfinal, *problem, backend), (dout, dfinal))
    needed = ctx.needs_input_grad
    return (*(grad if needed[i] else None for i, grad in enumerate(grads)), *[None] * (len(inputs) - len(grads)))


torch.library.register_autograd("mamba_scan::ssd", _ssd_autograd, setup_context=keep_inputs)
