"""Attention as registered ops: schemas, fake implementations, autograd."""

from typing import Any

import torch
from torch import Tensor

from hstu_kernels.dispatch import choose
from hstu_kernels.ops.second import refuse_second_derivative
from hstu_kernels.problem import Problem, check_contents

_PROBLEM = (
    "Tensor q, Tensor k, Tensor v, Tensor offsets, Tensor? q_offsets, Tensor? num_targets, Tensor? num_contextual, "
    "Tensor? position_weight, Tensor? timestamps, Tensor? time_weight, Tensor? row_divisor, Tensor? seed, "
    "Tensor? bias, Tensor? block_table, SymInt max_seqlen, float alpha, float divisor, bool causal, int max_attn_len, "
    "int min_full_attn_len, int target_group_size, int time_shift, float dropout"
)
_FIELDS = list(Problem.__dataclass_fields__)
_NUM_PROBLEM_FIELDS = len(_FIELDS)
_DIFFERENTIABLE = [_FIELDS.index(name) for name in ("q", "k", "v", "position_weight", "time_weight", "bias")]

torch.library.define("hstu_kernels::attention", f"({_PROBLEM}, str backend) -> Tensor")
torch.library.define(
    "hstu_kernels::attention_backward",
    f"(Tensor grad, {_PROBLEM}, str backend, bool[] needs) -> ({', '.join(['Tensor'] * len(_DIFFERENTIABLE))})",
)


def attention(p: Problem, backend: str | None) -> Tensor:
    """Run the registered op on a checked problem; ``backend`` None picks the fastest when the op runs.

    Args:
        p: a problem that ``check_static`` has passed; the integers in it are checked here, when the op runs.
        backend: name of a backend or None.

    Returns:
        out [Tq, H, Dv] in the dtype of q.
    """
    fields = (getattr(p, name) for name in _FIELDS)
    return torch.ops.hstu_kernels.attention(*fields, backend or "auto")


@torch.library.impl("hstu_kernels::attention", ("cpu", "cuda"))
def _attention(*args: Any) -> Tensor:
    p = Problem(*args[:_NUM_PROBLEM_FIELDS])
    check_contents(p)
    out: Tensor = choose(args[_NUM_PROBLEM_FIELDS], p).forward(p)
    return out


@torch.library.impl("hstu_kernels::attention_backward", ("cpu", "cuda"))
def _attention_backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    p = Problem(*args[:_NUM_PROBLEM_FIELDS])
    backend, needs = args[_NUM_PROBLEM_FIELDS:]
    packed = p if p.slots is None else p.gathered()
    grads = choose(backend, packed).backward(packed, grad, needs)
    if p.slots is not None:
        # Pages that several sequences share have the sum of their gradients.
        dk, dv = (x.new_zeros(x.shape) for x in (p.k, p.v))
        for pool, found in ((dk, grads[1]), (dv, grads[2])):
            pool.flatten(0, 1).index_add_(0, p.slots, found)
        grads = (grads[0], dk, dv, *grads[3:])
    return tuple(p.q.new_empty(0) if g is None else g for g in grads)


@torch.library.register_fake("hstu_kernels::attention")
def _attention_fake(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Tensor:
    return q.new_empty(q.shape[0], v.shape[-2], v.shape[-1])


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
refuse_second_derivative("hstu_kernels::attention_backward")
