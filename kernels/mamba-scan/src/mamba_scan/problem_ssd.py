"""One scan with scalar decays as every backend sees it, and the checks of its contract."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mamba_scan.checks import (
    FLOATS,
    INTEGERS,
    check_counts,
    check_device,
    check_offsets,
    check_optional_tensors,
    check_real,
    check_tensors,
    require,
)
from mamba_scan.problem import ScanProblem, computed_in


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
    seq_idx: Tensor | None
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
        return computed_in(self.x)

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
        """The same problem with other tensors under these names."""
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
        """The output from y = H C, shaped as x: skip connection and gate, in the dtype of x.

        Args:
            y: H C, shaped as x.
        """
        if self.D is not None:
            y = y + self.D.to(self.dtype).view(self.x.shape[-2], -1) * self.x.to(self.dtype)
        if self.z is not None:
            y = y * torch.nn.functional.silu(self.z.to(self.dtype))
        return y.to(self.x.dtype)

    def to_scan(self, x: Tensor) -> Tensor:
        """[b, l, h, p] as [b, d, l], or [T, h, p] as [T, d]."""
        return x.flatten(-2) if self.offsets is not None else x.flatten(-2).mT

    def from_scan(self, x: Tensor) -> Tensor:
        """The inverse of ``to_scan``: shaped as x."""
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
        """Check what can be checked without reading values.

        Raises:
            ValueError: an argument breaks its contract; the message names it, what it got and what it needs.
        """
        check_tensors(x=self.x, dt=self.dt, A=self.A, B=self.B, C=self.C)
        optional = {name: getattr(self, name) for name in ("D", "z", "dt_bias", "initial_states")}
        check_optional_tensors(**optional, offsets=self.offsets, seq_idx=self.seq_idx)
        check_real(dt=self.dt, A=self.A, **optional)
        packed = self.offsets is not None
        lead = [self.x.shape[0]] if packed else list(self.x.shape[:2])
        layout = "[T, h, p] (packed: offsets are given)" if packed else "[b, l, h, p]"
        require(self.x.dim() == (3 if packed else 4), "x", self.x, layout)
        require(self.x.dtype in FLOATS, "x", str(self.x.dtype), "float32, float64, bfloat16 or float16")
        heads, width = self.x.shape[-2:]
        require(list(self.dt.shape) == [*lead, heads], "dt", self.dt, f"{[*lead, heads]}")
        require(self.A.shape == (heads,), "A", self.A, f"[h] with h = {heads} as in x")
        for name, c in (("B", self.B), ("C", self.C)):
            right = c.dim() == len(lead) + 2 and list(c.shape[: len(lead)]) == lead
            require(right and c.shape[-1] > 0, name, c, f"{lead} followed by g and n")
            right = c.shape[-2] > 0 and heads % c.shape[-2] == 0
            require(right, name, f"{c.shape[-2]} groups", f"a divisor of h = {heads}")
        require(self.C.shape == self.B.shape, "C", self.C, f"the shape of B, {list(self.B.shape)}")
        if self.D is not None:
            right = self.D.shape in ((heads,), (heads, width))
            require(right, "D", self.D, f"[h] or [h, p] with h = {heads}, p = {width}")
        if self.z is not None:
            require(self.z.shape == self.x.shape, "z", self.z, f"the shape of x, {list(self.x.shape)}")
        if self.dt_bias is not None:
            require(self.dt_bias.shape == (heads,), "dt_bias", self.dt_bias, f"[h] with h = {heads}")
        for name in ("dt", "B", "C", "z"):
            other = getattr(self, name)
            right = other is None or other.dtype == self.x.dtype or name == "dt"
            require(right, name, str(other is not None and other.dtype), f"the dtype of x, {self.x.dtype}")
        if self.offsets is not None:
            check_offsets(self.offsets)
        if self.initial_states is not None:
            shape = [self.segments, heads, width, self.states]
            got = self.initial_states
            require(list(self.initial_states.shape) == shape, "initial_states", got, f"[S, h, p, n] = {shape}")
        if self.seq_idx is not None:
            right = list(self.seq_idx.shape) == lead and self.seq_idx.dtype in INTEGERS
            require(right, "seq_idx", self.seq_idx, f"int32 or int64 {lead}")
        check_counts(chunk_size=self.chunk_size)
        names = ("dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states", "offsets", "seq_idx")
        check_device(self.x, **{name: getattr(self, name) for name in names})
