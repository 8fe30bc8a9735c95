"""The registered ops: schemas, fake implementations, autograd. Backends are imported by name, when an op first runs."""

import importlib
import warnings
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hstu_kernels.pieces import check_layer_norm
from hstu_kernels.problem import Problem, check_contents

BACKENDS = ("reference", "cpu", "triton", "cuda")

_PROBLEM = (
    "Tensor q, Tensor k, Tensor v, Tensor offsets, Tensor? q_offsets, Tensor? num_targets, Tensor? num_contextual, "
    "Tensor? position_weight, Tensor? timestamps, Tensor? time_weight, Tensor? row_divisor, Tensor? seed, "
    "SymInt max_seqlen, float alpha, float divisor, bool causal, int max_attn_len, int min_full_attn_len, "
    "int time_shift, float dropout"
)
_DIFFERENTIABLE = (0, 1, 2, 7, 9)
_NUM_PROBLEM_FIELDS = 20

torch.library.define("hstu_kernels::attention", f"({_PROBLEM}, str backend) -> Tensor")
torch.library.define(
    "hstu_kernels::attention_backward",
    f"(Tensor grad, {_PROBLEM}, str backend, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


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
    """
    check_layer_norm(x, norm_weight, norm_bias)
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight: got shape {list(weight.shape)}, need [W, {x.shape[1]}], the width of x")
    if not _takes_triton(x, backend):
        normed = F.layer_norm(x, x.shape[1:], norm_weight, norm_bias, eps)
        return F.silu(F.linear(normed, weight), inplace=not torch.is_grad_enabled())
    if torch.is_autocast_enabled(x.device.type):
        weight = weight.to(torch.get_autocast_dtype(x.device.type))
    keep = torch.is_grad_enabled()
    out: Tensor = torch.ops.hstu_kernels.norm_project_silu(x, norm_weight, norm_bias, weight, eps, keep)[0]
    return out


def norm_gate(x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float, backend: str | None) -> Tensor:
    """Return LayerNorm(x) * gate in one pass over memory; all of x and gate [T, W], weight and bias [W]."""
    check_layer_norm(x, weight, bias)
    if gate.shape != x.shape:
        raise ValueError(f"gate: got shape {list(gate.shape)}, need that of x, {list(x.shape)}")
    return torch.ops.hstu_kernels.norm_gate(x, gate, weight, bias, eps, backend or "auto")


def attention(p: Problem, backend: str | None) -> Tensor:
    """Run the registered op on a checked problem; ``backend`` None picks the fastest when the op runs."""
    fields = (getattr(p, name) for name in Problem.__dataclass_fields__)
    return torch.ops.hstu_kernels.attention(*fields, backend or "auto")


def backend_status(name: str) -> str:
    """Return "ok" or the reason why the backend cannot run on this machine."""
    try:
        return _implementation(name).unavailable() or "ok"
    except ImportError as error:
        return str(error)


@torch.library.impl("hstu_kernels::attention", ("cpu", "cuda"))
def _attention(*args: Any) -> Tensor:
    p = Problem(*args[:_NUM_PROBLEM_FIELDS])
    check_contents(p)
    out: Tensor = _choose(args[_NUM_PROBLEM_FIELDS], p.q).forward(p)
    return out


@torch.library.impl("hstu_kernels::attention_backward", ("cpu", "cuda"))
def _attention_backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    p = Problem(*args[:_NUM_PROBLEM_FIELDS])
    backend, needs = args[_NUM_PROBLEM_FIELDS:]
    grads = _choose(backend, p.q).backward(p, grad, needs)
    return tuple(p.q.new_empty(0) if g is None else g for g in grads)


@torch.library.register_fake("hstu_kernels::attention")
def _attention_fake(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Tensor:
    return q.new_empty(q.shape[0], v.shape[1], v.shape[2])


@torch.library.register_fake("hstu_kernels::attention_backward")
def _attention_backward_fake(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    needs = args[-1]
    masters = [args[index] for index in _DIFFERENTIABLE]
    return tuple(
        args[0].new_empty(0) if x is None or not needed else x.new_empty(x.shape)
        for x, needed in zip(masters, needs, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    problem = inputs[:_NUM_PROBLEM_FIELDS]
    ctx.save_for_backward(*(x for x in problem if isinstance(x, Tensor)))
    ctx.layout = [None if isinstance(x, Tensor) else (x,) for x in problem]
    ctx.backend = inputs[_NUM_PROBLEM_FIELDS]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    saved = iter(ctx.saved_tensors)
    problem = [next(saved) if box is None else box[0] for box in ctx.layout]
    needs = [bool(ctx.needs_input_grad[index]) for index in _DIFFERENTIABLE]
    grads = torch.ops.hstu_kernels.attention_backward(grad, *problem, ctx.backend, needs)
    result: list[Any] = [None] * (_NUM_PROBLEM_FIELDS + 1)
    for index, needed, value in zip(_DIFFERENTIABLE, needs, grads, strict=True):
        result[index] = value if needed else None
    return tuple(result)


torch.library.register_autograd("hstu_kernels::attention", _backward, setup_context=_setup_context)


@torch.library.impl("hstu_kernels::norm_gate", ("cpu", "cuda"))
def _norm_gate(x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float, backend: str) -> Tensor:
    out: Tensor = _choose(backend, x).norm_gate(x, gate, weight, bias, eps)
    return out


@torch.library.impl("hstu_kernels::norm_gate_backward", ("cpu", "cuda"))
def _norm_gate_backward(
    grad: Tensor, x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor, Tensor]
    found = _choose(backend, x).norm_gate_backward(grad, x, gate, weight, bias, eps)
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
    found: tuple[Tensor, Tensor] = _choose("triton", x).norm_project_silu(x, *args)
    return found


@torch.library.impl("hstu_kernels::norm_project_silu_backward", ("cpu", "cuda"))
def _norm_project_silu_backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = _choose("triton", grad).norm_project_silu_backward(grad, *args)
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


def _no_second_derivative(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError("hstu_kernels has no second derivatives: call backward without create_graph=True")


for _name in ("attention", "norm_gate", "norm_project_silu"):
    torch.library.register_autograd(f"hstu_kernels::{_name}_backward", _no_second_derivative)


@cache
def _implementation(name: str) -> ModuleType:
    return importlib.import_module(f"hstu_kernels.impl.{name}")


def _choose(backend: str, x: Tensor) -> ModuleType:
    if backend != "auto":
        chosen = _implementation(backend)
        if reason := chosen.unavailable():
            raise RuntimeError(f'backend="{backend}" cannot run here: {reason}')
        if reason := chosen.supports(x):
            raise ValueError(f'backend="{backend}" cannot take these tensors: {reason}')
        return chosen
    # The CUDA kernels have not been timed against Triton's on a card yet: they run when asked for by name.
    name, what = ("cpu", "native CPU kernel") if x.device.type == "cpu" else ("triton", "Triton kernel")
    if x.dtype == torch.float64 and name == "triton":
        return _implementation("reference")
    if (status := backend_status(name)) == "ok":
        return _implementation(name)
    _warn_once(f"hstu_kernels runs on the slow reference path, for want of the {what}: {status}")
    return _implementation("reference")


def _takes_triton(x: Tensor, backend: str | None) -> bool:
    if backend is None:
        return x.is_cuda and x.dtype != torch.float64 and _triton_runs()
    return backend == "triton"


@torch.compiler.assume_constant_result
def _triton_runs() -> bool:
    return backend_status("triton") == "ok"


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
