"""One scan and one convolution as every backend sees them, and the checks of their contracts."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mamba_scan.checks import (
    FLOATS,
    INTEGERS,
    check_device,
    check_offsets,
    check_optional_tensors,
    check_real,
    check_tensors,
    require,
)

# Steps between two states kept for the backward pass, counted from the start of a segment; the kernels share it.
CHUNK = 64

_COMPLEX_OF = {torch.float64: torch.complex128}


@dataclass
class ScanProblem:
    """Arguments of a scan in canonical form; the order of the fields is the order of the op's arguments.

    Without offsets u, delta, z are [b, d, l] and variable B, C are [b, g, n, l]; with offsets they are [T, d] and
    [T, g, n]. Constant B, C are [d, n]. With a complex A, B and C are complex as well.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    initial_state: Tensor | None
    offsets: Tensor | None
    delta_softplus: bool

    @property
    def device(self) -> torch.device:
        return self.u.device

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: float64 for float64 inputs, else float32."""
        return computed_in(self.u)

    @property
    def state_dtype(self) -> torch.dtype:
        """Dtype of the states: that of the computation, complex if A is complex."""
        return _COMPLEX_OF.get(self.dtype, torch.complex64) if self.A.is_complex() else self.dtype

    @property
    def channels(self) -> int:
        """Number of channels, d."""
        return self.A.shape[0]

    @property
    def states(self) -> int:
        """States of a channel, n."""
        return self.A.shape[1]

    @property
    def segments(self) -> int:
        return self.u.shape[0] if self.offsets is None else self.offsets.shape[0] - 1

    @property
    def rows(self) -> int:
        """Number of tokens."""
        return self.u.shape[0] * self.u.shape[2] if self.offsets is None else self.u.shape[0]

    @property
    def groups(self) -> int:
        return next((x.shape[1] for x in (self.B, self.C) if x.dim() > 2), 1)

    @property
    def slots(self) -> int:
        """Upper bound of the number of chunk starts inside segments, each segment's first one not counted."""
        packed = self.offsets is not None
        count = self.u.shape[0] // CHUNK if packed else self.u.shape[0] * ((self.u.shape[2] + CHUNK - 1) // CHUNK - 1)
        # Two at the least: a size that may be 0 or 1 would tie an exported program to one side of a chunk's length.
        return torch.sym_max(count, 2)


@dataclass
class ConvProblem:
    """Arguments of a causal depthwise convolution; the order of the fields is the order of the op's arguments."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    seq_idx: Tensor | None
    initial_states: Tensor | None
    offsets: Tensor | None
    silu: bool

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: float64 for float64 inputs, else float32."""
        return computed_in(self.x)

    @property
    def channels(self) -> int:
        return self.weight.shape[0]

    @property
    def width(self) -> int:
        return self.weight.shape[1]

    @property
    def segments(self) -> int:
        return self.x.shape[0] if self.offsets is None else self.offsets.shape[0] - 1

    @property
    def rows(self) -> int:
        """Number of tokens."""
        return self.x.numel() // self.channels

    def check(self) -> None:
        """Check what can be checked without reading values."""
        check_tensors(x=self.x, weight=self.weight)
        optional = {"bias": self.bias, "initial_states": self.initial_states}
        check_optional_tensors(**optional, seq_idx=self.seq_idx, offsets=self.offsets)
        check_real(**optional)
        packed = self.offsets is not None
        layout = "[T, d] (packed: offsets are given)" if packed else "[b, d, l]"
        require(self.x.dim() == (2 if packed else 3), "x", self.x, layout)
        require(self.x.dtype in FLOATS, "x", str(self.x.dtype), "float32, float64, bfloat16 or float16")
        d = self.x.shape[1]
        right = self.weight.dim() == 2 and self.weight.shape[0] == d and self.weight.shape[1] > 0
        require(right, "weight", self.weight, f"[d, width] with d = {d} as in x")
        require(self.weight.is_floating_point(), "weight", str(self.weight.dtype), "a real dtype")
        if self.bias is not None:
            require(self.bias.shape == (d,), "bias", self.bias, f"[d] with d = {d} as in x")
        if self.seq_idx is not None:
            shape = [self.x.shape[0]] if packed else [self.x.shape[0], self.x.shape[2]]
            right = list(self.seq_idx.shape) == shape and self.seq_idx.dtype in INTEGERS
            require(right, "seq_idx", self.seq_idx, f"int32 or int64 {shape}")
        if self.offsets is not None:
            check_offsets(self.offsets)
        if self.initial_states is not None:
            shape = [self.segments, d, self.width - 1]
            got = self.initial_states
            require(list(self.initial_states.shape) == shape, "initial_states", got, f"[S, d, width - 1] = {shape}")
        check_device(
            self.x,
            weight=self.weight,
            bias=self.bias,
            seq_idx=self.seq_idx,
            initial_states=self.initial_states,
            offsets=self.offsets,
        )


