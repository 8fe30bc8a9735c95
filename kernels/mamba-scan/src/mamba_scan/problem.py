"""One scan and one convolution as every backend sees them, and the checks of their contracts."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Steps between two states kept for the backward pass, counted from the start of a segment; the kernels share it.
CHUNK = 64

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
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
        return _computed_in(self.u)

    @property
    def state_dtype(self) -> torch.dtype:
        return _COMPLEX_OF.get(self.dtype, torch.complex64) if self.A.is_complex() else self.dtype

    @property
    def channels(self) -> int:
        return self.A.shape[0]

    @property
    def states(self) -> int:
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
        if self.offsets is None:
            return self.u.shape[0] * (max(self.u.shape[2] - 1, 0) // CHUNK)
        return self.u.shape[0] // CHUNK


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
        return _computed_in(self.x)

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
        packed = self.offsets is not None
        layout = "[T, d] (packed: offsets are given)" if packed else "[b, d, l]"
        require(self.x.dim() == (2 if packed else 3), "x", _got(self.x), layout)
        require(self.x.dtype in FLOATS, "x", str(self.x.dtype), "float32, float64, bfloat16 or float16")
        d = self.x.shape[1]
        right = self.weight.dim() == 2 and self.weight.shape[0] == d and self.weight.shape[1] > 0
        require(right, "weight", _got(self.weight), f"[d, width] with d = {d} as in x")
        require(self.weight.is_floating_point(), "weight", str(self.weight.dtype), "a real dtype")
        if self.bias is not None:
            require(self.bias.shape == (d,), "bias", _got(self.bias), f"[d] with d = {d} as in x")
        if self.seq_idx is not None:
            shape = [self.x.shape[0]] if packed else [self.x.shape[0], self.x.shape[2]]
            right = list(self.seq_idx.shape) == shape and self.seq_idx.dtype in (torch.int32, torch.int64)
            require(right, "seq_idx", _got(self.seq_idx), f"int32 or int64 {shape}")
        if self.offsets is not None:
            check_offsets(self.offsets)
        if self.initial_states is not None:
            shape = [self.segments, d, self.width - 1]
            got = _got(self.initial_states)
            require(list(self.initial_states.shape) == shape, "initial_states", got, f"[S, d, width - 1] = {shape}")
        check_device(
            self.x,
            weight=self.weight,
            bias=self.bias,
            seq_idx=self.seq_idx,
            initial_states=self.initial_states,
            offsets=self.offsets,
        )


@dataclass
class SSDProblem:
    """Arguments of a scan with one scalar decay a head; the order of the fields is the order of the op's arguments.

    x, z are [b, l, h, p], dt is [b, l, h] and B, C are [b, l, g, n]; with offsets [T, h, p], [T, h] and [T, g, n].
    """

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    initial_states: Tensor | None
    offsets: Tensor | None
    dt_softplus: bool
    dt_min: float
    dt_max: float
    chunk_size: int

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: float64 for float64 inputs, else float32."""
        return _computed_in(self.x)

    @property
    def segments(self) -> int:
        return self.x.shape[0] if self.offsets is None else self.offsets.shape[0] - 1

    @property
    def states(self) -> int:
        return self.B.shape[-1]

    def leaves(self) -> dict[str, Tensor]:
        """The tensors that have gradients, detached, ready to be differentiated."""
        names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")
        return {name: x.detach().requires_grad_() for name in names if (x := getattr(self, name)) is not None}

    def replaced(self, tensors: dict[str, Tensor]) -> "SSDProblem":
        return replace(self, **tensors)  # type: ignore[arg-type]

    def steps(self) -> Tensor:
        """Step sizes as they are used, shaped as dt."""
        dt = self.dt.to(self.dtype)
        if self.dt_bias is not None:
            dt = dt + self.dt_bias.to(self.dtype)
        if self.dt_softplus:
            dt = torch.nn.functional.softplus(dt)
        return dt.clamp(self.dt_min, self.dt_max)

    def finished(self, y: Tensor) -> Tensor:
        """The output from y = H C, shaped as x: skip connection and gate, in the dtype of x."""
        if self.D is not None:
            y = y + self.D.to(self.dtype).view(self.x.shape[-2], -1) * self.x.to(self.dtype)
        if self.z is not None:
            y = y * torch.nn.functional.silu(self.z.to(self.dtype))
        return y.to(self.x.dtype)

    def to_scan(self, x: Tensor) -> Tensor:
        """[b, l, h, p] as [b, d, l], or [T, h, p] as [T, d]."""
        return x.flatten(-2) if self.offsets is not None else x.flatten(-2).mT

    def from_scan(self, x: Tensor) -> Tensor:
        return (x if self.offsets is not None else x.mT).unflatten(-1, self.x.shape[-2:])

    def as_scan(self) -> ScanProblem:
        """The same as a scan of h * p channels."""
        heads, width = self.x.shape[-2:]
        x = self.x.to(self.dtype)
        delta = self.steps()[..., None].expand(x.shape)
        B, C = (
            c.to(self.dtype) if self.offsets is not None else c.to(self.dtype).permute(0, 2, 3, 1)
            for c in (self.B, self.C)
        )
        D = None
        if self.D is not None:
            D = self.D.to(self.dtype).view(heads, -1).expand(heads, width).flatten()
        return ScanProblem(
            u=self.to_scan(x),
            delta=self.to_scan(delta),
            A=self.A.to(self.dtype)[:, None].expand(heads, width).flatten()[:, None].expand(-1, self.states),
            B=B,
            C=C,
            D=D,
            z=None if self.z is None else self.to_scan(self.z.to(self.dtype)),
            delta_bias=None,
            initial_state=None if self.initial_states is None else self.initial_states.to(self.dtype).flatten(1, 2),
            offsets=self.offsets,
            delta_softplus=False,
        )

    def check(self) -> None:
        """Check what can be checked without reading values."""
        packed = self.offsets is not None
        lead = [self.x.shape[0]] if packed else list(self.x.shape[:2])
        layout = "[T, h, p] (packed: offsets are given)" if packed else "[b, l, h, p]"
        require(self.x.dim() == (3 if packed else 4), "x", _got(self.x), layout)
        require(self.x.dtype in FLOATS, "x", str(self.x.dtype), "float32, float64, bfloat16 or float16")
        heads, width = self.x.shape[-2:]
        require(list(self.dt.shape) == [*lead, heads], "dt", _got(self.dt), f"{[*lead, heads]}")
        require(self.A.shape == (heads,), "A", _got(self.A), f"[h] with h = {heads} as in x")
        for name, c in (("B", self.B), ("C", self.C)):
            right = c.dim() == len(lead) + 2 and list(c.shape[: len(lead)]) == lead
            require(right and c.shape[-1] > 0, name, _got(c), f"{lead} followed by g and n")
            right = c.shape[-2] > 0 and heads % c.shape[-2] == 0
            require(right, name, f"{c.shape[-2]} groups", f"a divisor of h = {heads}")
        require(self.C.shape == self.B.shape, "C", _got(self.C), f"the shape of B, {list(self.B.shape)}")
        if self.D is not None:
            right = self.D.shape in ((heads,), (heads, width))
            require(right, "D", _got(self.D), f"[h] or [h, p] with h = {heads}, p = {width}")
        if self.z is not None:
            require(self.z.shape == self.x.shape, "z", _got(self.z), f"the shape of x, {list(self.x.shape)}")
        if self.dt_bias is not None:
            require(self.dt_bias.shape == (heads,), "dt_bias", _got(self.dt_bias), f"[h] with h = {heads}")
        for name in ("dt", "B", "C", "z"):
            other = getattr(self, name)
            right = other is None or other.dtype == self.x.dtype or name == "dt"
            require(right, name, str(other is not None and other.dtype), f"the dtype of x, {self.x.dtype}")
        if self.offsets is not None:
            check_offsets(self.offsets)
        if self.initial_states is not None:
            shape = [self.segments, heads, width, self.states]
            got = _got(self.initial_states)
            require(list(self.initial_states.shape) == shape, "initial_states", got, f"[S, h, p, n] = {shape}")
        require(self.chunk_size > 0, "chunk_size", f"{self.chunk_size}", "at least 1")
        names = ("dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states", "offsets")
        check_device(self.x, **{name: getattr(self, name) for name in names})


