"""The block of Mamba-1, with the parameter names of the published one, so that its checkpoints load."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_scan.block import Block, at_least_float32, inner_channels, short_conv1d, step_bias
from mamba_scan.checks import check_counts, check_flags, require
from mamba_scan.dispatch import check_backend
from mamba_scan.ops import InnerProblem, inner
from mamba_scan.update import causal_conv1d_update, selective_state_update


class Mamba(Block):
    """Map a sequence to a sequence: in-projection, short causal convolution, selective scan, gate, out-projection.

    Args:
        d_model: width of input and output.
        d_state: states of each channel, n.
        d_conv: width of the convolution.
        expand: inner channels d = expand * d_model, a whole number.
        dt_rank: rank of the step size's projection; "auto" for ceil(d_model / 16).
        dt_min: smallest step size at the start.
        dt_max: largest step size at the start.
        dt_init: initial weights of the step projection: "random", uniform within dt_scale / sqrt(dt_rank) of zero, or
            "constant", that number.
        dt_scale: scale of the step projection's initial weights.
        dt_init_floor: floor of the initial step sizes.
        conv_bias: whether the convolution has a bias.
        bias: whether in- and out-projection have biases.
        use_fast_path: as published; every path here is the fused one, and the results are the same.
        layer_idx: the block's number in a model, kept as an attribute.
        backend: as for ``selective_scan``.
        device: of the parameters.
        dtype: of the parameters; A_log and D stay float32 at the least.

    Raises:
        ValueError: an option has no sense; the message names it.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), section 3.4.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_backend(backend)
        check_counts(d_model=d_model, d_state=d_state, d_conv=d_conv)
        check_flags(conv_bias=conv_bias, bias=bias, use_fast_path=use_fast_path)
        require(dt_rank == "auto" or not isinstance(dt_rank, str), "dt_rank", repr(dt_rank), '"auto" or a whole number')
        require(dt_init in ("random", "constant"), "dt_init", repr(dt_init), '"random" or "constant"')
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = inner_channels(expand, d_model)
        self.dt_rank = math.ceil(d_model / 16) if isinstance(dt_rank, str) else dt_rank
        check_counts(dt_rank=self.dt_rank)
        self.layer_idx, self.backend = layer_idx, backend
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        exact = at_least_float32(made)
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **made)
        self.conv1d = short_conv1d(self.d_inner, d_conv, conv_bias, made)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **made)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, **made)
        self.A_log = nn.Parameter(torch.arange(1, d_state + 1, **exact).repeat(self.d_inner, 1).log())
        self.D = nn.Parameter(torch.ones(self.d_inner, **exact))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **made)
        bound = dt_scale * self.dt_rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, bound if dt_init == "constant" else -bound, bound)
        with torch.no_grad():
            self.dt_proj.bias.copy_(step_bias(self.d_inner, dt_min, dt_max, dt_init_floor, exact))

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
        """Shapes of the two parts of a state of ``batch`` sequences.

        Args:
            batch: how many sequences.

        Returns:
            conv [batch, d, d_conv - 1] and ssm [batch, d, n].
        """
        return [batch, self.d_inner, self.d_conv - 1], [batch, self.d_inner, self.d_state]
