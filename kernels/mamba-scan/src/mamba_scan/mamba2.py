"""The block of Mamba-2, with the parameter names of the published one, so that its checkpoints load."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_scan.api import causal_conv1d, ssd_scan
from mamba_scan.block import Block, at_least_float32, inner_channels, short_conv1d, step_bias
from mamba_scan.checks import check_counts, check_flags, check_range, require
from mamba_scan.dispatch import check_backend
from mamba_scan.update import causal_conv1d_update, selective_state_update


class Mamba2(Block):
    """Map a sequence to a sequence as Mamba-2 does: heads with scalar decays, one in-projection, a gated RMS norm.

    Args:
        d_model: width of input and output.
        d_state: states, n.
        d_conv: width of the convolution.
        conv_init: initial weights of the convolution are uniform within this of zero; None for torch's own.
        expand: inner channels d = expand * d_model, a whole number.
        headdim: width of a head, p; the channels scanned must be a multiple of it.
        d_ssm: how many of the inner channels are scanned, all by default; the others are a gated linear unit.
        ngroups: groups of heads that share B and C, and of channels that are normed together.
        A_init_range: range of the initial decay rates.
        D_has_hdim: whether the skip connection has a weight for every channel instead of one for every head.
        rmsnorm: whether the scan's output is normed; without it the scan itself is gated.
        norm_before_gate: norm(y) * silu(z) instead of norm(y * silu(z)).
        dt_min: smallest step size at the start.
        dt_max: largest step size at the start.
        dt_init_floor: floor of the initial step sizes.
        dt_limit: smallest and largest step size ever.
        bias: whether in- and out-projection have biases.
        conv_bias: whether the convolution has a bias.
        chunk_size: as for ``ssd_scan``.
        use_mem_eff_path: as published; there is one path, and the results are the same.
        layer_idx: the block's number in a model, kept as an attribute.
        process_group: None: a block is not spread over processes.
        sequence_parallel: as published; without a process group it means nothing.
        backend: as for ``selective_scan``.
        device: of the parameters.
        dtype: of the parameters; A_log, D and dt_bias stay float32 at the least.

    Raises:
        ValueError: an option has no sense or is not supported; the message names it.

    Source: Dao and Gu, "Transformers are SSMs" (2024), section 7.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: float = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1.0, 16.0),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 64,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group: None = None,
        sequence_parallel: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_backend(backend)
        check_counts(d_model=d_model, d_state=d_state, d_conv=d_conv, headdim=headdim, ngroups=ngroups)
        check_counts(chunk_size=chunk_size)
        check_flags(D_has_hdim=D_has_hdim, rmsnorm=rmsnorm, norm_before_gate=norm_before_gate, bias=bias)
        check_flags(conv_bias=conv_bias, use_mem_eff_path=use_mem_eff_path, sequence_parallel=sequence_parallel)
        require(process_group is None, "process_group", process_group, "None: one process holds a block")
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner, self.headdim, self.ngroups = inner_channels(expand, d_model), headdim, ngroups
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        check_counts(d_ssm=self.d_ssm)
        require(self.d_ssm <= self.d_inner, "d_ssm", str(d_ssm), f"at most expand * d_model = {self.d_inner}")
        fits = self.d_ssm % headdim == 0
        require(fits or d_ssm is not None, "headdim", str(headdim), f"a divisor of expand * d_model = {self.d_inner}")
        require(fits, "d_ssm", str(d_ssm), f"a multiple of headdim = {headdim}")
        self.nheads = self.d_ssm // headdim
        require(self.nheads % ngroups == 0, "ngroups", str(ngroups), f"a divisor of the {self.nheads} heads")
        self.dt_limit = check_range("dt_limit", dt_limit)
        self.D_has_hdim, self.chunk_size, self.layer_idx, self.backend = D_has_hdim, chunk_size, layer_idx, backend
        self.conv_channels = self.d_ssm + 2 * ngroups * d_state
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        exact = at_least_float32(made)
        projected = 2 * self.d_inner - self.d_ssm + self.conv_channels + self.nheads
        self.in_proj = nn.Linear(d_model, projected, bias=bias, **made)
        self.conv1d = short_conv1d(self.conv_channels, d_conv, conv_bias, made)
        if conv_init is not None:
            check_range("conv_init", (0.0, conv_init))
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        self.dt_bias = nn.Parameter(step_bias(self.nheads, dt_min, dt_max, dt_init_floor, exact))
        decay = check_range("A_init_range", A_init_range, above=0.0)
        self.A_log = nn.Parameter(torch.empty(self.nheads, **exact).uniform_(*decay).log())
        self.D = nn.Parameter(torch.ones(self.d_ssm if D_has_hdim else self.nheads, **exact))
        norm = _GatedRMSNorm(self.d_ssm, self.d_ssm // ngroups, norm_before_gate, **made) if rmsnorm else None
        self.norm = norm
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **made)

    def _run(
        self, x: Tensor, offsets: Tensor | None, conv_state: Tensor | None, ssm_state: Tensor | None
    ) -> tuple[Tensor, Any, Any]:
        rest, z, xBC, dt = self._split(self.in_proj(x))
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
            self._skip(),
            None if self.norm is not None else z.unflatten(-1, (self.nheads, self.headdim)),
            self.dt_bias,
            ssm_state,
            True,
            self.dt_limit,
            ssm_state is not None,
            offsets=offsets,
            backend=self.backend,
        )
        y, ssm = y if isinstance(y, tuple) else (y, None)
        return self._finished(y.flatten(-2), z, rest), conv, ssm

    def _step(self, x: Tensor, conv: Tensor, ssm: Tensor) -> Tensor:
        rest, z, xBC, dt = self._split(self.in_proj(x))
        mixed = causal_conv1d_update(
            xBC, conv, self.conv1d.weight.squeeze(1), self.conv1d.bias, "silu", backend=self.backend
        )
        u, B, C = self._parts(mixed)
        # The limits apply after softplus, so the step does both here.
        steps = F.softplus(dt.to(ssm.dtype) + self.dt_bias).clamp(*self.dt_limit)

        def spread(t: Tensor) -> Tensor:
            return t[..., None].expand(*t.shape, self.headdim)

        A = spread(-torch.exp(self.A_log))[..., None].expand(-1, -1, self.d_state)
        D = self._skip()
        D = spread(D) if D.dim() == 1 else D
        gate = None if self.norm is not None else z.unflatten(-1, (self.nheads, self.headdim))
        y = selective_state_update(ssm, u.to(ssm.dtype), spread(steps), A, B, C, D, gate, backend=self.backend)
        return self._finished(y.to(z.dtype).flatten(-2), z, rest)

    def state_shapes(self, batch: int) -> tuple[list[int], list[int]]:
        """Shapes of the two parts of a state of ``batch`` sequences.

        Args:
            batch: how many sequences.

        Returns:
            conv [batch, d_ssm + 2 * g * n, d_conv - 1] and ssm [batch, h, p, n].
        """
        return [batch, self.conv_channels, self.d_conv - 1], [batch, self.nheads, self.headdim, self.d_state]

    def _split(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What is not scanned, the gate, what is convolved, and the step sizes."""
        sizes = [2 * (self.d_inner - self.d_ssm), self.d_ssm, self.conv_channels, self.nheads]
        rest, z, xBC, dt = projected.split(sizes, dim=-1)
        return rest, z, xBC, dt

    def _skip(self) -> Tensor:
        return self.D.view(self.nheads, self.headdim) if self.D_has_hdim else self.D

    def _finished(self, y: Tensor, z: Tensor, rest: Tensor) -> Tensor:
        y = y if self.norm is None else self.norm(y, z)
        if rest.shape[-1]:
            gate, value = rest.chunk(2, dim=-1)
            y = torch.cat([F.silu(gate) * value, y], dim=-1)
        return self.out_proj(y)

    def _parts(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        states = self.ngroups * self.d_state
        u, B, C = mixed.split([self.d_ssm, states, states], dim=-1)
        B, C = (t.unflatten(-1, (self.ngroups, self.d_state)) for t in (B, C))
        return u.unflatten(-1, (self.nheads, self.headdim)), B, C


class _GatedRMSNorm(nn.Module):
    """weight * rms_norm(y * silu(z)), or before the gate weight * rms_norm(y) * silu(z); each group by itself."""

    def __init__(self, channels: int, group: int, before_gate: bool, **made: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, **made))
        self.group, self.before_gate = group, before_gate

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        wide = torch.promote_types(y.dtype, torch.float32)
        gate, y = F.silu(z.to(wide)), y.to(wide)
        y = (y if self.before_gate else y * gate).unflatten(-1, (-1, self.group))
        y = F.rms_norm(y, (self.group,), eps=1e-5).flatten(-2) * self.weight.to(wide)
        return (y * gate if self.before_gate else y).to(z.dtype)
