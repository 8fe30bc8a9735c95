"""The layer's pieces as registered ops: schemas, fake implementations, autograd."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hstu_kernels.dispatch import backend_status, choose
from hstu_kernels.ops.second import refuse_second_derivative
from hstu_kernels.pieces import check_layer_norm

torch.library.define(
    "hstu_kernels::norm_gate", "(Tensor x, Tensor gate, Tensor weight, Tensor bias, float eps, str backend) -> Tensor"
)
torch.library.define(
    "hstu_kernels::norm_gate_backward",
    "(Tensor grad, Tensor x, Tensor gate, Tensor weight, Tensor bias, float eps, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)

torch.library.define(
    "hstu_kernels::norm_project_silu",
    "(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight, float eps, bool keep) -> (Tensor, Tensor)",
)
torch.library.define(
    "hstu_kernels::norm_project_silu_backward",
    "(Tensor grad, Tensor projected, Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)


def norm_project_silu(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, eps: float, backend: str | None
) -> Tensor:
    """Return SiLU(LayerNorm(x) @ weight.T) [T, W]; x [T, D], norm_weight and norm_bias [D], weight [W, D].

    In Triton it is one op, which keeps x and the projection for backward and computes the norm anew. Elsewhere torch's
    own three: on a CPU training took 1.00 to 1.05 of the time with one op.

    Args:
        x: input of the norm.
        norm_weight: gain of the norm.
        norm_bias: shift of the norm.
        weight: of the projection.
        eps: added to the variance.
        backend: as for ``hstu_attention``.

    Raises:
        ValueError: a shape does not fit; names the argument, what it got and what it needs.
    """
    check_layer_norm(x, norm_weight, norm_bias)
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight: got shape {list(weight.shape)}, needs [W, {x.shape[1]}], the width of x")
    if not _takes_triton(x, backend):
        normed = F.layer_norm(x, x.shape[1:], norm_weight, norm_bias, eps)
        return F.silu(F.linear(normed, weight), inplace=not torch.is_grad_enabled())
    if torch.is_autocast_enabled(x.device.type):
        weight = weight.to(torch.get_autocast_dtype(x.device.type))
    keep = torch.is_grad_enabled()
    out: Tensor = torch.ops.hstu_kernels.norm_project_silu(x, norm_weight, norm_bias, weight, eps, keep)[0]
    return out


def norm_gate(x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float, backend: str | None) -> Tensor:
    """Return LayerNorm(x) * gate in one pass over memory; all of x and gate [T, W], weight and bias [W].

    Args:
        x: what is normed.
        gate: what the normed rows are multiplied with.
        weight: gain of the norm.
        bias: shift of the norm.
        eps: added to the variance.
        backend: as for ``hstu_attention``.

    Raises:
        ValueError: a shape does not fit; names the argument, what it got and what it needs.
    """
    check_layer_norm(x, weight, bias)
    if gate.shape != x.shape:
        raise ValueError(f"gate: got shape {list(gate.shape)}, needs that of x, {list(x.shape)}")
    return torch.ops.hstu_kernels.norm_gate(x, gate, weight, bias, eps, backend or "auto")


def _takes_triton(x: Tensor, backend: str | None) -> bool:
    if backend is None:
        return x.is_cuda and x.dtype != torch.float64 and _triton_runs()
    return backend == "triton"


@torch.compiler.assume_constant_result
def _triton_runs() -> bool:
    return backend_status("triton") == "ok"


@torch.library.impl("hstu_kernels::norm_gate", ("cpu", "cuda"))
def _norm_gate(x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float, backend: str) -> Tensor:
    out: Tensor = choose(backend, x).norm_gate(x, gate, weight, bias, eps)
    return out


@torch.library.impl("hstu_kernels::norm_gate_backward", ("cpu", "cuda"))
def _norm_gate_backward(
    grad: Tensor, x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor, Tensor]
    found = choose(backend, x).norm_gate_backward(grad, x, gate, weight, bias, eps)
    return found


@torch.library.register_fake("hstu_kernels::norm_gate")
def _norm_gate_fake(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("hstu_kernels::norm_gate_backward")
def _norm_gate_backward_fake(
    grad: Tensor, x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    return tuple(y.new_empty(y.shape) for y in (x, gate, weight, bias))


def _norm_gate_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.rest = inputs[4:]


def _norm_gate_grads(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return (*torch.ops.hstu_kernels.norm_gate_backward(grad, *ctx.saved_tensors, *ctx.rest), None, None)


torch.library.register_autograd("hstu_kernels::norm_gate", _norm_gate_grads, setup_context=_norm_gate_context)


@torch.library.impl("hstu_kernels::norm_project_silu", ("cpu", "cuda"))
def _norm_project_silu(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = choose("triton", x).norm_project_silu(x, *args)
    return found


@torch.library.impl("hstu_kernels::norm_project_silu_backward", ("cpu", "cuda"))
def _norm_project_silu_backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = choose("triton", grad).norm_project_silu_backward(grad, *args)
    return found


@torch.library.register_fake("hstu_kernels::norm_project_silu")
def _norm_project_silu_fake(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, eps: float, keep: bool
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], weight.shape[0])
    return weight.new_empty(shape), weight.new_empty(shape if keep else 0)


@torch.library.register_fake("hstu_kernels::norm_project_silu_backward")
def _norm_project_silu_backward_fake(
    grad: Tensor, projected: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, ...]:
    return tuple(y.new_empty(y.shape) for y in (x, norm_weight, norm_bias, weight))


def _norm_project_silu_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *inputs[:4])
    ctx.eps = inputs[4]


def _norm_project_silu_grads(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    return (*torch.ops.hstu_kernels.norm_project_silu_backward(grad, *ctx.saved_tensors, ctx.eps), None, None)


torch.library.register_autograd(
    "hstu_kernels::norm_project_silu", _norm_project_silu_grads, setup_context=_norm_project_silu_context
)
for _name in ("norm_gate", "norm_project_silu"):
    refuse_second_derivative(f"hstu_kernels::{_name}_backward")
