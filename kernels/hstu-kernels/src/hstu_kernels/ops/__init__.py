"""The registered ops, one file for attention and one for the layer's pieces; none knows a backend but by name."""

from hstu_kernels.ops.attention import attention
from hstu_kernels.ops.pieces import norm_gate, norm_project_silu

__all__ = ["attention", "norm_gate", "norm_project_silu"]
