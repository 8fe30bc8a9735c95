"""The convolution as registered ops: schemas, fake implementations, autograd."""

from typing import Any

import torch
from torch import Tensor

from mamba_scan.checks import check_offset_values
from mamba_scan.dispatch import choose
from mamba_scan.ops.refusals import once, refuse_transforms
from mamba_scan.ops.saved import keep_inputs, kept_inputs
from mamba_scan.problem import ConvProblem

_CONV = "Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, Tensor? initial_states, Tensor? offsets, bool silu"
_TENSORS = ("x", "weight", "bias", "initial_states")

torch.library.define("mamba_scan::conv", f"({_CONV}, bool states, str backend) -> (Tensor, Tensor)")
torch.library.define(
    "mamba_scan::conv_backward",
    f"(Tensor? dout, Tensor? dfinal, {_CONV}, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
)


def conv(p: ConvProblem, backend: str | None, states: bool) -> tuple[Tensor, Tensor]:
    """Run the registered convolution on a checked problem; without ``states`` nothing stands in the final ones.

    Args:
        p: a checked problem.
        backend: name of a backend; None picks the fastest when the op runs.
        states: whether the final states are wanted.

    Returns:
        out, shaped as x and in its dtype, and the final states [S, d, width - 1].
    """
    refuse_transforms("conv", vars(p).values())
    out, final = torch.ops.mamba_scan.conv(*vars(p).values(), states, backend or "auto")
    return out, final


@torch.library.impl("mamba_scan::conv", ("cpu", "cuda"))
def _conv(*args: Any) -> tuple[Tensor, Tensor]:
    p, (states, backend) = ConvProblem(*args[:-2]), args[-2:]
    check_offset_values(p.offsets, p.x.shape[0])
    out, final = choose(backend, p).conv_forward(p)
    return out, final if states else p.x.new_empty(0, dtype=p.dtype)


@torch.library.register_fake("mamba_scan::conv")
def _conv_fake(*args: Any) -> tuple[Tensor, Tensor]:
    p, states = ConvProblem(*args[:-2]), args[-2]
    return torch.empty_like(p.x), p.x.new_empty((p.segments, p.channels, p.width - 1) if states else 0, dtype=p.dtype)


@torch.library.impl("mamba_scan::conv_backward", ("cpu", "cuda"))
def _conv_backward(dout: Tensor | None, dfinal: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    p = ConvProblem(*args[:-1])
    grads = choose(args[-1], p).conv_backward(p, dout, dfinal)
    return tuple(grads[name] if name in grads else p.x.new_empty(0) for name in _TENSORS)


@torch.library.register_fake("mamba_scan::conv_backward")
def _conv_backward_fake(dout: Tensor | None, dfinal: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    p = ConvProblem(*args[:-1])
    tensors = (getattr(p, name) for name in _TENSORS)
    return tuple(p.x.new_empty(0) if x is None else torch.empty_like(x) for x in tensors)


def _conv_autograd(ctx: Any, dout: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
    inputs = kept_inputs(ctx)
    if dout is None and dfinal is None:
        return (None,) * len(inputs)
    *problem, _, backend = inputs
    found = torch.ops.mamba_scan.conv_backward(dout, dfinal, *problem, backend)
    dx, dweight, dbias, dstates = once(found, (dout, dfinal))
    grads = (dx, dweight, dbias, None, dstates, None, None, None, None)
    return tuple(grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=True))


torch.library.register_autograd("mamba_scan::conv", _conv_autograd, setup_context=keep_inputs)
