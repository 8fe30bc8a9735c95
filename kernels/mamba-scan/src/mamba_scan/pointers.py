"""Problems as the native kernels take them: addresses, sizes and strides by name."""

from typing import Any

import torch
from torch import Tensor

from mamba_scan.problem import ConvProblem, ScanProblem

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


class ScanArguments:
    """The problem as pointers; holds the converted tensors alive for as long as the call lasts.

    Args:
        p: a problem in canonical form.
    """

    def __init__(self, p: ScanProblem) -> None:
        self.p = p
        self.A = self.to_planes(p.A)
        self.B, self.C = (self.to_planes(x.permute(0, 3, 1, 2) if x.dim() == 4 else x) for x in (p.B, p.C))
        self.D = None if p.D is None else p.D.to(p.dtype).contiguous()
        self.bias = None if p.delta_bias is None else p.delta_bias.to(p.dtype).contiguous()
        self.initial = None if p.initial_state is None else self.to_planes(p.initial_state)
        self.offsets = None if p.offsets is None else p.offsets.to(torch.int64).contiguous()

    def named(self) -> dict[str, Any]:
        """The fields of the kernels' struct by name; tensors as addresses, 0 for none."""
        p = self.p
        return {
            "double_precision": int(p.dtype == torch.float64),
            "complex": int(p.A.is_complex()),
            "softplus": int(p.delta_softplus),
            "variable_B": int(p.B.dim() > 2),
            "variable_C": int(p.C.dim() > 2),
            "segments": p.segments,
            "length": 0 if p.offsets is not None else p.u.shape[2],
            "channels": p.channels,
            "states": p.states,
            "groups": p.groups,
            "rows": p.rows,
            "offsets": address(self.offsets),
            "u": array(p.u, p.offsets),
            "delta": array(p.delta, p.offsets),
            "z": array(p.z, p.offsets),
            "A": self.A.data_ptr(),
            "B": self.B.data_ptr(),
            "C": self.C.data_ptr(),
            "D": address(self.D),
            "bias": address(self.bias),
            "initial": address(self.initial),
        }

    def to_planes(self, x: Tensor) -> Tensor:
        """What belongs to states as the kernels take it: of complex numbers, real parts first, then imaginary ones."""
        if not self.p.A.is_complex():
            return x.to(self.p.dtype).contiguous()
        return torch.view_as_real(x.to(self.p.state_dtype)).movedim(-1, 0).contiguous()

    def from_planes(self, x: Tensor) -> Tensor:
        """Complex numbers, where A is complex, from what the kernels wrote: the inverse of ``to_planes``."""
        return torch.complex(x[0], x[1]) if self.p.A.is_complex() else x

    def empty(self, *shape: int) -> Tensor:
        """An uninitialised tensor of this shape for the kernels to write, a leading 2 where numbers are complex."""
        planes = (2,) if self.p.A.is_complex() else ()
        return torch.empty(*planes, *shape, dtype=self.p.dtype, device=self.p.device)


class ConvArguments:
    """The problem as pointers; holds the converted tensors alive for as long as the call lasts.

    Args:
        p: a checked problem.
    """

    def __init__(self, p: ConvProblem) -> None:
        self.p = p
        self.weight, self.bias, self.initial = (
            None if x is None else x.to(p.dtype).contiguous() for x in (p.weight, p.bias, p.initial_states)
        )
        self.documents = None if p.seq_idx is None else p.seq_idx.to(torch.int32).contiguous()
        self.offsets = None if p.offsets is None else p.offsets.to(torch.int64).contiguous()

    def named(self) -> dict[str, Any]:
        """The fields of the kernels' struct by name; tensors as addresses, 0 for none."""
        p = self.p
        return {
            "double_precision": int(p.dtype == torch.float64),
            "silu": int(p.silu),
            "segments": p.segments,
            "length": 0 if p.offsets is not None else p.x.shape[2],
            "channels": p.channels,
            "width": p.width,
            "offsets": address(self.offsets),
            "documents": address(self.documents),
            "x": array(p.x, p.offsets),
            "weight": address(self.weight),
            "bias": address(self.bias),
            "initial": address(self.initial),
        }


def array(x: Tensor | None, offsets: Tensor | None) -> tuple[int, int, int, int, int] | None:
    """Address, dtype and the strides of batch, time and channel.

    Args:
        x: [b, d, l], or packed [T, d] when offsets are given; None for no tensor.
        offsets: those of the packed rows, or None.
    """
    if x is None:
        return None
    batch, channel, time = (0, x.stride(1), x.stride(0)) if offsets is not None else x.stride()
    return x.data_ptr(), DTYPES[x.dtype], batch, time, channel


def as_like(grad: Tensor, x: Tensor) -> Tensor:
    """A gradient in the dtype and layout of what it is the gradient of.

    Args:
        grad: the gradient.
        x: what it is the gradient of.
    """
    return grad if grad.dtype == x.dtype and grad.stride() == x.stride() else torch.empty_like(x).copy_(grad)


def address(x: Tensor | None) -> int:
    """Address of a tensor's first element; 0 for None."""
    return 0 if x is None else x.data_ptr()
