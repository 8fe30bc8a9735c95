"""What both Mamba blocks are to their users, and the parts they are both made of."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mamba_scan.checks import (
    check_device,
    check_offsets,
    check_optional_tensors,
    check_range,
    check_real,
    check_tensors,
    require,
)


class MambaState(NamedTuple):
    """What a block remembers of sequences.

    Mamba: conv [b, d, d_conv - 1] and ssm [b, d, n], d = expand * d_model. Mamba2: conv [b, d + 2 * g * n, d_conv - 1]
    and ssm [b, h, p, n].
    """

    conv: Tensor
    ssm: Tensor


class Block(nn.Module):
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
        self._check_input(x)
        check_optional_tensors(offsets=offsets)
        shape = "[T, d_model] (packed: offsets are given)" if offsets is not None else "[b, l, d_model]"
        right = x.dim() == (3 if offsets is None else 2) and x.shape[-1] == self.d_model
        require(right, "x", x, f"{shape} with d_model = {self.d_model}")
        if offsets is not None:
            check_offsets(offsets)
        conv_state, ssm_state = self._parts_of(state)
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

        Raises:
            ValueError: an argument breaks its contract.
        """
        self._check_input(x)
        require(x.dim() == 2 and x.shape[1] == self.d_model, "x", x, f"[b, {self.d_model}]")
        before = self._parts_of(self.init_state(x.shape[0]) if state is None else state)
        for part, name, sizes in zip(before, ("conv", "ssm"), self.state_shapes(x.shape[0]), strict=True):
            require(list(part.shape) == sizes, f"state.{name}", f"{list(part.shape)}", f"{sizes}")
        conv, ssm = (part.detach().clone() for part in before)
        return self._step(x, conv, ssm), MambaState(conv, ssm)

    def init_state(self, batch: int) -> MambaState:
        """Return the state of ``batch`` sequences (or segments) before their first token.

        Args:
            batch: how many sequences; 0 or more.

        Returns:
            Zeros of ``state_shapes``, in float32 or, for float64 parameters, float64, where the parameters are.
        """
        like = self.conv1d.weight
        dtype = torch.promote_types(like.dtype, torch.float32)
        return MambaState(*(torch.zeros(*shape, dtype=dtype, device=like.device) for shape in self.state_shapes(batch)))

    def state_shapes(self, batch: int) -> tuple[list[int], list[int]]:
        """Shapes of the two parts of a state of ``batch`` sequences.

        Args:
            batch: how many sequences.

        Returns:
            Shape of conv and shape of ssm, as ``MambaState`` has them.
        """
        raise NotImplementedError

    def _check_input(self, x: Tensor) -> None:
        check_tensors(x=x)
        check_real(x=x)
        dtype = self.conv1d.weight.dtype
        right = x.dtype == dtype or torch.is_autocast_enabled(x.device.type)
        require(right, "x", x, f"{dtype}, the dtype of the parameters")

    def _parts_of(self, state: Any) -> tuple[Any, Any]:
        """Both parts of a state, or None twice for none."""
        if state is None:
            return None, None
        right = isinstance(state, tuple | list) and len(state) == 2
        require(right, "state", state, "a MambaState, or conv and ssm")
        check_tensors(**{"state.conv": state[0], "state.ssm": state[1]})
        check_real(**{"state.conv": state[0], "state.ssm": state[1]})
        return state[0], state[1]

    def _run(
        self, x: Tensor, offsets: Tensor | None, conv_state: Tensor | None, ssm_state: Tensor | None
    ) -> tuple[Tensor, Any, Any]:
        """The output and, where a state was given, both new states."""
        raise NotImplementedError

    def _step(self, x: Tensor, conv: Tensor, ssm: Tensor) -> Tensor:
        """The output of one token each; the states are brought forward in place."""
        raise NotImplementedError


def short_conv1d(channels: int, width: int, bias: bool, made: dict[str, Any]) -> nn.Conv1d:
    """The convolution of a block, whose parameters are those of torch's.

    Args:
        channels: convolved each by itself.
        width: taps of a filter.
        bias: whether there is one.
        made: device and dtype of the parameters.
    """
    return nn.Conv1d(channels, channels, width, groups=channels, padding=width - 1, bias=bias, **made)


def at_least_float32(made: dict[str, Any]) -> dict[str, Any]:
    """Where and in what dtype the parameters live that half precision would spoil.

    Args:
        made: device and dtype of the other parameters.
    """
    return made | {"dtype": torch.float64 if made["dtype"] == torch.float64 else torch.float32}


def step_bias(count: int, low: float, high: float, floor: float, made: dict[str, Any]) -> Tensor:
    """Biases whose softplus is the first step sizes, which spread evenly, in logarithm, over low..high.

    Args:
        count: number of biases.
        low: smallest first step size, above 0.
        high: largest one.
        floor: no first step size is below this.
        made: device and dtype.

    Returns:
        [count], drawn from torch's generator.

    Raises:
        ValueError: low and high are no range above 0.
    """
    check_range("dt_min", (low, high), above=0.0)
    spread = torch.rand(count, **made) * (math.log(high) - math.log(low)) + math.log(low)
    dt = spread.exp().clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))


def inner_channels(expand: float, d_model: int) -> int:
    """expand * d_model, which must be whole.

    Args:
        expand: inner channels for each one of the model.
        d_model: width of the model.

    Raises:
        ValueError: expand is no positive number, or the product is not whole.
    """
    number = isinstance(expand, int | float) and not isinstance(expand, bool)
    right = number and expand > 0 and float(expand * d_model).is_integer()
    require(right, "expand", expand, f"a number whose product with d_model = {d_model} is whole")
    return int(expand * d_model)