def canonical(p: ScanProblem) -> ScanProblem:
    """Check what can be checked without reading values, and bring B and C into canonical form."""
    packed = p.offsets is not None
    layout = "[T, d] (packed: offsets are given)" if packed else "[b, d, l]"
    require(p.u.dim() == (2 if packed else 3), "u", _got(p.u), layout)
    require(p.u.dtype in FLOATS, "u", str(p.u.dtype), "float32, float64, bfloat16 or float16")
    channels = p.u.shape[1]
    for name in ("delta", "z"):
        x = getattr(p, name)
        if x is not None:
            require(x.shape == p.u.shape, name, _got(x), f"the shape of u, {list(p.u.shape)}")
            require(x.dtype == p.u.dtype, name, str(x.dtype), f"the dtype of u, {p.u.dtype}")
    require(p.A.dim() == 2 and p.A.shape[0] == channels, "A", _got(p.A), f"[d, n] with d = {channels} as in u")
    require(p.A.is_complex() or p.A.is_floating_point(), "A", str(p.A.dtype), "a real or complex dtype")
    require(p.A.shape[1] > 0, "A", _got(p.A), "at least one state")
    for name in ("D", "delta_bias"):
        x = getattr(p, name)
        if x is not None:
            require(x.shape == (channels,), name, _got(x), f"[d] with d = {channels} as in u")
            require(x.is_floating_point(), name, str(x.dtype), "a real dtype")
    if p.offsets is not None:
        check_offsets(p.offsets)
    p.B, p.C = _coefficient(p, "B"), _coefficient(p, "C")
    groups = {x.shape[1] for x in (p.B, p.C) if x.dim() > 2}
    require(len(groups) < 2, "C", f"{p.C.shape[1] if p.C.dim() > 2 else 1} groups", "as many groups as B has")
    if p.initial_state is not None:
        shape = (p.segments, channels, p.states)
        require(p.initial_state.shape == shape, "initial_state", _got(p.initial_state), f"[S, d, n] = {list(shape)}")
        real = p.initial_state.is_floating_point()
        wanted = "a complex dtype, because A is complex" if p.A.is_complex() else "a real dtype"
        right = p.initial_state.is_complex() if p.A.is_complex() else real
        require(right, "initial_state", str(p.initial_state.dtype), wanted)
    names = ("delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state", "offsets")
    check_device(p.u, **{name: getattr(p, name) for name in names})
    return p


