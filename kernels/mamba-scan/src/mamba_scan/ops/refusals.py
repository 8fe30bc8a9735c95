"""What the ops have no formulas for is refused by name: second derivatives, transforms of functions, forward mode."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def once(gradients: Iterable[Tensor | None], directions: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Return gradients as they are, save that differentiating them again raises NotImplementedError.

    Args:
        gradients: what a backward pass found.
        directions: gradients of the outputs that it began with.
    """
    found = tuple(gradients)
    if not torch.is_grad_enabled():
        return found
    anchor = next(x for x in directions if x is not None)
    # With create_graph=True a gradient that hangs on nothing would pass for a constant.
    anchor = anchor if anchor.requires_grad else anchor.detach().requires_grad_()
    return tuple(None if x is None else _Once.apply(x, anchor) for x in found)


def refuse_transforms(op: str, arguments: Iterable[Any]) -> None:
    """Check that no argument of an op belongs to a transform of torch.func or carries a forward-mode derivative.

    Args:
        op: its name, for the message.
        arguments: of the op; what is no tensor is passed over.

    Raises:
        NotImplementedError: one does; the derivative would be wrong or the error obscure.
    """
    if torch.compiler.is_compiling():
        return
    for x in arguments:
        if not isinstance(x, Tensor):
            continue
        if torch._C._functorch.is_functorch_wrapped_tensor(x):
            raise NotImplementedError(
                f"mamba_scan::{op} has no rule for torch.func (grad, vmap, jvp, jacrev ...): call it on plain tensors "
                "and differentiate with backward or torch.autograd.grad"
            )
        if forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                f"mamba_scan::{op} has no forward mode (dual tensors, jvp): differentiate backward"
            )


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError("mamba_scan has no second derivatives: call backward without create_graph=True")
