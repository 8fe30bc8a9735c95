"""Inputs of an op kept for its backward pass, whatever of them is a tensor."""

from typing import Any

from torch import Tensor


def keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep all inputs; the ``setup_context`` of ops without anything else to keep."""
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
    ctx.layout = [None if isinstance(x, Tensor) else (x,) for x in inputs]


def kept_inputs(ctx: Any) -> list[Any]:
    """Return the inputs in their order."""
    left = iter(ctx.saved_tensors)
    return [next(left) if box is None else box[0] for box in ctx.layout]
