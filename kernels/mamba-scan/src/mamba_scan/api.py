"""The public functions: contract, checks, choice of backend."""

import torch
from torch import Tensor

from mamba_scan import ops
from mamba_scan.checks import (
    check_counts,
    check_flags,
    check_offset_values,
    check_offsets,
    check_optional_tensors,
    check_range,
    check_tensors,
    require,
)
from mamba_scan.dispatch import check_backend
from mamba_scan.problem import ConvProblem, ScanProblem, canonical
from mamba_scan.problem_ssd import SSDProblem


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    offsets: Tensor | None = None,
    initial_state: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the selective scan of Mamba over a batch of sequences, or over packed segments of any lengths.

    With dt = softplus(delta + delta_bias): h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t; y_t = <C_t, h_t> + D u_t;
    out_t = y_t * silu(z_t). Every tensor argument has a gradient, and so has the last state.

    Args:
        u: input [b, d, l], or packed [T, d] when offsets are given; float32, float64, bfloat16 or float16. Any strides.
        delta: step sizes, shaped as u and in its dtype.
        A: [d, n], real or complex.
        B: constant [d, n] or variable [b, n, l] or [b, g, n, l], g a divisor of d; packed [T, n] or [T, g, n]. For a
            complex A, a real variable B holds real and imaginary parts in turn, [..., 2 * l], unless it is complex.
        C: like B.
        D: skip connection [d].
        z: gate, shaped as u and in its dtype.
        delta_bias: [d], added to delta.
        delta_softplus: whether the steps go through softplus (the identity above 20).
        return_last_state: whether to return the state after each sequence as well.
        offsets: int32 or int64 [S + 1]; segment s is the rows offsets[s]..offsets[s + 1]. Empty segments are allowed.
        initial_state: [b, d, n], or [S, d, n] when packed; zero by default.
        backend: "reference", "cpu", "triton" or "cuda"; None picks the fastest that can run these tensors.

    Returns:
        out, shaped as u and in its dtype; with return_last_state also last_state [b or S, d, n] in the dtype of the
        computation: float32 (float64 for float64 inputs), complex if A is complex.

    Raises:
        ValueError: an argument breaks its contract; the message names it, what it got and what it needs.
        RuntimeError: the backend asked for cannot run on this machine; the message says why.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), algorithm 2.
    """
    check_backend(backend)
    check_flags(delta_softplus=delta_softplus, return_last_state=return_last_state)
    p = canonical(ScanProblem(u, delta, A, B, C, D, z, delta_bias, initial_state, offsets, delta_softplus))
    out, last = ops.scan(p, backend, return_last_state)
    return (out, last) if return_last_state else out


selective_scan_fn = selective_scan


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
    *,
    offsets: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve every channel with its own filter over its own past, in a batch or in packed segments.

    y_t = bias + sum over k of weight[:, width - 1 - k] * x_{t-k}, then the activation. Every tensor argument has a
    gradient, and so have the final states.

    Args:
        x: [b, d, l], or packed [T, d] when offsets are given; float32, float64, bfloat16 or float16. Any strides.
        weight: [d, width], any width of at least 1.
        bias: [d].
        seq_idx: int32 or int64 [b, l] or [T]; taps do not reach across a change of it, nor, where it is given, into
            initial_states; rows where it is negative are zero.
        initial_states: the width - 1 rows before each sequence, [b or S, d, width - 1]; zero by default.
        return_final_states: whether to return the last width - 1 rows of each sequence as well.
        final_states_out: tensor [b or S, d, width - 1] the final states are written to.
        activation: None, "silu" or "swish" (the same).
        offsets: int32 or int64 [S + 1]; segment s is the rows offsets[s]..offsets[s + 1]. Empty segments are allowed.
        backend: as for ``selective_scan``.

    Returns:
        out, shaped as x and in its dtype; with return_final_states also the final states [b or S, d, width - 1].

    Raises:
        ValueError: an argument breaks its contract.
        RuntimeError: the backend asked for cannot run on this machine.
    """
    check_backend(backend)
    check_flags(return_final_states=return_final_states)
    check_optional_tensors(final_states_out=final_states_out)
    require(activation in (None, "silu", "swish"), "activation", repr(activation), 'None, "silu" or "swish"')
    p = ConvProblem(x, weight, bias, seq_idx, initial_states, offsets, silu=activation is not None)
    p.check()
    out, final = ops.conv(p, backend, return_final_states or final_states_out is not None)
    final = final.to(x.dtype)
    if final_states_out is not None:
        shape = list(final.shape)
        require(
            list(final_states_out.shape) == shape, "final_states_out", f"{list(final_states_out.shape)}", f"{shape}"
        )
        final_states_out.detach().copy_(final.detach())
    return (out, final) if return_final_states else out


