# mypy: allow-untyped-defs, allow-incomplete-defs
"""What the Triton kernels of attention and of the layer's pieces share."""

import os

import torch
from torch import Tensor

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def tuned() -> bool:
    """Return whether block sizes may be tried out; fixed ones give the same sums in every process, without warm-up."""
    if torch.are_deterministic_algorithms_enabled():
        return False
    return not INTERPRETED and os.environ.get("HSTU_KERNELS_TRITON_CONFIG", "auto") != "fixed"


def dense(x: Tensor) -> Tensor:
    """Return x with rows whose elements lie one after another."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


# numpy has no bfloat16, so the interpreter multiplies in float32, which holds every bfloat16 exactly.
_WIDEN = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b):
    if _WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")
