"""The Mamba block, with the parameter names of the published one, so that its checkpoints load."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_scan.api import causal_conv1d_update, selective_state_update
from mamba_scan.fused import InnerProblem, inner
from mamba_scan.problem import check_device, check_offsets, require


class MambaState(NamedTuple):
    """What a block remembers of sequences: conv [b, d, d_conv - 1] and ssm [b, d, n], d = expand * d_model."""

    conv: Tensor
    ssm: Tensor


class Mamba(nn.Module):
    """Map a sequence to a sequence: in-projection, short causal convolution, selective scan, gate, out-projection.

    Args:
        d_model: width of input and output.
        d_state: states of each channel, n.
        d_conv: width of the convolution.
        expand: inner channels d = expand * d_model.
        dt_rank: rank of the step size's projection; "auto" for ceil(d_model / 16).
        dt_min: smallest step size at the start.
        dt_max: largest step size at the start.
        dt_scale: scale of the step projection's initial weights.
        dt_init_floor: floor of the initial step sizes.
        conv_bias: whether the convolution has a bias.
        bias: whether in- and out-projection have biases.
        backend: as for ``selective_scan``.
        device: of the parameters.
        dtype: of the parameters; A_log and D stay float32 at the least.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), section 3.4.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        *,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = expand * d_model
        self.dt_rank = math.ceil(d_model / 16) if isinstance(dt_rank, str) else dt_rank
        self.backend = backend
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        at_least_float32 = torch.float64 if dtype == torch.float64 else torch.float32
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **made)
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1, bias=conv_bias, **made
        )
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **made)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, **made)
        A = torch.arange(1, d_state + 1, dtype=at_least_float32, device=device).repeat(self.d_inner, 1)
        self.A_log = nn.Parameter(A.log())
        self.D = nn.Parameter(torch.ones(self.d_inner, dtype=at_least_float32, device=device))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **made)
        bound = dt_scale * self.dt_rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        # Biases whose softplus spreads the first step sizes evenly, in logarithm, over dt_min..dt_max.
        spread = torch.rand(self.d_inner, device=device) * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min)
        dt = spread.exp().clamp(min=dt_init_floor)
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))

    def forward(
        self, x: Tensor, offsets: Tensor | None = None, state: MambaState | tuple[Tensor, Tensor] | None = None
    ) -> Tensor | tuple[Tensor, MambaState]:
        """Map sequences to sequences; given a state, continue from it and return the new one too.

        Args:
            x: [b, l, d_model], or packed [T, d_model] when offsets are given.
            offsets: int32 or int64 [S + 1]; segment s is the rows offsets[s]..offsets[s + 1].
            state: what came before each sequence; ``init_state`` makes the one of nothing.

        Returns:
            out, shaped as x; with a state, (out, new state). Gradients flow through both states.

        Raises:
            ValueError: an argument breaks its contract.
        """
        shape = "[T, d_model] (packed: offsets are given)" if offsets is not None else "[b, l, d_model]"
        right = x.dim() == (3 if offsets is None else 2) and x.shape[-1] == self.d_model
        require(right, "x", str(list(x.shape)), f"{shape} with d_model = {self.d_model}")
        if offsets is not None:
            check_offsets(offsets)
        conv_state, ssm_state = (None, None) if state is None else state
        segments = x.shape[0] if offsets is None else offsets.shape[0] - 1
        for part, name, last in ((conv_state, "conv", self.d_conv - 1), (ssm_state, "ssm", self.d_state)):
            wanted = [segments, self.d_inner, last]
            got = "" if part is None else str(list(part.shape))
            require(part is None or list(part.shape) == wanted, f"state.{name}", got, str(wanted))
        check_device(x, offsets=offsets, **{"state.conv": conv_state, "state.ssm": ssm_state})
        xz = self.in_proj(x)
        problem = InnerProblem(
            xz,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            # Under autocast the activations are narrower than the weights.
            self.x_proj.weight.to(xz.dtype),
            self.dt_proj.weight.to(xz.dtype),
            self.dt_proj.bias,
            -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32))),
            self.D,
            self.out_proj.weight.to(xz.dtype),
            None if self.out_proj.bias is None else self.out_proj.bias.to(xz.dtype),
            conv_state,
            ssm_state,
            offsets,
        )
        out, conv, ssm = inner(problem, self.backend)
        return out if state is None else (out, MambaState(conv, ssm))

    def step(self, x: Tensor, state: MambaState | tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, MambaState]:
        """Advance a batch of sequences by one token each, for inference.

        Args:
            x: [b, d_model].
            state: after the tokens before; None at the start.

        Returns:
            (out [b, d_model], the state after this token). The state given is left as it was.
        """
        require(x.dim() == 2 and x.shape[1] == self.d_model, "x", str(list(x.shape)), f"[b, {self.d_model}]")
        before = self.init_state(x.shape[0]) if state is None else state
        conv, ssm = (part.detach().clone() for part in before)
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = causal_conv1d_update(u, conv, self.conv1d.weight.squeeze(1), self.conv1d.bias, "silu", backend=self.backend)
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        dt = F.linear(dt, self.dt_proj.weight)
        A = -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))
        y = selective_state_update(
            ssm, u, dt, A, B, C, self.D, z, self.dt_proj.bias, dt_softplus=True, backend=self.backend
        )
        return self.out_proj(y), MambaState(conv, ssm)

    def init_state(self, batch: int) -> MambaState:
        """Return the state of ``batch`` sequences (or segments) before their first token."""
        weight = self.conv1d.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return MambaState(
            torch.zeros(batch, self.d_inner, self.d_conv - 1, dtype=dtype, device=weight.device),
            torch.zeros(batch, self.d_inner, self.d_state, dtype=dtype, device=weight.device),
        )