def canonical(p: ScanProblem) -> ScanProblem:
    """Check what can be checked without reading values, and bring B and C into canonical form.

    Args:
        p: as the public function was called; its B and C are replaced.

    Returns:
        The same problem; B and C are constant [d, n] or variable with groups.

    Raises:
        ValueError: an argument breaks its contract; the message names it, what it got and what it needs.
    """
    check_tensors(u=p.u, delta=p.delta, A=p.A, B=p.B, C=p.C)
    check_optional_tensors(D=p.D, z=p.z, delta_bias=p.delta_bias, initial_state=p.initial_state, offsets=p.offsets)
    packed = p.offsets is not None
    layout = "[T, d] (packed: offsets are given)" if packed else "[b, d, l]"
    require(p.u.dim() == (2 if packed else 3), "u", p.u, layout)
    require(p.u.dtype in FLOATS, "u", str(p.u.dtype), "float32, float64, bfloat16 or float16")
    channels = p.u.shape[1]
    for name in ("delta", "z"):
        x = getattr(p, name)
        if x is not None:
            require(x.shape == p.u.shape, name, x, f"the shape of u, {list(p.u.shape)}")
            require(x.dtype == p.u.dtype, name, str(x.dtype), f"the dtype of u, {p.u.dtype}")
    require(p.A.dim() == 2 and p.A.shape[0] == channels, "A", p.A, f"[d, n] with d = {channels} as in u")
    require(p.A.is_complex() or p.A.is_floating_point(), "A", str(p.A.dtype), "a real or complex dtype")
    require(p.A.shape[1] > 0, "A", p.A, "at least one state")
    for name in ("D", "delta_bias"):
        x = getattr(p, name)
        if x is not None:
            require(x.shape == (channels,), name, x, f"[d] with d = {channels} as in u")
            require(x.is_floating_point(), name, str(x.dtype), "a real dtype")
    if p.offsets is not None:
        check_offsets(p.offsets)
    p.B, p.C = _coefficient(p, "B"), _coefficient(p, "C")
    groups = {x.shape[1] for x in (p.B, p.C) if x.dim() > 2}
    require(len(groups) < 2, "C", f"{p.C.shape[1] if p.C.dim() > 2 else 1} groups", "as many groups as B has")
    if p.initial_state is not None:
        shape = (p.segments, channels, p.states)
        require(p.initial_state.shape == shape, "initial_state", p.initial_state, f"[S, d, n] = {list(shape)}")
        real = p.initial_state.is_floating_point()
        wanted = "a complex dtype, because A is complex" if p.A.is_complex() else "a real dtype"
        right = p.initial_state.is_complex() if p.A.is_complex() else real
        require(right, "initial_state", str(p.initial_state.dtype), wanted)
    names = ("delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state", "offsets")
    check_device(p.u, **{name: getattr(p, name) for name in names})
    return p


def computed_in(x: Tensor) -> torch.dtype:
    """The dtype that a computation on x runs in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _coefficient(p: ScanProblem, name: str) -> Tensor:
    x: Tensor = getattr(p, name)
    d, n = p.A.shape
    packed = p.offsets is not None
    complex_dtype = p.state_dtype
    if packed:
        rows = p.u.shape[0]
        right = x.dim() in (2, 3) and x.shape[0] == rows and x.shape[-1] == n
        require(right, name, x, f"[T, n] or [T, g, n] with T = {rows}, n = {n}")
        x = x.unsqueeze(1) if x.dim() == 2 else x
    elif x.dim() == 2:
        require(x.shape == (d, n), name, x, f"[d, n] = [{d}, {n}] where constant, [b, n, l] or [b, g, n, l] else")
        require(p.A.is_complex() or x.is_floating_point(), name, str(x.dtype), "a real dtype")
        return x.to(complex_dtype) if p.A.is_complex() else x
    else:
        batch, length = p.u.shape[0], p.u.shape[2]
        # The established layout of a variable complex coefficient: real and imaginary parts alternate along the length.
        pairs = p.A.is_complex() and not x.is_complex()
        want = 2 * length if pairs else length
        right = x.dim() in (3, 4) and x.shape[0] == batch and x.shape[-2] == n and x.shape[-1] == want
        needs = f"[b, n, l] or [b, g, n, l] with b = {batch}, n = {n}, last size {want}"
        require(right, name, x, needs + (" (real and imaginary parts alternate)" if pairs else ""))
        x = x.unsqueeze(1) if x.dim() == 3 else x
        if pairs:
            x = torch.view_as_complex(x.to(p.dtype).unflatten(-1, (length, 2)))
    require(x.shape[1] > 0 and d % x.shape[1] == 0, name, f"{x.shape[1]} groups", f"a divisor of d = {d}")
    if p.A.is_complex():
        return x.to(complex_dtype)
    require(x.dtype == p.u.dtype, name, str(x.dtype), f"the dtype of u, {p.u.dtype}")
    return x
