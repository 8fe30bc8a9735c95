"""The Mamba blocks, with the parameter names of the published ones, so that their checkpoints load."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_scan.api import causal_conv1d, ssd_scan
from mamba_scan.checks import check_device, check_offsets, require
from mamba_scan.ops import InnerProblem, inner
from mamba_scan.update import causal_conv1d_update, selective_state_update


class MambaState(NamedTuple):
    """What a block remembers of sequences.

    Mamba: conv [b, d, d_conv - 1] and ssm [b, d, n], d = expand * d_model. Mamba2: conv [b, d + 2 * g * n, d_conv - 1]
    and ssm [b, h, p, n].
    """

    conv: Tensor
    ssm: Tensor


class _Block(nn.Module):
    """What both blocks are to their users; ``_run`` and ``_step`` are what they are inside."""

    d_model: int
    conv1d: nn.Conv1d

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
        require(right, "x", f"{list(x.shape)}", f"{shape} with d_model = {self.d_model}")
        if offsets is not None:
            check_offsets(offsets)
        conv_state, ssm_state = (None, None) if state is None else (state[0], state[1])
        wanted = self.state_shapes(x.shape[0] if offsets is None else offsets.shape[0] - 1)
        for part, name, sizes in zip((conv_state, ssm_state), ("conv", "ssm"), wanted, strict=True):
            got = "" if part is None else f"{list(part.shape)}"
            require(part is None or list(part.shape) == sizes, f"state.{name}", got, f"{sizes}")
        check_device(x, offsets=offsets, **{"state.conv": conv_state, "state.ssm": ssm_state})
        out, conv, ssm = self._run(x, offsets, conv_state, ssm_state)
        return out if state is None else (out, MambaState(conv, ssm))

    def step(self, x: Tensor, state: MambaState | tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, MambaState]:
        """Advance a batch of sequences by one token each, for inference.

        Args:
            x: [b, d_model].
            state: after the tokens before; None at the start.

        Returns:
            (out [b, d_model], the state after this token). The state given is left as it was.
        """
        require(x.dim() == 2 and x.shape[1] == self.d_model, "x", f"{list(x.shape)}", f"[b, {self.d_model}]")
        before = self.init_state(x.shape[0]) if state is None else state
        conv, ssm = (part.detach().clone() for part in before)
        return self._step(x, conv, ssm), MambaState(conv, ssm)

    def init_state(self, batch: int) -> MambaState:
        """Return the state of ``batch`` sequences (or segments) before their first token."""
        like = self.conv1d.weight
        dtype = torch.promote_types(like.dtype, torch.float32)
        return MambaState(*(torch.zeros(*shape, dtype=dtype, device=like.device) for shape in self.state_shapes(batch)))

    def state_shapes(self, batch: int) -> tuple[list[int], list[int]]:
        """Shapes of the two parts of a state of ``batch`` sequences."""
        raise NotImplementedError

    def _run(
        self, x: Tensor, offsets: Tensor | None, conv_state: Tensor | None, ssm_state: Tensor | None
    ) -> tuple[Tensor, Any, Any]:
        """The output and, where a state was given, both new states."""
        raise NotImplementedError

    def _step(self, x: Tensor, conv: Tensor, ssm: Tensor) -> Tensor:
        """The output of one token each; the states are brought forward in place."""
        raise NotImplementedError


class Mamba(_Block):
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
        exact = _at_least_float32(made)
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **made)
        self.conv1d = _conv1d(self.d_inner, d_conv, conv_bias, made)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **made)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, **made)
        self.A_log = nn.Parameter(torch.arange(1, d_state + 1, **exact).repeat(self.d_inner, 1).log())
        self.D = nn.Parameter(torch.ones(self.d_inner, **exact))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **made)
        bound = dt_scale * self.dt_rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        with torch.no_grad():
            self.dt_proj.bias.copy_(_step_bias(self.d_inner, dt_min, dt_max, dt_init_floor, exact))

    def _run(
        self, x: Tensor, offsets: Tensor | None, conv_state: Tensor | None, ssm_state: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
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
        return inner(problem, self.backend, conv_state is not None)

    def _step(self, x: Tensor, conv: Tensor, ssm: Tensor) -> Tensor:
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = causal_conv1d_update(u, conv, self.conv1d.weight.squeeze(1), self.conv1d.bias, "silu", backend=self.backend)
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        dt = F.linear(dt, self.dt_proj.weight)
        A = -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))
        y = selective_state_update(
            ssm, u, dt, A, B, C, self.D, z, self.dt_proj.bias, dt_softplus=True, backend=self.backend
        )
        return self.out_proj(y)

    def state_shapes(self, batch: int) -> tuple[list[int], list[int]]:
        """Shapes of the two parts of a state of ``batch`` sequences."""
        return [batch, self.d_inner, self.d_conv - 1], [batch, self.d_inner, self.d_state]


class Mamba2(_Block):
    """Map a sequence to a sequence as Mamba-2 does: heads with scalar decays, one in-projection, a gated RMS norm.

    Args:
        d_model: width of input and output.
        d_state: states, n.
        d_conv: width of the convolution.
        expand: inner channels d = expand * d_model.
        headdim: width of a head, p; d must be a multiple of it.
        ngroups: groups of heads that share B and C.
        A_init_range: range of the initial decay rates.
        dt_min: smallest step size at the start.
        dt_max: largest step size at the start.
        dt_init_floor: floor of the initial step sizes.
        dt_limit: smallest and largest step size ever.
        conv_bias: whether the convolution has a bias.
        bias: whether in- and out-projection have biases.
        chunk_size: as for ``ssd_scan``.
        backend: as for ``selective_scan``.
        device: of the parameters.
        dtype: of the parameters; A_log, D and dt_bias stay float32 at the least.

    Source: Dao and Gu, "Transformers are SSMs" (2024), section 7.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1.0, 16.0),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        conv_bias: bool = True,
        bias: bool = False,
        chunk_size: int = 64,
        *,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner, self.headdim, self.ngroups = expand * d_model, headdim, ngroups
        require(self.d_inner % headdim == 0, "headdim", str(headdim), f"a divisor of expand * d_model = {self.d_inner}")
        self.nheads = self.d_inner // headdim
        require(self.nheads % ngroups == 0, "ngroups", str(ngroups), f"a divisor of the {self.nheads} heads")
        self.dt_limit, self.chunk_size, self.backend = dt_limit, chunk_size, backend
        self.conv_channels = self.d_inner + 2 * ngroups * d_state
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        exact = _at_least_float32(made)
        self.in_proj = nn.Linear(d_model, self.d_inner + self.conv_channels + self.nheads, bias=bias, **made)
        self.conv1d = _conv1d(self.conv_channels, d_conv, conv_bias, made)
        self.dt_bias = nn.Parameter(_step_bias(self.nheads, dt_min, dt_max, dt_init_floor, exact))
        self.A_log = nn.Parameter(torch.empty(self.nheads, **exact).uniform_(*A_init_range).log())
        self.D = nn.Parameter(torch.ones(self.nheads, **exact))
        self.norm = _GatedRMSNorm(self.d_inner, self.d_inner // ngroups, **made)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **made)

    def _run(
        self, x: Tensor, offsets: Tensor | None, conv_state: Tensor | None, ssm_state: Tensor | None
    ) -> tuple[Tensor, Any, Any]:
        z, xBC, dt = self.in_proj(x).split([self.d_inner, self.conv_channels, self.nheads], dim=-1)
        mixed = causal_conv1d(
            xBC if offsets is not None else xBC.mT,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            initial_states=conv_state,
            return_final_states=conv_state is not None,
            activation="silu",
            offsets=offsets,
            backend=self.backend,
        )
        mixed, conv = mixed if isinstance(mixed, tuple) else (mixed, None)
        u, B, C = self._parts(mixed if offsets is not None else mixed.mT)
        y = ssd_scan(
            u,
            dt,
            -torch.exp(self.A_log),
            B,
            C,
            self.chunk_size,
            self.D,
            None,
            self.dt_bias,
            ssm_state,
            True,
            self.dt_limit,
            ssm_state is not None,
            offsets=offsets,
            backend=self.backend,
        )
        y, ssm = y if isinstance(y, tuple) else (y, None)
        return self.out_proj(self.norm(y.flatten(-2), z)), conv, ssm

    def _step(self, x: Tensor, conv: Tensor, ssm: Tensor) -> Tensor:
        z, xBC, dt = self.in_proj(x).split([self.d_inner, self.conv_channels, self.nheads], dim=-1)
        mixed = causal_conv1d_update(
            xBC, conv, self.conv1d.weight.squeeze(1), self.conv1d.bias, "silu", backend=self.backend
        )
        u, B, C = self._parts(mixed)
        # The limits apply after softplus, so the step does both here.
        steps = F.softplus(dt.to(ssm.dtype) + self.dt_bias).clamp(*self.dt_limit)

        def spread(t: Tensor) -> Tensor:
            return t[..., None].expand(*t.shape, self.headdim)

        A = spread(-torch.exp(self.A_log))[..., None].expand(-1, -1, self.d_state)
        y = selective_state_update(ssm, u.to(ssm.dtype), spread(steps), A, B, C, spread(self.D), backend=self.backend)
        return self.out_proj(self.norm(y.to(z.dtype).flatten(-2), z))

    def state_shapes(self, batch: int) -> tuple[list[int], list[int]]:
        """Shapes of the two parts of a state of ``batch`` sequences."""
        return [batch, self.conv_channels, self.d_conv - 1], [batch, self.nheads, self.headdim, self.d_state]

    def _parts(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        states = self.ngroups * self.d_state
        u, B, C = mixed.split([self.d_inner, states, states], dim=-1)
        B, C = (t.unflatten(-1, (self.ngroups, self.d_state)) for t in (B, C))
        return u.unflatten(-1, (self.nheads, self.headdim)), B, C


class _GatedRMSNorm(nn.Module):
    """weight * rms_norm(y * silu(z)), each group of channels by its own root mean square."""

    def __init__(self, channels: int, group: int, **made: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, **made))
        self.group = group

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        wide = torch.promote_types(y.dtype, torch.float32)
        gated = (y.to(wide) * F.silu(z.to(wide))).unflatten(-1, (-1, self.group))
        return F.rms_norm(gated, (self.group,), eps=1e-5).flatten(-2).to(z.dtype) * self.weight.to(z.dtype)


def _conv1d(channels: int, width: int, bias: bool, made: dict[str, Any]) -> nn.Conv1d:
    return nn.Conv1d(channels, channels, width, groups=channels, padding=width - 1, bias=bias, **made)


def _at_least_float32(made: dict[str, Any]) -> dict[str, Any]:
    return made | {"dtype": torch.float64 if made["dtype"] == torch.float64 else torch.float32}


def _step_bias(count: int, low: float, high: float, floor: float, made: dict[str, Any]) -> Tensor:
    """Biases whose softplus is the first step sizes, which spread evenly, in logarithm, over low..high."""
    spread = torch.rand(count, **made) * (math.log(high) - math.log(low)) + math.log(low)
    dt = spread.exp().clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))
