"""The layer's pieces by torch's own kernels, for backends that have nothing faster: norms are computed anew."""

import torch
from torch import Tensor


def check_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Check that x is [T, W] and weight and bias are [W].

    Args:
        x: what is normed.
        weight: gain of the norm.
        bias: shift of the norm.

    Raises:
        ValueError: names the argument, what it got and what it needs.
    """
    if x.dim() != 2:
        raise ValueError(f"x: got shape {list(x.shape)}, needs two dimensions [rows, width]")
    for name, vector in (("weight of the norm", weight), ("bias of the norm", bias)):
        if vector.dim() != 1 or vector.shape[0] != x.shape[1]:
            raise ValueError(f"{name}: got shape {list(vector.shape)}, needs [{x.shape[1]}], the width of x")


def norm_gate(x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """As ``reference.norm_gate``."""
    normed, _, _ = _normed(x, weight, bias, eps)
    return normed.mul_(gate)


def norm_gate_backward(
    grad: Tensor, x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``reference.norm_gate_backward``."""
    normed, mean, rstd = _normed(x, weight, bias, eps)
    d_x, d_weight, d_bias = _norm_backward(grad * gate, x, mean, rstd, weight, bias)
    return d_x, normed.mul_(grad), d_weight, d_bias


def norm_project_silu_backward(
    grad: Tensor, projected: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, norm_weight, norm_bias and weight of SiLU(projected), projected = LN(x) @ weight.T.

    Args:
        grad: gradient of the output [T, W].
        projected: what SiLU was applied to [T, W].
        x: input of the norm [T, D].
        norm_weight: gain of the norm [D].
        norm_bias: shift of the norm [D].
        weight: of the projection [W, D].
        eps: added to the variance.
    """
    normed, mean, rstd = _normed(x, norm_weight, norm_bias, eps)
    d_projected = torch.ops.aten.silu_backward(grad, projected)
    d_weight = d_projected.t() @ normed.to(weight.dtype)
    del normed
    d_normed = (d_projected @ weight).to(x.dtype)
    return *_norm_backward(d_normed, x, mean, rstd, norm_weight, norm_bias), d_weight


def _normed(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    normed, mean, rstd = torch.native_layer_norm(x, x.shape[1:], weight.to(x.dtype), bias.to(x.dtype), eps)
    return normed, mean, rstd


def _norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    d_x, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
        grad, x, x.shape[1:], mean, rstd, weight.to(x.dtype), bias.to(x.dtype), [True, True, True]
    )
    return d_x, d_weight.to(weight.dtype), d_bias.to(bias.dtype)