causal_conv1d_fn = causal_conv1d


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """Return the last rows of packed segments, the state from which ``causal_conv1d_update`` goes on.

    Args:
        x: packed rows [T, d].
        cu_seqlens: int32 or int64 [S + 1], the offsets of the segments.
        state_len: how many rows of each segment, at least 1.

    Returns:
        [S, d, state_len] in the dtype of x, oldest first, zeros before the start of a segment. x has a gradient.

    Raises:
        ValueError: an argument breaks its contract.
    """
    check_tensors(x=x, cu_seqlens=cu_seqlens)
    require(x.dim() == 2, "x", x, "[T, d]")
    check_counts(state_len=state_len)
    check_offsets(cu_seqlens, "cu_seqlens")
    if not torch.compiler.is_compiling():
        check_offset_values(cu_seqlens, x.shape[0], "cu_seqlens")
    ends = cu_seqlens[1:, None]
    rows = ends - state_len + torch.arange(state_len, device=x.device)
    # One row of zeros stands for whatever came before a segment.
    padded = torch.cat([x.new_zeros(1, x.shape[1]), x])
    return padded[torch.where(rows >= cu_seqlens[:-1, None], rows + 1, 0)].mT


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int = 64,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    seq_idx: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the scan of Mamba-2 (SSD), whose decay is one scalar a head, over a batch or packed segments.

    With dt = clamp(softplus(dt + dt_bias), *dt_limit): H_t = exp(dt_t A) H_{t-1} + dt_t x_t B_t^T;
    y_t = H_t C_t + D x_t; out_t = y_t * silu(z_t). Every tensor argument has a gradient, and so have the final states.

    Args:
        x: input [b, l, h, p], or packed [T, h, p] when offsets are given; float32, float64, bfloat16 or float16.
        dt: step sizes [b, l, h], or [T, h].
        A: [h], real.
        B: [b, l, g, n] or [T, g, n], g a divisor of h.
        C: like B.
        chunk_size: steps of a chunk within which the Triton backend works with matrix products, at most 64; changes no
            result.
        D: skip connection [h] or [h, p].
        z: gate, shaped as x.
        dt_bias: [h], added to dt.
        initial_states: [b or S, h, p, n]; zero by default.
        dt_softplus: whether the steps go through softplus.
        dt_limit: smallest and largest step.
        return_final_states: whether to return the state after each sequence as well.
        seq_idx: int32 or int64 [b, l], or [T]: documents within a sequence. The state starts anew, from zero, wherever
            it changes; the initial state is that of a sequence's first document, the final state that of its last. On
            a card this waits to be told how many there are; packed rows with offsets do not.
        offsets: int32 or int64 [S + 1]; segment s is the rows offsets[s]..offsets[s + 1]. Empty segments are allowed.
        backend: as for ``selective_scan``.

    Returns:
        out, shaped as x and in its dtype; with return_final_states also the final states [b or S, h, p, n], float32
        (float64 for float64 inputs).

    Raises:
        ValueError: an argument breaks its contract.
        RuntimeError: the backend asked for cannot run on this machine.

    Source: Dao and Gu, "Transformers are SSMs" (2024), section 6.
    """
    check_backend(backend)
    check_flags(dt_softplus=dt_softplus, return_final_states=return_final_states)
    low, high = check_range("dt_limit", dt_limit)
    p = SSDProblem(x, dt, A, B, C, D, z, dt_bias, initial_states, offsets, seq_idx, dt_softplus, low, high, chunk_size)
    p.check()
    out, final = ops.ssd(p, backend, return_final_states)
    return (out, final) if return_final_states else out
