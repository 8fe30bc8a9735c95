"""Triton kernels of attention and of the layer's pieces."""

import torch
from torch import Tensor

from hstu_kernels.impl.triton.attention import backward, forward
from hstu_kernels.impl.triton.common import INTERPRETED
from hstu_kernels.impl.triton.pieces import norm_gate, norm_gate_backward, norm_project_silu
from hstu_kernels.pieces import norm_project_silu_backward
from hstu_kernels.problem import Problem

__all__ = [
    "backward",
    "forward",
    "norm_gate",
    "norm_gate_backward",
    "norm_project_silu",
    "norm_project_silu_backward",
    "supports",
    "unavailable",
]


def unavailable() -> str | None:
    """Return why this backend cannot run here, or None."""
    if INTERPRETED or torch.cuda.is_available():
        return None
    return "no CUDA device is visible (TRITON_INTERPRET=1, set before Python starts, runs the kernels slowly on a CPU)"


def supports(p: Problem | Tensor) -> str | None:
    """Return why this backend cannot take the problem, or the rows of a layer's piece, or None."""
    if p.dtype == torch.float64:
        return "they are float64, needs float32, bfloat16 or float16"
    if p.device.type != ("cpu" if INTERPRETED else "cuda"):
        return f"they are on {p.device}, needs {'cpu (interpreter)' if INTERPRETED else 'cuda'}"
    return None