def check_offsets(offsets: Tensor) -> None:
    """Check the form of packed offsets; their values are looked at when the op runs."""
    right = offsets.dim() == 1 and offsets.shape[0] > 0 and offsets.dtype in (torch.int32, torch.int64)
    require(right, "offsets", _got(offsets), "int32 or int64 [S + 1]")


def check_offset_values(offsets: Tensor | None, rows: int) -> None:
    """Check that offsets begin with 0, end with the number of rows and never fall; only where that costs no wait."""
    if offsets is None or offsets.device.type != "cpu":
        return
    first, last = int(offsets[0]), int(offsets[-1])
    require(first == 0, "offsets", f"first value {first}", "0")
    require(last == rows, "offsets", f"last value {last}", f"the number of rows, {rows}")
    falls = offsets[1:] < offsets[:-1]
    if bool(falls.any()):
        at = int(falls.nonzero()[0])
        raise ValueError(
            f"offsets: got {int(offsets[at + 1])} after {int(offsets[at])} at position {at + 1}, "
            "needs offsets that never fall"
        )


def check_device(u: Tensor, **others: Tensor | None) -> None:
    """Check that every tensor lives where the first argument lives."""
    for name, x in others.items():
        require(x is None or x.device == u.device, name, f"a tensor on {x is not None and x.device}", f"{u.device}")


def require(condition: bool, name: str, got: str, needs: str) -> None:
    """Raise the ValueError every check of the package raises: argument, what it got, what it needs."""
    if not condition:
        raise ValueError(f"{name}: got {got}, needs {needs}")


def _computed_in(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _got(x: Tensor) -> str:
    return f"{x.dtype} {list(x.shape)}"


def _coefficient(p: ScanProblem, name: str) -> Tensor:
    x: Tensor = getattr(p, name)
    d, n = p.A.shape
    packed = p.offsets is not None
    complex_dtype = p.state_dtype
    if packed:
        rows = p.u.shape[0]
        right = x.dim() in (2, 3) and x.shape[0] == rows and x.shape[-1] == n
        require(right, name, _got(x), f"[T, n] or [T, g, n] with T = {rows}, n = {n}")
        x = x.unsqueeze(1) if x.dim() == 2 else x
    elif x.dim() == 2:
        require(x.shape == (d, n), name, _got(x), f"[d, n] = [{d}, {n}] where constant, [b, n, l] or [b, g, n, l] else")
        require(p.A.is_complex() or x.is_floating_point(), name, str(x.dtype), "a real dtype")
        return x.to(complex_dtype) if p.A.is_complex() else x
    else:
        batch, length = p.u.shape[0], p.u.shape[2]
        # The established layout of a variable complex coefficient: real and imaginary parts alternate along the length.
        pairs = p.A.is_complex() and not x.is_complex()
        want = 2 * length if pairs else length
        right = x.dim() in (3, 4) and x.shape[0] == batch and x.shape[-2] == n and x.shape[-1] == want
        needs = f"[b, n, l] or [b, g, n, l] with b = {batch}, n = {n}, last size {want}"
        require(right, name, _got(x), needs + (" (real and imaginary parts alternate)" if pairs else ""))
        x = x.unsqueeze(1) if x.dim() == 3 else x
        if pairs:
            x = torch.view_as_complex(x.to(p.dtype).unflatten(-1, (length, 2)))
    require(x.shape[1] > 0 and d % x.shape[1] == 0, name, f"{x.shape[1]} groups", f"a divisor of d = {d}")
    if p.A.is_complex():
        return x.to(complex_dtype)
    require(x.dtype == p.u.dtype, name, str(x.dtype), f"the dtype of u, {p.u.dtype}")
    return x
